"""Losses of the probes: cross-entropy, scale-invariant depth errors with a gradient term, cosine of normals.

All take a mask of valid pixels or an ignored label, and are 0, with zero gradients, where no pixel is valid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel_cli.config.labelled import IGNORE

EPSILON = 1e-3
"""Added to depths in metres before the logarithm, as in DINOv2's depth code."""
GRADIENT_STRIDES = (1, 2, 4, 6)
SIG_BETA = 0.15


def cross_entropy(logits: Tensor, labels: Tensor, ignore: int = IGNORE) -> Tensor:
    """Mean cross-entropy over the pixels whose label is not `ignore`.

    Args:
        logits: (B, C, ...).
        labels: (B, ...), integers in 0..C-1 or `ignore`.
        ignore: label that counts nowhere.
    """
    total = F.cross_entropy(logits, labels.long(), ignore_index=ignore, reduction="sum")
    return total / (labels != ignore).sum().clamp(min=1)


def scale_invariant_log(prediction: Tensor, target: Tensor, valid: Tensor, beta: float = SIG_BETA) -> Tensor:
    """sqrt(var(g) + beta * mean(g)^2), g = log(prediction) - log(target) over all valid pixels of the batch.

    This is SiLog; a constant factor before it, as some authors have (10), does not matter to AdamW.
    Sources: Eigen et al. 2014, eq. 4, whose lambda is 1 - beta; Bhat et al. 2021 (AdaBins), eq. 4, beta 0.15.

    Args:
        prediction: positive depths in metres, of any shape.
        target: the truth, of the same shape.
        valid: bool, of the same shape.
        beta: weight of the squared mean; 1 makes it the root mean square log error.
    """
    count, mean, variance = _log_moments(prediction, target, valid)
    return _root(variance + beta * mean.square()) * (count > 0)


def sig_loss(prediction: Tensor, target: Tensor, valid: Tensor, warming_up: bool = False) -> Tensor:
    """SigLoss of DINOv2's depth probes: SiLog with beta 0.15; while warming up, of its mean term alone.

    Source: https://github.com/facebookresearch/dinov2, dinov2/eval/depth/models/losses/sigloss.py.
    """
    if not warming_up:
        return scale_invariant_log(prediction, target, valid, SIG_BETA)
    count, mean, _ = _log_moments(prediction, target, valid)
    return _root(SIG_BETA * mean.square()) * (count > 0)


def gradient_term(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean absolute difference of log-depth gradients over two pixels, summed over strides of 1, 2, 4 and 6 pixels.

    Source: gradientloss.py beside `sig_loss`. The released code strides and differs along the batch and channel axes
    of its tensors; this is the term as it is meant, along height and width.

    Args:
        prediction: positive depths in metres (B, 1, H, W).
        target: the truth, of the same shape.
        valid: bool (B, 1, H, W).
    """
    total = prediction.new_zeros(())
    for stride in GRADIENT_STRIDES:
        mask = valid[..., ::stride, ::stride]
        difference = _log_difference(
            prediction[..., ::stride, ::stride], target[..., ::stride, ::stride], mask
        )  # 0 where invalid
        down = (difference[..., 2:, :] - difference[..., :-2, :]).abs() * (mask[..., 2:, :] & mask[..., :-2, :])
        across = (difference[..., 2:] - difference[..., :-2]).abs() * (mask[..., 2:] & mask[..., :-2])
        total = total + (down.sum() + across.sum()) / mask.sum().clamp(min=1)
    return total


def cosine_loss(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean of 1 - cosine between predicted and true normals over valid pixels.

    Args:
        prediction: (B, 3, ...), of any length.
        target: of the same shape.
        valid: bool (B, 1, ...).
    """
    cosine = F.cosine_similarity(prediction, target, dim=1)
    mask = valid[:, 0]
    return torch.where(mask, 1 - cosine, 0.0).sum() / mask.sum().clamp(min=1)


def sample_points(num_points: int, batch: int, generator: torch.Generator) -> Tensor:
    """Random places in [0, 1): (B, P, 2), fractions of height and width; the generator decides alone."""
    return torch.rand(batch, num_points, 2, generator=generator)


def at_points(maps: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Values of maps at label pixels, without resizing the whole maps: (B, K, P).

    The same values as bilinear resizing to the labels' size (align_corners=False) and selecting the pixels.

    Args:
        maps: (B, K, h, w).
        points: from `sample_points`.
        size: (height, width) of the labels.
    """
    pixels = _pixels(points, size).to(maps.device)
    extent = torch.tensor(size, device=maps.device)
    places = ((2 * pixels + 1) / extent - 1).to(maps.dtype)
    # Up to the centres of the outer locations: as padding by the border, which is missing on MPS.
    border = 1 - 1 / torch.tensor(maps.shape[-2:], device=maps.device, dtype=maps.dtype)
    places = torch.maximum(torch.minimum(places, border), -border).flip(-1)
    sampled = F.grid_sample(maps, places[:, None], mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled[:, :, 0]


def labels_at_points(labels: Tensor, points: Tensor) -> Tensor:
    """Values of labels (B, K, H, W) or (B, H, W) at the same pixels: (B, K, P) or (B, P)."""
    height, width = labels.shape[-2:]
    pixels = _pixels(points, (height, width)).to(labels.device)
    flat = pixels[..., 0] * width + pixels[..., 1]
    if labels.dim() == 3:
        return labels.flatten(1).gather(1, flat)
    return labels.flatten(2).gather(2, flat[:, None].expand(-1, labels.shape[1], -1))


def _pixels(points: Tensor, size: tuple[int, int]) -> Tensor:
    extent = torch.tensor(size)
    return (points.cpu() * extent).long().clamp(max=extent - 1)


def _log_difference(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """log(prediction) - log(target); 0, without gradient, where invalid."""
    one = prediction.new_ones(())
    kept, truth = torch.where(valid, prediction, one), torch.where(valid, target, one)
    return torch.log(kept + EPSILON) - torch.log(truth + EPSILON)


def _log_moments(prediction: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of valid pixels, and mean and variance (over the number itself) of their log differences."""
    difference = _log_difference(prediction, target, valid)
    count = valid.sum()
    mean = difference.sum() / count.clamp(min=1)
    variance = (torch.where(valid, difference - mean, 0.0).square()).sum() / count.clamp(min=1)
    return count, mean, variance


def _root(value: Tensor) -> Tensor:
    """The square root; its gradient is 0, not infinite, at 0."""
    return value.clamp(min=1e-12).sqrt()
