"""Each term of the loss, worked by hand or against a slow and plain implementation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from brixel_cli.config.distill import CosineConfig, EdgeConfig, L1Config, LossConfig, SpectralConfig
from brixel_cli.core import losses
from brixel_cli.core.losses import (
    NUM_RADIAL_BINS,
    Basis,
    DistillationLoss,
    cosine_error,
    edge_parts,
    fit_basis,
    radial_amplitude,
    radial_bins,
    sobel,
    spectral_error,
)
from brixel_cli.core.pca import RunningPca

TERMS = ("l1", "edge", "spectral", "cosine")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def only(name: str, weight: float = 1.0, **options: object) -> LossConfig:
    """A configuration in which one term alone has a weight."""
    sections = {"l1": L1Config, "edge": EdgeConfig, "spectral": SpectralConfig, "cosine": CosineConfig}
    return LossConfig(
        **{term: section(weight=weight, **options) if term == name else section(weight=0.0)
           for term, section in sections.items()}
    )  # fmt: skip


def ramp(in_x: float, in_y: float, channels: int = 1) -> Tensor:
    """A map (1, channels, 4, 5) that rises by in_x a column and in_y a row in channel 0; the others are 0."""
    map_ = torch.zeros(1, channels, 4, 5)
    map_[0, 0] = in_x * torch.arange(5.0) + in_y * torch.arange(4.0)[:, None]
    return map_


FIRST_CHANNEL = Basis(torch.tensor([[1.0], [0.0]]), torch.zeros(2))


# --- L1 ---


@pytest.mark.parametrize(("form", "expected"), [("raw", 1.5), ("relative", 0.75)])
def test_l1_by_hand(form: str, expected: float) -> None:
    target = torch.tensor([2.0, -2.0, 1.0, 3.0]).reshape(1, 2, 1, 2)
    prediction = torch.tensor([3.0, 0.0, 1.0, 0.0]).reshape(1, 2, 1, 2)
    # |1| + |2| + |0| + |3| = 6 over 4 = 1.5; mean |T| = 8 / 4 = 2; 1.5 / 2 = 0.75
    parts = DistillationLoss(only("l1", form=form))(prediction, target)
    assert parts.total.item() == pytest.approx(expected)


# --- edge ---


def test_sobel_of_a_ramp_is_eight_times_its_slope() -> None:
    # One row of the kernel: -1 * v + 1 * (v + 2) = 2 for slope 1; the rows weigh 1 + 2 + 1 = 4; 2 * 4 = 8.
    in_x, in_y = sobel(ramp(1, 0))
    assert in_x.shape == in_y.shape == (1, 1, 2, 3)
    assert torch.equal(in_x, torch.full((1, 1, 2, 3), 8.0))
    assert torch.equal(in_y, torch.zeros(1, 1, 2, 3))
    in_x, in_y = sobel(ramp(0, -0.5))
    assert torch.equal(in_x, torch.zeros(1, 1, 2, 3))
    assert torch.equal(in_y, torch.full((1, 1, 2, 3), -4.0))


def test_sobel_treats_channels_apart() -> None:
    maps = torch.cat([ramp(1, 0), ramp(0, 1)], dim=1)
    in_x, in_y = sobel(maps)
    assert in_x[0, :, 0, 0].tolist() == [8.0, 0.0]
    assert in_y[0, :, 0, 0].tolist() == [0.0, 8.0]


@pytest.mark.parametrize(("form", "expected"), [("raw", 80.0), ("relative", 1.25)])
def test_edge_by_hand(form: str, expected: float) -> None:
    # Target slopes (1, 0): gradients 8, 0. Prediction slopes (2, 0.5): 16, 4. MSE 8^2 + 4^2 = 80; energy 8^2 = 64.
    target, prediction = ramp(1, 0, channels=2), ramp(2, 0.5, channels=2)
    prediction[0, 1] = randn(4, 5)  # not in the basis: must not count
    parts = DistillationLoss(only("edge", form=form), FIRST_CHANNEL)(prediction, target)
    assert parts.total.item() == pytest.approx(expected)
    error, energy = edge_parts(prediction, target, FIRST_CHANNEL)
    assert (error.item(), energy.item()) == pytest.approx((80.0, 64.0))


def test_edge_is_a_mean_over_components() -> None:
    both = Basis(torch.eye(2), torch.tensor([5.0, -3.0]))  # a mean has no gradient: it must not count
    error, energy = edge_parts(ramp(2, 0.5, channels=2), ramp(1, 0, channels=2), both)
    assert (error.item(), energy.item()) == pytest.approx((40.0, 32.0))


def test_projection_takes_the_mean_off_first() -> None:
    basis = Basis(torch.tensor([[0.6], [0.8]]), torch.tensor([1.0, 2.0]))
    maps = torch.tensor([6.0, 12.0]).reshape(1, 2, 1, 1)
    # 0.6 * (6 - 1) + 0.8 * (12 - 2) = 3 + 8 = 11
    assert basis.project(maps).item() == pytest.approx(11.0)


def test_without_a_basis_one_is_fitted_on_the_batch_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fit(maps: Tensor, num_components: int, seed: int) -> Basis:
        calls.append((maps.shape, num_components, seed))
        return FIRST_CHANNEL

    monkeypatch.setattr(losses, "fit_basis", fit)
    parts = DistillationLoss(only("edge", form="raw", components=3))(ramp(2, 0.5, 2), ramp(1, 0, 2), seed=11)
    assert calls == [((1, 2, 4, 5), 3, 11)]
    assert parts.total.item() == pytest.approx(80.0)


# --- basis ---


def test_a_basis_finds_the_principal_directions_and_the_mean() -> None:
    # Spread 5 along (0.6, 0.8, 0), 1 along (0.8, -0.6, 0), 0.01 along the third axis.
    scores = randn(4, 3, 16, 16) * torch.tensor([5.0, 1.0, 0.01])[:, None, None]
    axes = torch.tensor([[0.6, 0.8, 0.0], [0.8, -0.6, 0.0], [0.0, 0.0, 1.0]])
    mean = torch.tensor([10.0, -20.0, 3.0])
    maps = torch.einsum("bkhw,kd->bdhw", scores, axes) + mean[:, None, None]
    basis = fit_basis(maps, 2, seed=0, share=1.0)
    assert basis.components.shape == (3, 2)
    torch.testing.assert_close((axes[:2] @ basis.components).abs(), torch.eye(2), atol=0.02, rtol=0)
    torch.testing.assert_close(basis.components.T @ basis.components, torch.eye(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis.mean, maps.mean(dim=(0, 2, 3)), atol=1e-4, rtol=0)


def test_a_basis_is_fitted_on_a_third_of_the_locations() -> None:
    # Every location has its own mark; the mean tells how many of the 300 were taken: 100 ones of 300.
    maps = randn(3, 4, 10, 10)
    third, whole = fit_basis(maps, 2, seed=0), fit_basis(maps, 2, seed=0, share=1.0)
    tokens = maps.permute(0, 2, 3, 1).reshape(300, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        chosen = tokens[torch.randperm(300)[:100]]
    torch.testing.assert_close(third.mean, chosen.mean(dim=0))
    torch.testing.assert_close(whole.mean, tokens.mean(dim=0))


def test_a_basis_is_the_same_for_the_same_seed_and_leaves_the_global_generator_alone() -> None:
    maps = randn(2, 16, 8, 8)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = fit_basis(maps, 8, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = fit_basis(maps, 8, seed=5), fit_basis(maps, 8, seed=6)
    assert torch.equal(first.components, again.components)
    assert torch.equal(first.mean, again.mean)
    assert not torch.equal(first.mean, other.mean)


class LikeMps(TorchDispatchMode):
    """What MPS lacks is refused off the CPU: float64 and the QR decomposition."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
                assert tensor.dtype != torch.float64, f"{func} makes float64 on {tensor.device}"
                assert "qr" not in str(func), f"{func} on {tensor.device}"
        return output


