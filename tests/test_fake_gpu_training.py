"""What a training computes, on a GPU that is not there: losses, fidelity, PCA, linear fit, an update, a validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conftest import with_changes
from fake_gpu import MIXED, backbone_on_gpu, fake_gpu, on_gpu

from brixel_cli.config.distill import LossConfig, Recipe
from brixel_cli.core.linear_fit import LinearFit
from brixel_cli.core.losses import Basis, DistillationLoss, fit_basis
from brixel_cli.core.metrics import FIDELITY, fidelity, fidelity_basis
from brixel_cli.core.pca import RunningPca
from brixel_cli.core.student import build_adapter
from brixel_cli.drawing.feature_maps import pca_colours
from brixel_cli.engines.distilling.batches import Batch, compute_maps
from brixel_cli.engines.distilling.trainer import Trainer, with_noise
from brixel_cli.engines.distilling.validation import validate
from brixel_cli.engines.runtime import Runtime

CUDA = torch.device("cuda:0")


def all_terms(form: str, spectral: str, basis: str) -> LossConfig:
    return LossConfig.model_validate(
        {
            "l1": {"weight": 1.0, "form": form},
            "edge": {"weight": 1.0, "form": form, "basis": basis},
            "spectral": {"weight": 1.0, "form": spectral},
            "cosine": {"weight": 1.0},
        }
    )


@pytest.mark.parametrize("basis", ["fixed", "batch"])
@pytest.mark.parametrize(("form", "spectral"), [("relative", "centred"), ("raw", "released")])
def test_all_losses_in_all_forms(form: str, spectral: str, basis: str, gpu: None) -> None:
    prediction = torch.randn(2, 64, 12, 8, device="cuda", requires_grad=True)
    target = torch.randn(2, 64, 12, 8, device="cuda", dtype=torch.float16)  # as a cache has it
    fixed = fit_basis(target, 8, seed=0) if basis == "fixed" else None
    parts = DistillationLoss(all_terms(form, spectral, basis), fixed)(prediction, target, seed=1)
    assert set(parts.terms) == {"l1", "edge", "spectral", "cosine"}
    assert {term.device for term in parts.terms.values()} == {CUDA}
    assert parts.total.requires_grad


def test_a_basis_on_the_cpu_is_noticed(gpu: None) -> None:
    loss = DistillationLoss(all_terms("raw", "centred", "fixed"), Basis(torch.randn(64, 8), torch.randn(64)))
    maps = torch.randn(2, 64, 12, 8, device="cuda")
    with pytest.raises(RuntimeError, match=MIXED):
        loss(maps, maps)


def test_fidelity_and_its_basis(gpu: None) -> None:
    prediction, target = torch.randn(2, 64, 12, 8, device="cuda")
    basis = fidelity_basis(target)
    assert (basis.components.device, basis.mean.device) == (CUDA, CUDA)
    assert set(fidelity(prediction, target, basis)) == set(fidelity(prediction, target)) == set(FIDELITY)


def test_components_of_a_set_are_found_on_the_cpu(gpu: None) -> None:
    gathered = RunningPca(64)
    gathered.add(torch.randn(64, 12, 8, device="cuda"))
    assert gathered.basis(3).components.device.type == "cpu"


def test_maps_are_painted(gpu: None) -> None:
    maps = torch.randn(2, 64, 12, 8, device="cuda")
    assert [picture.size for picture in pca_colours(list(maps), maps[0])] == [(8, 12), (8, 12)]


def test_the_linear_fit_adds_up_on_the_gpu() -> None:
    with fake_gpu():  # on MPS the sums are on the CPU, by the type of the device
        fit = LinearFit(64, CUDA)
        maps = [torch.randn(3, 64, 3, 2, device="cuda") for _ in range(4)]
        fit.add(maps, maps[-1], torch.randn(3, 64, 12, 8, device="cuda"), torch.tensor([True, False, True]))
        assert {total.device for total in fit.sums} == {CUDA}
        weight, bias, _ = fit.solve()
        assert (weight.device.type, tuple(weight.shape), tuple(bias.shape)) == ("cpu", (64, 256), (64,))


def test_noise_is_drawn_on_the_gpu(gpu: None) -> None:
    maps = [torch.randn(2, 64, 3, 2, device="cuda") for _ in range(4)]
    assert {map_.device for map_ in with_noise(maps, 0.5, [1, 2])} == {CUDA}


@pytest.fixture
def runtime() -> Runtime:
    """As of a run on CUDA in bfloat16."""
    made = Runtime("cpu", training=True)
    made.device, made.dtype = CUDA, torch.bfloat16
    return made


def batch_on_gpu(backbone: torch.nn.Module, runtime: Runtime) -> Batch:
    pixels = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)  # read and cropped on the CPU
    images, maps, targets = compute_maps(backbone, runtime, pixels, 4)
    return Batch(images, maps, targets, ["a", "b"], [False, False])


def test_views_become_maps_and_targets(runtime: Runtime, gpu: None) -> None:
    batch = batch_on_gpu(backbone_on_gpu(), runtime)
    assert {tensor.device for tensor in (batch.images, *batch.maps, batch.targets)} == {CUDA}
    assert (tuple(batch.images.shape), tuple(batch.targets.shape)) == ((2, 3, 32, 32), (2, 64, 8, 8))


@pytest.mark.parametrize("kind", ["fusion", "deformable"])
def test_an_update(
    kind: str, runtime: Runtime, tiny_recipe_file: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it but the backward pass, which needs a driver: gradients are put in its place."""
    recipe = with_changes(tiny_recipe_file, f"adapter.kind={kind}", "optim.map_noise=0.5", "optim.accumulate=2")
    adapter = on_gpu(lambda: build_adapter(64, 4, recipe.adapter))
    backbone = backbone_on_gpu()
    batch = batch_on_gpu(backbone, runtime)

    def backward(loss: torch.Tensor) -> None:
        assert (loss.device, loss.dtype, loss.requires_grad) == (CUDA, torch.float32, True)
        for parameter in adapter.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr("torch.Tensor.backward", backward)
    monkeypatch.setattr("torch.nn.Module.to", lambda module, *_: module)  # there already; a fake cannot be swapped
    trainer = Trainer(recipe, adapter, backbone, runtime)
    trainer.loss.basis = fit_basis(batch.targets, 8, seed=0)
    values, names = trainer.update(iter([batch, batch]), lr=1e-3)
    assert set(values) == {"loss", "l1", "edge", "spectral", "cosine", "grad_norm"}
    assert (trainer.step, trainer.refused_in_a_row, names) == (1, 0, ["a", "b"] * 2)
    tensors, _ = trainer.state()
    moments = {tensor.device for name, tensor in tensors.items() if name.endswith("exp_avg")}
    averages = {tensor.device for name, tensor in tensors.items() if name.startswith("average.module")}
    assert moments == averages == {CUDA}


class _OneBatch:
    """A source of one batch."""

    def __init__(self, batch: Batch):
        self.batch, self.skipped = batch, []

    def iterate(self, keys: Iterator[Sequence[tuple[int, int]]]) -> Iterator[Batch]:
        yield self.batch


def test_a_validation_with_its_picture(runtime: Runtime, tiny_recipe: Recipe, gpu: None) -> None:
    backbone = backbone_on_gpu()
    adapter = on_gpu(lambda: build_adapter(64, 4, tiny_recipe.adapter))
    source = _OneBatch(batch_on_gpu(backbone, runtime))
    found, picture = validate(adapter, backbone, source, 2, runtime, at_once=2, step=1)
    assert found.num_images == 2
    assert picture.height > 200
