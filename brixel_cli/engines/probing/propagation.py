"""Propagation: video object segmentation by the similarity of frozen features, from the first frame's mask."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brixel_cli.config.labelled import IGNORE
from brixel_cli.config.protocols import PropagationProtocol
from brixel_cli.core.correspondence import common_grid, unit_map
from brixel_cli.core.propagation import hard_mask, propagate, soft_mask
from brixel_cli.core.video_metrics import contour_accuracy, object_figures, region_similarity
from brixel_cli.data.labelled import LabelledSet
from brixel_cli.data.row_store import Array
from brixel_cli.engines.probing.features import Maps
from brixel_cli.engines.probing.items import Measured
from brixel_cli.engines.probing.plan import SplitPlan
from brixel_cli.engines.probing.results import Items
from brixel_cli.errors import BrixelError

LEAST_FRAMES = 3
"""The first and the last frame of a sequence are not measured."""


def sequences_of(labelled: LabelledSet) -> dict[str, list[int]]:
    """The rows of the frames of each sequence, in their order: a folder of images is a sequence.

    Raises:
        BrixelError: a sequence has too few frames.
    """
    by_folder: dict[Path, list[int]] = {}
    for row, name in enumerate(labelled.names):
        by_folder.setdefault(Path(name).parent, []).append(row)
    alike = len({folder.name for folder in by_folder}) < len(by_folder)
    found = {folder.as_posix() if alike else folder.name: rows for folder, rows in by_folder.items()}
    short = [name for name, rows in found.items() if len(rows) < LEAST_FRAMES]
    if short:
        raise BrixelError(
            f"{len(short)} of the {len(found)} sequences of {labelled.recipe.name} have fewer than {LEAST_FRAMES} "
            f"frames, such as {short[0]}: a sequence is a folder of frames, and its first and last are not measured."
        )
    return found


def num_measured(rows: Sequence[int]) -> int:
    """Frames of a sequence that are propagated to and measured."""
    return len(rows) - 2


def measure_propagation(
    maps: Maps,
    split: SplitPlan,
    rules: PropagationProtocol,
    done: Items,
    keep: Callable[[Items], None],
    device: torch.device,
    bar: Any,
) -> Measured:
    """J, F and J&F of every object of every sequence.

    Args:
        maps: of the split.
        split: the frames.
        rules: of propagation.
        done: objects of an earlier run; their sequences are not measured again.
        keep: is given all objects so far after each sequence.
        device: where features are compared.
        bar: hears of every frame.
    """
    items: Items = dict(done)
    groups: dict[str, list[str]] = {}
    for sequence, rows in sequences_of(split.labelled).items():
        members = [name for name in items if name.rpartition("/")[0] == sequence]
        if not members:
            own = _measure_sequence(maps, split, rows, rules, device, bar)
            members = [f"{sequence}/{name}" for name in own]
            items |= dict(zip(members, own.values(), strict=True))
            keep(items)
        else:
            bar.update(num_measured(rows))
        groups[sequence] = members
    return Measured(items, groups)


@torch.inference_mode()
def _measure_sequence(
    maps: Maps, split: SplitPlan, rows: Sequence[int], rules: PropagationProtocol, device: torch.device, bar: Any
) -> Mapping[str, dict[str, float]]:
    """The figures of each object of the first frame's mask, by its name."""
    labels = split.labelled.recipe.data.labels
    assert labels is not None
    first = _labels(split.labelled, rows[0])
    objects = [int(value) for value in np.unique(first) if value not in (0, IGNORE)]
    if not objects:
        raise BrixelError(
            f"{split.labelled.names[rows[0]]}: the mask of a sequence's first frame has no object, only "
            f"{labels.classes[0]}. Take the sequence out, or begin it later; see data.labels.ids."
        )
    grid = common_grid((first.shape[0], first.shape[1]), rules.grid)

    def read(row: int) -> Tensor:
        return unit_map(maps.read(split.positions[row][:1])[0].to(device), grid)

    start = read(rows[0]), soft_mask(_numbered(first, objects), len(objects), grid).to(device)
    last: deque[tuple[Tensor, Tensor]] = deque(maxlen=rules.memory)
    found: dict[int, tuple[list[float], list[float]]] = {value: ([], []) for value in objects}
    for row in rows[1:-1]:
        features = read(row)
        memory = [start, *last]
        soft = propagate(
            features, [item[0] for item in memory], [item[1] for item in memory], rules.radius, rules.top,
            rules.temperature,
        )  # fmt: skip
        last.append((features, soft))
        truth = _labels(split.labelled, row)
        guess = hard_mask(soft, (truth.shape[0], truth.shape[1]))
        counts = truth != IGNORE
        for number, value in enumerate(objects, 1):
            masks = (guess == number) & counts, (truth == value) & counts
            found[value][0].append(region_similarity(*masks))
            found[value][1].append(contour_accuracy(*masks))
        bar.update(1)
    return {labels.classes[value]: object_figures(*values) for value, values in found.items()}


def _labels(labelled: LabelledSet, row: int) -> Array:
    labels = labelled.load(row).labels
    assert labels is not None
    return labels


def _numbered(labels: Array, objects: Sequence[int]) -> Array:
    """Labels in which the objects have the numbers from 1 on, and all else is background."""
    numbers = np.zeros(256, np.uint8)
    numbers[list(objects)] = np.arange(1, len(objects) + 1)
    found: Array = numbers[labels]
    return found