def test_a_basis_is_fitted_on_the_cpu_and_returned_on_the_device_of_the_maps() -> None:
    with FakeTensorMode(), LikeMps():
        basis = fit_basis(torch.empty(2, 16, 8, 8, device="cuda"), 8, seed=0)
        assert basis.components.shape == (16, 8)
        assert basis.components.device.type == basis.mean.device.type == "cuda"


def test_a_running_pca_takes_maps_of_a_device_without_float64() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), LikeMps():
        pca = RunningPca(4)
        pca.add(torch.empty(4, 3, 3, device="cuda"))
        assert pca.products.dtype == torch.float64


def test_a_basis_carries_no_gradient() -> None:
    basis = fit_basis(randn(1, 8, 6, 6).requires_grad_(), 3, seed=0)
    assert not basis.components.requires_grad
    assert not basis.mean.requires_grad


@pytest.mark.parametrize(("shape", "expected"), [((1, 3, 8, 8), (3, 3)), ((1, 16, 1, 2), (16, 2))])
def test_a_basis_of_few_channels_or_locations_has_fewer_components(
    shape: tuple[int, ...], expected: tuple[int, int]
) -> None:
    assert fit_basis(randn(*shape), 8, seed=0, share=1.0).components.shape == expected


# --- cosine ---


