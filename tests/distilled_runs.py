"""Helpers of the tests that compare the runs of `brixel distill`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Listener

from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import load_recipe
from brixel_cli.core.weights import load_tensors
from brixel_cli.engines.distilling.distillation import distill
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.engines.distilling.trainer import Trainer


def tensors_of(folder: Path, name: str = "state.safetensors") -> dict[str, torch.Tensor]:
    return load_tensors(folder / name)[0]


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("state.safetensors", "student.safetensors", "last.safetensors"):
        left, right = tensors_of(one, name), tensors_of(other, name)
        assert left.keys() == right.keys()
        assert [key for key in left if not torch.equal(left[key], right[key])] == []
    assert (one / "results.json").read_text() == (other / "results.json").read_text()

    def figures(folder: Path) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]

    assert figures(one) == figures(other)


def assert_stop_changes_nothing(
    recipe: Recipe, folder: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    """A run that a fault stops before its third step, and that is resumed, equals one that was not stopped."""
    distill(recipe, RunFolder(folder / "whole"), listener)
    original = Trainer.update

    def stop_after_two(self: Trainer, *arguments: Any, **named: Any) -> Any:
        if self.step == 2:
            raise stop
        return original(self, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", stop_after_two)
        with pytest.raises(stop):
            distill(recipe, RunFolder(folder / "parts"), listener)
    distill(recipe, RunFolder(folder / "parts"), listener, resume=True)
    assert_same_run(folder / "whole", folder / "parts")


def recipe_of(folder: Path) -> Recipe:
    return load_recipe(str(folder / "recipe.yaml"))
