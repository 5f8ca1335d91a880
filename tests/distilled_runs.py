"""Helpers of the tests that compare the runs of `brixel distill`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import load_recipe
from brixel_cli.core.weights import load_tensors


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


def recipe_of(folder: Path) -> Recipe:
    return load_recipe(str(folder / "recipe.yaml"))
