"""Metrics of video object segmentation: region similarity J and contour accuracy F, by object.

Source: Perazzi et al. 2016, A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation, section 5;
means over objects, and which frames count, as in Pont-Tuset et al. 2017, https://arxiv.org/abs/1704.00675.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Mask = npt.NDArray[np.bool_]
CONTOUR_TOLERANCE = 0.008
"""Of contours that count as equal: the distance in pixels over the image's diagonal, rounded up."""
GOOD = 0.5
"""Recall is the share of frames above it."""
PARTS = 4
"""Decay is the mean of the first part of a sequence minus that of the last."""


def region_similarity(prediction: Mask, truth: Mask) -> float:
    """J: intersection over union of masks (H, W); 1 where both are empty."""
    union = int((prediction | truth).sum())
    return int((prediction & truth).sum()) / union if union else 1.0


def contour_accuracy(prediction: Mask, truth: Mask) -> float:
    """F: harmonic mean of the precision and recall of the contour of masks (H, W).

    A pixel of a contour is matched if one of the other contour is at most `CONTOUR_TOLERANCE` of the image's diagonal
    away, rounded up to whole pixels. 1 where both contours are empty, 0 where one is.
    """
    reach = math.ceil(CONTOUR_TOLERANCE * math.hypot(*truth.shape))
    guess, true = contour(prediction), contour(truth)
    num_guess, num_true = int(guess.sum()), int(true.sum())
    if not num_guess or not num_true:
        return float(num_guess == num_true)
    precision = int((guess & dilated(true, reach)).sum()) / num_guess
    recall = int((true & dilated(guess, reach)).sum()) / num_true
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: Mask) -> Mask:
    """Pixels (H, W) that differ from their right, lower, or lower right neighbour in the image."""
    edges = np.zeros_like(mask)
    edges[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edges[:-1] |= mask[:-1] != mask[1:]
    edges[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return edges


def dilated(mask: Mask, radius: int) -> Mask:
    """Pixels (H, W) that are at most so many pixels from one of the mask."""
    rows, columns = np.nonzero(mask)
    found = np.zeros_like(mask)
    if not len(rows):
        return found
    top, left = max(int(rows.min()) - radius, 0), max(int(columns.min()) - radius, 0)
    window = np.s_[top : int(rows.max()) + radius + 1, left : int(columns.max()) + radius + 1]
    offsets = np.arange(-radius, radius + 1)
    disc = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float32)
    part = torch.from_numpy(mask[window].astype(np.float32))[None, None]
    found[window] = F.conv2d(part, torch.from_numpy(disc)[None, None], padding=radius)[0, 0].numpy() > 0.5
    return found


def object_figures(regions: Sequence[float], contours: Sequence[float]) -> dict[str, float]:
    """Figures of an object from J and F of the frames that count: mean, recall and decay of each, and their mean J&F.

    Recall: share of frames above 0.5. Decay: mean of the first quarter of the frames minus that of the last.
    """
    figures: dict[str, float] = {}
    for name, values in (("j", np.asarray(regions)), ("f", np.asarray(contours))):
        ends = np.floor(np.linspace(1, len(values), PARTS + 1) + 0.5).astype(int) - 1
        first, last = values[: ends[1] + 1], values[ends[-2] : ends[-1] + 1]
        figures |= {
            f"{name}_mean": float(values.mean()),
            f"{name}_recall": float((values > GOOD).mean()),
            f"{name}_decay": float(first.mean() - last.mean()),
        }
    return {"jf_mean": (figures["j_mean"] + figures["f_mean"]) / 2, **figures}
