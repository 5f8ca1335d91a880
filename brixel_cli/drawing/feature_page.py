"""A page to look at features: point at a place of an image, and see what is like it, in every source at once.

One HTML file that needs nothing else, in the style of the reports. Its parts are feature_page.{html,css,js}, and
feature_page_maps.js for the arithmetic.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from brixel_cli.core.formatting import printable
from brixel_cli.core.losses import Basis
from brixel_cli.core.pca import RunningPca
from brixel_cli.drawing.page import document, escape

COMPONENTS = 64
"""Numbers kept of a feature vector: the first is along the mean vector, the others are principal components."""
LARGEST_PICTURE = 768
JPEG_QUALITY = 80
LOCATIONS = 2**14
"""On which the components are fitted at most, evenly spread."""
QUERIES = 32
"""Points of each image and source whose heat maps are compared with those of the full features."""
FILES = Path(__file__).parent


@dataclass(frozen=True)
class PageImage:
    """An image of the page.

    Attributes:
        name: shown above it.
        picture: of the area that the maps cover.
        maps: (D, h, w) by source, the same sources for all images; those of another D than the finest are left out.
        layers: further pictures of the same area, by title, such as truth and predictions.
    """

    name: str
    picture: Image.Image
    maps: Mapping[str, Tensor]
    layers: Mapping[str, Image.Image] = field(default_factory=dict)


@dataclass(frozen=True)
class FeaturePage:
    """A page in memory, and how well its heat maps stand for those of the full features.

    Attributes:
        html: the whole file.
        correlation: of a heat map of the page with that of all channels, mean over images, sources and points.
        worst: the lowest mean of one image and source.
        worst_of: which that is.
    """

    html: str
    correlation: float
    worst: float
    worst_of: str


@dataclass(frozen=True)
class _Reduction:
    """How unit feature vectors become int8: components (D, K), and offset (K) and step of their scores."""

    components: Tensor
    offset: Tensor
    step: float

    def encode(self, unit: Tensor) -> Tensor:
        """Unit vectors (D, h, w) as int8 (K, h, w)."""
        return ((self._scores(unit) - self.offset[:, None, None]) / self.step).round().clamp(-127, 127).to(torch.int8)

    def decode(self, reduced: Tensor) -> Tensor:
        """Unit vectors (K, h, w), as the page computes them."""
        return F.normalize(reduced.float() * self.step + self.offset[:, None, None], dim=0)

    def _scores(self, unit: Tensor) -> Tensor:
        return torch.einsum("dhw,dk->khw", unit, self.components)

    @staticmethod
    def fit(finest: Sequence[Tensor], others: Sequence[Tensor]) -> _Reduction:
        """Components of unit vectors (D, h, w) of the finest source; a step that covers the scores of all sources.

        One step for all components makes the error of dot products least for the bytes that are left after packing.
        """
        gathered = RunningPca(finest[0].shape[0])
        stride = -(-sum(map_[0].numel() for map_ in finest) // LOCATIONS)
        for map_ in finest:
            gathered.add(map_.flatten(1)[:, ::stride, None])
        basis: Basis = gathered.basis(COMPONENTS - 1)
        rest = basis.mean - basis.components @ (basis.components.T @ basis.mean)
        parts = [basis.components]
        if rest.norm() > 1e-4:  # else the mean is among the components already
            parts.insert(0, F.normalize(rest, dim=0)[:, None])
        components = torch.cat(parts, dim=1)
        offset = components.T @ basis.mean
        plain = _Reduction(components, offset, 1.0)
        largest = max(float((plain._scores(map_) - offset[:, None, None]).abs().max()) for map_ in [*finest, *others])
        return _Reduction(components, offset, max(largest, 1e-6) / 127)


def feature_page(title: str, images: Sequence[PageImage], video: bool = False) -> FeaturePage:
    """Make the page of some images.

    Args:
        title: of the page.
        images: at least one.
        video: whether they are frames, of which one at a time is shown, by a slider.
    """
    first = images[0].maps
    finest = max(first, key=lambda source: (first[source][0].numel(), source == "teacher"))
    sources = [source for source in first if len(first[source]) == len(first[finest])]
    units = [{source: F.normalize(image.maps[source].float(), dim=0) for source in sources} for image in images]
    reduction = _Reduction.fit(
        [maps[finest] for maps in units], [maps[source] for maps in units for source in sources if source != finest]
    )
    reduced = [{source: reduction.encode(map_) for source, map_ in maps.items()} for maps in units]
    correlations, low = _compare(units, reduced, reduction)
    place = min(correlations, key=lambda key: correlations[key])
    mean, worst = float(np.mean(list(correlations.values()))), correlations[place]
    worst_of = printable(f"{images[place[0]].name}, {place[1]}")
    channels = units[0][finest].shape[0]
    note = (
        f"Heat maps are cosine similarities of {reduction.components.shape[1]} components instead of {channels} "
        f"channels. Their correlation with the full ones: {mean:.4f} on average, {worst:.4f} for the worst image "
        f"({worst_of}), over {QUERIES} points each."
    )
    shown = torch.cat([maps[finest].flatten(1) for maps in reduced], dim=1).float()
    shown = shown[:, :: -(-shown.shape[1] // 100_000)]
    ends = torch.quantile(shown, torch.tensor([0.01, 0.99]), dim=1)
    data: dict[str, Any] = {
        "sources": sources,
        "finest": sources.index(finest),
        "step": reduction.step,
        "offset": reduction.offset.tolist(),
        "low": ends[0].tolist(),
        "high": ends[1].tolist(),
        "floor": low,
        "note": note,
        "video": video,
        "images": [
            {
                "name": printable(image.name),
                "picture": _jpeg(image.picture),
                "grids": [list(maps[source].shape[1:]) for source in sources],
                "layers": [{"title": title, "picture": _jpeg(layer)} for title, layer in image.layers.items()],
            }
            for image, maps in zip(images, reduced, strict=True)
        ],
        "maps": _packed([maps[source] for maps in reduced for source in sources]),
    }
    return FeaturePage(_html(title, data), mean, worst, worst_of)


def _compare(
    units: Sequence[Mapping[str, Tensor]], reduced: Sequence[Mapping[str, Tensor]], reduction: _Reduction
) -> tuple[dict[tuple[int, str], float], float]:
    """Correlation of heat maps by image and source; and the 5th percentile of the full similarities, to 0.05."""
    correlations: dict[tuple[int, str], float] = {}
    seen: list[Tensor] = []
    for number, maps in enumerate(units):
        for source, unit in maps.items():
            full, small = unit.flatten(1), reduction.decode(reduced[number][source]).flatten(1)
            points = torch.linspace(0, full.shape[1] - 1, min(QUERIES, full.shape[1])).round().long()
            heat = full[:, points].T @ full
            correlations[number, source] = float(_correlation(heat, small[:, points].T @ small).mean())
            seen.append(heat.flatten()[:: max(heat.numel() // 4096, 1)])
    low = float(torch.quantile(torch.cat(seen)[:1_000_000], 0.05))
    return correlations, float(np.clip(np.floor(low * 20) / 20, -1, 0.95))


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's of the rows of (Q, N); 1 where a row is the same everywhere."""
    first, second = (rows.double() - rows.double().mean(dim=1, keepdim=True) for rows in (first, second))
    norms = first.norm(dim=1) * second.norm(dim=1)
    return torch.where(norms > 1e-9, (first * second).sum(dim=1) / norms.clamp(min=1e-9), torch.ones_like(norms))


def _packed(maps: Sequence[Tensor]) -> str:
    """int8 maps (K, h, w), one after the other, component by component, as base64 of zlib's format."""
    planes: list[npt.NDArray[np.int8]] = [map_.contiguous().numpy() for map_ in maps]
    return base64.b64encode(zlib.compress(b"".join(plane.tobytes() for plane in planes))).decode()


def _jpeg(picture: Image.Image) -> str:
    picture = picture.convert("RGB")
    picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _html(title: str, data: Mapping[str, Any]) -> str:
    style, body, maps, script = (
        (FILES / f"feature_page{part}").read_text(encoding="utf-8") for part in (".css", ".html", "_maps.js", ".js")
    )
    content = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no name can end the element
    body = body.replace("TITLE", escape(title))
    data_element = f'<script type="application/json" id="data">{content}</script>'
    return document(title, f"{body}{data_element}\n<script>{maps}{script}</script>", f"<style>{style}</style>")
