"""Feature maps as colours: the first three principal components of the teacher's map as red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from brixel_cli.core.losses import fit_basis

TILE = 224
BAR = 22
GAP = 4


def pca_colours(maps: Sequence[Tensor], reference: Tensor) -> list[Image.Image]:
    """Maps (D, h, w), of any grids, in the colours of `reference` (D, H, W): one image of h x w pixels each.

    Basis and colour range (1st to 99th percentile of each component) are fitted on the reference alone, so that
    equal colours mean equal features in all of them.
    """
    basis = fit_basis(reference[None], 3, seed=0, share=1.0)
    scores = basis.project(reference[None].float())[0].flatten(1)
    low, high = torch.quantile(
        scores[:, :: max(scores.shape[1] // 100_000, 1)], torch.tensor([0.01, 0.99]).to(scores), dim=1
    )
    colours = []
    for map_ in maps:
        score = basis.project(map_[None].float())[0]
        scaled = (score - low[:, None, None]) / (high - low).clamp(min=1e-12)[:, None, None]
        pixels = (scaled.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        if pixels.shape[-1] < 3:  # a backbone with fewer than three channels, or a map with as few locations
            pixels = np.pad(pixels, ((0, 0), (0, 0), (0, 3 - pixels.shape[-1])))
        colours.append(Image.fromarray(np.ascontiguousarray(pixels)))
    return colours


def denormalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """A normalised image (3, H, W) as a picture again."""
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    pixels = ((image.float().cpu() * scale + shift).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


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
