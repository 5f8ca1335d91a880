"""The reference pages of the documentation, made from the app and from the typed options.

    python tests/measure/reference_pages.py    # writes docs/reference/commands.md and recipes.md

A test compares the pages with what this makes: a new option without a new page is an error.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from brixel_cli.app import app
from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import recipe_summaries
from brixel_cli.config.labelled import ProbeRecipe
from brixel_cli.config.probe import PredictionsConfig
from brixel_cli.config.protocols import MatchingProtocol, PropagationProtocol, Protocol
from brixel_cli.config.section import Section
from brixel_cli.config.supervised import SupervisedConfig

FOLDER = Path(__file__).resolve().parent.parent.parent / "docs" / "reference"
AGAIN = "<!-- Made by tests/measure/reference_pages.py; do not edit. -->\n"
NEEDS = "needs: images, runs and labelled sets of those names"
Schema = Mapping[str, Any]


def pages() -> dict[str, str]:
    """Each page by its file name."""
    return {"commands.md": commands_page(), "recipes.md": recipes_page()}


def commands_page() -> str:
    group = typer.main.get_command(app)
    parts = [AGAIN, "# Commands\n", "`brixel COMMAND --help` shows the same in the terminal.\n"]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        examples = [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("  ")]
        parts += [
            f"## brixel {name}\n",
            paragraphs(command.help),
            f"<!-- {NEEDS} -->\n```\n" + "\n".join(examples) + "\n```\n",
        ]
        hints = typing.get_type_hints(command.callback)
        shown = [item for item in command.params if not getattr(item, "hidden", False)]
        for panel in dict.fromkeys(getattr(item, "rich_help_panel", None) for item in shown):
            rows = [
                option_row(item, hints[item.name]) for item in shown if getattr(item, "rich_help_panel", None) == panel
            ]
            parts += [f"**{panel or 'Arguments'}**\n", table(["option", "what it does", "default"], rows)]
    return "\n".join(parts)


def paragraphs(text: str | None) -> str:
    return re.sub(r"(?<!\n)\n(?!\n)", " ", (text or "").strip()) + "\n"


def option_row(item: Any, hint: Any) -> list[str]:
    """An option or argument of the command line; its type is that of the command's Python function."""
    named = " ".join([", ".join(f"`{name}`" for name in item.opts), value_of(item, hint)]).strip()
    if item.param_type_name == "argument":
        named = f"`{item.name.upper()}`"
    default = "" if item.default in (None, False) else f"`{item.default}`"
    return [named, item.help or "", default]


def value_of(item: Any, hint: Any) -> str:
    """What stands behind an option: nothing, its metavar, the names that are allowed, or the kind of value."""
    if hint is bool:
        return ""
    if item.metavar:
        return str(item.metavar)
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{name}`" for name in kinds)
    if typing.get_origin(hint) is not list and len(kinds) == 1:
        return value_of(item, kinds[0])
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(hint, "TEXT")


def recipes_page() -> str:
    parts = [
        AGAIN,
        "# Recipes\n",
        "A recipe is a YAML file with the sections below. `--set key.path=value` changes one value. "
        "`brixel distill --copy-recipe vitl my.yaml` copies a shipped one.\n",
    ]
    for title, schema in (("brixel distill", Recipe), ("brixel probe", ProbeRecipe)):
        parts += [f"## Shipped recipes of {title}\n"]
        parts += [
            table(["recipe", "what it is"], [[f"`{name}`", text] for name, text in recipe_summaries(schema).items()])
        ]
    for title, section in (
        ("Options of a distillation", Recipe),
        ("Options of a labelled set", ProbeRecipe),
        ("Options of a protocol", Protocol),
        ("Options of predictions (--set predictions.KEY)", PredictionsConfig),
        ("Options of a network that is trained end to end (--set supervised.KEY)", SupervisedConfig),
        ("Options of the protocol matching", MatchingProtocol),
        ("Options of the protocol propagation", PropagationProtocol),
    ):
        parts += [f"## {title}\n", table(["key", "type", "default", "what it is"], list(option_rows(section)))]
    return "\n".join(parts)


def option_rows(section: type[Section]) -> Iterator[list[str]]:
    schema = section.model_json_schema()
    yield from walk(schema, schema.get("$defs", {}), "")


def walk(schema: Schema, definitions: Mapping[str, Schema], prefix: str) -> Iterator[list[str]]:
    """A row for each value below a section, the sections themselves left out."""
    for name, field in schema["properties"].items():
        within = section_of(field, definitions)
        if within is not None:
            yield from walk(within, definitions, f"{prefix}{name}.")
            continue
        default = "required" if name in schema.get("required", ()) else f"`{written(field.get('default'))}`"
        described = " ".join(str(field.get("description", "")).split())
        yield [f"`{prefix}{name}`", type_of(field, definitions), default, described]


def section_of(field: Schema, definitions: Mapping[str, Schema]) -> Schema | None:
    for item in (field, *field.get("anyOf", ()), *field.get("allOf", ())):
        if "$ref" in item:
            found = definitions[item["$ref"].rpartition("/")[2]]
            if "properties" in found:
                return found
    return None


def type_of(field: Schema, definitions: Mapping[str, Schema]) -> str:
    """The type of a value and its bounds, in words."""
    if "$ref" in field:
        return type_of(definitions[field["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(type_of(item, definitions) for item in field["anyOf"]))
    if "enum" in field:
        return ", ".join(f"`{written(value)}`" for value in field["enum"])
    if "const" in field:
        return f"`{written(field['const'])}`"
    if field.get("type") == "array":
        inner = field.get("items", {})
        least, most = field.get("minItems"), field.get("maxItems")
        number = f" of {least}" if least is not None and least == most else ""
        return f"list{number}: {type_of(inner, definitions)}" if inner else f"list{number}"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false",
             "null": "null", "object": "mapping"}  # fmt: skip
    bounds = [
        f"{sign} {field[key]:g}"
        for key, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
        if key in field
    ]
    return " ".join([words.get(str(field.get("type")), "any value"), ", ".join(bounds)]).strip()


def written(value: object) -> str:
    """A value as YAML has it."""
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
