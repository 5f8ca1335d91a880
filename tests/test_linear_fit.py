"""The closed-form fit of the adapter's linear part."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import Listener, with_changes
from torch import Tensor

from brixel_cli.config.distill import AdapterConfig, FusionConfig, Recipe
from brixel_cli.core.linear_fit import STRENGTHS, LinearFit
from brixel_cli.core.student import build_adapter
from brixel_cli.core.weights import load_tensors
from brixel_cli.engines.distilling.distillation import distill
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.errors import BrixelError

CPU = torch.device("cpu")


def views(count: int, weight: Tensor, bias: Tensor, noise: float = 0.0, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Maps (count, 2, 2, 3), and targets four times as fine whose means over cells are the last map plus the rule."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(count, 2, 2, 3, generator=generator) for _ in range(4)]
    added = torch.einsum("oi,bihw->bohw", weight, torch.cat(maps, dim=1)) + bias[:, None, None]
    coarse = maps[-1] + added + noise * torch.randn(count, 2, 2, 3, generator=generator)
    detail = torch.randn(count, 2, 8, 12, generator=generator)
    detail -= torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(detail, 4), scale_factor=4)
    return maps, torch.nn.functional.interpolate(coarse, scale_factor=4) + detail


def test_it_finds_the_rule_behind_the_maps() -> None:
    weight, bias = torch.randn(2, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([3.0, -2.0])
    fit = LinearFit(2, CPU)
    maps, targets = views(200, weight, bias)
    fit.add(maps, maps[-1], targets, torch.arange(200) % 5 == 4)
    found_weight, found_bias, strength = fit.solve()
    assert strength == STRENGTHS[0]  # nothing but the rule: the weakest ridge is best
    # The ridge of 0.001 draws the weights of inputs of variance about 1 to zero by about a thousandth.
    assert torch.allclose(found_weight, weight / (1 + STRENGTHS[0]), atol=1e-3)
    assert torch.allclose(found_bias, bias, atol=1e-3)


def test_one_input_by_hand() -> None:
    """Two locations, the last map 1 and 3, the others zero; the target adds 2 and 6: slope 2, less the ridge's share."""
    fit = LinearFit(1, CPU)
    last = torch.tensor([[[[1.0, 3.0]]]])
    zeros = torch.zeros_like(last)
    fit.add([zeros, zeros, zeros, last], last, torch.tensor([[[[3.0, 9.0]]]]), torch.tensor([False]))
    weight, bias, strength = fit.solve()
    assert strength == STRENGTHS[-1]  # no view was left out to choose by: the strongest
    # Variance of the input 1, of all four on average 1/4; covariance with what is added 2: 2 / (1 + 10 / 4).
    slope = 2 / (1 + 10 / 4)
    assert weight.tolist() == [[0.0, 0.0, 0.0, pytest.approx(slope)]]
    assert bias.tolist() == [pytest.approx(4 - slope * 2)]


def test_noise_asks_for_a_stronger_ridge() -> None:
    weight, bias = torch.full((2, 8), 0.1), torch.zeros(2)
    chosen = []
    for noise in (0.0, 5.0):
        fit = LinearFit(2, CPU)
        maps, targets = views(15, weight, bias, noise)
        fit.add(maps, maps[-1], targets, torch.arange(15) % 5 == 4)
        chosen.append(fit.solve()[2])
    assert chosen[0] == STRENGTHS[0]
    assert chosen[1] > 0.1


def test_views_taken_in_one_by_one_give_the_same() -> None:
    weight, bias = torch.randn(2, 8, generator=torch.Generator().manual_seed(5)), torch.ones(2)
    maps, targets = views(12, weight, bias, noise=1.0)
    left_out = torch.arange(12) % 4 == 0
    at_once, apart = LinearFit(2, CPU), LinearFit(2, CPU)
    at_once.add(maps, maps[-1], targets, left_out)
    for number in range(12):
        one = slice(number, number + 1)
        apart.add([map_[one] for map_ in maps], maps[-1][one], targets[one], left_out[one])
    for first, second in zip(at_once.solve(), apart.solve(), strict=True):
        assert torch.allclose(torch.as_tensor(first), torch.as_tensor(second), atol=1e-6)


