"""Ridge regression from the backbone's four maps to what the teacher's map adds, on the token grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel_cli.errors import BrixelError

STRENGTHS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
"""Of the ridge, as a share of the inputs' mean variance."""


class LinearFit:
    """Sums over many views, from which the regression is solved; the best ridge is chosen on views left out.

    Attributes:
        sums: for the two parts of the views (fitted on, left out), and to be added up over processes:
            inputs by inputs (2, 4 D + 1, 4 D + 1) and inputs by outputs (2, 4 D + 1, D), float64; the last input is 1.
    """

    def __init__(self, embed_dim: int, device: torch.device):
        place = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        size = 4 * embed_dim + 1
        self.sums = (
            torch.zeros(2, size, size, dtype=torch.float64, device=place),
            torch.zeros(2, size, embed_dim, dtype=torch.float64, device=place),
        )

    @staticmethod
    def num_bytes(embed_dim: int) -> int:
        """Memory of the sums."""
        return 8 * 2 * (4 * embed_dim + 1) * (5 * embed_dim + 1)

    @torch.no_grad()
    def add(self, maps: Sequence[Tensor], residual: Tensor, targets: Tensor, left_out: Tensor) -> None:
        """Take in views.

        Args:
            maps: four backbone maps (B, D, h, w), the last block's last.
            residual: what the adapter adds to its learned part, on the token grid: (B, D, h, w).
            targets: the teacher's maps (B, D, H, W).
            left_out: which of the B views are left out of the choice's fit, bool.
        """
        grid = (residual.shape[-2], residual.shape[-1])
        inputs = torch.cat([*(map_.float() for map_ in maps), torch.ones_like(maps[0][:, :1]).float()], dim=1)
        outputs = F.adaptive_avg_pool2d(targets.float(), grid) - residual.float()
        for part in (False, True):
            chosen = left_out.to(inputs.device) == part
            x, y = (t[chosen].permute(0, 2, 3, 1).flatten(0, 2) for t in (inputs, outputs))
            for total, right in zip(self.sums, (x, y), strict=True):
                total[int(part)] += (x.T @ right).to(total.device).to(total.dtype)  # device first: MPS has no float64

    def solve(self) -> tuple[Tensor, Tensor, float]:
        """Weight (D, 4 D), bias (D) and the ridge's strength, chosen by the squared error on the views left out.

        The weights are those of all views; with none left out the strongest ridge is taken.

        Raises:
            BrixelError: the sums are not finite.
        """
        if not all(total.isfinite().all() for total in self.sums):
            raise BrixelError("the sums of the linear fit are not finite")
        (fitted, held), (fitted_out, held_out) = (tuple(total.cpu()) for total in self.sums)

        regression = _Ridge(fitted, fitted_out)

        def error(strength: float) -> float:
            weights = regression.weights(strength)
            return float((weights * (held @ weights)).sum() - 2 * (weights * held_out).sum())

        least = min(STRENGTHS, key=error) if held[-1, -1] and fitted[-1, -1] else STRENGTHS[-1]
        weights = _Ridge(fitted + held, fitted_out + held_out).weights(least)
        return weights[:-1].T.float(), weights[-1].float(), least


class _Ridge:
    """Ridge regressions of every strength from one eigendecomposition of the inputs' covariance.

    Args:
        inputs: sums of inputs by inputs (4 D + 1, 4 D + 1).
        outputs: sums of inputs by outputs (4 D + 1, D).
    """

    def __init__(self, inputs: Tensor, outputs: Tensor):
        count = inputs[-1, -1].clamp(min=1)
        self.mean_in, self.mean_out = inputs[-1, :-1] / count, outputs[-1] / count
        covariance = inputs[:-1, :-1] / count - torch.outer(self.mean_in, self.mean_in)
        self.variance = covariance.diagonal().mean()
        self.values, self.vectors = torch.linalg.eigh(covariance)
        self.joint = self.vectors.T @ (outputs[:-1] / count - torch.outer(self.mean_in, self.mean_out))

    def weights(self, strength: float) -> Tensor:
        """Weights (4 D + 1, D), the last row the intercept, which is not penalised."""
        ridge = (strength * self.variance).clamp(min=torch.finfo(torch.float32).tiny)
        # Rounding can leave an eigenvalue of zero a little below it.
        weights = self.vectors @ (self.joint / (self.values.clamp(min=0) + ridge)[:, None])
        return torch.cat([weights, (self.mean_out - self.mean_in @ weights)[None]])
