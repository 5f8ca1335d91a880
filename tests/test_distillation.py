"""The run of a distillation as a whole, and its options."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import Listener, with_changes
from distilled_runs import assert_same_run, recipe_of, tensors_of
from PIL import Image

from brixel_cli import load_student
from brixel_cli.config.distill import CacheConfig, Recipe
from brixel_cli.config.files import load_recipe
from brixel_cli.core.backbone import Backbone
from brixel_cli.core.student import read_adapter
from brixel_cli.engines.distilling.distillation import distill
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError, UsageError

# The run as a whole


def test_a_run_leaves_what_it_promises(tiny_recipe: Recipe, tmp_path: Path, listener: Listener) -> None:
    done = distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    names = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert names == [
        "last.safetensors", "metrics.jsonl", "pictures/step_000002.png", "pictures/step_000004.png",
        "recipe.yaml", "results.json", "state.safetensors", "student.safetensors",
    ]  # fmt: skip
    assert all(path.exists() for path in done.files)
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")) == tiny_recipe
    picture = Image.open(tmp_path / "run" / "pictures" / "step_000004.png")
    assert picture.width > 4 * 224
    assert picture.height > 2 * 224
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 1), ("train", 2), ("validation", 2), ("train", 3), ("train", 4), ("validation", 4),
    ]  # fmt: skip
    assert {"loss", "l1", "edge", "spectral", "cosine", "grad_norm", "lr", "images_per_second"} <= lines[0].keys()
    assert done.results.best.num_images == 2
    assert "6 training and 2 held-out images, 0 skipped" in listener.said[0]


def test_only_the_adapter_is_stored_and_it_loads_in_one_line(
    tiny_recipe: Recipe, tmp_path: Path, listener: Listener
) -> None:
    distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    assert not [key for key in tensors_of(tmp_path / "run", "student.safetensors") if "vit" in key or "backbone" in key]
    torch.manual_seed(tiny_recipe.seed)  # random weights are the run's own only under its seed
    student = load_student(tmp_path / "run")
    assert not student.training
    assert student(torch.randn(1, 3, 32, 48)).shape == (1, 64, 8, 12)
    card = read_adapter(str(tmp_path / "run")).card
    assert card.trained_sides == [32, 32]
    assert card.recovered_gap.keys() == {"32"}


def test_training_improves_on_the_bilinear_backbone(tiny_recipe_file: Path, tmp_path: Path, listener: Listener) -> None:
    recipe = with_changes(tiny_recipe_file, "optim.steps=60", "optim.lr=5e-3", "run.validate_every=60",
                          "run.checkpoint_every=60", "loss.spectral.weight=0.0")  # fmt: skip
    best = distill(recipe, RunFolder(tmp_path / "run"), listener).results.best
    assert best.student["l1"] < best.backbone["l1"]
    assert best.student["cosine"] > best.backbone["cosine"]
    assert best.recovered_gap["cosine"] > 0.05


def test_the_same_recipe_gives_the_same_bits(tiny_recipe: Recipe, tmp_path: Path, listener: Listener) -> None:
    for name in ("one", "two"):
        distill(tiny_recipe, RunFolder(tmp_path / name), listener)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_run_over_several_sizes(tiny_recipe_file: Path, tmp_path: Path, listener: Listener) -> None:
    recipe = with_changes(
        tiny_recipe_file, "views.kind=fixed", "views.per_image=2", "views.other_sizes=[[64, 128]]", "cache.enabled=true"
    )
    whole = distill(recipe, RunFolder(tmp_path / "whole"), listener)
    assert whole.results.steps == 4
    online = recipe.model_copy(update={"cache": CacheConfig()})
    computed = distill(online, RunFolder(tmp_path / "online"), listener)
    assert computed.results.best.student["l1"] == pytest.approx(whole.results.best.student["l1"], rel=1e-2)


def test_more_sizes_than_views(tiny_recipe_file: Path, tmp_path: Path, listener: Listener) -> None:
    recipe = with_changes(tiny_recipe_file, "views.other_sizes=[64, 64, 64, 64, 64, 64, 64, 64]")
    with pytest.raises(UsageError, match=r"6 training views cannot be shared out over the 9 sizes of .*name fewer"):
        distill(recipe, RunFolder(tmp_path / "run"), listener)


# Options


def test_views_that_do_not_fit_the_patch_are_refused_with_the_nearest(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    recipe = with_changes(tiny_recipe_file, "views.teacher_size=[120, 200]")
    with pytest.raises(UsageError, match=r"each side must be a multiple of 64. Nearest: 128x192 \(height x width\)"):
        distill(recipe, RunFolder(tmp_path / "run"), listener)


def test_a_batch_that_cannot_be_shared_out_is_refused(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "__init__", _three_processes)
    with pytest.raises(UsageError, match=r"optim.batch_size 4 cannot be shared out over 3 processes with 1 passes each: "
                                         "give a multiple of 3"):  # fmt: skip
        distill(load_recipe(str(tiny_recipe_file)), RunFolder(tmp_path / "run"), listener)


def _three_processes(self: Runtime, *_: object, **__: object) -> None:
    self.world_size = 3


def test_a_device_that_is_not_there_is_named(tiny_recipe_file: Path, tmp_path: Path, listener: Listener) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    recipe = with_changes(tiny_recipe_file, "run.device=cuda")
    with pytest.raises(UsageError, match=r"run.device is cuda, which this machine does not have; present: cpu"):
        distill(recipe, RunFolder(tmp_path / "run"), listener)


@pytest.mark.parametrize("changes", [
    ("views.factor=2", "views.teacher_size=64"), ("views.factor=8", "views.teacher_size=256", "data.min_side=100"),
    ("views.teacher_size=[128, 192]", "data.min_side=100"), ("loss.edge.basis=batch", "loss.edge.form=raw"),
    ("loss.l1.form=raw", "loss.spectral.form=released"), ("optim.schedule=two_step", "optim.average=0.0"),
    ("adapter.residual=half_grid", "adapter.checkpointing=true"), ("run.precision=bfloat16",), ("run.tensorboard=true",),
    ("run.workers=2",), ("optim.steps=null", "optim.epochs=2"), ("backbone.dtype=bfloat16",),
])  # fmt: skip
def test_every_option_trains(
    tiny_recipe_file: Path, tmp_path: Path, changes: tuple[str, ...], listener: Listener
) -> None:
    results = distill(with_changes(tiny_recipe_file, *changes), RunFolder(tmp_path / "run"), listener).results
    assert all(math.isfinite(value) for value in results.best.student.values())
    if "run.tensorboard=true" in changes:
        assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_training_can_start_from_a_student(
    tiny_recipe: Recipe, tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    distill(tiny_recipe, RunFolder(tmp_path / "first"), listener)
    recipe = with_changes(
        tiny_recipe_file, f"init={tmp_path / 'first'}", "optim.lr=1e-12", "optim.average=0.0", "optim.weight_decay=0.0"
    )
    distill(recipe, RunFolder(tmp_path / "second"), listener)
    first, second = (tensors_of(tmp_path / name, "student.safetensors") for name in ("first", "second"))
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)
    other = with_changes(tiny_recipe_file, f"init={tmp_path / 'first'}", "adapter.kind=deformable")
    with pytest.raises(
        UsageError,
        match=r"does not fit the recipe \(in the file -> in the recipe\):\n  adapter.kind: \"fusion\" -> \"deformable\"",
    ):
        distill(other, RunFolder(tmp_path / "third"), listener)


def test_the_environment_stays_as_it_was(tiny_recipe: Recipe, tmp_path: Path, listener: Listener) -> None:
    before = dict(os.environ)
    distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    assert {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "PYTEST"))} == {
        key: value for key, value in before.items() if not key.startswith(("ACCELERATE", "PYTEST"))
    }


# Surroundings


def test_an_output_that_cannot_be_a_folder_is_named(tiny_recipe: Recipe, tmp_path: Path, listener: Listener) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(BrixelError, match=r"The folder .*/taken cannot be made: File exists. Choose another one"):
        distill(tiny_recipe, RunFolder(tmp_path / "taken" / "run"), listener)


def test_a_run_works_from_any_folder(tiny_recipe_file: Path, tmp_path: Path, listener: Listener, monkeypatch) -> None:
    from safetensors.torch import save_file

    from brixel_cli.core.backbone import load_backbone

    monkeypatch.chdir(tmp_path)
    save_file(load_backbone("test_vit", "random").vit.state_dict(), "backbone.safetensors")
    recipe = with_changes(tiny_recipe_file, "backbone.weights=backbone.safetensors")
    distill(recipe, RunFolder(tmp_path / "run"), listener)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_student(tmp_path / "run")(torch.randn(1, 3, 32, 32)).shape == (1, 64, 8, 8)
    assert distill(recipe_of(tmp_path / "run"), RunFolder(tmp_path / "run"), listener, resume=True).results.steps == 4


@pytest.mark.parametrize("edge", ["0.5", "0.0"])
def test_feature_maps_that_are_not_finite_are_named(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch, edge: str
) -> None:
    original = Backbone.last_map
    monkeypatch.setattr(Backbone, "last_map", lambda self, images: original(self, images) * math.nan)
    recipe = with_changes(tiny_recipe_file, f"loss.edge.weight={edge}", "optim.steps=2")
    with pytest.raises(BrixelError, match=r"\d.png: the teacher's feature map is not finite. Compute in float32"):
        distill(recipe, RunFolder(tmp_path / "run"), listener)
