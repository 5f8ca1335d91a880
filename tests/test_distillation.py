from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Listener, with_changes
from PIL import Image

from brixel_cli import load_student
from brixel_cli.config.distill import CacheConfig, OptimConfig, Recipe
from brixel_cli.config.files import load_recipe
from brixel_cli.core.weights import load_tensors
from brixel_cli.data.row_store import Store
from brixel_cli.engines.distilling.batches import batch_keys
from brixel_cli.engines.distilling.distillation import distill
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.engines.distilling.trainer import (
    Trainer,
    decay_groups,
    learning_rate,
    make_adapter,
    num_steps,
    with_noise,
)
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError, UsageError


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


def test_training_improves_on_the_bilinear_backbone(tiny_recipe_file: Path, tmp_path: Path, listener: Listener) -> None:
    recipe = with_changes(tiny_recipe_file, "optim.steps=60", "optim.lr=5e-3", "run.validate_every=60",
                          "run.checkpoint_every=60", "loss.spectral.weight=0.0")  # fmt: skip
    best = distill(recipe, RunFolder(tmp_path / "run"), listener).results.best
    assert best.student["l1"] < best.backbone["l1"]
    assert best.student["cosine"] > best.backbone["cosine"]
    assert best.gap_closed["cosine"] > 0.05


def test_the_same_recipe_gives_the_same_bits(tiny_recipe: Recipe, tmp_path: Path, listener: Listener) -> None:
    for name in ("one", "two"):
        distill(tiny_recipe, RunFolder(tmp_path / name), listener)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_noise_on_the_maps_is_a_share_of_their_deviation() -> None:
    torch.manual_seed(0)
    maps = [7 + scale * torch.randn(4, 64, 16, 16) for scale in (2.0, 0.1)]
    before = [map_.clone() for map_ in maps]
    noisy = with_noise(maps, 0.5, range(4))
    # 65,536 values: the deviation is known to 0.3 %, the mean to 0.4 % of it.
    for map_, changed, deviation in zip(maps, noisy, (1.0, 0.05), strict=True):
        assert float((changed - map_).std()) == pytest.approx(deviation, rel=0.02)
        assert abs(float((changed - map_).mean())) < 0.02 * deviation
    assert all(torch.equal(left, right) for left, right in zip(maps, before, strict=True))
    assert all(same is map_ for same, map_ in zip(with_noise(maps, 0.0, range(4)), maps, strict=True))
    # An image has its noise from its own seed, whatever else is in the batch.
    assert torch.equal(with_noise([maps[0][2:]], 0.5, [2, 3])[0], noisy[0][2:])
    assert not torch.equal(with_noise([maps[0][2:]], 0.5, [3, 3])[0], noisy[0][2:])


def test_training_with_noise_repeats_and_is_another_training(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    for name, share in (("without", 0.0), ("one", 0.5), ("two", 0.5)):
        distill(with_changes(tiny_recipe_file, f"optim.map_noise={share}"), RunFolder(tmp_path / name), listener)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    key = "out.1.weight"
    assert not torch.equal(*(tensors_of(tmp_path / name, "student.safetensors")[key] for name in ("without", "one")))


@pytest.mark.parametrize("kind", ["fusion", "deformable"])
def test_gradients_reach_only_the_adapter(tiny_recipe_file: Path, kind: str, listener: Listener) -> None:
    from brixel_cli.core.backbone import load_backbone
    from brixel_cli.engines.distilling.batches import OnlineBatches
    from brixel_cli.engines.distilling.training_images import find_images, make_views

    recipe = with_changes(tiny_recipe_file, f"adapter.kind={kind}", "adapter.deformable.drop_path=0.0")
    backbone = load_backbone("test_vit", "random")
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    trainer = Trainer(
        recipe, make_adapter(recipe, backbone, listener), Runtime(recipe.run.device, recipe.run.precision)
    )
    views, _ = make_views(recipe, find_images(recipe))
    batches = OnlineBatches(views, backbone, trainer.runtime, workers=0)
    for _ in range(4):  # the first updates wake layers that start at zero, from the last one backwards
        trainer.update(batches.iterate(batch_keys(views, range(1), 4)), lr=1e-3)
    assert [name for name, p in trainer.adapter.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone.parameters())
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in trainer.adapter.parameters()}
    assert not backbone.training
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("kind", ["fusion", "deformable"])
def test_only_the_weights_of_layers_decay(tiny_recipe_file: Path, kind: str) -> None:
    from brixel_cli.core.student import build_adapter

    adapter = build_adapter(64, 4, with_changes(tiny_recipe_file, f"adapter.kind={kind}").adapter)
    decayed, others = decay_groups(adapter, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(tensor): name for name, tensor in adapter.named_parameters()}
    first, second = ({names[id(tensor)] for tensor in group["params"]} for group in (decayed, others))
    assert first | second == set(names.values())
    assert not first & second
    wanted = {"fusion": ({"fuse.weight", "coarse.0.expand.weight"},
                         {"linear.weight", "coarse.0.scale", "coarse.0.norm.weight", "fuse.bias"}),
              "deformable": ({"fc1.weight", "extractors.0.0.attn.value_proj.weight"},
                             {"level_embed", "norm.weight", "stem.1.weight", "fc1.bias"})}[kind]  # fmt: skip
    assert wanted[0] <= first
    assert wanted[1] <= second


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


