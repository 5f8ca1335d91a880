"""Feature maps read at the pixels of their image: at single points, or resized to its size, chunk by chunk.

Pixel (y, x) of an image has its centre at (y + 0.5, x + 0.5), as in `torch.nn.functional.interpolate` with
`align_corners=False`; beyond the centres of the outermost locations of a map, their values continue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from brixel_cli.core.memory import check_memory, main_memory
from brixel_cli.errors import UsageError

Points = npt.ArrayLike | Tensor
CHUNK_VALUES = 1 << 22
"""Numbers that are computed at a time, besides the result."""
Size = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """The part of an image that a feature map covers, in pixels of the image.

    Attributes:
        top, left: of its upper left corner.
        height, width: of it.
    """

    top: float
    left: float
    height: float
    width: float


def covering(whole: Size, size: Size) -> Size:
    """Height and width of an image that is resized to cover `size`."""
    scale = max(size[0] / whole[0], size[1] / whole[1])
    return max(round(whole[0] * scale), size[0]), max(round(whole[1] * scale), size[1])


def covered_part(whole: Size, size: Size, fit: str) -> Part:
    """The part of an image that the model saw.

    Args:
        whole: height and width of the image.
        size: of the model's input.
        fit: `centre` for what `data.views.centre_view` cuts out; everything for the others.
    """
    if fit != "centre":
        return Part(0, 0, *whole)
    resized = covering(whole, size)
    offsets = [round((side - kept) / 2) for side, kept in zip(resized, size, strict=True)]
    down, across = whole[0] / resized[0], whole[1] / resized[1]
    return Part(offsets[0] * down, offsets[1] * across, size[0] * down, size[1] * across)


def read_at(map_: Tensor, part: Part, size: Sequence[int] | None, points: Points | None, out: Any = None) -> Tensor:
    """A feature map (D, h, w) at points, or resized; bilinear.

    Args:
        map_: float32.
        part: of the image that it covers.
        size: height and width in pixels to which it is resized; None without `points`: those of `part`.
        points: [[y, x], ...] in pixels of the image, which need not be whole.
        out: float32 array of the result's shape that is filled, such as a `numpy.memmap`; None: a new one in memory.

    Returns:
        (N, D) for N points, (D, *size) otherwise; float32.

    Raises:
        UsageError: both size and points, or one of them is no size or points, or a point lies outside of the part.
        BrixelError: the result does not fit into memory.
    """
    if points is not None:
        if size is not None:
            raise UsageError("Give size or points, not both.")
        places = _places(points, part)
        found = _result((len(places), len(map_)), out, map_)
        at_once = max(CHUNK_VALUES // len(map_), 1)
        for start in range(0, len(places), at_once):
            grid = places[start : start + at_once].to(map_)[None, :, None]
            sampled = F.grid_sample(map_[None], grid, padding_mode="border", align_corners=False)
            found[start : start + at_once] = sampled[0, :, :, 0].T
        return found
    return _resized(map_, _size((round(part.height), round(part.width)) if size is None else size), out)


def _resized(map_: Tensor, size: Size, out: Any) -> Tensor:
    """Resized in strips of rows: first along the height, where a row mixes two of the map, then along the width."""
    channels, rows, columns = map_.shape
    found = _result((channels, *size), out, map_)
    at = ((torch.arange(size[0], dtype=torch.float64) + 0.5) * rows / size[0] - 0.5).clamp(0, rows - 1)
    above = at.long().clamp(max=max(rows - 2, 0))
    share = (at - above).to(map_)[:, None]
    below = (above + 1).clamp(max=rows - 1)
    above, below = above.to(map_.device), below.to(map_.device)
    at_once = max(CHUNK_VALUES // (channels * max(size[1], columns)), 1)
    for start in range(0, size[0], at_once):
        strip = slice(start, start + at_once)
        mixed = torch.lerp(map_[:, above[strip]], map_[:, below[strip]], share[strip])
        shape = (mixed.shape[1], size[1])
        found[:, strip] = F.interpolate(mixed[None], shape, mode="bilinear", align_corners=False)[0]
    return found


def _result(shape: tuple[int, ...], out: Any, like: Tensor) -> Tensor:
    if out is None:
        if like.device.type == "cpu":
            needed, what = 4 * int(np.prod(shape, dtype=np.int64)), f"A feature map of {'x'.join(map(str, shape))}"
            advice = "Ask for a smaller size, or for points; FeatureFile.at also fills a numpy.memmap, out=..."
            check_memory(needed, main_memory(), what, advice)
        return like.new_empty(shape)
    if getattr(out, "shape", None) != shape or getattr(out, "dtype", None) != np.float32:
        raise UsageError(f"out must be a float32 array of shape {shape}.")
    return torch.from_numpy(out)


def _size(size: Sequence[int]) -> Size:
    try:
        height, width = (int(side) for side in size)
    except (TypeError, ValueError) as error:
        raise UsageError(f"size must be (height, width) in pixels, not {size!r}.") from error
    if min(height, width) < 1:
        raise UsageError(f"size must be (height, width) in pixels, from 1 up, not {size!r}.")
    return height, width


def _places(points: Points, part: Part) -> Tensor:
    """Points as `grid_sample` wants them: (x, y), from -1 to 1 over the part."""
    try:
        found = torch.as_tensor(np.asarray(points.cpu() if isinstance(points, Tensor) else points, np.float64))
    except (TypeError, ValueError) as error:
        raise UsageError(f"points must be [[y, x], ...] in pixels: {error}.") from error
    if found.ndim != 2 or found.shape[1] != 2:
        raise UsageError(f"points must be [[y, x], ...] in pixels, an array (N, 2), not {tuple(found.shape)}.")
    corner = torch.tensor([part.top, part.left], dtype=torch.float64)
    within = (found + 0.5 - corner) / torch.tensor([part.height, part.width], dtype=torch.float64)
    outside = ~((within >= 0) & (within <= 1)).all(dim=1)
    if outside.any():
        at = int(outside.nonzero()[0, 0])
        rows, columns = (part.top, part.top + part.height), (part.left, part.left + part.width)
        raise UsageError(
            f"Point {at}, {found[at].tolist()}, lies outside of what the feature map covers: rows {rows[0]:g} to "
            f"{rows[1]:g} and columns {columns[0]:g} to {columns[1]:g} of the image, in pixels."
        )
    return (within * 2 - 1).flip(1)
