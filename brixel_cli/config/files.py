"""Recipes as YAML files: finding them, reading them without YAML's traps, reporting all errors at once."""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from brixel_cli.config.base import did_you_mean
from brixel_cli.config.distill import Recipe
from brixel_cli.config.labelled import ProbeRecipe
from brixel_cli.config.section import Section, flatten
from brixel_cli.errors import UsageError

PACKAGE = Path(__file__).resolve().parent.parent
SHIPPED = PACKAGE / "recipes" if (PACKAGE / "recipes").is_dir() else PACKAGE.parent / "recipes"
Schema = TypeVar("Schema", bound=Section)


class _Kind(NamedTuple):
    """Folder of the shipped recipes of a schema, below recipes/, and a change that --set could make to one."""

    folder: str
    example: str


_KINDS: dict[type[Section], _Kind] = {
    Recipe: _Kind("", "optim.lr=3e-4"),
    ProbeRecipe: _Kind("probe", "data.root=data/mine"),
}


MOST_NODES = 100_000
"""Values of a file, each repetition through an alias counted."""
MOST_DEPTH = 50
MOST_DIGITS = 18
"""Of a whole number: it fits into 64 bits."""
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, only true and false are booleans, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key_node.value}' stands twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[-1] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def _integer(_: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """YAML 1.1 would read a leading zero as octal; `010` here is ten."""
    if len(node.value) > MOST_DIGITS:
        raise yaml.constructor.ConstructorError(None, None, "a number is too large", node.start_mark)
    return int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def shipped_recipes(schema: type[Section] = Recipe) -> list[str]:
    """Names of the recipes of a schema that come with brixel."""
    return sorted(path.stem for path in (SHIPPED / _KINDS[schema].folder).glob("*.yaml"))


def find_recipe(reference: str, schema: type[Section] = Recipe) -> Path:
    """Locate a recipe: a path, or the name of a shipped one (`vitl`, `vitl.yaml` or `recipes/vitl.yaml`).

    Raises:
        UsageError: there is neither such a file nor such a shipped recipe.
    """
    path = Path(reference)
    if path.is_file():
        return path
    stem, folder = path.name.removesuffix(".yaml"), Path(_KINDS[schema].folder)
    shipped = shipped_recipes(schema)
    if path.parent in (Path("."), Path("recipes") / folder) and stem in shipped:
        return SHIPPED / folder / f"{stem}.yaml"
    raise UsageError(
        f"No recipe at {reference}, and brixel ships none of that name.{did_you_mean(stem, shipped)} "
        f"Shipped: {', '.join(shipped)}."
    )


def recipe_summaries(schema: type[Section] = Recipe) -> dict[str, str]:
    """Names of the recipes that come with brixel, and what the first line of each says."""
    folder = SHIPPED / _KINDS[schema].folder
    return {
        name: (folder / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for name in shipped_recipes(schema)
    }


def copy_recipe(name: str, destination: Path, schema: type[Section] = Recipe) -> Path:
    """Copy a recipe, to be changed; into a folder it goes under its own name.

    Raises:
        UsageError: there is no such recipe, or the destination is there already or cannot be written.
    """
    source = find_recipe(name, schema)
    target = destination / source.name if destination.is_dir() else destination
    if target.suffix not in (".yaml", ".yml"):
        raise UsageError(f"A recipe is a .yaml file: copy {name} to {target}.yaml, or into a folder that is there.")
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise UsageError(f"{target} is there already, and is not overwritten: name another file.") from error
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}.") from error
    return target


@typing.overload
def load_recipe(reference: str, overrides: Sequence[str] = ()) -> Recipe: ...


@typing.overload
def load_recipe(reference: str, overrides: Sequence[str], schema: type[Schema]) -> Schema: ...


def load_recipe(reference: str, overrides: Sequence[str] = (), schema: type[Section] = Recipe) -> Section:
    """Read a recipe of a schema, and apply `key.path=value` overrides, in order.

    Raises:
        UsageError: with every error of the recipe in one message: key path, expected, found, nearest spelling.
    """
    path = find_recipe(reference, schema)
    tree = _read(path)
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must hold keys and values, such as 'name: mine'; it holds {_shown(tree)}.")
    for override in overrides:
        _apply(tree, override, _KINDS[schema].example)
    return _validated(tree, schema, str(path), "--set", overrides)


def with_overrides(section: Schema, overrides: Sequence[str], what: str) -> Schema:
    """A section with `key.path=value` overrides, in order.

    Args:
        section: of any schema.
        overrides: keys without the name of the section itself.
        what: names the section in errors.

    Raises:
        UsageError: with every error in one message, as `load_recipe`.
    """
    tree = section.model_dump()
    for override in overrides:
        _apply(tree, override, "lr=3e-4")
    return _validated(tree, type(section), what, f"--set for {what}", overrides)


def _validated(tree: dict[str, Any], schema: type[Schema], what: str, option: str, overrides: Sequence[str]) -> Schema:
    """The tree as a section; wrong values are reported as those of the option where its overrides set them."""
    sections = {key for key, field in schema.model_fields.items() if isinstance(field.annotation, type(BaseModel))}
    tree = {key: {} if value is None and key in sections else value for key, value in tree.items()}
    try:
        return schema.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        lines = _describe_all(error.errors(), schema)
        keys = [override.partition("=")[0].strip() for override in overrides]
        own = [line for path, line in lines.items() if any(f"{path}.".startswith(f"{key}.") for key in keys)]
        others = [line for line in lines.values() if line not in own]
        where = f"{what} with --set applied" if overrides else what
        raise UsageError(
            "\n".join(
                f"{name} has {len(found)} error{'s' * (len(found) > 1)}:\n" + "\n".join(f"  {line}" for line in found)
                for name, found in ((where, others), (option, own))
                if found
            )
        ) from error