def test_every_strength_comes_from_one_eigendecomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (calls.append(len(matrix)), eigh(matrix))[1])
    weight, bias = torch.full((2, 8), 0.1), torch.ones(2)
    maps, targets = views(15, weight, bias, noise=5.0)
    fit = LinearFit(2, CPU)
    fit.add(maps, maps[-1], targets, torch.arange(15) % 5 == 4)
    found, intercept, strength = fit.solve()
    assert calls == [8, 8]  # one to choose the strength, one of all views
    # The normal equations of the centred sums, solved directly.
    inputs, outputs = (sums.sum(dim=0) for sums in fit.sums)
    count = inputs[-1, -1]
    mean_in, mean_out = inputs[-1, :-1] / count, outputs[-1] / count
    covariance = inputs[:-1, :-1] / count - torch.outer(mean_in, mean_in)
    ridge = strength * covariance.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    joint = outputs[:-1] / count - torch.outer(mean_in, mean_out)
    expected = torch.linalg.solve(covariance + ridge, joint)
    torch.testing.assert_close(found, expected.T.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(intercept, (mean_out - mean_in @ expected).float(), atol=1e-6, rtol=1e-5)


def test_constant_maps_give_finite_weights() -> None:
    fit = LinearFit(1, CPU)
    fit.add(
        [torch.ones(2, 1, 2, 2)] * 4, torch.ones(2, 1, 2, 2), torch.full((2, 1, 4, 4), 3.0), torch.tensor([False, True])
    )
    weight, bias, _ = fit.solve()
    assert weight.tolist() == [[0.0, 0.0, 0.0, 0.0]]
    assert bias.tolist() == [2.0]


def test_an_adapter_takes_it_over() -> None:
    """A fresh adapter with the fitted linear part gives the last map plus what the rule adds, enlarged."""
    adapter = build_adapter(2, 4, AdapterConfig(fusion=FusionConfig(width=8, middle_width=8, fine_width=8))).eval()
    weight, bias = torch.randn(2, 8, generator=torch.Generator().manual_seed(5)), torch.ones(2)
    adapter.set_linear(weight, bias)
    maps, targets = views(3, weight, bias)
    with torch.inference_mode():
        prediction = adapter(torch.zeros(3, 3, 28, 42), maps)
    coarse = torch.nn.functional.avg_pool2d(targets, 4)
    # Enlarging goes by way of the middle grid for what is added, straight for the last map.
    added = coarse - maps[-1]
    expected = sum(
        torch.nn.functional.interpolate(part, size=size, mode="bilinear")
        for part, size in (
            (torch.nn.functional.interpolate(added, size=(4, 6), mode="bilinear"), (8, 12)),
            (maps[-1], (8, 12)),
        )
    )
    assert torch.allclose(prediction, expected, atol=1e-5)


def test_sums_that_are_not_finite_are_named() -> None:
    fit = LinearFit(1, CPU)
    maps = [torch.ones(1, 1, 2, 2)] * 4
    fit.add(maps, maps[-1], torch.full((1, 1, 4, 4), torch.inf), torch.tensor([False]))
    with pytest.raises(BrixelError, match="the sums of the linear fit are not finite"):
        fit.solve()


def test_the_memory_of_the_sums_is_known_before() -> None:
    fit = LinearFit(6, CPU)
    assert sum(total.numel() * total.element_size() for total in fit.sums) == LinearFit.num_bytes(6)


# In a run


def linear_weight(folder: Path) -> Tensor:
    return load_tensors(folder / "student.safetensors")[0]["linear.weight"]


def test_the_linear_part_is_fitted_before_the_first_step(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    still = ("optim.steps=1", "optim.lr=1e-12", "optim.average=0.0", "optim.weight_decay=0.0", "run.validate_every=1")
    results = {}
    for name, views in (("fitted", 2048), ("two", 2), ("zero", 0)):
        recipe = with_changes(tiny_recipe_file, *still, f"optim.linear_views={views}")
        results[name] = distill(recipe, RunFolder(tmp_path / name), listener).results.best
    said = [line for line in listener.said if line.startswith("linear part fitted")]
    assert [line.split(",")[0] for line in said] == ["linear part fitted on 6 views", "linear part fitted on 2 views"]
    fitted, zero = (linear_weight(tmp_path / name) for name in ("fitted", "zero"))
    assert fitted.abs().max() > 1e-4
    assert zero.abs().max() < 1e-10
    assert results["fitted"].student["cosine"] > results["fitted"].backbone["cosine"] + 0.01
    assert results["zero"].student["cosine"] == pytest.approx(results["zero"].backbone["cosine"], abs=1e-4)
    # A student to begin with keeps its own.
    again = with_changes(tiny_recipe_file, *still, f"init={tmp_path / 'fitted'}", "seed=5", "backbone.weights=random")
    distill(again, RunFolder(tmp_path / "again"), listener)
    assert torch.allclose(linear_weight(tmp_path / "again"), fitted, atol=1e-9)


def test_the_linear_fit_draws_views_of_every_size_and_photograph(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six photographs of four views in two sizes: of twelve views drawn, both sizes are there and both parts."""
    seen: list[tuple[tuple[int, ...], list[bool]]] = []
    add = LinearFit.add

    def watched(fit: LinearFit, maps, residual, targets, left_out) -> None:
        seen.append((tuple(targets.shape[-2:]), left_out.tolist()))
        add(fit, maps, residual, targets, left_out)

    monkeypatch.setattr(LinearFit, "add", watched)
    recipe = with_changes(tiny_recipe_file, "optim.linear_views=12", "views.kind=fixed", "views.per_image=4",
                          "views.other_sizes=[64]", "optim.steps=1", "run.validate_every=1")  # fmt: skip
    distill(recipe, RunFolder(tmp_path / "run"), listener)
    assert {grid for grid, _ in seen} == {(8, 8), (4, 4)}
    marks = [mark for _, left_out in seen for mark in left_out]
    assert len(marks) == 12
    assert 0 < sum(marks) < 6


def test_a_linear_part_that_cannot_be_fitted_starts_at_zero(
    tiny_recipe: Recipe, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = LinearFit.add

    def add_infinity(fit: LinearFit, maps, residual, targets, left_out) -> None:
        add(fit, maps, residual, targets + math.inf, left_out)

    monkeypatch.setattr(LinearFit, "add", add_infinity)
    distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    assert listener.warned == ["the linear part starts at zero: the sums of the linear fit are not finite"]
    assert linear_weight(tmp_path / "run").isfinite().all()
