"""Crops of a probe: the part of an image that an extractor sees, and the target that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from brixel_cli.config.labelled import IGNORE
from brixel_cli.data.resizing import snap
from brixel_cli.data.views import seed_of

CropKind = Literal["whole", "centre", "stretch", "random", "slide"]
Scalar = TypeVar("Scalar", bound=np.generic)
GREY = (124, 116, 104)
"""The mean colour of ImageNet, about 0 after normalisation."""


@dataclass(frozen=True)
class Crop:
    """A crop, in pixels of the image resized to the student's scale.

    Attributes:
        row: of the image in its set.
        scaled: (height, width) that the whole image is resized to.
        box: (top, left, height, width) of the part that is seen; may reach over the lower and right border.
        flip: whether it is mirrored left to right, after cutting.
    """

    row: int
    scaled: tuple[int, int]
    box: tuple[int, int, int, int]
    flip: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the student's input in pixels."""
        return self.box[2], self.box[3]

    @property
    def inside(self) -> tuple[int, int]:
        """(height, width) of the part of the box that lies in the image."""
        return min(self.box[2], self.scaled[0] - self.box[0]), min(self.box[3], self.scaled[1] - self.box[1])


def plan_crops(
    kind: CropKind,
    sizes: Sequence[tuple[int, int]],
    side: int | tuple[int, int],
    patch_size: int,
    *,
    per_image: int = 1,
    seed: int = 0,
    stride: int | None = None,
    scale: tuple[float, float] = (1.0, 1.0),
) -> list[Crop]:
    """The crops of a set of images, in their order.

    Args:
        kind: `whole`: the whole image, short side `side` (the lesser one of two) times `scale`, aspect kept but for
            rounding to the patch. `centre`: resized to cover `side`, centre crop. `stretch`: squeezed into `side`.
            `random`: `per_image` crops of `side` at random places, from the image that covers `side` resized by a
            random factor, half of them mirrored. `slide`: windows of `side`, one every `stride` pixels, that together
            cover the image, resized to cover `side`; the last ones are moved back to the border.
        sizes: (height, width) of the images.
        side: student's input in pixels, one side or (height, width); rounded to multiples of the patch.
        patch_size: of the backbone.
        per_image: number of crops of each image; of `random`.
        seed: of places, scales and mirroring; of `random`.
        stride: pixels between windows, None for two thirds of the window rounded to the patch; of `slide`.
        scale: least and most of the factor that is drawn, uniformly, of `random`; the factor, twice, of `whole`.
    """
    wanted = (side, side) if isinstance(side, int) else side
    height, width = (snap(length, patch_size) for length in wanted)
    crops: list[Crop] = []
    for row, image in enumerate(sizes):
        if kind == "whole":
            ratio = min(wanted) * scale[0] / min(image)
            scaled = snap(image[0] * ratio, patch_size), snap(image[1] * ratio, patch_size)
            crops.append(Crop(row, scaled, (0, 0, *scaled)))
        elif kind == "stretch":
            crops.append(Crop(row, (height, width), (0, 0, height, width)))
        elif kind == "centre":
            scaled = _cover(image, (height, width))
            top, left = (round((have - seen) / 2) for have, seen in zip(scaled, (height, width), strict=True))
            crops.append(Crop(row, scaled, (top, left, height, width)))
        elif kind == "random":
            for number in range(per_image):
                rng = np.random.default_rng(seed_of(seed, row, number))
                crops.append(_random(row, image, (height, width), scale, rng))
        else:
            scaled = _cover(image, (height, width))
            steps = [stride or snap(length * 2 / 3, patch_size) for length in (height, width)]
            crops += [
                Crop(row, scaled, (top, left, height, width))
                for top in _starts(scaled[0], height, steps[0])
                for left in _starts(scaled[1], width, steps[1])
            ]
    return crops


def cut_image(
    image: Image.Image, crop: Crop, size: tuple[int, int] | None = None, fill: tuple[int, int, int] = GREY
) -> Image.Image:
    """What is seen of an image, at a size (height, width) in pixels, which is larger for the teacher; None: the crop's.

    Cut from the original with antialiased bicubic interpolation; `fill` is put beyond its border.
    """
    (top, left), (height, width) = crop.box[:2], crop.inside
    full = size or crop.size
    inside = round(height * full[0] / crop.size[0]), round(width * full[1] / crop.size[1])
    down, across = image.height / crop.scaled[0], image.width / crop.scaled[1]
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    seen = image.resize((inside[1], inside[0]), Image.Resampling.BICUBIC, box=box)
    if crop.inside != crop.size:
        canvas = Image.new("RGB", (full[1], full[0]), fill)
        canvas.paste(seen)
        seen = canvas
    return ImageOps.mirror(seen) if crop.flip else seen


