"""Training of a probe's head: its batches, labels of several sizes, and what ends it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import probe_speed
import pytest
import torch
from conftest import Listener
from probe_sets import (
    FAST,
    figures,
    make_options,
    make_set,
    one_hot,
    recipe_file,
    write_features,
)

from brixel_cli.engines.probing import runs
from brixel_cli.engines.probing.probing import probe
from brixel_cli.engines.probing.training import batches
from brixel_cli.errors import BrixelError


def test_an_epoch_takes_every_image_once_in_one_of_its_fields() -> None:
    positions = [[0, 1], [2, 3], [4, 5], [6, 7]]
    taken = list(batches(positions, [(2, 2)] * 8, 2, 20, seed=0))
    for epoch in range(10):
        pair = taken[2 * epoch] + taken[2 * epoch + 1]
        assert sorted(crop // 2 for crop in pair) == [0, 1, 2, 3]
    assert {crop for batch in taken for crop in batch} == set(range(8))
    assert taken == list(batches(positions, [(2, 2)] * 8, 2, 20, seed=0))
    assert taken != list(batches(positions, [(2, 2)] * 8, 2, 20, seed=1))


def test_batches_do_not_mix_grids() -> None:
    grids = [(2, 2), (2, 3), (2, 2), (2, 3), (2, 2)]
    taken = list(batches([[n] for n in range(5)], grids, 4, 50, seed=0))
    assert len(taken) == 50
    assert all(len({grids[crop] for crop in batch}) == 1 for batch in taken)
    counts = np.bincount(np.concatenate(taken), minlength=5)
    assert counts.min() > 30  # 200 draws of 5 images


def test_labels_of_several_sizes_train_together(root: Path, tmp_path: Path, listener: Listener) -> None:
    from PIL import Image

    mixed = make_set(tmp_path / "mixed")
    for split, name in (("train", "0"), ("val", "1")):
        for folder in ("images", "labels"):
            path = mixed / folder / split / f"{name}.png"
            Image.open(path).resize((80, 60), Image.Resampling.NEAREST).save(path)
    whole = one_hot(mixed, "labels", 3)

    def blocks(name: str) -> np.ndarray:
        """The label of each block's middle: the same grid whatever the size."""
        labels = whole(name)
        step = labels.shape[1] // 6
        return labels[:, step // 2 :: step, step // 2 :: step]

    source = str(write_features(tmp_path / "mixed.h5", mixed, blocks))
    for points in (0, 64):
        changes = [f"protocol.points={points}", "protocol.steps=60", "protocol.lr=0.1", "protocol.batch_size=3"]
        found = figures(make_options(mixed, tmp_path / f"{points}", sources=[source], overrides=changes), listener)
        assert found["pixel_accuracy"] > 0.75


def test_a_loss_that_is_not_finite_ends_the_training(root: Path, tmp_path: Path, listener: Listener) -> None:
    source = str(write_features(tmp_path / "nan.h5", root, lambda name: np.full((2, 4, 4), np.nan)))
    with pytest.raises(
        BrixelError, match=r"The loss is nan at step 1, seed 0\. Lower the rate: --set protocol.lr=0.0002"
    ):
        probe(make_options(root, tmp_path / "out", sources=[source], overrides=FAST), listener)


@pytest.mark.parametrize(("name", "message"), [
    ("train_head", r"Out of memory training on backbone with 8 images a step\. Take --set protocol.batch_size=4, a smal"),
    ("evaluate_head", r"Out of memory evaluating backbone, image by image\. Take a smaller --res, or another --device"),
])  # fmt: skip
def test_memory_that_runs_out_names_the_options_to_change(
    root: Path, tmp_path: Path, model, listener: Listener, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(runs, name, full)
    with pytest.raises(BrixelError, match=message):
        probe(make_options(root, tmp_path / "out", checkpoints=[model[0]], overrides=FAST), listener)


def test_the_script_that_measures_the_speed(
    root: Path,
    tmp_path: Path,
    model: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--recipe", str(recipe_file(root)), "--output", str(tmp_path), "--steps", "2", "--source", "student"]
    arguments += ["--checkpoint", model[0], "--backbone-weights", model[1], "--set", FAST[0], "--set", FAST[1]]
    monkeypatch.setattr(sys, "argv", ["probe_speed.py", *arguments])
    probe_speed.main()
    speed = json.loads(capsys.readouterr().out)["sources"]["student"]
    assert speed["stored_steps_per_second"] > 0
    assert speed["in_loop_steps_per_second"] > 0