def test_cosine_by_hand() -> None:
    # Three locations: same direction 1; (3, 4) and (4, 3): 24 / 25; opposite -1. 1 - 0.96 / 3 = 0.68
    target = torch.tensor([[1.0, 4.0, 2.0], [0.0, 3.0, 0.0]]).reshape(1, 2, 1, 3)
    prediction = torch.tensor([[9.0, 3.0, -1.0], [0.0, 4.0, 0.0]]).reshape(1, 2, 1, 3)
    assert cosine_error(prediction, target).item() == pytest.approx(0.68)
    assert DistillationLoss(only("cosine"))(prediction, target).total.item() == pytest.approx(0.68)


# --- spectral ---


def test_radial_bins_of_a_square_grid_by_hand() -> None:
    # Frequencies -0.5, -0.25, 0, 0.25; the corner (-0.5, -0.5) is at 0.7071 = 1, which would be bin 24: clamped to 23.
    # 24 * 0.25 / 0.7071 = 8.49; 24 * 0.3536 / 0.7071 = 12; 24 * 0.5 / 0.7071 = 16.97; 24 * 0.5590 / 0.7071 = 18.97
    assert radial_bins(4, 4).tolist() == [[23, 18, 16, 18], [18, 12, 8, 12], [16, 8, 0, 8], [18, 12, 8, 12]]


def test_radial_bins_of_other_grids_by_hand() -> None:
    assert radial_bins(2, 4).tolist() == [[23, 18, 16, 18], [16, 8, 0, 8]]
    # Three columns: -1/3, 0, 1/3. Corner sqrt(1/4 + 1/9) = 0.6009; 24 * 0.5 / 0.6009 = 19.97; 24 / 3 / 0.6009 = 13.31
    assert radial_bins(2, 3).tolist() == [[23, 19, 23], [13, 0, 13]]


def slow_radial_amplitude(maps: Tensor, centred: bool) -> list[list[float]]:
    """The definition, written out: whole spectrum, loops over bins."""
    height, width = maps.shape[-2:]
    hann_y = [0.5 - 0.5 * math.cos(2 * math.pi * y / (height - 1)) for y in range(height)]
    hann_x = [0.5 - 0.5 * math.cos(2 * math.pi * x / (width - 1)) for x in range(width)]
    spectrum = np.fft.fft2(maps.double().numpy() * np.outer(hann_y, hann_x), norm="ortho")
    amplitude = np.abs(spectrum).mean(axis=1)
    if centred:
        amplitude = np.fft.fftshift(amplitude, axes=(-2, -1))
    bins = radial_bins(height, width).numpy()
    return [
        [image[bins == number].mean() for number in range(7, NUM_RADIAL_BINS) if (bins == number).any()]  # 7.2 is 0.3
        for image in amplitude
    ]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("grid", [(16, 16), (12, 20), (9, 14), (15, 11), (4, 4)])
def test_radial_amplitude_equals_its_definition(grid: tuple[int, int], centred: bool) -> None:
    maps = randn(2, 5, *grid)
    expected = torch.tensor(slow_radial_amplitude(maps, centred), dtype=torch.float32)
    torch.testing.assert_close(radial_amplitude(maps, centred), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["centred", "released"])
def test_spectral_error_equals_its_definition(form: str) -> None:
    prediction, target = randn(2, 5, 12, 20), 3 * randn(2, 5, 12, 20, seed=1)
    centred = form == "centred"
    predicted, wanted = (np.array(slow_radial_amplitude(maps, centred)) for maps in (prediction, target))
    expected = ((np.log(predicted + 1e-8) - np.log(wanted + 1e-8)) ** 2).mean()
    assert spectral_error(prediction, target, centred).item() == pytest.approx(expected, rel=1e-4)
    parts = DistillationLoss(only("spectral", form=form))(prediction, target)
    assert parts.total.item() == pytest.approx(expected, rel=1e-4)


def test_spectral_error_of_a_scaled_map_by_hand() -> None:
    # All amplitudes doubled: the logarithms differ by log 2 everywhere.
    maps = randn(1, 4, 16, 16)
    assert spectral_error(2 * maps, maps).item() == pytest.approx(math.log(2) ** 2, rel=1e-4)


