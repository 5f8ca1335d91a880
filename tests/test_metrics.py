"""Fidelity of a map to the teacher's, and the gap that a student recovers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from brixel_cli.core.metrics import FIDELITY, fidelity, fidelity_basis, recovered_gap, recovered_gaps


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


def test_recovered_gaps_by_hand() -> None:
    baseline = {"l1": 0.8, "cosine": 0.80, "edge": 2.0, "spectral": 4.0}
    student = {"l1": 0.6, "cosine": 0.95, "edge": 2.5, "spectral": 0.0}
    # (0.6 - 0.8) / (0 - 0.8) = 0.25; (0.95 - 0.80) / (1 - 0.80) = 0.75; (2.5 - 2) / -2 = -0.25; (0 - 4) / -4 = 1
    expected = {"l1": 0.25, "cosine": 0.75, "edge": -0.25, "spectral": 1.0}
    assert recovered_gaps(baseline, student) == pytest.approx(expected)


def test_the_backbone_recovers_nothing_and_the_teacher_everything() -> None:
    baseline = {"l1": 0.8, "cosine": 0.80, "edge": 2.0, "spectral": 4.0}
    teacher = {"l1": 0.0, "cosine": 1.0, "edge": 0.0, "spectral": 0.0}
    assert recovered_gaps(baseline, baseline) == dict.fromkeys(FIDELITY, 0.0)
    assert recovered_gaps(baseline, teacher) == dict.fromkeys(FIDELITY, 1.0)


def test_without_a_gap_nothing_is_recovered() -> None:
    teacher = {"l1": 0.0, "cosine": 1.0, "edge": 0.0, "spectral": 0.0}
    student = {"l1": 0.1, "cosine": 1.0, "edge": 0.0, "spectral": 0.2}
    assert all(math.isnan(share) for share in recovered_gaps(teacher, student).values())
