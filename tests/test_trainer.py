"""Updates of the adapter: what they change, how they accumulate, and which of them are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import Listener, with_changes
from distilled_runs import assert_same_run, tensors_of

from brixel_cli.config.distill import OptimConfig, Recipe
from brixel_cli.engines.distilling.batches import batch_keys
from brixel_cli.engines.distilling.distillation import distill
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.engines.distilling.trainer import (
    Trainer,
    learning_rate,
    make_adapter,
    num_steps,
    parameter_groups,
    with_noise,
)
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError

# What an update changes


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
        recipe, make_adapter(recipe, backbone, listener), backbone, Runtime(recipe.run.device, recipe.run.precision)
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

    recipe = with_changes(tiny_recipe_file, f"adapter.kind={kind}", "optim.weight_decay=0.1")
    adapter = build_adapter(64, 4, recipe.adapter)
    decayed, others = parameter_groups(adapter, recipe.optim)
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


# Surroundings


def test_checkpointing_does_not_change_a_run(tiny_recipe_file: Path, tmp_path: Path, listener: Listener) -> None:
    for name in ("false", "true"):
        changes = (f"adapter.checkpointing={name}", "adapter.kind=deformable", "run.precision=float32")
        distill(with_changes(tiny_recipe_file, *changes), RunFolder(tmp_path / name), listener)
    one, two = (tensors_of(tmp_path / name, "last.safetensors") for name in ("false", "true"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=1e-4)
