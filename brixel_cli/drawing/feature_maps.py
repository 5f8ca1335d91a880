"""Feature maps as colours: the first three principal components of the teacher's map as red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from brixel_cli.core.losses import Basis, fit_basis

TILE = 224
BAR = 22
GAP = 4


@dataclass(frozen=True)
class Palette:
    """How features become colours: three principal components, and the range of each that is shown.

    Attributes:
        basis: the components.
        low, high: of each component's scores, drawn as 0 and 255.
    """

    basis: Basis
    low: Tensor
    high: Tensor

    @staticmethod
    def fit(basis: Basis, references: Sequence[Tensor]) -> Palette:
        """Range from the 1st to the 99th percentile of each component over reference maps (D, H, W)."""
        scores = torch.cat([basis.project(map_[None].float())[0].flatten(1) for map_ in references], dim=1)
        shown = scores[:, :: max(scores.shape[1] // 100_000, 1)].cpu()  # torch's quantiles take float64 on the way
        low, high = torch.quantile(shown, torch.tensor([0.01, 0.99]), dim=1).to(scores.device)
        return Palette(basis, low, high)

    def paint(self, map_: Tensor) -> Image.Image:
        """A map (D, h, w) as a picture of h x w pixels."""
        score = self.basis.project(map_[None].float())[0]
        scaled = (score - self.low[:, None, None]) / (self.high - self.low).clamp(min=1e-12)[:, None, None]
        pixels = (scaled.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        if pixels.shape[-1] < 3:  # a backbone with fewer than three channels, or a map with as few locations
            pixels = np.pad(pixels, ((0, 0), (0, 0), (0, 3 - pixels.shape[-1])))
        return Image.fromarray(np.ascontiguousarray(pixels))


def pca_colours(maps: Sequence[Tensor], reference: Tensor, basis: Basis | None = None) -> list[Image.Image]:
    """Maps (D, h, w), of any grids, in the colours of `reference` (D, H, W): one image of h x w pixels each.

    Basis and colour range (1st to 99th percentile of each component) are fitted on the reference alone, so that
    equal colours mean equal features in all of them.

    Args:
        maps: to be drawn.
        reference: the map that the colours are fitted on.
        basis: components of the reference that are known already, three or more; None: fitted here.
    """
    basis = basis or fit_basis(reference[None], 3, seed=0, share=1.0)
    palette = Palette.fit(Basis(basis.components[:, :3], basis.mean), [reference])
    return [palette.paint(map_) for map_ in maps]


def denormalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """A normalised image (3, H, W) as a picture again."""
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    pixels = ((image.float().cpu() * scale + shift).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def side_by_side(image: Image.Image, colours: Image.Image) -> Image.Image:
    """An image, and beside it, at the same size, a picture of its map."""
    canvas = Image.new("RGB", (2 * image.width, image.height))
    canvas.paste(image)
    canvas.paste(colours.resize(image.size, Image.Resampling.NEAREST), (image.width, 0))
    return canvas


def contact_sheet(pairs: Sequence[tuple[Image.Image, Image.Image]], across: int = 3) -> Image.Image:
    """Pairs of an image and a picture of its map under headings, so many of them in a row."""
    across = min(across, len(pairs))
    blank = Image.new("RGB", (1, 1), "white")
    tiles = [tile for pair in pairs for tile in pair]
    tiles += [blank] * (-len(tiles) % (2 * across))
    return panel(
        ["image", "features"] * across, [tiles[at : at + 2 * across] for at in range(0, len(tiles), 2 * across)]
    )


def panel(titles: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures in a grid under column titles; each is enlarged without smoothing to a height of 224 pixels."""
    tiles = [
        [tile.resize((max(round(TILE * tile.width / tile.height), 1), TILE), Image.Resampling.NEAREST) for tile in row]
        for row in rows
    ]
    widths = [max(row[column].width for row in tiles) for column in range(len(titles))]
    canvas = Image.new("RGB", (sum(widths) + GAP * (len(widths) + 1), BAR + len(rows) * (TILE + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    for column, title in enumerate(titles):
        left = GAP + sum(widths[:column]) + GAP * column
        draw.text((left + 2, 3), title, fill="black", font=font)
        for number, row in enumerate(tiles):
            canvas.paste(row[column], (left, BAR + number * (TILE + GAP)))
    return canvas
