"""Recipes as texts, for the tests that read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import load_recipe
from brixel_cli.errors import UsageError

LEAST = "name: least\nbackbone: {name: test_vit}\noptim: {steps: 4}\n"


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(folder: Path, text: str, *overrides: str) -> str:
    """The message of the one UsageError that the recipe gives."""
    with pytest.raises(UsageError) as caught:
        load_recipe(write(folder, text), overrides)
    return str(caught.value)


def least(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(write(folder, LEAST), overrides)
