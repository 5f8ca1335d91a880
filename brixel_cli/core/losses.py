"""Distillation losses between a prediction P and a target T, both (B, D, H, W), computed in float32.

Source: BRIXEL, arXiv 2511.05168: L1 + edge + spectral; the cosine term is ours. Each term has a scale-free default
and the released form; see the recipe's `loss` section.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel_cli.config.distill import LossConfig

NUM_RADIAL_BINS = 24
HIGH_FREQUENCY_FROM = 0.3
EPS = 1e-8


@dataclass(frozen=True)
class Basis:
    """Principal components (D, K) and mean (D) of feature vectors; both without gradient."""

    components: Tensor
    mean: Tensor

    def project(self, maps: Tensor) -> Tensor:
        """Maps (B, D, H, W) as component scores (B, K, H, W)."""
        centred = maps - self.mean[:, None, None]
        scores: Tensor = torch.einsum("bdhw,dk->bkhw", centred, self.components)
        return scores


@torch.no_grad()
def fit_basis(maps: Tensor, num_components: int, seed: int, share: float = 1 / 3) -> Basis:
    """PCA of a random share of the locations of `maps` (B, D, H, W), by a rank-24 randomised SVD with 2 iterations.

    It is computed on the CPU, since MPS lacks the QR that the SVD needs, and returned on the device of the maps. The
    same values and seed give the same basis, whatever the device. Every generator of torch is left as it was.
    """
    tokens = maps.permute(0, 2, 3, 1).flatten(0, 2)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of the GPUs too
        chosen = tokens[torch.randperm(len(tokens))[: max(int(len(tokens) * share), 1)].to(tokens.device)].cpu().float()
        mean = chosen.mean(dim=0)
        rank = min(24, *chosen.shape)
        components = torch.svd_lowrank(chosen - mean, q=rank, niter=2)[2][:, :num_components]
    return Basis(components.to(maps.device), mean.to(maps.device))


def sobel(maps: Tensor) -> tuple[Tensor, Tensor]:
    """3x3 Sobel gradients in x and y of (B, C, H, W), not normalised, no padding: two of (B, C, H - 2, W - 2)."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=maps.device, dtype=maps.dtype)
    channels = maps.shape[1]
    in_x = F.conv2d(maps, kernel.expand(channels, 1, 3, 3), groups=channels)
    in_y = F.conv2d(maps, kernel.T.expand(channels, 1, 3, 3), groups=channels)
    return in_x, in_y


