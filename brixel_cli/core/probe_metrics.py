"""Metrics of the probes, over a whole set and image by image: segmentation, depth, surface normals.

Sums are kept in float64 or as counts; predictions are never changed. An image without a valid pixel counts nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from brixel_cli.config.labelled import IGNORE

DILATION_RATIO = 0.02
ANGLE_BINS = 18_000
"""Of the histogram that the median is read from: 0.01 degrees each."""
ANGLES = (11.25, 22.5, 30.0)
LEADING = {
    "segmentation": "miou",
    "depth": "rmse_m",
    "normals": "mean_angle_deg",
    "matching": "pck_2",
    "propagation": "jf_mean",
}
"""The metric by which images are ranked."""
HIGHER_IS_BETTER = frozenset({"miou", "pixel_accuracy", "boundary_iou", "delta1", "delta2", "delta3"})
HIGHER_IS_BETTER |= {f"within_{angle:g}" for angle in ANGLES}
HIGHER_IS_BETTER |= {"pck_1", "pck_2", "pck_5", "jf_mean", "j_mean", "j_recall", "f_mean", "f_recall"}


class Meter(Protocol):
    """Gathers errors over a set, image by image."""

    def add(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """Take in one image; its own figures, nan where it has no valid pixel."""

    def compute(self) -> dict[str, Any]:
        """Figures of the set."""


class SegmentationMeter:
    """One confusion matrix over the whole set, and one of boundaries.

    Classes absent from both prediction and label are left out of the means, not counted as 0. Boundary IoU: IoU of
    the pixels of a class that are within 2 % of the image's diagonal of another one or of the image's border.
    Source: Cheng et al. 2021, https://arxiv.org/abs/2103.16562.

    Args:
        num_classes: C.
        ignore: label that counts nowhere.
    """

    def __init__(self, num_classes: int, ignore: int = IGNORE):
        self.num_classes, self.ignore = num_classes, ignore
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.boundary = torch.zeros(3, num_classes, dtype=torch.int64)

    def add(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """Take in one image: predicted and true classes (H, W), integers; its mIoU and boundary IoU."""
        prediction, target = prediction.cpu().long(), target.cpu().long()
        from torchmetrics.functional.classification import multiclass_confusion_matrix  # slow to import

        confusion = multiclass_confusion_matrix(
            prediction.flatten(), target.flatten(), self.num_classes, ignore_index=self.ignore, validate_args=False
        ).long()
        boundary = boundary_counts(prediction, target, self.num_classes, self.ignore)
        self.confusion += confusion
        self.boundary += boundary
        return self._summary(confusion, boundary)

    def compute(self) -> dict[str, Any]:
        """`miou`, `pixel_accuracy`, `boundary_iou`, and by class `class_iou`, `class_boundary_iou` (nan: absent)."""
        return self._summary(self.confusion, self.boundary) | {
            "class_iou": _ious(self.confusion).tolist(),
            "class_boundary_iou": _boundary_ious(self.boundary).tolist(),
        }

    @staticmethod
    def _summary(confusion: Tensor, boundary: Tensor) -> dict[str, float]:
        total = int(confusion.sum())
        return {
            "miou": _ious(confusion).nanmean().item(),
            "pixel_accuracy": int(confusion.trace()) / total if total else math.nan,
            "boundary_iou": _boundary_ious(boundary).nanmean().item(),
        }


class DepthMeter:
    """Errors in metres, pooled over all valid pixels of the set, and their means over images as second figures.

    Args:
        align: fit scale and shift of each image's prediction to the truth, by least squares over its valid pixels.
        least: predictions under this many metres are raised to it, as by the published evaluations.
    """

    def __init__(self, align: bool = False, least: float = 1e-3):
        self.align, self.least = align, least
        from torchmetrics import MeanMetric, Metric  # slow to import
        from torchmetrics.regression import MeanAbsolutePercentageError, MeanSquaredError

        self.metrics: dict[str, Metric] = {
            "rmse_m": MeanSquaredError(squared=False),
            "abs_rel": MeanAbsolutePercentageError(),
            **{name: MeanMetric() for name in ("delta1", "delta2", "delta3", "log_mean", "log_square")},
        }
        for metric in self.metrics.values():
            metric.set_dtype(torch.float64)
        self.images: list[dict[str, float]] = []

    def add(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """Take in one image: depths in metres (H, W); a truth that is not positive and finite is invalid."""
        valid = (target > 0) & target.isfinite()
        if not valid.any():
            return dict.fromkeys((*list(self.metrics)[:5], "silog"), math.nan)
        truth = target[valid].cpu().double()
        guess = prediction[valid].cpu().double()
        if self.align:
            guess = aligned(guess, truth)
        guess = guess.clamp(min=self.least)
        ratio = torch.maximum(guess / truth, truth / guess)
        logs = guess.log() - truth.log()
        parts = {f"delta{power}": (ratio < 1.25**power).double() for power in (1, 2, 3)}
        parts |= {"log_mean": logs, "log_square": logs.square()}
        values = {
            name: float(metric(parts[name]) if name in parts else metric(guess, truth))
            for name, metric in self.metrics.items()
        }
        self.images.append(_with_silog(values))
        return dict(self.images[-1])

    def compute(self) -> dict[str, Any]:
        """`rmse_m`, `abs_rel`, `delta1..3`, `silog`, pooled; the same names with `_image_mean` for the second figures.

        SiLog is 100 sqrt(var(log difference)), as on the KITTI benchmark.
        """
        if not self.images:
            return {}
        pooled = _with_silog({name: float(metric.compute()) for name, metric in self.metrics.items()})
        means = {f"{name}_image_mean": float(np.mean([image[name] for image in self.images])) for name in pooled}
        return pooled | means


class NormalsMeter:
    """Angles between predicted and true normals, pooled over all valid pixels of the set, and means over images."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.within = np.zeros(len(ANGLES), np.int64)
        self.histogram = np.zeros(ANGLE_BINS, np.int64)
        self.images: list[dict[str, float]] = []

    def add(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """Take in one image: vectors (3, H, W); a truth of length 0, or not finite, is invalid."""
        names = ["mean_angle_deg", "median_angle_deg", *(f"within_{angle:g}" for angle in ANGLES)]
        valid = (target.square().sum(dim=0) > 0) & target.isfinite().all(dim=0)
        if not valid.any():
            return dict.fromkeys(names, math.nan)
        angles = angles_deg(prediction[:, valid].cpu().double(), target[:, valid].cpu().double()).numpy()
        within = np.array([(angles < angle).sum() for angle in ANGLES])
        self.count += len(angles)
        self.total += float(angles.sum())
        self.within += within
        self.histogram += np.histogram(angles, bins=ANGLE_BINS, range=(0, 180))[0]
        figures = [angles.mean(), np.median(angles), *(within / len(angles))]
        self.images.append(dict(zip(names, map(float, figures), strict=True)))
        return dict(self.images[-1])

    def compute(self) -> dict[str, Any]:
        """Mean and median angle in degrees (the median to 0.01), shares under 11.25, 22.5 and 30 degrees."""
        if not self.count:
            return {}
        middle = int(np.searchsorted(np.cumsum(self.histogram), self.count / 2))
        pooled = {
            "mean_angle_deg": self.total / self.count,
            "median_angle_deg": (middle + 0.5) * 180 / ANGLE_BINS,
            **{f"within_{a:g}": int(n) / self.count for a, n in zip(ANGLES, self.within, strict=True)},
        }
        return pooled | {f"{name}_image_mean": float(np.mean([i[name] for i in self.images])) for name in pooled}


def aligned(prediction: Tensor, target: Tensor) -> Tensor:
    """Scale and shift of a prediction (N) that come nearest to the target by least squares; a constant is shifted."""
    deviation = prediction - prediction.mean()
    spread = deviation.square().sum()
    scale = (deviation * (target - target.mean())).sum() / spread if spread > 0 else spread.new_zeros(())
    return scale * deviation + target.mean()


def angles_deg(first: Tensor, second: Tensor) -> Tensor:
    """Angles in degrees between vectors (3, N), exact for small ones too: from the tangent of the half angle."""
    first, second = F.normalize(first, dim=0), F.normalize(second, dim=0)
    apart, along = (first - second).norm(dim=0), (first + second).norm(dim=0)
    return torch.rad2deg(2 * torch.atan2(apart, along))


def boundary_of(labels: Tensor, width: int) -> Tensor:
    """Pixels (H, W) within `width`, in the larger of both axes, of another label or of the image's border."""
    found = torch.ones(labels.shape, dtype=torch.bool)
    inner = found[width:-width, width:-width]  # whose square neighbourhood lies in the image
    if inner.numel():
        changes = torch.zeros(inner.shape, dtype=torch.int32)
        for axis, (rows, columns) in enumerate(((2 * width, 2 * width + 1), (2 * width + 1, 2 * width))):
            differs = (labels.diff(dim=axis) != 0).cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
            sums = F.pad(differs, (1, 0, 1, 0))  # of all that lies above and to the left
            changes += sums[rows:, columns:] - sums[:-rows, columns:] - sums[rows:, :-columns] + sums[:-rows, :-columns]
        inner.copy_(changes > 0)
    return found


def boundary_counts(prediction: Tensor, target: Tensor, num_classes: int, ignore: int = IGNORE) -> Tensor:
    """Pixels (3, C) on the boundaries of each class: in both at once, in the prediction, in the target.

    Ignored pixels belong to no class, in the prediction as in the target.
    """
    height, width = target.shape
    reach = max(round(DILATION_RATIO * math.hypot(height, width)), 1)
    prediction = torch.where(target == ignore, ignore, prediction)
    edges = [boundary_of(labels, reach) & (target != ignore) for labels in (prediction, target)]
    both = edges[0] & edges[1] & (prediction == target)
    chosen = (target[both], prediction[edges[0]], target[edges[1]])
    return torch.stack([torch.bincount(labels, minlength=num_classes) for labels in chosen])


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; nan for the spread of fewer than two."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _ious(confusion: Tensor) -> Tensor:
    both = confusion.diag().double()
    return both / (confusion.sum(dim=0) + confusion.sum(dim=1) - both)


def _boundary_ious(counts: Tensor) -> Tensor:
    both = counts[0].double()
    return both / (counts[1] + counts[2] - both)


def _with_silog(values: dict[str, float]) -> dict[str, float]:
    mean, square = values.pop("log_mean"), values.pop("log_square")
    return values | {"silog": 100 * math.sqrt(max(square - mean**2, 0.0))}
