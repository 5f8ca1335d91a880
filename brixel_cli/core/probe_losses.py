"""Losses of the probes: cross-entropy, scale-invariant depth errors with a gradient term, cosine of normals.

All take a mask of valid pixels or an ignored label, and are 0, with zero gradients, where no pixel is valid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
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
    """Random rows and columns of each image, whose crossings are the points: (B, 2, S), fractions in [0, 1) ascending.

    S is the whole part of the root of `num_points`. One row is drawn from each of S equal strips of the height, and one
    column of the width, so that every pixel is as likely as any other. Values at crossings are two small products of
    matrices; at as many single pixels, reading them and adding up their gradients takes most of a step's time.

    Args:
        num_points: of each image; S * S are drawn.
        batch: B.
        generator: decides alone.
    """
    side = math.isqrt(num_points)
    return (torch.rand(batch, 2, side, generator=generator) + torch.arange(side)) / side


def at_points(maps: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Values of maps at label pixels, without resizing the whole maps: (B, K, S, S).

    The same values as bilinear resizing to the labels' size (align_corners=False) and selecting the pixels.

    Args:
        maps: (B, K, h, w).
        points: from `sample_points`.
        size: (height, width) of the labels.
    """
    rows, columns = (
        _bilinear(pixels, length, locations).to(maps)
        for pixels, length, locations in zip(_pixels(points, size), size, maps.shape[-2:], strict=True)
    )
    sampled: Tensor = rows[:, None] @ (maps.flatten(1, 2) @ columns.mT).unflatten(1, maps.shape[1:3])
    return sampled


def labels_at_points(labels: Sequence[npt.NDArray[Any]], points: Tensor) -> Tensor:
    """Values of images' labels (H, W) or (K, H, W), all of one size, at the same pixels: (B, ..., S, S)."""
    rows, columns = (pixels.numpy() for pixels in _pixels(points, labels[0].shape[-2:]))
    chosen = [np.asarray(values)[..., r[:, None], c] for values, r, c in zip(labels, rows, columns, strict=True)]
    return torch.from_numpy(np.stack(chosen))


def _pixels(points: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows and columns (B, S) of points, in pixels of labels of a size."""
    rows, columns = ((points[:, axis] * size[axis]).long().clamp(max=size[axis] - 1) for axis in (0, 1))
    return rows, columns


def _bilinear(pixels: Tensor, length: int, locations: int) -> Tensor:
    """Weights (B, S, locations) of a map's locations at pixels (B, S), of `length` on the same stretch."""
    places = ((pixels + 0.5) * (locations / length) - 0.5).clamp(0, locations - 1)
    distances = (places[..., None] - torch.arange(locations)).abs()
    return (1 - distances).clamp(min=0)


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
