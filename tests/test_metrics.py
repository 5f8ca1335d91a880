"""Fidelity of a map to the teacher's, and the gap that a student recovers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from brixel_cli.core.metric_titles import gap_text
from brixel_cli.core.metrics import (
    FIDELITY,
    Gap,
    fidelity,
    fidelity_basis,
    gap_over_images,
    gap_over_seeds,
    gaps_by_domain,
    mean_gap,
    recovered_gap,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_target_is_perfectly_faithful_to_itself() -> None:
    target = randn(16, 12, 10)
    found = fidelity(target.clone(), target)
    assert tuple(found) == FIDELITY
    assert found == pytest.approx({"l1": 0.0, "cosine": 1.0, "edge": 0.0, "spectral": 0.0}, abs=1e-6)


def test_a_doubled_target_by_hand() -> None:
    # L1 = mean |T|; same direction; edges: (2 - 1)^2 of the energy; every amplitude twice as large: log(2)^2.
    target = randn(4, 12, 12)
    found = fidelity(2 * target, target)
    assert found["l1"] == pytest.approx(target.abs().mean().item())
    assert found["cosine"] == pytest.approx(1.0)
    assert found["edge"] == pytest.approx(1.0, rel=1e-4)
    assert found["spectral"] == pytest.approx(math.log(2) ** 2, rel=1e-4)


def test_a_blank_map_loses_all_edges_and_has_no_direction() -> None:
    found = fidelity(torch.zeros(16, 12, 12), randn(16, 12, 12))
    assert found["edge"] == pytest.approx(1.0, rel=1e-4)
    assert found["cosine"] == pytest.approx(0.0, abs=1e-6)


def test_fidelity_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    prediction, target = randn(16, 8, 8), randn(16, 8, 8, seed=1)
    before = torch.random.get_rng_state()
    first = fidelity(prediction, target)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert fidelity(prediction, target) == first


def test_a_target_without_edges_gives_finite_figures() -> None:
    assert all(math.isfinite(value) for value in fidelity(randn(8, 6, 6), torch.ones(8, 6, 6)).values())


def test_one_basis_serves_every_map_of_a_target() -> None:
    prediction, target = randn(16, 8, 8), randn(16, 8, 8, seed=1)
    assert fidelity(prediction, target, fidelity_basis(target)) == fidelity(prediction, target)
    assert fidelity(prediction, target.half(), fidelity_basis(target.half())) == fidelity(prediction, target.half())


def test_the_recovered_gap_of_a_metric_by_hand() -> None:
    assert recovered_gap(40.0, 55.0, 60.0) == 0.75  # 15 of 20 points
    assert recovered_gap(0.5, 0.4, 0.3, higher_is_better=False) == pytest.approx(0.5)
    # A teacher that is no better than the backbone leaves no gap.
    assert math.isnan(recovered_gap(60.0, 55.0, 60.0))
    assert math.isnan(recovered_gap(60.0, 55.0, 50.0))
    assert math.isnan(recovered_gap(0.3, 0.4, 0.5, higher_is_better=False))


def test_the_gap_over_seeds_has_its_spread_by_hand() -> None:
    # (0.5 - 0.4) / (0.6 - 0.4); each mean moves the share by 1/0.2, -0.5/0.2 and -0.5/0.2 of its own deviation.
    gap = gap_over_seeds((0.4, 0.02), (0.5, 0.01), (0.6, 0.04))
    assert gap.value == pytest.approx(0.5)
    assert gap.spread == pytest.approx((0.05**2 + (0.5 * 0.1) ** 2 + (0.5 * 0.2) ** 2) ** 0.5)
    # The gap of 0.2 is under two deviations, 2 * hypot(0.08, 0.08).
    assert math.isnan(gap_over_seeds((0.4, 0.08), (0.5, 0.01), (0.6, 0.08)).value)
    single = gap_over_seeds((0.4, math.nan), (0.5, math.nan), (0.6, math.nan))
    assert single.value == pytest.approx(0.5)
    assert math.isnan(single.spread)
    assert math.isnan(gap_over_seeds((0.4, 0.0), (0.5, 0.0), (0.6, 0.0), higher_is_better=False).value)


def test_the_gap_over_images_has_its_standard_error_by_hand() -> None:
    gap = gap_over_images([0.8, 0.6], [0.9, 0.7], "cosine")
    assert gap.value == pytest.approx(0.2 / 0.6)
    # Gains 0.1, 0.1; a third of the gaps 0.2, 0.4 is 1/15, 2/15: off by +1/30 and -1/30, whose deviation is sqrt(2)/30.
    assert gap.spread == pytest.approx(1 / 30 / 0.3)
    assert gap_over_images([0.8], [0.4], "l1").value == pytest.approx(0.5)
    assert math.isnan(gap_over_images([0.8], [0.4], "l1").spread)
    assert math.isnan(gap_over_images([1.0, 0.0], [1.0, 0.5], "cosine").value)  # 0.5 is one standard error
    for name, best in (("l1", 0.0), ("cosine", 1.0), ("edge", 0.0), ("spectral", 0.0)):
        plain = [0.5, 0.4, 0.45]
        assert gap_over_images(plain, plain, name) == Gap(0.0, 0.0)
        assert gap_over_images(plain, [best] * 3, name).value == pytest.approx(1.0)
        assert math.isnan(gap_over_images([best] * 3, plain, name).value)


def test_domains_are_the_first_folders_and_their_mean_leaves_out_those_without_a_gap() -> None:
    names = ["street/a.png", "rooms/x/b.png", "rooms/c.png", "flat/d.png", "street/e.png"]
    backbone, student = [0.8, 0.5, 0.6, 1.0, 0.8], [0.9, 0.5, 0.6, 1.0, 0.9]
    found = gaps_by_domain(names, backbone, student)
    assert list(found) == ["street", "rooms", "flat", "mean"]
    assert [found[name].value for name in ("street", "rooms", "mean")] == pytest.approx([0.5, 0.0, 0.25])
    assert math.isnan(found["flat"].value)
    assert mean_gap([Gap(0.2, 0.03), Gap(), Gap(0.4, 0.04)]) == Gap(pytest.approx(0.3), pytest.approx(0.025))
    assert math.isnan(mean_gap([Gap()]).value)
    assert gaps_by_domain(["a.png", "b.png"], [0.5, 0.5], [0.6, 0.6]) == {}
    assert gaps_by_domain(["one/a.png", "one/b.png"], [0.5, 0.5], [0.6, 0.6]) == {}


def test_a_gap_is_written_with_its_spread() -> None:
    assert (gap_text(0.5678, 0.131), gap_text(0.5678), gap_text(None), gap_text(math.nan, 0.1)) == (
        "57 +- 13 %", "56.8%", "-", "-",
    )  # fmt: skip