def test_the_centred_form_sees_the_finest_pattern_and_the_released_form_the_mean() -> None:
    # A checkerboard is the highest frequency: centred, at the corner of the bins; unshifted, in their middle.
    board = ((torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1)[None, None]
    flat = torch.ones(1, 1, 16, 16)
    assert radial_amplitude(board)[0, -1] > 100 * radial_amplitude(flat)[0, -1]
    assert radial_amplitude(flat, centred=False)[0, -1] > 100 * radial_amplitude(board, centred=False)[0, -1]


# --- the sum ---


def test_the_total_is_the_weighted_sum_of_the_terms() -> None:
    weights = {"l1": 2.0, "edge": 3.0, "spectral": 0.1, "cosine": 0.5}
    config = LossConfig(
        l1=L1Config(weight=2.0), edge=EdgeConfig(weight=3.0), spectral=SpectralConfig(weight=0.1),
        cosine=CosineConfig(weight=0.5),
    )  # fmt: skip
    prediction, target = randn(2, 16, 8, 8), randn(2, 16, 8, 8, seed=1)
    parts = DistillationLoss(config)(prediction, target)
    assert tuple(parts.terms) == TERMS
    assert parts.total.item() == pytest.approx(sum(weights[name] * value.item() for name, value in parts.terms.items()))
    for name in TERMS:  # each unweighted term is what it is alone
        alone = DistillationLoss(only(name))(prediction, target).total.item()
        assert parts.terms[name].item() == pytest.approx(alone)
        assert alone > 0


@pytest.mark.parametrize("name", TERMS)
def test_a_term_of_weight_zero_is_not_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {"edge": "edge_parts", "spectral": "spectral_error", "cosine": "cosine_error"}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    for term, function in functions.items():
        if term != name:
            monkeypatch.setattr(losses, function, refuse)
    if name != "l1":
        monkeypatch.setattr(losses.F, "l1_loss", refuse)
    if name != "edge":
        monkeypatch.setattr(losses, "fit_basis", refuse)
    parts = DistillationLoss(only(name, weight=0.5))(randn(1, 8, 8, 8), randn(1, 8, 8, 8, seed=1))
    assert list(parts.terms) == [name]
    assert parts.total.item() == pytest.approx(0.5 * parts.terms[name].item())


@pytest.mark.parametrize("name", TERMS)
def test_gradients_reach_the_prediction_only(name: str) -> None:
    prediction = randn(2, 8, 8, 8).requires_grad_()
    target = randn(2, 8, 8, 8, seed=1).requires_grad_()
    parts = DistillationLoss(only(name))(prediction, target)
    assert not any(term.requires_grad for term in parts.terms.values())
    parts.total.backward()
    assert target.grad is None
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
    assert prediction.grad.abs().sum() > 0


@pytest.mark.parametrize("name", TERMS)
def test_gradients_are_finite_where_prediction_and_target_are_flat(name: str) -> None:
    prediction = torch.zeros(1, 8, 8, 8, requires_grad=True)
    parts = DistillationLoss(only(name))(prediction, torch.zeros(1, 8, 8, 8))
    parts.total.backward()
    assert parts.total.isfinite()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize("name", ["l1", "edge", "cosine", "spectral"])
def test_the_default_forms_do_not_depend_on_the_scale_of_the_features(name: str) -> None:
    prediction, target = randn(2, 16, 8, 8), randn(2, 16, 8, 8, seed=1)
    loss = DistillationLoss(only(name))
    small, large = (loss(scale * prediction, scale * target).total.item() for scale in (1, 100))
    assert large == pytest.approx(small, rel=1e-3)


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("edge", 2)])
def test_the_raw_forms_grow_with_the_scale_of_the_features(name: str, power: int) -> None:
    prediction, target = randn(2, 16, 8, 8), randn(2, 16, 8, 8, seed=1)
    loss = DistillationLoss(only(name, form="raw"))
    small, large = (loss(scale * prediction, scale * target).total.item() for scale in (1, 100))
    assert large == pytest.approx(small * 100**power, rel=1e-3)


@pytest.mark.parametrize("name", ["l1", "edge"])
def test_relative_terms_are_divided_by_the_mean_over_all_processes(name: str) -> None:
    prediction, target = randn(2, 8, 8, 8), randn(2, 8, 8, 8, seed=1)
    alone = DistillationLoss(only(name))(prediction, target).total.item()
    shared = DistillationLoss(only(name), mean_over_processes=lambda scale: 4 * scale)(prediction, target).total.item()
    assert shared == pytest.approx(alone / 4)


def test_losses_are_float32_whatever_comes_in() -> None:
    prediction, target = randn(1, 8, 8, 8), randn(1, 8, 8, 8, seed=1)
    rounded = DistillationLoss(LossConfig())(prediction.bfloat16(), target.half())
    expected = DistillationLoss(LossConfig())(prediction.bfloat16().float(), target.half().float())
    assert rounded.total.dtype == torch.float32
    assert torch.equal(rounded.total, expected.total)


def test_a_perfect_prediction_costs_nothing() -> None:
    target = randn(2, 16, 8, 8)
    parts = DistillationLoss(LossConfig(spectral=SpectralConfig(weight=0.1)))(target.clone(), target)
    terms = {name: value.item() for name, value in parts.terms.items()}
    assert terms == pytest.approx(dict.fromkeys(TERMS, 0.0), abs=1e-6)