def cut_target(target: npt.NDArray[Scalar], crop: Crop, size: tuple[int, int] | None = None) -> npt.NDArray[Scalar]:
    """What belongs to the crop of a target (..., H, W) of the original image's size, by nearest neighbour.

    Args:
        target: labels, depth or mask (H, W), or normals (3, H, W), whose x changes sign when mirrored. Beyond the
            border: 255 for uint8 labels, else 0.
        crop: what is seen.
        size: (height, width) of the result; None: the target's own resolution, to the nearest pixel.
    """
    height, width = target.shape[-2:]
    per_pixel = height / crop.scaled[0], width / crop.scaled[1]
    size = size or (max(round(crop.box[2] * per_pixel[0]), 1), max(round(crop.box[3] * per_pixel[1]), 1))
    rows = _centres(crop.box[0] * per_pixel[0], crop.box[2] * per_pixel[0], size[0])
    columns = _centres(crop.box[1] * per_pixel[1], crop.box[3] * per_pixel[1], size[1])
    seen = target[..., rows.clip(max=height - 1)[:, None], columns.clip(max=width - 1)]
    nothing = IGNORE if target.dtype == np.uint8 else 0
    seen[..., rows >= height, :] = nothing
    seen[..., columns >= width] = nothing
    if crop.flip:
        seen = seen[..., ::-1].copy()
        if target.ndim == 3:
            seen[0] *= -1
    return seen


def cut_map(features: Tensor, crop: Crop, grid: tuple[int, int]) -> Tensor:
    """What is seen of a stored map (D, h, w) of the whole image, bilinear on a grid (height, width): (D, *grid).

    A mirrored map is not quite the map of the mirrored image: for a source that can compute its features, give it
    the mirrored image instead.
    """
    (top, left, height, width), (all_rows, all_columns) = crop.box, crop.scaled
    y = (top + (torch.arange(grid[0]) + 0.5) * height / grid[0]) / all_rows * 2 - 1
    x = (left + (torch.arange(grid[1]) + 0.5) * width / grid[1]) / all_columns * 2 - 1
    if crop.flip:
        x = x.flip(0)
    places = torch.stack([x.expand(grid), y[:, None].expand(grid)], dim=-1).to(features)
    return F.grid_sample(features[None], places[None], padding_mode="border", align_corners=False)[0]


def stitch(maps: Sequence[Tensor], crops: Sequence[Crop]) -> Tensor:
    """Put maps (C, height, width of the crop) of windows of one image together, mean where they overlap.

    Returns:
        (C, *scaled).
    """
    total = maps[0].new_zeros(maps[0].shape[0], *crops[0].scaled)
    times = maps[0].new_zeros(crops[0].scaled)
    for map_, crop in zip(maps, crops, strict=True):
        (top, left), (height, width) = crop.box[:2], crop.inside
        seen = map_.flip(-1) if crop.flip else map_
        total[:, top : top + height, left : left + width] += seen[:, :height, :width]
        times[top : top + height, left : left + width] += 1
    return total / times


def _cover(image: tuple[int, int], size: tuple[int, int], factor: float = 1) -> tuple[int, int]:
    """The size of an image resized to cover `size`, times a factor."""
    ratio = max(size[0] / image[0], size[1] / image[1])
    height, width = (max(round(length * ratio), least) for length, least in zip(image, size, strict=True))
    return max(round(height * factor), 1), max(round(width * factor), 1)


def _random(
    row: int, image: tuple[int, int], size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> Crop:
    scaled = _cover(image, size, rng.uniform(*scale))
    top, left = (int(rng.integers(max(have - seen, 0) + 1)) for have, seen in zip(scaled, size, strict=True))
    return Crop(row, scaled, (top, left, *size), bool(rng.random() < 0.5))


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover a length; the last one ends with it."""
    return [*range(0, length - window, stride), length - window]


def _centres(start: float, length: float, count: int) -> npt.NDArray[np.int64]:
    """Pixels that hold the centres of `count` equal parts of a stretch."""
    return np.floor(start + (np.arange(count) + 0.5) * length / count).astype(np.int64)
