"""Fields of view of a probe: the part of an image that an extractor sees, and the target that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

FieldKind = Literal["whole", "centre", "stretch", "random", "slide"]


@dataclass(frozen=True)
class FieldOfView:
    """A field of view, in pixels of the image resized to the student's scale.

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


def plan_fields(
    kind: FieldKind,
    sizes: Sequence[tuple[int, int]],
    side: int | tuple[int, int],
    patch_size: int,
    *,
    per_image: int = 1,
    seed: int = 0,
    stride: int | None = None,
    scale: tuple[float, float] = (0.5, 2.0),
) -> list[FieldOfView]:
    """The fields of view of a set of images, in their order.

    Args:
        kind: `whole`: the whole image, short side `side`, aspect kept but for rounding to the patch.
            `centre`: short side `side`, centre crop. `stretch`: squeezed into `side`.
            `random`: `per_image` crops of `side` at random places, from the image at a random scale, half of them
            mirrored. `slide`: windows of `side`, one every `stride` pixels, that cover the image.
        sizes: (height, width) of the images.
        side: student's input in pixels, one side or (height, width); rounded to multiples of the patch.
        patch_size: of the backbone.
        per_image: number of views of each image; of `random`.
        seed: of places, scales and mirroring; of `random`.
        scale: least and most of the scale that is drawn, log-uniformly; of `random`.
        stride: pixels between windows, None for two thirds of the window rounded to the patch; of `slide`.
    """
    raise NotImplementedError


def cut_image(
    image: Image.Image, field: FieldOfView, enlarge: int = 1, fill: tuple[int, int, int] = (124, 116, 104)
) -> Image.Image:
    """What is seen of an image, `enlarge` times the size of the field (the teacher's factor for the teacher).

    Cut from the original with antialiased bicubic interpolation; `fill` is put beyond its border.
    """
    raise NotImplementedError


def cut_target(
    target: npt.NDArray[np.generic], field: FieldOfView, size: tuple[int, int] | None = None, *, normals: bool = False
) -> npt.NDArray[np.generic]:
    """What belongs to the field of a target (..., H, W) of the original image's size, by nearest neighbour.

    Args:
        target: labels, depth, normals or mask. Beyond the border: 255 for uint8 labels, else 0.
        field: of view.
        size: (height, width) of the result; None: the target's own resolution.
        normals: whether it holds vectors, whose x changes sign when mirrored.
    """
    raise NotImplementedError


def cut_map(features: Tensor, field: FieldOfView, grid: tuple[int, int]) -> Tensor:
    """What is seen of a stored map (D, h, w) of the whole image, bilinear on a grid (height, width): (D, *grid)."""
    raise NotImplementedError


def stitch(maps: Sequence[Tensor], fields: Sequence[FieldOfView]) -> Tensor:
    """Mean of maps (C, height, width of the field) of windows of one image, put together: (C, *scaled)."""
    raise NotImplementedError
