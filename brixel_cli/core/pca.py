"""Principal components of a whole set of maps, which need not be in memory together."""

from __future__ import annotations

import torch
from torch import Tensor

from brixel_cli.core.losses import Basis


class RunningPca:
    """Gathers mean and covariance of feature vectors, map after map, in float64.

    Args:
        channels: D of the maps.
    """

    def __init__(self, channels: int):
        self.count = 0
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.products = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, map_: Tensor) -> None:
        """Take in all locations of a map (D, h, w)."""
        tokens = map_.detach().flatten(1).cpu().double()  # the CPU first: MPS has no float64
        self.count += tokens.shape[1]
        self.total += tokens.sum(dim=1)
        self.products += tokens @ tokens.T

    def basis(self, num_components: int) -> Basis:
        """The leading components (D, K), float32; each signed so that its largest entry is positive."""
        mean = self.total / max(self.count, 1)
        covariance = self.products / max(self.count, 1) - torch.outer(mean, mean)
        components = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :num_components]
        largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
        return Basis((components * largest.sign()).float().contiguous(), mean.float())
