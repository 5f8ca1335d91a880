"""Feature maps of inputs that are too large for one pass: computed in tiles that overlap, and blended strip by strip.

A location of the map is a weighted mean of the tiles that cover it. Weights fall towards the border of a tile, which
knows least of the image; along each axis they add up to 1. Only one row of tiles is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from brixel_cli.data.row_store import in_batches
from brixel_cli.engines.models import CPU_BATCH_PIXELS

TRIM = 0.25
"""Share of the overlap at the border of a tile that has no weight, where another tile covers it."""
Size = tuple[int, int]


@dataclass(frozen=True)
class Tiling:
    """How the model's input is cut.

    Attributes:
        tile: side of a tile in pixels of the model's input, a multiple of the patch.
        overlap: of neighbours at least, likewise.
        patch_size: side of a patch in pixels.
        finer: locations of the map along the side of a patch.
        trim: share of the overlap at the border of a tile that has no weight.
    """

    tile: int
    overlap: int
    patch_size: int
    finer: int
    trim: float = TRIM

    def cuts(self, size: Size) -> bool:
        """Whether an input of this size is cut at all."""
        return max(size) > self.tile

    def input_size(self, size: Size) -> Size:
        """What the model sees of an input of this size at once."""
        return min(size[0], self.tile), min(size[1], self.tile)

    def starts(self, side: int) -> list[int]:
        """Where tiles begin along a side of the input, in pixels; evenly spread, at multiples of the patch."""
        if side <= self.tile:
            return [0]
        count = math.ceil((side - self.overlap) / (self.tile - self.overlap))
        patches = (side - self.tile) // self.patch_size
        return [patches * at // (count - 1) * self.patch_size for at in range(count)]

    def weights(self, side: int) -> list[Tensor]:
        """Weights of the locations of each tile along a side; those of all tiles add up to 1 everywhere."""
        starts = self.starts(side)
        cells = self.finer / self.patch_size
        length, least = round(min(side, self.tile) * cells), self.overlap * cells
        trim = least * self.trim
        inside = torch.arange(length, dtype=torch.float64) + 0.5
        ramp = ((torch.minimum(inside, length - inside) - trim) / (least - 2 * trim)).clamp(0, 1)
        total = torch.zeros(side // self.patch_size * self.finer, dtype=torch.float64)
        found = []
        for start in starts:
            weight = ramp.clone()
            if start == 0:
                weight[: length // 2] = 1
            if start == starts[-1]:
                weight[length // 2 :] = 1
            first = start // self.patch_size * self.finer
            total[first : first + length] += weight
            found.append(weight)
        firsts = [start // self.patch_size * self.finer for start in starts]
        return [(w / total[first : first + length]).float() for first, w in zip(firsts, found, strict=True)]


def strips(
    maps: Callable[[Tensor], Tensor], read: Callable[[int, int, Size], Tensor], size: Size, tiling: Tiling
) -> Iterator[tuple[int, Tensor]]:
    """A feature map from top to bottom, in strips (D, r, w) of float32 with their first rows.

    Args:
        maps: the model: from pixels (B, 3, H, W) to maps (B, D, h, w).
        read: pixels (3, H, W) of a tile, from its top, left and size.
        size: of the whole input, (height, width) in pixels.
        tiling: how it is cut.
    """
    (tops, lefts), seen = (tiling.starts(size[0]), tiling.starts(size[1])), tiling.input_size(size)
    down, across = tiling.weights(size[0]), tiling.weights(size[1])
    at_once = max(CPU_BATCH_PIXELS // (seen[0] * seen[1]), 1)
    rows, columns = (side // tiling.patch_size * tiling.finer for side in (seen[0], size[1]))
    carried: Tensor | None = None
    for at, top in enumerate(tops):
        strip: Tensor | None = None
        for some in in_batches(range(len(lefts)), at_once):
            found = maps(torch.stack([read(top, lefts[n], seen) for n in some])).float().cpu()
            strip = found.new_zeros(found.shape[1], rows, columns) if strip is None else strip
            for n, map_ in zip(some, found, strict=True):
                first = lefts[n] // tiling.patch_size * tiling.finer
                strip[:, :, first : first + map_.shape[2]] += map_ * (down[at][:, None] * across[n])
        assert strip is not None
        if carried is not None:
            strip[:, : carried.shape[1]] += carried
        end = rows if top == tops[-1] else (tops[at + 1] - top) // tiling.patch_size * tiling.finer
        yield top // tiling.patch_size * tiling.finer, strip[:, :end]
        carried = strip[:, end:].clone()
