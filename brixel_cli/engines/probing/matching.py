"""Matching: are the features of one point of a scene alike in two images? Poses and depth say which pixels show it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brixel_cli.config.protocols import MatchingProtocol
from brixel_cli.core.correspondence import (
    Floats,
    View,
    common_grid,
    features_at,
    nearest_pixels,
    pck,
    unit_map,
    viewpoint_change_deg,
    visible,
)
from brixel_cli.data.labelled import LabelledSet
from brixel_cli.data.views import seed_of
from brixel_cli.engines.probing.features import Maps
from brixel_cli.engines.probing.items import Measured
from brixel_cli.engines.probing.plan import SplitPlan
from brixel_cli.engines.probing.results import Items
from brixel_cli.engines.reporting import Reporter
from brixel_cli.errors import BrixelError

TRIED = 200
"""Pixels of an image by which its overlap with others is estimated."""
CANDIDATES = 8
"""Pixels that are tried for each one that is looked for."""
_OVERLAP, _CHOICE, _QUERIES = 1, 2, 3
"""What the fixed seed is used for."""


@dataclass(frozen=True)
class Pair:
    """Two images of a scene, and pixels that show the same points.

    Attributes:
        rows: of both images in their set.
        angle: between both cameras, in degrees.
        bin: of the angle.
        pixels: (N, 2), of the first image.
        truth: (N, 2), of the second.
    """

    rows: tuple[int, int]
    angle: float
    bin: int
    pixels: Floats
    truth: Floats

    def name(self, labelled: LabelledSet) -> str:
        """Both images and the angle, for tables."""
        first, second = (labelled.names[row] for row in self.rows)
        return f"{first} to {second}, {self.angle:.1f} deg"


def find_pairs(labelled: LabelledSet, rules: MatchingProtocol, reporter: Reporter) -> list[Pair]:
    """Pairs of images of one folder that overlap, by their viewpoint changes, each with what is looked for in it.

    Raises:
        BrixelError: there are none, or a file is damaged.
    """
    scenes: dict[str, list[int]] = {}
    for row, name in enumerate(labelled.names):
        scenes.setdefault(Path(name).parent.as_posix(), []).append(row)
    found: list[Pair] = []
    with reporter.bar("find pairs", len(scenes), unit="scene") as bar:
        for rows in scenes.values():
            chosen = sorted({int(place) for place in np.linspace(0, len(rows) - 1, min(len(rows), rules.frames))})
            found += _pairs_of_scene(labelled, [rows[place] for place in chosen], rules)
            bar.update(1)
    if not found:
        raise BrixelError(
            f"No two of the {len(labelled)} images of {labelled.recipe.name} show the same part of a scene: none "
            f"shares {rules.overlap:.0%} of its points with another one of its folder. See data.poses (from camera to "
            "scene, in metres), data.depth.scale and intrinsics, and --set protocol.overlap."
        )
    return found


def _pairs_of_scene(labelled: LabelledSet, rows: list[int], rules: MatchingProtocol) -> Iterator[Pair]:
    views = {row: _view(labelled, row) for row in rows}
    tried = {row: _valid_pixels(view, TRIED, seed_of(_OVERLAP, row)) for row, view in views.items()}
    by_bin: dict[int, list[tuple[int, int, float]]] = {}
    for first, second in itertools.combinations(rows, 2):
        angle = viewpoint_change_deg(views[first].pose, views[second].pose)
        place = int(np.searchsorted(rules.angles, angle))
        if place == len(rules.angles):
            continue
        seen, _ = visible(tried[first], views[first], views[second], rules.tolerance)
        if seen.any() and seen.mean() >= rules.overlap:
            by_bin.setdefault(place, []).append((first, second, angle))
    for place, candidates in sorted(by_bin.items()):
        rng = np.random.default_rng(seed_of(_CHOICE, rows[0], place))
        few = len(candidates) <= rules.pairs
        for number in range(len(candidates)) if few else sorted(rng.permutation(len(candidates))[: rules.pairs]):
            first, second, angle = candidates[number]
            pixels = _valid_pixels(views[first], CANDIDATES * rules.queries, seed_of(_QUERIES, first, second))
            seen, places = visible(pixels, views[first], views[second], rules.tolerance)
            if seen.any():
                yield Pair((first, second), angle, place, pixels[seen][: rules.queries], places[seen][: rules.queries])


def _view(labelled: LabelledSet, row: int) -> View:
    sample = labelled.load(row)
    assert sample.depth is not None
    assert sample.pose is not None
    assert sample.camera is not None
    return View(np.where(sample.valid, sample.depth, 0), sample.camera, sample.pose)


def _valid_pixels(view: View, count: int, seed: int) -> Floats:
    """So many random pixels (N, 2) of known depth, or all of them."""
    y, x = np.nonzero(view.depth)
    chosen = np.random.default_rng(seed).permutation(len(x))[:count]
    return np.stack([x[chosen], y[chosen]], axis=1).astype(np.float64)


@torch.inference_mode()
def measure_matching(
    maps: Maps, split: SplitPlan, pairs: list[Pair], rules: MatchingProtocol, device: torch.device, bar: Any
) -> Measured:
    """PCK of the nearest neighbours of a source's features.

    Args:
        maps: of the split.
        split: the images.
        pairs: that are looked at.
        rules: of matching.
        device: where features are compared.
        bar: hears of every pair.
    """

    def read(row: int) -> torch.Tensor:
        return maps.read(split.positions[row][:1])[0].to(device)

    items: Items = {}
    groups: dict[str, list[str]] = {name: [] for name in rules.bins}
    for second, some in itertools.groupby(sorted(pairs, key=lambda pair: pair.rows[::-1]), lambda pair: pair.rows[1]):
        size = split.labelled.size(second)
        candidates = unit_map(read(second), common_grid(size, rules.grid))
        for pair in some:
            first = pair.rows[0]
            queries = features_at(read(first), pair.pixels, split.labelled.size(first))
            name = pair.name(split.labelled)
            items[name] = pck(nearest_pixels(queries, candidates, size), pair.truth, size)
            groups[rules.bins[pair.bin]].append(name)
            bar.update(1)
    return Measured(items, groups)
