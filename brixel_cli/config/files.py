"""Recipes as YAML files: finding them, reading them without YAML's traps, reporting all faults at once."""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from brixel_cli.config.base import Section
from brixel_cli.config.distill import Recipe
from brixel_cli.config.labelled import ProbeRecipe
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
    close = difflib.get_close_matches(stem, shipped, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"No recipe at {reference}, and brixel ships none of that name.{hint} Shipped: {', '.join(shipped)}."
    )


@typing.overload
def load_recipe(reference: str, overrides: Sequence[str] = ()) -> Recipe: ...


@typing.overload
def load_recipe(reference: str, overrides: Sequence[str], schema: type[Schema]) -> Schema: ...


def load_recipe(reference: str, overrides: Sequence[str] = (), schema: type[Section] = Recipe) -> Section:
    """Read a recipe of a schema, and apply `key.path=value` overrides, in order.

    Raises:
        UsageError: with every fault of the recipe in one message: key path, expected, found, nearest spelling.
    """
    path = find_recipe(reference, schema)
    tree = _read(path)
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must hold keys and values, such as 'name: mine'; it holds {_shown(tree)}.")
    for override in overrides:
        _apply(tree, override, _KINDS[schema].example)
    return _validated(tree, schema, str(path))


def with_overrides(section: Schema, overrides: Sequence[str], what: str) -> Schema:
    """A section with `key.path=value` overrides, in order.

    Args:
        section: of any schema.
        overrides: keys without the name of the section itself.
        what: names the section in errors.

    Raises:
        UsageError: with every fault in one message, as `load_recipe`.
    """
    tree = section.model_dump()
    for override in overrides:
        _apply(tree, override, "lr=3e-4")
    return _validated(tree, type(section), what)


def _validated(tree: dict[str, Any], schema: type[Schema], what: str) -> Schema:
    sections = {key for key, field in schema.model_fields.items() if isinstance(field.annotation, type(BaseModel))}
    tree = {key: {} if value is None and key in sections else value for key, value in tree.items()}
    try:
        return schema.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        faults = _describe_all(error.errors(), schema)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UsageError(f"{what} has {count}:\n" + "\n".join(f"  {fault}" for fault in faults)) from error


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
    whole, given = load_recipe(reference, [], schema), _flatten(_read(find_recipe(reference, schema)))
    return [key for key in _flatten(whole.model_dump()) if key not in given]


def differences(
    old: Section | Mapping[str, Any], new: Section | Mapping[str, Any], ignored: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """What differs between two configurations: by key path the old value and the new one, None where there is none.

    Args:
        old: a section, or a mapping of JSON values, whose mappings may be nested.
        new: as `old`.
        ignored: key paths whose values may differ; a section's name ignores the whole section.
    """
    before, after = (_flatten(tree.model_dump() if isinstance(tree, Section) else tree) for tree in (old, new))
    sections = tuple(f"{key}." for key in ignored)
    return {
        key: (before.get(key), after.get(key))
        for key in before | after
        if before.get(key) != after.get(key) and key not in ignored and not key.startswith(sections)
    }


def difference_lines(found: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Differences for people: `key.path: old -> new`, long values cut."""
    return [f"{key}: {_shortened(before)} -> {_shortened(after)}" for key, (before, after) in found.items()]


def _shortened(value: Any) -> str:
    text = _shown(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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


def _describe_all(faults: Sequence[Any], schema: type[Section]) -> list[str]:
    """One line for each faulty key, whatever the number of things that are wrong with its value."""
    lines: dict[str, list[Any]] = {}
    for fault in faults:
        section, depth = _section_of(fault["loc"][:-1], schema)
        # Below a section's key, pydantic adds positions in lists, and the branches of unions, which no user knows.
        below = fault["loc"][depth + 1 :]
        known = fault["loc"] if all(isinstance(part, int) for part in below) else fault["loc"][: depth + 1]
        path = ".".join(str(part) for part in known) or "the recipe"
        lines.setdefault(path, []).append((section, fault))
    return [f"{path}: {_describe(path, found[0][0], [fault for _, fault in found])}" for path, found in lines.items()]


def _describe(path: str, section: type[BaseModel], faults: Sequence[Any]) -> str:
    fault = faults[0]
    key = path.rpartition(".")[2]
    if fault["type"] == "extra_forbidden":
        known = list(section.model_fields)
        close = difflib.get_close_matches(key.lower(), known, n=1)
        return "unknown key; " + (f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}")
    if fault["type"] == "missing":
        return f"missing; {section.model_fields[key].description or 'required'}"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    expected = " or ".join(dict.fromkeys(_expectation(fault) for fault in faults))
    found = fault["input"]
    hint = ""
    if isinstance(found, str) and fault["type"] == "literal_error":
        close = difflib.get_close_matches(found, re.findall(r"'([^']*)'", fault["msg"]), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
    return f"expected {expected}; found {_shown(found)}{hint}"


def _expectation(fault: Any) -> str:
    if fault["type"] in ("too_short", "too_long"):
        limit = fault["ctx"].get("min_length", fault["ctx"].get("max_length"))
        return f"a list of {limit}"
    message: str = fault["msg"]
    return message.removeprefix("Input should be ").removeprefix("a valid ").replace("array", "a list")


def _section_of(location: Sequence[Any], schema: type[Section]) -> tuple[type[BaseModel], int]:
    """The innermost section that a fault's location lies in, and how many keys lead to it."""
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


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
