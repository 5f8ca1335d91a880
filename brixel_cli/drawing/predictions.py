"""Predictions of probes as pictures: class maps, depth, surface normals, and where they differ from the truth."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from brixel_cli.config.labelled import IGNORE
from brixel_cli.core.heads import Quantity

WRONG = (230, 30, 30)
WORST_ANGLE = 60.0
"""Degrees that are drawn as the largest error of normals."""
WORST_DEPTH = 0.3
"""Error, as a share of the true depth, that is drawn as the largest."""


def class_colours() -> npt.NDArray[np.uint8]:
    """A colour (red, green, blue) for each class number from 0, always the same; black is no class: (256, 3)."""
    colours = [
        colorsys.hsv_to_rgb(number * 0.618034 % 1, (0.85, 0.55, 0.7)[number % 3], (0.95, 0.7)[number // 3 % 2])
        for number in range(IGNORE)
    ]
    return (np.array([*colours, (0, 0, 0)]) * 255).round().astype(np.uint8)


def paint_labels(labels: Tensor) -> Image.Image:
    """Class numbers (H, W) in colours; 255 is black."""
    return Image.fromarray(class_colours()[labels.cpu().numpy().astype(np.int64)])


def paint_depth(depth: Tensor, low: float, high: float) -> Image.Image:
    """Depth (H, W) in metres, from yellow at `low` to violet at `high`; 0 is black."""
    return _coloured(1 - (depth.float() - low) / max(high - low, 1e-6), depth > 0, "viridis")


def depth_range(depth: Tensor) -> tuple[float, float]:
    """The 2nd and 98th percentile of the valid pixels of a depth map, for `paint_depth`."""
    valid = depth[depth > 0].float()
    if not len(valid):
        return 0.0, 1.0
    low, high = np.percentile(valid.cpu().numpy(), [2, 98])
    return float(low), float(high)


def paint_normals(normals: Tensor) -> Image.Image:
    """Unit normals (3, H, W), x right, y down, z forward, in the usual colours; 0 is black.

    Red grows to the right, green upwards, blue towards the camera: a wall that faces it is light blue, a floor green.
    """
    towards_viewer = normals.float().cpu() * torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    pixels = ((towards_viewer * 0.5 + 0.5).clamp(0, 1) * 255).round() * (normals.cpu() != 0).any(dim=0)
    return Image.fromarray(np.ascontiguousarray(pixels.byte().permute(1, 2, 0).numpy()))


def paint_errors(quantity: Quantity, image: Image.Image, prediction: Tensor, truth: Tensor) -> Image.Image:
    """Where a prediction differs from the truth, both (H, W), normals (3, H, W).

    Labels: wrong pixels red on the image in pale grey. Depth: |prediction - truth| / truth, black to yellow at 30 %
    and more. Normals: the angle between them, black to yellow at 60 degrees and more. Pixels that count nowhere are
    grey on depth and normals.
    """
    if quantity == "segmentation":
        height, width = truth.shape
        grey = ImageOps.grayscale(image).resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.repeat((np.asarray(grey, np.float32) * 0.4 + 150)[..., None], 3, axis=2).astype(np.uint8)
        pixels[((prediction != truth) & (truth != IGNORE)).cpu().numpy()] = WRONG
        return Image.fromarray(pixels)
    if quantity == "depth":
        valid = truth > 0
        share = (prediction.float() - truth.float()).abs() / truth.float().clamp(min=1e-6) / WORST_DEPTH
    else:
        valid = (truth != 0).any(dim=0)
        angle = torch.rad2deg((prediction.float() * truth.float()).sum(dim=0).clamp(-1, 1).acos())
        share = angle / WORST_ANGLE
    return _coloured(share, valid, "inferno", invalid=128)


def comparison(
    quantity: Quantity, image: Image.Image, truth: Tensor, predictions: Mapping[str, Tensor]
) -> tuple[list[str], list[list[Image.Image]]]:
    """Titles and rows for `panel`: image and each source's prediction, below them the truth and each one's errors.

    Args:
        quantity: what is predicted.
        image: that the extractors saw, of any size.
        truth: labels (H, W), depth (H, W) or (1, H, W), normals (3, H, W).
        predictions: by name of the source, of the truth's shape.
    """
    truth = truth[0] if quantity == "depth" and truth.ndim == 3 else truth
    flat = {name: map_[0] if quantity == "depth" and map_.ndim == 3 else map_ for name, map_ in predictions.items()}
    low, high = depth_range(truth) if quantity == "depth" else (0.0, 1.0)

    def paint(map_: Tensor) -> Image.Image:
        if quantity == "segmentation":
            return paint_labels(map_)
        return paint_depth(map_, low, high) if quantity == "depth" else paint_normals(map_)

    above = [image, *(paint(map_) for map_ in flat.values())]
    below = [paint(truth), *(paint_errors(quantity, image, map_, truth) for map_ in flat.values())]
    return ["image, truth", *flat], [above, below]


@lru_cache(maxsize=4)
def _colormap(name: str) -> npt.NDArray[np.uint8]:
    import matplotlib  # slow to import: only where a picture is drawn

    return np.asarray(matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)


def _coloured(share: Tensor, valid: Tensor, colormap: str, invalid: int = 0) -> Image.Image:
    """Values (H, W), 0 to 1, in a colour map; `invalid` is the grey of pixels that are not valid."""
    places = (share.nan_to_num(0).clamp(0, 1) * 255).round().byte().cpu().numpy()
    pixels = _colormap(colormap)[places]
    pixels[~valid.cpu().numpy()] = invalid
    return Image.fromarray(pixels)
