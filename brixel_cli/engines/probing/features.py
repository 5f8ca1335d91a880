"""Frozen maps and targets of a probe: computed once, stored, and read many times."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from brixel_cli.config.labelled import IGNORE
from brixel_cli.core.files import clear_partials
from brixel_cli.core.formatting import human_bytes, human_size
from brixel_cli.core.heads import QUANTITIES
from brixel_cli.data.checksums import CHECKSUM
from brixel_cli.data.crops import Crop, cut_image, cut_map, cut_target
from brixel_cli.data.feature_layout import Grid, Layout, MapWriter, encode
from brixel_cli.data.grouping import in_batches, positions_within_size, rows_by_size
from brixel_cli.data.images import LARGE_PIXELS, decoded
from brixel_cli.data.labelled import LabelledSet, Sample, all_errors
from brixel_cli.data.row_store import DONE, MISSING, Array, Store, create_store
from brixel_cli.engines.memory import check_batch
from brixel_cli.engines.models import FeatureExtractor
from brixel_cli.engines.probing.plan import (
    ProbePlan,
    Size,
    SourcePlan,
    SplitPlan,
    StoredPart,
    feature_rows,
)
from brixel_cli.engines.probing.sources import FileSource, ModelSource
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime
from brixel_cli.engines.streams import num_workers, read_ahead
from brixel_cli.errors import BrixelError


class Maps(Protocol):
    """Maps of the crops of a split."""

    grids: list[Grid]
    channels: int

    def read(self, positions: Sequence[int]) -> Tensor:
        """Maps (B, D, h, w), float32, of crops whose grids are equal."""


class StoredMaps:
    """Maps that were computed here, read from the feature folder."""

    def __init__(self, split: SplitPlan):
        assert split.maps is not None
        assert split.layout is not None
        self.store = Store(split.maps.path)
        self.grids = [grid for grid in split.layout.grids if grid is not None]
        self.channels = split.layout.channels
        self._layout = split.layout

    def read(self, positions: Sequence[int]) -> Tensor:
        """Maps (B, D, h, w), float32, of crops whose grids are equal."""
        places = [self._layout.dataset("features", at) for at in positions]
        return torch.from_numpy(self.store.read(places[0][0], [place for _, place in places])).float()


class FileMaps:
    """Maps of whole images from a file of `brixel extract`, of which each crop's part is taken."""

    def __init__(self, source: FileSource, split: SplitPlan):
        self.file, self.crops = source.file, split.crops
        self._rows = feature_rows(source, split.labelled)
        self.grids = [self._grid(crop) for crop in self.crops]
        self.channels = int(self.file[self._rows[0]].shape[0])

    def read(self, positions: Sequence[int]) -> Tensor:
        """Maps (B, D, h, w), float32, of crops whose grids are equal."""
        return torch.stack([self._read(at) for at in positions])

    def _read(self, position: int) -> Tensor:
        crop = self.crops[position]
        map_ = torch.from_numpy(self.file[self._rows[crop.row]])
        whole = crop.size == crop.scaled and not crop.flip
        return map_ if whole else cut_map(map_, crop, self.grids[position])

    def _grid(self, crop: Crop) -> Grid:
        """As many locations as the crop's share of the image has in the file."""
        height, width = (int(side) for side in self.file.grid_size[self._rows[crop.row]])
        rows, columns = height * crop.size[0] / crop.scaled[0], width * crop.size[1] / crop.scaled[1]
        return max(round(rows), 1), max(round(columns), 1)


