"""A cache of training batches: teacher and backbone run once for each fixed view, and their maps are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brixel_cli.config.distill import Recipe
from brixel_cli.core.backbone import Backbone
from brixel_cli.core.files import clear_partials
from brixel_cli.core.formatting import human_bytes, human_size
from brixel_cli.core.identity import files_sha256, json_digest
from brixel_cli.data.checksums import CHECKSUM
from brixel_cli.data.columns import Column, bytes_needed
from brixel_cli.data.grouping import batches_of_one_size, positions_within_size
from brixel_cli.data.images import Skipped, load_image
from brixel_cli.data.row_store import MISSING, Array, Store, create_store
from brixel_cli.data.views import Views
from brixel_cli.engines.distilling.batches import Batch, Key, OnlineBatches
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError

CACHE_FORMAT = 4
"""Of what is computed for a view; a cache of another format is not read. Since 4, large JPEGs are decoded reduced."""
CACHE_BATCH = 8
KINDS = ("images", "maps", "targets")
"""What is stored of a view, in the order of its checksum."""


@dataclass(frozen=True)
class CacheLayout:
    """Where each view's arrays are in a cache: a dataset of each kind for each size of view.

    Attributes:
        sizes: of every row's teacher input (height, width).
        factor, patch_size, embed_dim: of student and backbone.
    """

    sizes: tuple[tuple[int, int], ...]
    factor: int
    patch_size: int
    embed_dim: int

    @cached_property
    def positions(self) -> list[int]:
        """Each row's position in the datasets of its size."""
        return positions_within_size(self.sizes)

    def dataset(self, kind: str, row: int) -> str:
        """Name of the dataset of a kind that a row is in."""
        return f"{kind}/{human_size(self.sizes[row])}"

    @property
    def columns(self) -> dict[str, Column]:
        """Every dataset; `photograph` is the number of the image that each view was really cut from."""
        columns = {"photograph": Column((), "int32")}
        for (height, width), count in Counter(self.sizes).items():
            fine = self.factor * self.patch_size
            h, w = height // fine, width // fine
            shapes: dict[str, tuple[int, ...]] = {
                "images": (3, height // self.factor, width // self.factor),
                "maps": (4, self.embed_dim, h, w),
                "targets": (self.embed_dim, self.factor * h, self.factor * w),
            }
            for kind, shape in shapes.items():
                columns[f"{kind}/{human_size((height, width))}"] = Column(shape, "float16", count)
        return columns


def cache_layout(parts: Sequence[Views], backbone: Backbone) -> CacheLayout:
    """The layout of a cache of these views, part after part."""
    sizes = [
        views.config.teacher_sizes[views.size_number(0, number)] for views in parts for number in range(len(views))
    ]
    return CacheLayout(tuple(sizes), parts[0].config.factor, backbone.patch_size, backbone.embed_dim)


class CachedBatches:
    """Reads batches from a cache file, in which view number n is row `first_row + n`."""

    def __init__(self, store: Store, layout: CacheLayout, views: Views, first_row: int, device: torch.device):
        self.store, self.layout, self.views, self.first_row, self.device = store, layout, views, first_row, device
        self.skipped: list[Skipped] = []
        self._checked: set[int] = set()
        for number in range(0, len(views), views.config.per_image):
            wanted = views.image(number)
            if self._used(number) != wanted.name:
                self.skipped.append(Skipped(wanted.name, _damage(wanted.path)))

    def _used(self, number: int) -> str:
        """The image that a view was cut from: another than the wanted one where that was damaged."""
        row = self.first_row + number
        image = int(self.store.read("photograph", [row])[0])
        if not 0 <= image < len(self.views.images):
            raise self._damaged(row)
        return self.views.images[image].name

    def iterate(self, keys: Iterable[Sequence[Key]]) -> Iterator[Batch]:
        """One batch for each list of keys, in order.

        Raises:
            BrixelError: a row has changed since it was written, which is found when it is first read.
        """
        for batch in keys:
            rows = [self.first_row + number for _, number in batch]
            arrays = {kind: self._read(kind, rows) for kind in KINDS}
            for place, row in enumerate(rows):
                self._check(row, [*(arrays[kind][place] for kind in KINDS), self.store.read("photograph", [row])])
            sources = [(self._used(number), self.views.image(number).name) for _, number in batch]
            yield Batch(
                images=self._tensor(arrays["images"]).float(),
                maps=list(self._tensor(arrays["maps"]).float().unbind(1)),
                targets=self._tensor(arrays["targets"]),
                names=[used for used, _ in sources],
                replaced=[used != wanted for used, wanted in sources],
            )

    def _read(self, kind: str, rows: list[int]) -> Array:
        return self.store.read(self.layout.dataset(kind, rows[0]), [self.layout.positions[row] for row in rows])

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _check(self, row: int, values: Sequence[Array]) -> None:
        """Raise a BrixelError where a row is not what was written; older caches have no checksums."""
        if row in self._checked:
            return
        if not self.store.intact(row, values):
            raise self._damaged(row)
        self._checked.add(row)

    def _damaged(self, row: int) -> BrixelError:
        """The error for a row that has changed; the next run computes it again."""
        self.store.mark(row, MISSING)
        return BrixelError(
            f"{self.store.path}: the cached view {row} has changed since it was written, as on a failing disk. "
            "Go on with --resume: the view is then computed again."
        )


class CacheFile:
    """The file of a run's cache, for its parts one after the other: training and held-out views.

    The file is named by a fingerprint of all that its numbers depend on, so that a cache is never read by mistake.
    An interrupted filling goes on where it stopped; several processes fill disjoint rows.

    Raises:
        BrixelError: it does not fit on the disk, or an image cannot be read.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_folder: Path,
        backbone: Backbone,
        parts: Sequence[Views],
        runtime: Runtime,
        reporter: Reporter,
    ):
        self.recipe, self.backbone, self.parts, self.runtime, self.reporter = recipe, backbone, parts, runtime, reporter
        images = [image for views in parts for image in views.images]
        description = {
            "format": CACHE_FORMAT,
            "backbone": [backbone.name, backbone.sha256, str(backbone.dtype)],
            "precision": runtime.precision,
            "views": recipe.views.model_dump(),
            "seed": recipe.seed,
            "photographs": [image.name for image in images],
            "sha256": files_sha256([image.path for image in images]),
            "parts": [len(views) for views in parts],
        }
        folder = Path(recipe.cache.directory) if recipe.cache.directory else run_folder / "cache"
        self.path = folder / f"{json_digest(description)[:16]}.h5"
        self.num_rows = sum(len(views) for views in parts)
        self.layout = cache_layout(parts, backbone)
        if runtime.is_first:
            clear_partials(folder)
        if runtime.is_first and not self.path.exists():
            sums = {CHECKSUM: np.zeros(self.num_rows, np.uint64)}
            needed = human_bytes(bytes_needed(self.num_rows, self.layout.columns) + sums[CHECKSUM].nbytes)
            reporter.say(f"cache: {self.num_rows} views need {needed} on disk, at {self.path}")
            others = [file for file in folder.glob("*.h5") if file != self.path] if folder.is_dir() else []
            if others:
                taken = human_bytes(sum(file.stat().st_size for file in others))
                reporter.say(
                    f"cache: {len(others)} other files in {folder} take {taken}; delete those no longer needed"
                )
            create_store(self.path, self.num_rows, self.layout.columns, description, sums)
        runtime.wait()

    def fill(self) -> list[CachedBatches]:
        """Compute the rows that are missing, and open the file: a source of batches for each part.

        Raises:
            BrixelError: an image cannot be read, or its maps are not finite.
        """
        runtime, store = self.runtime, Store(self.path, writable=True)
        starts = [sum(len(views) for views in self.parts[:number]) for number in range(len(self.parts))]
        missing = {int(row) for row in store.missing}
        runtime.wait()  # every process has read the same list before the first row is filled
        with self.reporter.bar("cache", self.num_rows, self.num_rows - len(missing), "view") as bar:
            for views, first_row in zip(self.parts, starts, strict=True):
                rows = [row for row in range(first_row, first_row + len(views)) if row in missing]
                for count in self._fill(store, views, first_row, rows[runtime.rank :: runtime.world_size]):
                    bar.update(count * runtime.world_size)
        runtime.wait()
        return [
            CachedBatches(store, self.layout, views, row, runtime.device)
            for views, row in zip(self.parts, starts, strict=True)
        ]

    def _fill(self, store: Store, views: Views, first_row: int, rows: list[int]) -> Iterator[int]:
        """Compute rows of a part; yields the number of each batch."""
        layout, runtime = self.layout, self.runtime
        at_once = min(CACHE_BATCH, self.recipe.optim.images_per_pass(runtime.world_size))
        chunks = batches_of_one_size(rows, lambda row: layout.sizes[row], at_once)
        numbers = {image.name: number for number, image in enumerate(views.images)}
        online = OnlineBatches(views, self.backbone, runtime, self.recipe.run.workers)
        batches = online.iterate([(0, row - first_row) for row in chunk] for chunk in chunks)
        for chunk, batch in zip(chunks, batches, strict=True):
            tensors = {"images": batch.images, "maps": torch.stack(batch.maps, dim=1), "targets": batch.targets}
            arrays: dict[str, list[Array]] = {
                layout.dataset(kind, chunk[0]): [
                    _as_float16(tensor, kind, name) for tensor, name in zip(tensors[kind], batch.names, strict=True)
                ]
                for kind in KINDS
            }
            positions = [layout.positions[row] for row in chunk]
            used: list[Array] = [np.array(numbers[name], np.int32) for name in batch.names]
            store.write(chunk, arrays | {"photograph": used}, dict.fromkeys(arrays, positions))
            yield len(chunk)


def _as_float16(tensor: Tensor, kind: str, name: str) -> npt.NDArray[np.float16]:
    """One image's values as they are stored; raises a BrixelError that names the image where they are not finite."""
    values: npt.NDArray[np.float16] = tensor.half().cpu().numpy()
    if not np.isfinite(values).all():
        what = {"images": "view", "maps": "backbone's feature maps", "targets": "teacher's feature map"}[kind]
        largest = float(tensor.float().abs().max())
        raise BrixelError(
            f"{name}: the {what} cannot be cached: not finite, or beyond float16's 65504 (largest value {largest:g}). "
            "Compute in float32 (--set run.precision=float32), remove the image, or train without a cache "
            "(--set cache.enabled=false)."
        )
    return values


def _damage(path: Path) -> str:
    try:
        load_image(path)
    except BrixelError as error:
        return str(error).removesuffix(f": {path}")
    return "could not be read when the cache was filled"