def edge_parts(prediction: Tensor, target: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """Squared difference of Sobel gradients in the basis, MSE(x) + MSE(y), and the target's own energy, detached."""
    px, py = sobel(basis.project(prediction))
    tx, ty = sobel(basis.project(target))
    error = F.mse_loss(px, tx) + F.mse_loss(py, ty)
    return error, (tx.square().mean() + ty.square().mean()).detach()


def radial_bins(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Bin 0..23 of every location (H, W) of a centred spectrum, by its distance from zero frequency, corner = 1."""
    fy = torch.fft.fftshift(torch.fft.fftfreq(height, device=device))
    fx = torch.fft.fftshift(torch.fft.fftfreq(width, device=device))
    radius = (fy[:, None].square() + fx[None, :].square()).sqrt()
    bins: Tensor = (radius / radius.max() * NUM_RADIAL_BINS).long()
    return bins.clamp(max=NUM_RADIAL_BINS - 1)


def radial_amplitude(maps: Tensor, centred: bool = True) -> Tensor:
    """Mean amplitude of the spectrum of (B, D, H, W) in the radial bins from 0.3 up: (B, bins).

    Hann window (non-periodic), 2-D FFT (ortho), amplitude, mean over channels, mean over each bin. With
    `centred=False` the spectrum is not shifted before binning, as in the released code: what it calls high
    frequency then contains zero frequency. Bins without any location (small maps) are left out.
    """
    height, width = maps.shape[-2:]
    window = torch.outer(
        torch.hann_window(height, periodic=False, device=maps.device),
        torch.hann_window(width, periodic=False, device=maps.device),
    )
    # The spectrum of real maps is symmetric: half of it is computed, the other half mirrored after the channel mean.
    half = torch.fft.rfft2(maps * window, norm="ortho").abs().mean(dim=1)
    rows = -torch.arange(height, device=maps.device) % height
    mirrored = half[:, rows][:, :, 1 : (width + 1) // 2].flip(-1)
    amplitude = torch.cat([half, mirrored], dim=-1)
    if centred:
        amplitude = torch.fft.fftshift(amplitude, dim=(-2, -1))
    bins = radial_bins(height, width, maps.device).flatten()
    sums = amplitude.new_zeros(len(maps), NUM_RADIAL_BINS).index_add_(1, bins, amplitude.flatten(1))
    counts = torch.bincount(bins, minlength=NUM_RADIAL_BINS)
    kept = counts.nonzero().flatten()
    kept = kept[kept >= math.floor(HIGH_FREQUENCY_FROM * NUM_RADIAL_BINS)]
    return sums[:, kept] / counts[kept]


def spectral_error(prediction: Tensor, target: Tensor, centred: bool = True) -> Tensor:
    """Mean squared difference of the logarithms of the high-frequency radial amplitudes: a scalar."""
    predicted = radial_amplitude(prediction, centred)
    wanted = radial_amplitude(target, centred)
    return ((predicted + EPS).log() - (wanted + EPS).log()).square().mean()


def cosine_error(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - mean cosine similarity over locations: a scalar in [0, 2]."""
    return 1 - F.cosine_similarity(prediction, target, dim=1).mean()


@dataclass(frozen=True)
class LossParts:
    """The weighted total and, by name, the unweighted terms that were computed."""

    total: Tensor
    terms: dict[str, Tensor]


class DistillationLoss:
    """The recipe's sum of terms; a term of weight 0 is not computed.

    Args:
        config: the recipe's `loss` section.
        basis: fixed PCA basis of the edge term; None: fitted on every batch.
        mean_over_processes: averages a tensor over all processes, so that the scales by which the relative terms
            are divided are those of the whole batch, wherever its parts are.
    """

    def __init__(
        self,
        config: LossConfig,
        basis: Basis | None = None,
        mean_over_processes: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ):
        self.config = config
        self.basis = basis
        self.mean_over_processes = mean_over_processes

    def __call__(self, prediction: Tensor, target: Tensor, seed: int = 0) -> LossParts:
        """Compute all terms.

        Args:
            prediction: student maps (B, D, H, W).
            target: teacher maps (B, D, H, W), of any float type; receives no gradient.
            seed: of the random choices of a basis fitted on the batch.
        """
        prediction = prediction.float()
        target = target.detach().float()
        if target.stride() != prediction.stride() and target.shape == prediction.shape:
            target = torch.empty_like(prediction).copy_(target)  # layouts that differ cost twice the time
        config, terms = self.config, dict[str, tuple[float, Tensor]]()
        if config.l1.weight:
            l1 = F.l1_loss(prediction, target)
            if config.l1.form == "relative":
                l1 = l1 / (self.mean_over_processes(target.abs().mean()) + EPS)
            terms["l1"] = (config.l1.weight, l1)
        if config.edge.weight:
            basis = self.basis or fit_basis(target, config.edge.components, seed)
            edge, energy = edge_parts(prediction, target, basis)
            if config.edge.form == "relative":
                edge = edge / (self.mean_over_processes(energy) + EPS)
            terms["edge"] = (config.edge.weight, edge)
        if config.spectral.weight:
            spectral = spectral_error(prediction, target, centred=config.spectral.form == "centred")
            terms["spectral"] = (config.spectral.weight, spectral)
        if config.cosine.weight:
            terms["cosine"] = (config.cosine.weight, cosine_error(prediction, target))
        total = torch.stack([weight * value for weight, value in terms.values()]).sum()
        return LossParts(total, {name: value.detach() for name, (_, value) in terms.items()})