class Targets:
    """Stored targets of a split."""

    def __init__(self, split: SplitPlan, task: str):
        self.store = Store(split.targets.path)
        self.sizes = split.target_sizes
        self.quantities = QUANTITIES[task]
        self._places = positions_within_size(self.sizes)

    def read(self, row: int) -> dict[str, Tensor]:
        """For each quantity: labels (H, W) uint8, depth (1, H, W) or normals (3, H, W); 255 or 0 counts nowhere."""
        return {quantity: torch.from_numpy(np.array(self.view(quantity, row))) for quantity in self.quantities}

    def count_anywhere(self, num_classes: int) -> bool:
        """Whether each quantity has a pixel that counts, in any row.

        Raises:
            BrixelError: a label is no class.
        """
        nothing = {"segmentation": IGNORE}
        for row in range(len(self.sizes)) if "segmentation" in self.quantities else ():
            labels = self.view("segmentation", row)
            if ((labels >= num_classes) & (labels != IGNORE)).any():
                raise BrixelError(
                    f"{self.store.path} is damaged: its row {row} has labels beyond the {num_classes} classes. Delete "
                    "the file, and give the same command again: it is made anew."
                )
        return all(
            any((self.view(quantity, row) != nothing.get(quantity, 0)).any() for row in range(len(self.sizes)))
            for quantity in self.quantities
        )

    def view(self, quantity: str, row: int) -> Array:
        """The same for one quantity, not copied; read-only."""
        values: Array = self.store.array(f"{quantity}/{human_size(self.sizes[row])}")[self._places[row]]
        return values


def prepare(plan: ProbePlan, runtime: Runtime, reporter: Reporter) -> None:
    """Fill the feature folder with what is missing of targets and maps, after saying how much room it takes.

    Raises:
        BrixelError: it does not fit on the disk, or images or targets of the set cannot be used.
    """
    reporter.say(
        f"features: {human_bytes(plan.bytes_needed)} needed, {human_bytes(plan.bytes_free)} free, "
        f"in {plan.options.features}"
    )
    clear_partials(plan.options.features)
    plan.check_disk()
    for source_plan in plan.sources:
        for split in source_plan.splits:
            _fill_targets(split, plan.options.recipe.task, reporter)
    for source_plan in plan.sources:
        _fill_maps(source_plan, runtime, reporter)


def open_maps(source_plan: SourcePlan, split: SplitPlan) -> Maps:
    """The maps of a split, to be read."""
    if isinstance(source_plan.source, FileSource):
        return FileMaps(source_plan.source, split)
    return StoredMaps(split)


def _fill_targets(split: SplitPlan, task: str, reporter: Reporter) -> None:
    at = positions_within_size(split.target_sizes)

    def places(row: int) -> dict[str, int]:
        size = human_size(split.target_sizes[row])
        return {f"{quantity}/{size}": at[row] for quantity in QUANTITIES[task]}

    store = _opened(split.targets, places, reporter)
    missing = {int(row) for row in store.missing}
    if not missing:
        return
    rows_of_image = [[row] for row in range(len(split.labelled))] if split.slides else split.positions
    images = [image for image, rows in enumerate(rows_of_image) if missing & set(rows)]

    def load(image: int) -> list[dict[str, Array]] | BrixelError:
        try:
            sample = split.labelled.load(image)
        except BrixelError as error:
            return error
        return [_cut(sample, split, row, task) for row in rows_of_image[image]]

    errors: list[str] = []
    total = len(split.target_sizes)
    with reporter.bar(f"targets, {split.split}", total, total - len(missing), "crop") as bar:
        for chunk, loaded in read_ahead([[image] for image in images], load, num_workers(), polite=False):
            rows, cut = rows_of_image[chunk[0]], loaded[0]
            if isinstance(cut, BrixelError):
                errors.append(str(cut))
                continue
            for row, values in zip(rows, cut, strict=True):
                columns = {name: [value] for name, value in zip(places(row), values.values(), strict=True)}
                store.write([row], columns, {name: [place] for name, place in places(row).items()})
            bar.update(len(rows))
    store.flush()
    if errors:
        raise all_errors(errors, len(split.labelled))


def _cut(sample: Sample, split: SplitPlan, row: int, task: str) -> dict[str, Array]:
    """An image's targets for one row; beyond the evaluation crop, in evaluation, nothing counts."""
    crop, size = (None, None) if split.slides else (split.crops[row], split.target_sizes[row])
    valid = sample.valid if split.split == "evaluate" else np.ones_like(sample.valid)
    wholes: dict[str, tuple[Array | None, Array]] = {
        "segmentation": (sample.labels, np.array(IGNORE, np.uint8)),
        "depth": (sample.depth, np.array(0, np.float32)),
        "normals": (sample.normals, np.array(0, np.float32)),
    }
    targets: dict[str, Array] = {}
    for quantity in QUANTITIES[task]:
        value, nothing = wholes[quantity]
        assert value is not None
        whole = np.where(valid, value, nothing)
        target = whole if crop is None else cut_target(whole, crop, size)
        targets[quantity] = target[None] if quantity == "depth" else target
    return targets


