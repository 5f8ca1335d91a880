"""How faithful a map is to the teacher's: L1, cosine, edge and spectral error, image by image."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel_cli.core.losses import cosine_error, edge_parts, fit_basis, spectral_error

FIDELITY = ("l1", "cosine", "edge", "spectral")


@torch.no_grad()
def fidelity(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Fidelity of one image's map to its target, both (D, H, W).

    Returns:
        `l1`: mean absolute difference, in feature units, best 0. `cosine`: mean cosine similarity over locations,
        best 1. `edge`: squared error of the Sobel gradients in the target's first 8 principal components over the
        target's own gradient energy, best 0. `spectral`: mean squared log ratio of the high-frequency radial
        amplitudes, best 0.
    """
    prediction, target = prediction.float()[None], target.float()[None]
    edge, energy = edge_parts(prediction, target, fit_basis(target, 8, seed=0, share=1.0))
    return {
        "l1": F.l1_loss(prediction, target).item(),
        "cosine": 1 - cosine_error(prediction, target).item(),
        "edge": (edge / energy.clamp(min=1e-12)).item(),
        "spectral": spectral_error(prediction, target).item(),
    }


def share_of_gap_closed(baseline: Mapping[str, float], student: Mapping[str, float]) -> dict[str, float]:
    """(student - baseline) / (teacher - baseline) for each fidelity metric; 1 is the teacher, 0 the baseline.

    A metric in which the baseline already equals the teacher has no gap, and is nan.
    """
    teacher = {"l1": 0.0, "cosine": 1.0, "edge": 0.0, "spectral": 0.0}
    shares = {}
    for name in FIDELITY:
        gap = teacher[name] - baseline[name]
        shares[name] = (student[name] - baseline[name]) / gap if gap else float("nan")
    return shares
