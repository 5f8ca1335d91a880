"""How close a feature map is to the teacher's: L1, cosine, edge and spectral error of each image; the recovered gap."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel_cli.core.losses import Basis, cosine_error, edge_parts, fit_basis, spectral_error

FIDELITY = ("l1", "cosine", "edge", "spectral")
PERFECT = {"l1": 0.0, "cosine": 1.0, "edge": 0.0, "spectral": 0.0}
"""The teacher's own fidelity."""
COMPONENTS = 8
"""Principal components of the target in which edges are compared."""


@torch.no_grad()
def fidelity_basis(target: Tensor) -> Basis:
    """The principal components of a target (D, H, W) in which `fidelity` compares edges."""
    return fit_basis(target[None], COMPONENTS, seed=0, share=1.0)


@torch.no_grad()
def fidelity(prediction: Tensor, target: Tensor, basis: Basis | None = None) -> dict[str, float]:
    """Fidelity of one image's map to its target, both (D, H, W).

    Args:
        prediction: the map.
        target: the teacher's map.
        basis: `fidelity_basis(target)`, where several maps are compared with one target; None: fitted here.

    Returns:
        `l1`: mean absolute difference, in feature units, best 0. `cosine`: mean cosine similarity over locations,
        best 1. `edge`: squared error of the Sobel gradients in the target's first 8 principal components over the
        target's own gradient energy, best 0. `spectral`: mean squared log ratio of the high-frequency radial
        amplitudes, best 0.
    """
    prediction, target = prediction.float()[None], target.float()[None]
    edge, energy = edge_parts(prediction, target, basis or fidelity_basis(target[0]))
    return {
        "l1": F.l1_loss(prediction, target).item(),
        "cosine": 1 - cosine_error(prediction, target).item(),
        "edge": (edge / energy.clamp(min=1e-12)).item(),
        "spectral": spectral_error(prediction, target).item(),
    }


def recovered_gap(backbone: float, student: float, teacher: float, higher_is_better: bool = True) -> float:
    """(student - backbone) / (teacher - backbone) of a metric: 1 is the teacher, 0 the backbone.

    It is nan where the teacher is no better than the backbone: there is no gap to recover.
    """
    gap = teacher - backbone
    return (student - backbone) / gap if (gap > 0 if higher_is_better else gap < 0) else math.nan


def recovered_gaps(backbone: Mapping[str, float], student: Mapping[str, float]) -> dict[str, float]:
    """The recovered gap of each fidelity metric."""
    return {
        name: recovered_gap(backbone[name], student[name], PERFECT[name], higher_is_better=name == "cosine")
        for name in FIDELITY
    }
