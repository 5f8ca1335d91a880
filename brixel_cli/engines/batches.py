"""Where a training batch comes from: computed from photographs as it is needed, or read from a cache computed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from brixel_cli.core.backbone import Backbone
from brixel_cli.data.features import Column, Store, bytes_needed, create_store
from brixel_cli.data.images import Skipped, load_image
from brixel_cli.data.views import View, Views, reduce_view, seed_of
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError
from brixel_cli.formatting import human_bytes
from brixel_cli.recipe import Recipe

Key = tuple[int, int]
CACHE_FORMAT = 2
CACHE_BATCH = 8


@dataclass(frozen=True)
class Batch:
    """What one pass of training or validation needs.

    Attributes:
        images: the student's normalised views (B, 3, H, W).
        maps: the backbone's four maps of them, each (B, D, h, w).
        targets: the teacher's maps (B, D, factor * h, factor * w).
        names: the photographs, for messages.
        replaced: for each, whether it stands in for a damaged one.
    """

    images: Tensor
    maps: list[Tensor]
    targets: Tensor
    names: list[str]
    replaced: list[bool]


class Batches(Protocol):
    """A source of batches for lists of view keys, (epoch, number)."""

    skipped: list[Skipped]

    def iterate(self, keys: Iterable[Sequence[Key]]) -> Iterator[Batch]:
        """One batch for each list of keys, in order."""


def batch_keys(
    num_views: int, seed: int, steps: range, batch_size: int, accumulate: int = 1, rank: int = 0, world_size: int = 1
) -> Iterator[list[Key]]:
    """Which views each pass of each step takes: a new shuffle every epoch, a pure function of seed and step.

    The global batch of a step is the same however it is divided over passes and processes.

    Args:
        num_views: training views in an epoch.
        seed: of the shuffles.
        steps: the steps to yield, `accumulate` passes each.
        batch_size: views in a step, over all passes and processes.
        accumulate: passes in a step.
        rank: this process.
        world_size: number of processes.
    """
    orders: dict[int, Any] = {}
    share = batch_size // (accumulate * world_size)
    for step in steps:
        for part in range(accumulate):
            start = step * batch_size + (part * world_size + rank) * share
            keys = []
            for position in range(start, start + share):
                epoch, place = divmod(position, num_views)
                if epoch not in orders:
                    orders = {epoch - 1: orders.get(epoch - 1), epoch: None}
                    orders[epoch] = np.random.default_rng(seed_of(seed, epoch)).permutation(num_views)
                keys.append((epoch, int(orders[epoch][place])))
            yield keys


@torch.no_grad()
def compute_maps(
    backbone: Backbone, runtime: Runtime, pixels: Tensor, factor: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    """From teacher views (B, 3, 4S, 4S): the student's views, the backbone's four maps of those, and the targets."""
    pixels = pixels.to(runtime.device)
    images = reduce_view(pixels, factor)
    with runtime.autocast():
        return images, backbone.intermediate_maps(images), backbone.last_map(pixels)


class OnlineBatches:
    """Reads and crops photographs in worker processes; runs backbone and teacher on each batch."""

    def __init__(self, views: Views, backbone: Backbone, runtime: Runtime, workers: int):
        self.views, self.backbone, self.runtime, self.workers = views, backbone, runtime, workers
        self.skipped: list[Skipped] = []

    def load(self, keys: Iterable[Sequence[Key]]) -> Iterator[list[View]]:
        """The views themselves, read ahead by the workers."""
        loader = DataLoader(
            self.views,
            batch_sampler=keys,  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=list,
        )
        try:
            for batch in loader:
                self.skipped.extend(item for view in batch for item in view.skipped if item not in self.skipped)
                yield batch
        except BrixelError as error:  # a worker's comes wrapped in its traceback
            raise BrixelError(str(error).strip().rpartition("BrixelError: ")[2]) from error

    def iterate(self, keys: Iterable[Sequence[Key]]) -> Iterator[Batch]:
        """One batch for each list of keys, in order."""
        for views in self.load(keys):
            pixels = torch.stack([view.pixels for view in views])
            yield Batch(
                *compute_maps(self.backbone, self.runtime, pixels, self.views.config.factor),
                names=[view.name for view in views],
                replaced=[bool(view.skipped) for view in views],
            )


class CachedBatches:
    """Reads batches from a cache file, in which view number n is row `first_row + n`."""

    def __init__(self, store: Store, views: Views, first_row: int, device: torch.device):
        self.store, self.views, self.first_row, self.device = store, views, first_row, device
        self.skipped: list[Skipped] = []
        for number in range(0, len(views), views.config.per_image):
            wanted = views.photograph(number)
            if self._used(number) != wanted.name:
                self.skipped.append(Skipped(wanted.name, _damage(wanted.path)))

    def _used(self, number: int) -> str:
        """The photograph that a view was cut from: another than the wanted one where that was damaged."""
        return self.views.photographs[int(self.store.read("photograph", [self.first_row + number])[0])].name

    def iterate(self, keys: Iterable[Sequence[Key]]) -> Iterator[Batch]:
        """One batch for each list of keys, in order."""
        for batch in keys:
            rows = [self.first_row + number for _, number in batch]
            maps = self._tensor("maps", rows)
            sources = [(self._used(number), self.views.photograph(number).name) for _, number in batch]
            yield Batch(
                images=self._tensor("images", rows),
                maps=list(maps.unbind(1)),
                targets=self._tensor("targets", rows),
                names=[used for used, _ in sources],
                replaced=[used != wanted for used, wanted in sources],
            )

    def _tensor(self, name: str, rows: list[int]) -> Tensor:
        return torch.from_numpy(self.store.read(name, rows)).to(self.device).float()


def cache_columns(recipe: Recipe, embed_dim: int, patch_size: int) -> dict[str, Column]:
    """Datasets of a cache: for each view its image, maps and target, and the photograph that it was really cut from."""
    height, width = recipe.student_hw
    h, w, factor = height // patch_size, width // patch_size, recipe.views.factor
    return {
        "images": Column((3, height, width), "float16"),
        "maps": Column((4, embed_dim, h, w), "float16"),
        "targets": Column((embed_dim, factor * h, factor * w), "float16"),
        "photograph": Column((), "int32"),
    }


def open_cache(
    recipe: Recipe, run_folder: Path, backbone: Backbone, parts: Sequence[Views], runtime: Runtime, reporter: Reporter
) -> list[CachedBatches]:
    """Fill the cache of these views, or what is missing of it, and open it; one source for each part.

    The file is named by a fingerprint of all that its numbers depend on, so that a cache is never read by mistake.
    An interrupted filling goes on where it stopped; several processes fill disjoint rows.

    Raises:
        BrixelError: it does not fit on the disk.
    """
    description = {
        "format": CACHE_FORMAT,
        "backbone": [backbone.name, backbone.sha256, str(backbone.dtype)],
        "precision": runtime.precision,
        "views": recipe.views.model_dump(),
        "seed": recipe.seed,
        "photographs": [
            [str(p.path.resolve()), p.path.stat().st_size, p.path.stat().st_mtime_ns]
            for v in parts
            for p in v.photographs
        ],
        "parts": [len(views) for views in parts],
    }
    fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    folder = Path(recipe.cache.directory) if recipe.cache.directory else run_folder / "cache"
    path = folder / f"{fingerprint[:16]}.h5"
    num_rows = sum(len(views) for views in parts)
    columns = cache_columns(recipe, backbone.embed_dim, backbone.patch_size)
    if runtime.is_first and not path.exists():
        reporter.say(f"cache: {num_rows} views need {human_bytes(bytes_needed(num_rows, columns))} on disk, at {path}")
        others = [file for file in folder.glob("*.h5") if file != path] if folder.is_dir() else []
        if others:
            taken = human_bytes(sum(file.stat().st_size for file in others))
            reporter.say(f"cache: {len(others)} other files in {folder} take {taken}; delete those no longer needed")
        create_store(path, num_rows, columns, description)
    runtime.wait()
    store = Store(path, writable=True)
    starts = [sum(len(views) for views in parts[:number]) for number in range(len(parts))]
    missing = {int(row) for row in store.missing}
    runtime.wait()  # every process has read the same list before the first row is filled
    with reporter.bar("cache", num_rows, num_rows - len(missing), "view") as bar:
        for views, first_row in zip(parts, starts, strict=True):
            rows = [row for row in range(first_row, first_row + len(views)) if row in missing]
            mine = rows[runtime.rank :: runtime.world_size]
            at_once = min(CACHE_BATCH, recipe.optim.images_per_pass(runtime.world_size))
            chunks = [mine[at : at + at_once] for at in range(0, len(mine), at_once)]
            numbers = {photograph.name: number for number, photograph in enumerate(views.photographs)}
            online = OnlineBatches(views, backbone, runtime, recipe.run.workers)
            batches = online.iterate([(0, row - first_row) for row in chunk] for chunk in chunks)
            for chunk, batch in zip(chunks, batches, strict=True):
                maps = torch.stack(batch.maps, dim=1)
                for place, row in enumerate(chunk):
                    tensors = {"images": batch.images, "maps": maps, "targets": batch.targets}
                    arrays = {name: _half(tensor[place]) for name, tensor in tensors.items()}
                    photograph = np.array(numbers[batch.names[place]], np.int32)
                    store.write(row, {**arrays, "photograph": photograph})
                bar.update(len(chunk) * runtime.world_size)
    runtime.wait()
    return [CachedBatches(store, views, row, runtime.device) for views, row in zip(parts, starts, strict=True)]


def _damage(path: Path) -> str:
    try:
        load_image(path)
    except BrixelError as error:
        return str(error).removesuffix(f": {path}")
    return "could not be read when the cache was filled"


def _half(tensor: Tensor) -> Any:
    return tensor.half().cpu().numpy()
