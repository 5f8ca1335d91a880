"""`--list-recipes` and `--copy-recipe` of `brixel distill` and `brixel probe`."""

from __future__ import annotations

from pathlib import Path

from brixel_cli.cli.console import print_files, print_json, print_table
from brixel_cli.config.files import copy_recipe, recipe_summaries
from brixel_cli.config.section import Section


def list_recipes(schema: type[Section], as_json: bool) -> None:
    """Show the recipes of a schema that come with brixel."""
    summaries = recipe_summaries(schema)
    if as_json:
        print_json({"recipes": summaries})
    else:
        print_table("", ["recipe", "what it is"], list(summaries.items()), figures=False)


def write_copy(schema: type[Section], name: str, destination: str, as_json: bool) -> None:
    """Copy a recipe that comes with brixel to a file, to be changed; errors as `copy_recipe`."""
    path = str(copy_recipe(name, Path(destination), schema))
    if as_json:
        print_json({"files": [path]})
    else:
        print_files([path])


def recipes_only(schema: type[Section], listed: bool, copied: tuple[str, str] | None, as_json: bool) -> bool:
    """List or copy shipped recipes, where a command was asked for just that; whether it was."""
    if listed:
        list_recipes(schema, as_json)
    if copied:
        write_copy(schema, *copied, as_json)
    return listed or bool(copied)