def load_variants(path: Path) -> dict[str, dict[str, Any]]:
    """Read a file of variants of a recipe: under each name the values that change, by key path.

    Raises:
        UsageError: the file is not there, or is not of that form.
    """
    if not path.is_file():
        raise UsageError(f"No file of variants at {path}.")
    tree = _read(path)
    variants = {name: changes or {} for name, changes in tree.items()} if isinstance(tree, dict) else {}
    if not variants or not all(isinstance(changes, dict) for changes in variants.values()):
        raise UsageError(
            f"{path} must hold variants by name, and under each the values that change, such as "
            "'wide: {adapter.fusion.width: 256}'."
        )
    return {str(name): changes for name, changes in variants.items()}


def dump_recipe(recipe: Section) -> str:
    """A recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False)


def missing_keys(reference: str, schema: type[Section] = Recipe) -> list[str]:
    """Key paths that a recipe file leaves to their defaults: in a run's own recipe those that its brixel did not know.

    Raises:
        UsageError: as `load_recipe`.
    """
    whole, given = load_recipe(reference, [], schema), flatten(_read(find_recipe(reference, schema)))
    return [key for key in flatten(whole.model_dump()) if key not in given]


class _Dumper(yaml.SafeDumper):
    """Writes floats so that `_Loader` and any YAML reader take them as numbers, and short lists in one line."""


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "." not in text and "e" in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)
_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _read(path: Path) -> Any:
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path} is not a valid YAML file: {error}") from error


def _parse(text: str) -> Any:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_extent(node, {}, 0)
        return loader.construct_document(node)
    except (RecursionError, ValueError) as error:  # of PyYAML itself: brackets by the thousand, numbers out of range
        raise yaml.YAMLError(f"it cannot be read: {error}") from error


def _check_extent(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Number of values of a node; raises a YAMLError where there are too many, they are too deep, or of another kind.

    Aliases repeat a node: a few lines can stand for more values than memory holds, or hold themselves.
    """
    if node.tag not in _TAGS:
        raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag} is not allowed here", node.start_mark)
    if depth > MOST_DEPTH:
        raise yaml.constructor.ConstructorError(
            None, None, f"values are nested more than {MOST_DEPTH} levels deep", node.start_mark
        )
    if id(node) in known:
        return known[id(node)]
    count = 1
    if isinstance(node, yaml.CollectionNode):
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        count += sum(_check_extent(part, known, depth + 1) for part in parts)
    if count > MOST_NODES:
        raise yaml.constructor.ConstructorError(None, None, f"it holds more than {MOST_NODES} values", node.start_mark)
    known[id(node)] = count
    return count


def _apply(tree: dict[str, Any], override: str, example: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set takes key.path=value, such as {example}; got {override!r}.")
    *parents, leaf = key.strip().split(".")
    if not all((*parents, leaf)):
        raise UsageError(f"--set {key}: a part of the key is empty. Such as {example}.")
    node = tree
    for parent in parents:
        child = node[parent] = {} if node.get(parent) is None else node[parent]
        if not isinstance(child, dict):
            raise UsageError(f"--set {key}: '{parent}' is a value, not a section.")
        node = child
    try:
        node[leaf] = _parse(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {key}: {text!r} is not a YAML value: {error}") from error


def _describe_all(errors: Sequence[Any], schema: type[Section]) -> dict[str, str]:
    """By key path one line for each wrong key, whatever the number of things that are wrong with its value."""
    lines: dict[str, list[Any]] = {}
    for error in errors:
        section, depth = _section_of(error["loc"][:-1], schema)
        # Below a section's key, pydantic adds positions in lists, and the branches of unions, which no user knows.
        below = error["loc"][depth + 1 :]
        known = error["loc"] if all(isinstance(part, int) for part in below) else error["loc"][: depth + 1]
        path = ".".join(str(part) for part in known) or "the recipe"
        lines.setdefault(path, []).append((section, error))
    return {
        path: f"{path}: {_describe(path, found[0][0], [error for _, error in found])}" for path, found in lines.items()
    }


def _describe(path: str, section: type[BaseModel], errors: Sequence[Any]) -> str:
    error = errors[0]
    key = path.rpartition(".")[2]
    if error["type"] == "extra_forbidden":
        known = list(section.model_fields)
        close = difflib.get_close_matches(key.lower(), known, n=1)
        return "unknown key; " + (f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}")
    if error["type"] == "missing":
        return f"missing; {section.model_fields[key].description or 'required'}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    expected = " or ".join(dict.fromkeys(_expectation(error) for error in errors))
    found = error["input"]
    hint = ""
    if isinstance(found, str) and error["type"] == "literal_error":
        close = difflib.get_close_matches(found, re.findall(r"'([^']*)'", error["msg"]), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
    return f"expected {expected}; found {_shown(found)}{hint}"


def _expectation(error: Any) -> str:
    if error["type"] in ("too_short", "too_long"):
        limit = error["ctx"].get("min_length", error["ctx"].get("max_length"))
        return f"a list of {limit}"
    message: str = error["msg"]
    return message.removeprefix("Input should be ").removeprefix("a valid ").replace("array", "a list")


def _section_of(location: Sequence[Any], schema: type[Section]) -> tuple[type[BaseModel], int]:
    """The innermost section that a error's location lies in, and how many keys lead to it."""
    section: type[BaseModel] = schema
    for depth, key in enumerate(location):
        annotation = typing.get_type_hints(section).get(str(key))
        options = [option for option in typing.get_args(annotation) if option is not type(None)] or [annotation]
        if len(options) > 1 or not (isinstance(options[0], type) and issubclass(options[0], BaseModel)):
            return section, depth
        section = options[0]
    return section, len(location)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)
