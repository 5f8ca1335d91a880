"""`--list-recipes` and `--copy-recipe` of `brixel distill` and `brixel probe`."""

from __future__ import annotations

from pathlib import Path

from brixel_cli.cli.console import print_json, print_results, print_table
from brixel_cli.config.files import copy_recipe, recipe_summaries
from brixel_cli.config.section import Section


def recipes_only(schema: type[Section], listed: bool, copied: tuple[str, str] | None, as_json: bool) -> bool:
    """List or copy shipped recipes, where a command was asked for just that; whether it was."""
    if listed:
        summaries = recipe_summaries(schema)
        if as_json:
            print_json({"recipes": summaries})
        else:
            print_table("", ["recipe", "what it is"], list(summaries.items()), figures=False)
    if copied:
        name, destination = copied
        print_results({}, [copy_recipe(name, Path(destination), schema)], as_json, lambda: None)
    return listed or bool(copied)
