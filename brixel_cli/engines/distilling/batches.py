"""Which views make a training batch, and batches computed from images as they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from brixel_cli.core.backbone import Backbone
from brixel_cli.data.images import Skipped, share_room
from brixel_cli.data.views import View, Views, normalise_pixels, reduce_view, seed_of
from brixel_cli.engines.runtime import Runtime
from brixel_cli.engines.streams import most_workers, num_cores
from brixel_cli.errors import BrixelError

Key = tuple[int, int]
MOST_WORKERS = 16
CPU_WORKERS = 2
"""On the CPU the networks need the cores."""


@dataclass(frozen=True)
class Batch:
    """What one pass of training or validation needs.

    Attributes:
        images: the student's normalised views (B, 3, H, W).
        maps: the backbone's four maps of them, each (B, D, h, w).
        targets: the teacher's maps (B, D, factor * h, factor * w), float32, or float16 from a cache.
        names: the images, for messages.
        replaced: for each, whether it stands in for a damaged one.
    """

    images: Tensor
    maps: list[Tensor]
    targets: Tensor
    names: list[str]
    replaced: list[bool]


def check_finite(batch: Batch) -> None:
    """Raise a BrixelError that names the images whose target is not finite."""
    odd = [name for name, target in zip(batch.names, batch.targets, strict=True) if not target.isfinite().all()]
    if odd:
        raise BrixelError(
            f"{', '.join(odd)}: the teacher's feature map is not finite. Compute in float32 (--set "
            "run.precision=float32), or remove the image. Where "
            "every image is named, the weights of the backbone are damaged."
        )


class Batches(Protocol):
    """A source of batches for lists of view keys, (epoch, number)."""

    skipped: list[Skipped]

    def iterate(self, keys: Iterable[Sequence[Key]]) -> Iterator[Batch]:
        """One batch for each list of keys, in order."""


def batch_keys(
    views: Views, steps: range, batch_size: int, accumulate: int = 1, rank: int = 0, world_size: int = 1
) -> Iterator[list[Key]]:
    """Which views each pass of each step takes: a new shuffle every epoch, a pure function of the views and the step.

    The global batch of a step is the same however it is divided over passes and processes. Its views are of one size;
    sizes are interleaved, in an order that changes.

    Args:
        views: to be trained on; their seed is that of the shuffles.
        steps: the steps to yield, `accumulate` passes each.
        batch_size: views in a step, over all passes and processes.
        accumulate: passes in a step.
        rank: this process.
        world_size: number of processes.
    """
    num_sizes = views.config.num_sizes
    share = batch_size // (accumulate * world_size)
    shuffles: dict[tuple[int, int], list[int]] = {}
    for step in steps:
        turn, place_in_turn = divmod(step, num_sizes)
        size = _shuffled(num_sizes, views.seed, turn, num_sizes)[place_in_turn] if num_sizes > 1 else 0
        for part in range(accumulate):
            start = turn * batch_size + (part * world_size + rank) * share
            keys = []
            for position in range(start, start + share):
                epoch, place = divmod(position, len(views) // num_sizes)
                if (size, epoch) not in shuffles:
                    shuffles.pop((size, epoch - 2), None)
                    shuffles[size, epoch] = _numbers(views, size, epoch)
                keys.append((epoch, shuffles[size, epoch][place]))
            yield keys


def _numbers(views: Views, size: int, epoch: int) -> list[int]:
    """The views of one size in an epoch, shuffled."""
    if views.config.num_sizes == 1:
        return _shuffled(len(views), views.seed, epoch)
    numbers = [number for number in range(len(views)) if views.size_number(epoch, number) == size]
    return [numbers[place] for place in _shuffled(len(numbers), views.seed, epoch, size)]


def _shuffled(count: int, *seed: int) -> list[int]:
    order: list[int] = np.random.default_rng(seed_of(*seed)).permutation(count).tolist()
    return order


@torch.no_grad()
def compute_maps(
    backbone: Backbone, runtime: Runtime, pixels: Tensor, factor: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    """From teacher views: the student's views, the backbone's four maps of those, and the targets.

    Args:
        backbone: the teacher, and the trunk of the student.
        runtime: where pixels are normalised and reduced, and the maps computed.
        pixels: uint8 (B, 3, factor * H, factor * W).
        factor: of teacher side over student side.
    """
    views = normalise_pixels(pixels.to(runtime.device, non_blocking=True), backbone.mean, backbone.std)
    images = reduce_view(views, factor)
    with runtime.autocast():
        return images, backbone.intermediate_maps(images), backbone.last_map(views)


def num_workers(asked: int | None, runtime: Runtime) -> int:
    """Processes that read views: as many as asked for, up to some for each core; None: by the cores.

    The training's processes share the cores.
    """
    if asked is not None:
        return min(asked, most_workers(runtime.world_size))
    share = num_cores() // runtime.world_size
    return min(max(share - 1, 1), MOST_WORKERS) if runtime.device.type == "cuda" else min(share, CPU_WORKERS)


class ViewBatch(NamedTuple):
    """Views as the workers send them.

    Attributes:
        pixels: uint8 (B, 3, H, W).
        names: of the images.
        skipped: for each, the files that it stands in for.
    """

    pixels: Tensor
    names: list[str]
    skipped: list[tuple[Skipped, ...]]


def _collate(views: list[View]) -> ViewBatch:
    pixels = torch.stack([view.pixels for view in views])
    return ViewBatch(pixels, [view.name for view in views], [view.skipped for view in views])


class _NextKeys:
    """The lists of keys that a loader is to read next; its worker processes stay from one iteration to another."""

    keys: Iterable[Sequence[Key]] = ()

    def __iter__(self) -> Iterator[Sequence[Key]]:
        return iter(self.keys)


class ViewLoader:
    """Reads and crops images in worker processes.

    Args:
        views: which are read.
        runtime: whose device they are for, and whose processes share the cores.
        workers: processes, 0: this one; None: by the cores.

    Attributes:
        count: of the worker processes.
        skipped: damaged images that were found, with reasons.
    """

    def __init__(self, views: Views, runtime: Runtime, workers: int | None):
        self.count = num_workers(workers, runtime)
        self.skipped: list[Skipped] = []
        self._next = _NextKeys()
        if self.count:
            share_room()
        self._loader: DataLoader[ViewBatch] = DataLoader(
            views,  # type: ignore[arg-type]
            batch_sampler=self._next,  # type: ignore[arg-type]
            num_workers=self.count,
            collate_fn=_collate,
            pin_memory=runtime.device.type == "cuda",
            persistent_workers=self.count > 0,
        )

    def load(self, keys: Iterable[Sequence[Key]]) -> Iterator[ViewBatch]:
        """Views for each list of keys, in order, read ahead by the workers."""
        self._next.keys = keys
        try:
            for batch in self._loader:
                self.skipped.extend(item for files in batch.skipped for item in files if item not in self.skipped)
                yield batch
        except BrixelError as error:  # a worker's comes wrapped in its traceback
            raise BrixelError(str(error).strip().rpartition("BrixelError: ")[2]) from error


class OnlineBatches:
    """Batches computed from images as they are needed: views from a `ViewLoader`, their maps from the backbone.

    Args:
        views: training or held-out views.
        backbone: the teacher, and the trunk of the student.
        runtime: where they compute.
        workers: as for `ViewLoader`.
    """

    def __init__(self, views: Views, backbone: Backbone, runtime: Runtime, workers: int | None):
        self.loader = ViewLoader(views, runtime, workers)
        self.skipped = self.loader.skipped
        self.factor, self.backbone, self.runtime = views.config.factor, backbone, runtime

    def iterate(self, keys: Iterable[Sequence[Key]]) -> Iterator[Batch]:
        """One batch for each list of keys, in order."""
        for loaded in self.loader.load(keys):
            yield Batch(
                *compute_maps(self.backbone, self.runtime, loaded.pixels, self.factor),
                names=loaded.names,
                replaced=[bool(files) for files in loaded.skipped],
            )
