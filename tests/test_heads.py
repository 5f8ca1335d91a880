"""Probe heads: what they compute, how they start, and that they come back from disk as they were."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from brixel_cli.core.heads import Head, HeadSpec, build_head, channel_sums, enlarge, load_head, save_head
from brixel_cli.core.weights import load_tensors, save_tensors
from brixel_cli.errors import WeightsError

SPECS = {
    "linear": HeadSpec("segmentation", 8, 5, batch_norm=False),
    "linear, BatchNorm": HeadSpec("segmentation", 8, 5),
    "bins": HeadSpec("depth", 8),
    "one depth": HeadSpec("depth", 8, bins=0),
    "readout": HeadSpec("depth", 8, kind="readout", batch_norm=False),
    "normals": HeadSpec("normals", 8),
    "both": HeadSpec("depth_normals", 8),
}
SHAPES = {"segmentation": 5, "depth": 1, "normals": 3}


@pytest.mark.parametrize("name", SPECS)
def test_every_head_gives_its_quantities_on_the_grid_and_learns(name: str) -> None:
    head = build_head(SPECS[name], 0)
    outputs = head(torch.randn(2, 8, 3, 4))
    assert {key: tuple(value.shape) for key, value in outputs.items()} == {
        key: (2, SHAPES[key], 3, 4) for key in SPECS[name].quantities
    }
    sum(output.square().mean() for output in outputs.values()).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_a_linear_head_is_a_matrix() -> None:
    head = build_head(SPECS["linear"], 0)
    convolution = head.branches["segmentation"][0]
    maps = torch.randn(1, 8, 2, 2)
    expected = torch.einsum("kc,bchw->bkhw", convolution.weight[:, :, 0, 0], maps)
    torch.testing.assert_close(head(maps)["segmentation"], expected)


def test_a_linear_head_may_be_enlarged_before_or_after() -> None:
    # What the protocol jafar says: the convolution on the enlarged map.
    head, maps = build_head(SPECS["linear"], 0), torch.randn(1, 8, 4, 4)
    before = head(F.interpolate(maps, size=(13, 13), mode="bilinear"))["segmentation"]
    torch.testing.assert_close(enlarge("segmentation", head(maps)["segmentation"], (13, 13)), before)


def test_bins_are_weighed_by_their_softmax() -> None:
    # Three bins at 1, 2 and 3 m; logits ln(1, 1, 2): (1 + 2 + 2 * 3) / 4 m.
    head = Head(HeadSpec("depth", 3, batch_norm=False, bins=3, depth_range=(1.0, 3.0)))
    convolution = head.branches["depth"][0]
    convolution.weight.data = torch.eye(3)[:, :, None, None]
    convolution.bias.data.zero_()
    maps = torch.tensor([0.0, 0.0, math.log(2)]).view(1, 3, 1, 1)
    assert head(maps)["depth"].item() == pytest.approx(9 / 4)


def test_depth_stays_positive_and_in_range() -> None:
    maps = 100 * torch.randn(2, 8, 5, 5)
    for name in ("bins", "one depth", "readout"):
        depth = build_head(SPECS[name], 0)(maps)["depth"]
        assert depth.min() > 0
    assert build_head(SPECS["bins"], 0)(maps)["depth"].max() <= 10


def test_the_readout_sees_neighbours_and_a_linear_head_does_not() -> None:
    maps = torch.zeros(1, 8, 5, 5)
    moved = maps.clone()
    moved[:, :, 2, 2] = 5
    for name, reach in (("readout", 9), ("linear", 1)):
        head = build_head(SPECS[name], 0)
        key = SPECS[name].quantities[0]
        changed = (head(moved)[key] - head(maps)[key]).abs().amax(dim=1) > 0
        assert int(changed.sum()) == reach


def test_enlarged_normals_have_length_one() -> None:
    enlarged = enlarge("normals", torch.randn(2, 3, 3, 3), (10, 11))
    torch.testing.assert_close(enlarged.norm(dim=1), torch.ones(2, 10, 11))


def test_both_branches_are_what_each_would_be_alone() -> None:
    both, maps = build_head(SPECS["both"], 0), torch.randn(2, 8, 3, 3)
    alone = Head(SPECS["normals"])
    alone.branches["normals"].load_state_dict(both.branches["normals"].state_dict())
    assert torch.equal(both(maps)["normals"], alone(maps)["normals"])


@pytest.mark.parametrize("name", ["linear, BatchNorm", "bins", "normals", "both"])
def test_folding_batch_norm_changes_neither_outputs_nor_gradients_nor_statistics(name: str) -> None:
    folded, plain = build_head(SPECS[name], 0), build_head(SPECS[name], 0)
    maps = 3 * torch.randn(4, 8, 5, 6) + torch.linspace(-20, 20, 8)[:, None, None]
    for head in (folded, plain):
        for parameter in head.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        expected = {key: plain._finish(key, branch(maps)) for key, branch in plain.branches.items()}
        found = folded(maps)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=2e-5, rtol=1e-4)
        for outputs in (expected, found):
            sum(output.square().sum() for output in outputs.values()).backward()
    for one, other in zip(folded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-3, rtol=1e-3)
    state = plain.state_dict()
    for key, value in folded.state_dict().items():  # running statistics among it
        torch.testing.assert_close(value, state[key], atol=1e-5, rtol=1e-5)


def test_sums_that_are_known_already_change_nothing() -> None:
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]], [[[0.0, 0.0], [0.0, -2.0]]]])
    sums = channel_sums(maps)
    assert sums.tolist() == [[[12.0], [pytest.approx(50.0)]], [[-2.0], [pytest.approx(4.0)]]]
    head, same = (build_head(HeadSpec("segmentation", 1, 2), 0) for _ in range(2))
    assert head.needs_sums
    assert torch.equal(head(maps, sums)["segmentation"], same(maps)["segmentation"])
    norm = head.branches["segmentation"][0]
    # Mean 10 / 8 and variance 54 / 8 - 1.25^2; the running ones move a tenth of the way, with 8 / 7 of the variance.
    assert norm.running_mean.item() == pytest.approx(0.125)
    assert norm.running_var.item() == pytest.approx(0.9 + 0.1 * 5.1875 * 8 / 7)
    assert not head.eval().needs_sums
    assert not build_head(SPECS["linear"], 0).needs_sums


def test_the_seed_alone_decides() -> None:
    torch.manual_seed(1)
    first = build_head(SPECS["readout"], 3).state_dict()
    state = torch.random.get_rng_state()
    second = build_head(SPECS["readout"], 3).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(state, torch.random.get_rng_state())
    other = build_head(SPECS["readout"], 4).state_dict()
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_the_seed_decides_whatever_the_default_device_is() -> None:
    expected = build_head(SPECS["readout"], 3).state_dict()
    with torch.device("meta"):  # as within a block for an accelerator
        found = build_head(SPECS["readout"], 3).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", SPECS)
def test_a_head_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    head = build_head(SPECS[name], 0)
    head(torch.randn(4, 8, 3, 3))  # moves the statistics of BatchNorm
    save_head(tmp_path / "head.safetensors", head, {"recipe": {"name": "mine"}, "classes": ["a", "b"]})
    loaded, description = load_head(tmp_path / "head.safetensors")
    assert description == {"recipe": {"name": "mine"}, "classes": ["a", "b"]}
    assert (loaded.spec, loaded.training) == (head.spec, False)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    maps = torch.randn(1, 8, 3, 3)
    for key, value in head.eval()(maps).items():
        assert torch.equal(loaded(maps)[key], value)


def test_other_files_are_no_heads(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_tensors(path, {"a": torch.zeros(1)}, {"format": "brixel-student-1"})
    with pytest.raises(
        WeightsError, match=r"is no probe head of format brixel-head-1: brixel-student-1\. Heads are what"
    ):
        load_head(path)
    save_tensors(path, {"a": torch.zeros(1)}, {"format": "brixel-head-1", "head": "{}", "description": "{}"})
    with pytest.raises(WeightsError, match="its description of the head cannot be read"):
        load_head(path)
    save_head(path, build_head(SPECS["linear"], 0), {})
    tensors, metadata = load_tensors(path)
    save_tensors(path, {"other": tensors["branches.segmentation.0.bias"]}, metadata)
    with pytest.raises(WeightsError, match="does not fit its own description: 3 of its keys are wrong"):
        load_head(path)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"channels": 0}, "channels: Input should be greater than 0"),
    ({"channels": 2**40}, "channels: Input should be less than or equal to 65536"),
    ({"channels": "8"}, "channels: Input should be a valid integer"),
    ({"bins": -1}, "bins: Input should be greater than or equal to 0"),
    ({"num_classes": 300}, "num_classes: Input should be less than or equal to 255"),
    ({"num_classes": 0}, "a head for segmentation with 0 classes"),
    ({"task": "cooking"}, "task: Input should be 'segmentation'"),
    ({"kind": "huge"}, "kind: Input should be 'linear' or 'readout'"),
    ({"batch_norm": "yes"}, "batch_norm: Input should be a valid boolean"),
    ({"depth_range": [1.0]}, "depth_range.1: Field required"),
    ({"depth_range": [5.0, 1.0]}, "its depth_range (5.0, 1.0) is empty"),
    ({"depth_range": [1.0, math.inf]}, "depth_range.1: Input should be a finite number"),
    ({"colour": 1}, "colour: Unexpected keyword argument"),
    (None, "head: Input should be an object"),
])  # fmt: skip
def test_a_head_that_is_described_wrongly_is_refused(changes: dict | None, reason: str, tmp_path: Path) -> None:
    save_head(tmp_path / "head.safetensors", build_head(SPECS["linear"], 0), {})
    tensors, metadata = load_tensors(tmp_path / "head.safetensors")
    said = json.dumps(changes if changes is None else json.loads(metadata["head"]) | changes)
    save_tensors(tmp_path / "head.safetensors", tensors, metadata | {"head": said})
    with pytest.raises(WeightsError) as caught:
        load_head(tmp_path / "head.safetensors")
    assert "head.safetensors: its description of the head cannot be read: " in str(caught.value)
    assert reason in str(caught.value)


def test_a_head_of_another_width_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_head(path, build_head(SPECS["readout"], 0), {})
    tensors, metadata = load_tensors(path)
    said = json.loads(metadata["head"]) | {"kind": "linear", "channels": 2**16, "bins": 2**16}  # 17 GB of weights
    save_tensors(path, tensors, metadata | {"head": json.dumps(said)})
    with pytest.raises(WeightsError, match="does not fit its own description"):
        load_head(path)
