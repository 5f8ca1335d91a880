"""Backbone, adapters and student on an accelerator that is not there; first, that mixing devices is noticed."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import MIXED, MissingOnMpsError, backbone_on_gpu, fake_gpu, on_gpu
from torch import Tensor, nn

from brixel_cli.config.distill import AdapterConfig
from brixel_cli.core.student import Student, build_adapter


class _Mixed(nn.Module):
    """Keeps a constant that `Module.to` does not move."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.constant = how, torch.ones(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.how == "added":
            return x + self.constant
        if self.how == "made":
            return x * torch.ones(4)
        if self.how == "indexed":
            return torch.ones(4)[torch.zeros(2, dtype=torch.long, device=x.device)]
        if self.how == "numpy":
            return torch.from_numpy(x.numpy())
        return x * self.constant.to(x.device)


@pytest.mark.parametrize("how", ["added", "made", "indexed"])
def test_a_module_that_mixes_devices_is_noticed(gpu: None, how: str) -> None:
    with pytest.raises(RuntimeError, match=MIXED):
        on_gpu(lambda: _Mixed(how))(torch.ones(2, 4, device="cuda"))


def test_a_tensor_of_an_accelerator_is_no_array(gpu: None) -> None:
    with pytest.raises(TypeError, match="to numpy"):
        on_gpu(lambda: _Mixed("numpy"))(torch.ones(2, 4, device="cuda"))


def test_a_module_that_moves_its_constant_is_not_blamed(gpu: None) -> None:
    assert on_gpu(lambda: _Mixed("moved"))(torch.ones(2, 4, device="cuda")).device.type == "cuda"


def test_two_gpus_are_two_devices() -> None:
    with fake_gpu(), pytest.raises(RuntimeError, match=MIXED):
        on_gpu(lambda: _Mixed("moved"), "cuda:1")(torch.ones(2, 4, device="cuda:0"))


def test_what_mps_lacks_is_noticed() -> None:
    with fake_gpu(mps_operators=True), pytest.raises(MissingOnMpsError, match="float64"):
        torch.ones(2, device="cuda").double()
    with fake_gpu(mps_operators=True), pytest.raises(MissingOnMpsError, match="no kernel"):
        torch.linalg.eig(torch.ones(2, 2, device="cuda"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_backbone_stays_on_its_device(gpu: None, dtype: str) -> None:
    backbone = backbone_on_gpu(dtype)
    images = torch.randn(2, 3, 48, 32, device="cuda")  # another grid: position embeddings are resized
    maps = [*backbone.intermediate_maps(images), backbone.last_map(images)]
    assert {(tuple(map_.shape), map_.device.type, map_.dtype) for map_ in maps} == {
        ((2, 64, 3, 2), "cuda", torch.float32)
    }
    assert len(backbone.signature()) == 64
    assert backbone.does_as(backbone.signature())


def test_images_left_on_the_cpu_are_noticed(gpu: None) -> None:
    with pytest.raises(RuntimeError, match=MIXED):
        backbone_on_gpu().last_map(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["fusion", "deformable"])
def test_students_stay_on_their_device(kind: str, checkpointing: bool, autocast: bool, gpu: None) -> None:
    config = AdapterConfig(kind=kind, checkpointing=checkpointing)
    student = Student(backbone_on_gpu(), on_gpu(lambda: build_adapter(64, 4, config)))
    images = torch.randn(2, 3, 48, 32, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        trained = student.train()(images)
        with torch.no_grad():
            used = student.eval()(images)
    assert trained.requires_grad
    for maps in (trained, used):
        assert (tuple(maps.shape), maps.device.type, maps.dtype) == ((2, 64, 12, 8), "cuda", torch.float32)


@pytest.mark.parametrize("residual", ["direct", "half_grid"])
def test_weights_in_bfloat16_and_both_residuals(residual: str, gpu: None) -> None:
    config = AdapterConfig(kind="deformable", residual=residual)
    adapter = on_gpu(lambda: build_adapter(64, 4, config).to(torch.bfloat16))
    student = Student(backbone_on_gpu("bfloat16"), adapter).eval()
    with torch.inference_mode():
        maps = student(torch.randn(1, 3, 32, 32, device="cuda"))
    assert (maps.device.type, maps.dtype) == ("cuda", torch.float32)


def test_the_linear_part_takes_weights_from_the_cpu(gpu: None) -> None:
    adapter = on_gpu(lambda: build_adapter(64, 4, AdapterConfig()))
    adapter.set_linear(torch.randn(64, 256), torch.randn(64))
    assert adapter.linear is not None
    assert adapter.linear.weight.device.type == "cuda"