def _fill_maps(source_plan: SourcePlan, runtime: Runtime, reporter: Reporter) -> None:
    source = source_plan.source
    if not isinstance(source, ModelSource):
        return
    stores = []
    for split in source_plan.splits:
        if split.maps is not None and (layout := split.layout) is not None:
            stores.append((split, layout, _opened(split.maps, _places(layout), reporter)))
    if not any(len(store.missing) for _, _, store in stores):
        return
    model = source.load(runtime, reporter)
    for split, layout, store in stores:
        missing = {int(row) for row in store.missing}
        writer = MapWriter(store, layout)
        with reporter.bar(f"{source.label}, {split.split}", len(store), len(store) - len(missing), "crop") as bar:
            for chunk, maps in _computed(source, model, split, missing):
                writer.write(chunk, {"features": list(maps)})
                bar.update(len(missing.intersection(chunk)))
        store.flush()


def _computed(
    source: ModelSource, model: FeatureExtractor, split: SplitPlan, missing: Collection[int]
) -> Iterator[tuple[Sequence[int], Array]]:
    """Maps of all batches in which a crop is missing; the same batches for any crops, so that the bits are the same."""
    if not missing:
        return
    rows_of_size = rows_by_size(range(len(split.crops)), lambda at: source.seen(split.crops[at].size)[-1])
    counts = {size: len(rows) for size, rows in rows_of_size.items()}
    check_batch(model, counts, None)
    batch_sizes = model.batch_sizes(counts, None)
    chunks = [chunk for size, rows in rows_of_size.items() for chunk in in_batches(rows, batch_sizes[size])]
    chunks = [chunk for chunk in chunks if any(row in missing for row in chunk)]
    polite = model.runtime.device.type == "cpu"
    load = image_loader(split.labelled, split.crops, source.seen)
    for chunk, pixels in read_ahead(chunks, load, num_workers(), polite):
        batches = [
            torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2).contiguous() for seen in zip(*pixels, strict=True)
        ]
        maps = model.maps(*batches)
        tensors, finite = encode(maps, "float16", None)
        if not all(finite):
            name = split.labelled.names[split.crops[chunk[finite.index(False)]].row]
            raise BrixelError(f"{name}: its features are no finite numbers in float16; check the weights.")
        yield chunk, tensors["features"].cpu().numpy()


def image_loader(
    labelled: LabelledSet, crops: Sequence[Crop], seen: Callable[[Size], Sequence[Size]]
) -> Callable[[int], list[Array]]:
    """What reads a crop by its position, at each size that a model sees of it, the finest last, (H, W, 3), uint8."""

    def load(position: int) -> list[Array]:
        crop = crops[position]
        sizes = seen(crop.size)
        size = sizes[-1]
        enough = math.ceil(crop.scaled[0] * size[0] / crop.size[0]), math.ceil(crop.scaled[1] * size[1] / crop.size[1])
        with decoded(labelled.root / labelled.names[crop.row], enough=enough, over=LARGE_PIXELS) as image:
            return [np.asarray(cut_image(image, crop, size)) for size in sizes]

    return load


def _places(layout: Layout) -> Callable[[int], Mapping[str, int]]:
    return lambda row: dict([layout.dataset("features", row)])


def _opened(part: StoredPart, places: Callable[[int], Mapping[str, int]], reporter: Reporter) -> Store:
    """A store of the feature folder, to be filled; its rows that have changed since they were written are missing.

    Args:
        part: what it holds.
        places: by dataset, where a row's values are.
        reporter: hears of rows that have changed.
    """
    if not part.path.exists():
        sums = {CHECKSUM: np.zeros(part.num_rows, np.uint64)}
        create_store(part.path, part.num_rows, part.columns, part.description, sums)
    store = Store(part.path, writable=True)
    changed = [
        row
        for row in np.flatnonzero(store.status == DONE).tolist()
        if not store.intact(row, (store.array(name)[place] for name, place in places(row).items()))
    ]
    for row in changed:
        store.mark(row, MISSING)
    if changed:
        reporter.warn(f"{part.path}: {len(changed)} rows have changed since they were written; they are computed again")
    return store
