"""Low-rank updates of the backbone: what they compute, how they train, how a student with them is stored."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import Listener, with_changes
from distilled_runs import assert_stop_changes_nothing, tensors_of
from safetensors.torch import save_file

import brixel_cli
from brixel_cli.config.distill import Recipe
from brixel_cli.core.backbone import Backbone, load_backbone
from brixel_cli.core.lora import LowRankUpdates, linear_layers, stored_layers
from brixel_cli.core.student import read_adapter, save_student
from brixel_cli.engines.distilling.distillation import distill
from brixel_cli.engines.distilling.plan import plan
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.engines.distilling.trainer import make_adapter, parameter_groups
from brixel_cli.errors import UsageError, WeightsError


@pytest.fixture
def updates(backbone: Backbone) -> LowRankUpdates:
    updates = LowRankUpdates(linear_layers(backbone), rank=2)
    for update in updates.layers.values():
        torch.nn.init.normal_(update.up, std=0.05)  # type: ignore[union-attr, arg-type]
    return updates


@pytest.fixture
def recipe(tiny_recipe_file: Path, tmp_path: Path) -> Recipe:
    """With updates, on weights that can be had again."""
    torch.manual_seed(0)
    save_file(load_backbone("test_vit", "random").vit.state_dict(), tmp_path / "vit.safetensors")
    weights = f"backbone.weights={tmp_path / 'vit.safetensors'}"
    return with_changes(tiny_recipe_file, weights, "adapter.lora_rank=2", "optim.lora_lr=0.01")


def test_the_layers_are_those_of_the_blocks(backbone: Backbone) -> None:
    layers = linear_layers(backbone)
    assert len(layers) == 4 * len(backbone.vit.blocks)  # type: ignore[arg-type]
    assert layers["blocks.0.attn.qkv"] == (192, 64)
    assert layers["blocks.0.mlp.fc1"][1] == 64


def test_a_layer_that_is_not_called_has_no_update() -> None:
    """Of some models the weights of a layer are read, and the layer is never called: a hook would not be either."""
    model = load_backbone("eva02_tiny_patch14_224", "random")
    called = linear_layers(model)
    assert called
    images = torch.randn(1, 3, 28, 28)
    updates = LowRankUpdates(called, rank=1)
    sum(map_.sum() for map_ in updates.maps(model, images)).backward()  # type: ignore[union-attr]
    assert all(update.up.grad is not None for update in updates.layers.values())


def test_one_layer_by_hand() -> None:
    updates = LowRankUpdates({"blocks.0.fc": (2, 3)}, rank=1)
    update = updates.layers["blocks/0/fc"]
    assert torch.equal(update(torch.ones(3)), torch.zeros(2))
    update.down.data[:] = torch.tensor([[1.0, 2.0, 3.0]])
    update.up.data[:] = torch.tensor([[1.0], [-1.0]])
    assert torch.equal(update(torch.tensor([1.0, 0.0, 2.0])), torch.tensor([7.0, -7.0]))


def test_merged_weights_compute_the_same_and_leave_the_backbone_alone(
    backbone: Backbone, updates: LowRankUpdates
) -> None:
    images = torch.randn(2, 3, 32, 48)
    before = backbone.last_map(images)
    applied = updates.maps(backbone, images)
    merged = updates.merged(backbone).intermediate_maps(images)
    for one, other in zip(applied, merged, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-4, atol=1e-4)
    assert torch.equal(backbone.last_map(images), before)
    assert not torch.allclose(applied[-1], before)


def test_gradients_reach_the_updates_alone(backbone: Backbone) -> None:
    updates = LowRankUpdates(linear_layers(backbone), rank=2)
    updates.maps(backbone, torch.randn(1, 3, 32, 32))[-1].square().sum().backward()
    assert all(update.up.grad.any() for update in updates.layers.values())  # type: ignore[union-attr, operator]
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_a_run_trains_them_and_its_student_has_them(recipe: Recipe, tmp_path: Path, listener: Listener) -> None:
    distill(recipe, RunFolder(tmp_path / "run"), listener)
    tensors = tensors_of(tmp_path / "run", "student.safetensors")
    assert stored_layers(tensors)
    assert all(tensor.any() for key, tensor in tensors.items() if key.startswith("lora."))
    student = brixel_cli.load_student(tmp_path / "run")
    images = torch.randn(1, 3, 32, 32)
    lora = student.adapter.lora
    assert lora is not None
    with torch.no_grad():
        expected = student.adapter(images, lora.maps(student.backbone, images))
    torch.testing.assert_close(student(images), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(student.trunk.last_map(images), student.backbone.last_map(images))


@pytest.mark.parametrize("changes", [(), ("views.kind=fixed", "cache.enabled=true"), ("optim.average=0.5",)])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(
    tiny_recipe_file: Path,
    recipe: Recipe,
    tmp_path: Path,
    listener: Listener,
    monkeypatch: pytest.MonkeyPatch,
    changes: tuple[str, ...],
) -> None:
    recipe = with_changes(
        tiny_recipe_file, f"backbone.weights={recipe.backbone.weights}", "adapter.lora_rank=2", *changes
    )
    assert_stop_changes_nothing(recipe, tmp_path, listener, monkeypatch, KeyboardInterrupt)


def test_they_have_a_rate_of_their_own_and_do_not_decay(recipe: Recipe, backbone: Backbone) -> None:
    adapter = make_adapter(recipe, backbone)
    updates = parameter_groups(adapter, recipe.optim)[2]
    assert {id(tensor) for tensor in updates["params"]} == {id(tensor) for tensor in adapter.lora.parameters()}  # type: ignore[union-attr]
    assert (updates["weight_decay"], updates["lr_scale"]) == (0.0, 10.0)


def test_a_dry_run_counts_the_pass_through_the_backbone(recipe: Recipe, listener: Listener) -> None:
    plain = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"lora_rank": 0})})
    key = "adapter, forward and backward"
    assert plan(recipe, listener).gflop_per_step[key] > plan(plain, listener).gflop_per_step[key]
    assert plan(recipe, listener).num_live_parameters > plan(plain, listener).num_live_parameters


def test_a_student_of_another_rank_does_not_start_a_run(
    recipe: Recipe, backbone: Backbone, tmp_path: Path, listener: Listener
) -> None:
    distill(recipe, RunFolder(tmp_path / "run"), listener)
    other = recipe.model_copy(
        update={"init": str(tmp_path / "run"), "adapter": recipe.adapter.model_copy(update={"lora_rank": 3})}
    )
    with pytest.raises(UsageError, match=r"adapter.lora_rank: 2 -> 3"):
        make_adapter(other, backbone)


def test_a_file_without_the_updates_it_describes_is_refused(recipe: Recipe, tmp_path: Path, listener: Listener) -> None:
    distill(recipe, RunFolder(tmp_path / "run"), listener)
    stored = read_adapter(str(tmp_path / "run"))
    rest = {key: tensor for key, tensor in stored.tensors.items() if not key.startswith("lora.")}
    save_student(tmp_path / "bare.safetensors", rest, stored.card)
    with pytest.raises(WeightsError, match="it holds no low-rank updates"):
        brixel_cli.load_student(tmp_path / "bare.safetensors")


def test_updates_of_other_layers_are_refused(recipe: Recipe, tmp_path: Path, listener: Listener) -> None:
    distill(recipe, RunFolder(tmp_path / "run"), listener)
    stored = read_adapter(str(tmp_path / "run"))
    moved = {key.replace("blocks/0/", "blocks/77/"): tensor for key, tensor in stored.tensors.items()}
    save_student(tmp_path / "moved.safetensors", moved, dataclasses.replace(stored.card))
    with pytest.raises(WeightsError, match="updates of other layers than those of test_vit"):
        brixel_cli.load_student(tmp_path / "moved.safetensors")