# Stopping and resuming


@pytest.mark.parametrize("changes", [(), ("adapter.kind=deformable",), ("views.kind=fixed", "views.per_image=2", "cache.enabled=true"),
                                     ("views.kind=random", "optim.accumulate=2")])  # fmt: skip
def test_two_steps_a_stop_and_two_more_equal_four(
    tiny_recipe_file: Path,
    tmp_path: Path,
    changes: tuple[str, ...],
    listener: Listener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = with_changes(tiny_recipe_file, *changes)
    distill(recipe, RunFolder(tmp_path / "whole"), listener)

    class Stop(Exception):
        pass

    def stop_after_two(self: Trainer, *arguments: object, **named: object) -> object:
        if self.step == 2:
            raise Stop
        return original(self, *arguments, **named)

    original = Trainer.update
    monkeypatch.setattr(Trainer, "update", stop_after_two)
    with pytest.raises(Stop):
        distill(recipe, RunFolder(tmp_path / "parts"), listener)
    monkeypatch.setattr(Trainer, "update", original)
    distill(recipe, RunFolder(tmp_path / "parts"), listener, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(
    tiny_recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_recipe_file.write_text(tiny_recipe_file.read_text().replace("steps: 4", "steps: 12"))
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "brixel_cli", "distill", "--recipe", str(tiny_recipe_file), "--quiet", "--output"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    command.append(str(folder))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.03)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "state.safetensors").exists()
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert_same_run(tmp_path / "whole", folder)


def test_resuming_a_finished_run_changes_nothing(tiny_recipe: Recipe, tmp_path: Path, listener: Listener) -> None:
    first = distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = distill(tiny_recipe, RunFolder(tmp_path / "run"), listener, resume=True)
    assert again.results == first.results
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_is_neither_overwritten_nor_mixed_by_accident(
    tiny_recipe: Recipe, tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UsageError, match=r"holds no run to resume: recipe.yaml is missing"):
        distill(tiny_recipe, folder, listener, resume=True)
    distill(tiny_recipe, folder, listener)
    with pytest.raises(
        UsageError, match=r"holds a run already. Continue it with --resume, begin anew with --overwrite"
    ):
        distill(tiny_recipe, folder, listener)
    other = with_changes(tiny_recipe_file, "optim.lr=2e-3", "run.log_every=5")
    with pytest.raises(UsageError, match=r"was begun with another recipe:\n  optim.lr: 0.001 -> 0.002\n"):
        distill(other, folder, listener, resume=True)
    text = folder.recipe.read_text()
    folder.recipe.write_text("".join(line for line in text.splitlines(True) if "map_noise" not in line))
    with pytest.raises(
        UsageError, match=r"another version of brixel, which had no optim.map_noise: say in .*recipe.yaml"
    ):
        distill(tiny_recipe, folder, listener, resume=True)
    assert distill(other, folder, listener, overwrite=True).results.steps == 4


def test_a_run_interrupted_while_its_cache_is_filled_can_be_resumed(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("views.kind=fixed", "views.per_image=2", "cache.enabled=true")
    recipe, folder = with_changes(tiny_recipe_file, *changes), RunFolder(tmp_path / "run")
    written: list[int] = []
    original = Store.write

    def write(self: Store, row: int, values: object) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(row)
        original(self, row, values)

    monkeypatch.setattr(Store, "write", write)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, folder, listener)
    assert listener.said[-1] == f"continue this run with: brixel distill --resume --output {tmp_path / 'run'}"
    monkeypatch.setattr(Store, "write", original)
    assert distill(recipe_of(tmp_path / "run"), folder, listener, resume=True).results.steps == 4


def test_a_cache_that_does_not_fit_on_the_disk_leaves_the_run_that_was_there(
    tiny_recipe: Recipe, tiny_recipe_file: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    before = tensors_of(tmp_path / "run", "student.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 10))
    cached = with_changes(tiny_recipe_file, "cache.enabled=true", "views.kind=fixed")
    with pytest.raises(BrixelError, match="has 10 B free"):
        distill(cached, RunFolder(tmp_path / "run"), listener, overwrite=True)
    assert recipe_of(tmp_path / "run") == tiny_recipe
    assert tensors_of(tmp_path / "run", "student.safetensors").keys() == before.keys()


def test_a_run_cannot_be_made_longer_and_says_how_to_train_on(
    tiny_recipe: Recipe, tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    longer = with_changes(tiny_recipe_file, "optim.steps=8")
    with pytest.raises(
        UsageError, match=r"length of the run in .*run cannot be changed \(optim.steps: 4 -> 8\).*--init .*run "
    ):
        distill(longer, RunFolder(tmp_path / "run"), listener, resume=True)


# Updates that must not happen


def test_memory_that_runs_out_is_an_error_that_names_the_options(
    tiny_recipe: Recipe, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(self: Trainer, *_: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(
        BrixelError, match="Out of memory with 4 images in a pass and a teacher input of 128x128"
    ) as caught:
        distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    for option in ("optim.accumulate", "adapter.checkpointing", "backbone.dtype", "optim.batch_size"):
        assert option in str(caught.value)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    original = Trainer.update

    def update(self: Trainer, passes: object, lr: float) -> object:
        def poisoned():
            for batch in passes:
                if self.step in steps:
                    batch.targets.fill_(math.nan)
                yield batch

        return original(self, poisoned(), lr)

    monkeypatch.setattr(Trainer, "update", update)


def test_an_update_on_a_non_finite_loss_is_refused_and_named(
    tiny_recipe: Recipe, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {1, 2})
    distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    refusals = [message for message in listener.warned if "refused" in message]
    assert len(refusals) == 2
    assert "update 2 refused (loss nan" in refusals[0]
    assert ".png" in refusals[0]
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(tmp_path / "run").values())
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("refused") == 2


def test_three_refusals_in_a_row_end_the_run_with_the_file_names(
    tiny_recipe: Recipe, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {1, 2, 3})
    with pytest.raises(BrixelError, match=r"3 updates in a row were refused \(loss nan.*the last at step 4 on: \d.png"):
        distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    assert (tmp_path / "run" / "state.safetensors").exists()


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
def test_every_knob_trains(
    tiny_recipe_file: Path, tmp_path: Path, changes: tuple[str, ...], listener: Listener
) -> None:
    results = distill(with_changes(tiny_recipe_file, *changes), RunFolder(tmp_path / "run"), listener).results
    assert all(math.isfinite(value) for value in results.best.student.values())
    if "run.tensorboard=true" in changes:
        assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_accumulated_passes_give_the_update_of_one_pass(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    """Spectral and cosine terms and raw L1 are means over images, so that equal parts average to the whole."""
    changes = ("loss.l1.form=raw", "loss.edge.form=raw", "run.precision=float32")
    for name, passes in (("one", 1), ("two", 2)):
        recipe = with_changes(tiny_recipe_file, *changes, f"optim.accumulate={passes}")
        distill(recipe, RunFolder(tmp_path / name), listener)
    one, two = (tensors_of(tmp_path / name, "last.safetensors") for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=2e-4, rtol=1e-3)


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
    with pytest.raises(UsageError, match=r"does not fit the recipe:\n  adapter.kind: recipe deformable, file fusion"):
        distill(other, RunFolder(tmp_path / "third"), listener)


def test_schedules_by_hand() -> None:
    cosine = OptimConfig(steps=110, lr=1.0, warmup_steps=10)
    # Warm-up over 10 steps: 1/10, 2/10 ... 1; then half a cosine over 100 steps: 1 at its start, 1/2 in its middle.
    assert [learning_rate(cosine, step, 110, 50) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(cosine, 60, 110, 50) == pytest.approx(0.5)
    assert learning_rate(cosine, 109, 110, 50) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))
    two = OptimConfig(steps=110, lr=1e-3, first_epoch_lr=1e-4, schedule="two_step")
    assert [learning_rate(two, step, 110, 50) for step in (0, 49, 50, 109)] == [1e-4, 1e-4, 1e-3, 1e-3]
    flat = OptimConfig(steps=110, lr=1e-3, schedule="constant", warmup_steps=2)
    assert [learning_rate(flat, step, 110, 50) for step in (0, 1, 50)] == [5e-4, 1e-3, 1e-3]
    # A warm-up longer than a tenth of the run is cut to that tenth.
    assert learning_rate(OptimConfig(steps=20, lr=1.0), 1, 20, 5) == pytest.approx(1.0)
    # 2.5 epochs of 100 views in batches of 16: 250 / 16 = 15.6, so 16 steps.
    assert num_steps(OptimConfig(epochs=2.5, batch_size=16), 100) == 16


def test_the_environment_stays_as_it_was(tiny_recipe: Recipe, tmp_path: Path, listener: Listener) -> None:
    before = dict(os.environ)
    distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    assert {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "PYTEST"))} == {
        key: value for key, value in before.items() if not key.startswith(("ACCELERATE", "PYTEST"))
    }


# Surroundings


def test_checkpointing_does_not_change_a_run(tiny_recipe_file: Path, tmp_path: Path, listener: Listener) -> None:
    for name in ("false", "true"):
        changes = (f"adapter.checkpointing={name}", "adapter.kind=deformable", "run.precision=float32")
        distill(with_changes(tiny_recipe_file, *changes), RunFolder(tmp_path / name), listener)
    one, two = (tensors_of(tmp_path / name, "last.safetensors") for name in ("false", "true"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=1e-4)


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


def recipe_of(folder: Path) -> Recipe:
    return load_recipe(str(folder / "recipe.yaml"))
