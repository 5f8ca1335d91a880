"""What a probe will look at and store: crops, targets, maps, and the room that they need on the disk."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from brixel_cli.config.labelled import Split
from brixel_cli.config.probe import ProbeOptions, num_labelled
from brixel_cli.config.protocols import CropConfig
from brixel_cli.config.section import Side
from brixel_cli.core.files import check_disk, free_bytes
from brixel_cli.core.formatting import human_size
from brixel_cli.core.heads import QUANTITIES
from brixel_cli.core.identity import json_digest
from brixel_cli.data.columns import Column, bytes_needed
from brixel_cli.data.crops import Crop, cut_target, plan_crops
from brixel_cli.data.feature_layout import Grid, Layout
from brixel_cli.data.labelled import LabelledSet
from brixel_cli.engines.probing.sources import FileSource, ModelSource, PredictionSource, Source
from brixel_cli.errors import BrixelError

FORMAT = 1
Size = tuple[int, int]


@dataclass(frozen=True)
class StoredPart:
    """A file of the feature folder, and what it will hold: named by a fingerprint of all that it depends on.

    Attributes:
        path: of the file.
        num_rows: a row for each crop.
        columns: its datasets.
        description: what the fingerprint is of.
    """

    path: Path
    num_rows: int
    columns: dict[str, Column]
    description: dict[str, Any]

    @property
    def bytes_needed(self) -> int:
        """Bytes of the file that are not on the disk yet."""
        return 0 if self.path.exists() else bytes_needed(self.num_rows, self.columns)


@dataclass(frozen=True)
class SplitPlan:
    """One split as one source sees it.

    Attributes:
        labelled: the images with their targets.
        split: `train` or `evaluate`.
        crops: of the images, those of an image side by side.
        targets: where their targets are stored.
        target_sizes: (height, width) of each row of the targets.
        maps: where the source's maps of them are stored; None for a feature file.
        grids: of the maps; empty for a feature file.
        slides: whether a target belongs to all windows of an image together.
    """

    labelled: LabelledSet
    split: Split
    crops: list[Crop]
    targets: StoredPart
    target_sizes: list[Size]
    maps: StoredPart | None
    layout: Layout | None
    slides: bool

    @cached_property
    def positions(self) -> list[list[int]]:
        """For each image of the set, the positions of its crops."""
        found: list[list[int]] = [[] for _ in range(len(self.labelled))]
        for position, crop in enumerate(self.crops):
            found[crop.row].append(position)
        return found

    def target_row(self, image: int) -> int:
        """The row of the targets that an image is evaluated on."""
        return image if self.slides else self.positions[image][0]


@dataclass(frozen=True)
class SourcePlan:
    """A source, with the splits as it sees them; there is none to train on for tasks that train nothing."""

    source: Source
    evaluate: SplitPlan
    training: SplitPlan | None

    @property
    def train(self) -> SplitPlan:
        """The split that heads are trained on, of a task that trains them."""
        assert self.training is not None
        return self.training

    @property
    def splits(self) -> list[SplitPlan]:
        """Those whose targets and maps it needs: nothing is trained for predictions that are there already."""
        if self.training is None or isinstance(self.source, PredictionSource):
            return [self.evaluate]
        return [self.training, self.evaluate]

    @property
    def seeds(self) -> int | None:
        """How many seeds it has of itself; None: as many as are asked for."""
        if isinstance(self.source, PredictionSource):
            return len(self.source.folders)
        return 1 if self.training is None else None


@dataclass(frozen=True)
class ProbePlan:
    """All that is fixed before the first forward pass."""

    options: ProbeOptions
    sources: list[SourcePlan]

    @property
    def parts(self) -> list[StoredPart]:
        """Every file that is needed, once."""
        splits = [split for source in self.sources for split in source.splits]
        found = [part for split in splits for part in (split.targets, split.maps) if part is not None]
        return list({part.path: part for part in found}.values())

    @property
    def bytes_needed(self) -> int:
        """Bytes that will be added to the feature folder."""
        return sum(part.bytes_needed for part in self.parts)

    @property
    def bytes_free(self) -> int:
        """Bytes free where the features go."""
        return free_bytes(self.options.features)

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return any(item.seeds is None for item in self.sources)

    @property
    def num_steps(self) -> int:
        """Steps of each training of a head."""
        images = num_labelled(len(self.sources[0].train.labelled), self.options.label_fraction)
        return self.options.training.num_steps(images)

    @property
    def notes(self) -> list[str]:
        """What is to be known of a plan for which the backbone's weights were not read."""
        models = [item.source for item in self.sources if isinstance(item.source, ModelSource)]
        notes = []
        if any(model.kind == "equal_cost" and model.spec.scale == 1 for model in models):
            notes.append("The input of the backbone at equal cost is measured by the run; here it is the student's.")
        if any(not model.backbone_sha256 for model in models):
            notes.append("The backbone's weights were not read: stored features count as missing here.")
        known = ("pretrained", "random")
        absent = {m.spec.weights for m in models if m.spec.weights not in known and not Path(m.spec.weights).is_file()}
        return notes + [f"The run needs the backbone's weights, and {path} is not there." for path in sorted(absent)]

    def check_disk(self) -> None:
        """Raise a BrixelError where the features do not fit on the disk."""
        check_disk(self.options.features, self.bytes_needed, "Storing features and targets")


def make_plan(
    options: ProbeOptions, sources: Sequence[Source], train: LabelledSet | None, evaluate: LabelledSet, precision: str
) -> ProbePlan:
    """Work out crops, grids and bytes from headers; nothing is written. Without `train`, nothing will be trained.

    Raises:
        BrixelError: an image's header cannot be read, or a feature file lacks an image of the set, or has
            one row for two of them.
    """
    protocol = options.protocol
    settings: list[tuple[Split, LabelledSet, CropConfig, Side | None]] = [
        ("evaluate", evaluate, protocol.evaluate, protocol.evaluate_labels)
    ]
    if train is not None:
        settings.append(("train", train, options.training.train, options.training.train_labels))
    sizes = {split: [labelled.size(row) for row in range(len(labelled))] for split, labelled, _, _ in settings}
    plans = []
    targets: dict[tuple[Split, int], tuple[list[Crop], StoredPart, list[Size]]] = {}
    for source in sources:
        splits = []
        for split, labelled, config, label_side in settings:
            key = split, source.patch_size
            if key not in targets:
                stride = protocol.stride(options.size)
                crops = crops_of(config, sizes[split], options.size, source.patch_size, stride)
                part, target_sizes = _targets(options, labelled, split, crops, sizes[split], label_side, config)
                targets[key] = crops, part, target_sizes
            crops, part, target_sizes = targets[key]
            maps, layout = _maps(options, source, labelled, crops, precision)
            slides = config.kind == "slide"
            splits.append(SplitPlan(labelled, split, crops, part, target_sizes, maps, layout, slides))
        if isinstance(source, FileSource):
            _refuse_shared_rows(source, [planned.labelled for planned in splits])
        plans.append(SourcePlan(source, splits[0], splits[1] if len(splits) > 1 else None))
    return ProbePlan(options, plans)


def crops_of(config: CropConfig, sizes: Sequence[Size], side: Side, patch_size: int, stride: int | None) -> list[Crop]:
    """The crops of a set; where they are mirrored too, the mirrored ones follow the plain ones."""
    crops = plan_crops(
        config.kind,
        sizes,
        side if isinstance(side, int) else (side[0], side[1]),
        patch_size,
        per_image=config.per_image,
        stride=stride,
        scale=(config.scale[0], config.scale[1]),
    )
    if not config.flip:
        return crops
    return [dataclasses.replace(crop, flip=flip) for crop in crops for flip in (False, True)]


def feature_rows(source: FileSource, labelled: LabelledSet) -> list[int]:
    """The row of the feature file that each image of a set has: by its path, or by the end of it.

    Raises:
        BrixelError: some have none.
    """
    file = source.file
    root = Path(file.description.get("root", "."))
    by_path = {str((root / name).absolute()): row for row, name in enumerate(file.paths)}
    by_name = {name: row for row, name in enumerate(file.paths)}
    done = set(file.rows)
    rows, missing = [], []
    for name in labelled.names:
        parts = Path(name).parts
        tails = ["/".join(parts[at:]) for at in range(len(parts))]
        row = by_path.get(str((labelled.root / name).absolute()))
        row = next((by_name[tail] for tail in tails if tail in by_name), None) if row is None else row
        if row is None or row not in done:
            missing.append(name)
        else:
            rows.append(row)
    if missing:
        raise BrixelError(
            f"{source.path} has no features of {len(missing)} of the {len(labelled)} images of the split, such as "
            f"{missing[0]}. Extract them: brixel extract --input {labelled.root} --output {source.path}"
        )
    return rows


def _refuse_shared_rows(source: FileSource, splits: Sequence[LabelledSet]) -> None:
    """Two images of one name in two folders must not get the features of one of them."""
    image_of: dict[int, str] = {}
    for labelled in splits:
        for name, row in zip(labelled.names, feature_rows(source, labelled), strict=True):
            if image_of.setdefault(row, name) != name:
                raise BrixelError(
                    f"{source.path}: {source.file.paths[row]} could be {image_of[row]} and {name}. Extract the "
                    f"features of the whole set: brixel extract --input {labelled.root} --output {source.path}"
                )


def target_columns(task: str, sizes: Sequence[Size], split: Split) -> dict[str, Column]:
    """Datasets of the targets: for each quantity and size one, filled in the order of the rows of that size."""
    real = "float16" if split == "train" else "float32"
    kinds = {"segmentation": ((), "uint8"), "depth": ((1,), real), "normals": ((3,), real)}
    columns = {}
    for size, count in Counter(sizes).items():
        for quantity in QUANTITIES[task]:
            lead, dtype = kinds[quantity]
            columns[f"{quantity}/{human_size(size)}"] = Column((*lead, *size), dtype, count)
    return columns


def _targets(
    options: ProbeOptions,
    labelled: LabelledSet,
    split: Split,
    crops: list[Crop],
    sizes: Sequence[Size],
    label_side: Side | None,
    config: CropConfig,
) -> tuple[StoredPart, list[Size]]:
    fixed = None if label_side is None else (label_side, label_side) if isinstance(label_side, int) else label_side
    if config.kind == "slide":
        target_sizes = list(sizes)
    elif fixed is not None:
        target_sizes = [(fixed[0], fixed[1])] * len(crops)
    else:
        target_sizes = [_own_size(crop, sizes[crop.row]) for crop in crops]
    description = {
        "format": FORMAT,
        "targets": options.recipe.task,
        "split": split,
        "set": labelled.fingerprint(),
        "fields": json_digest([dataclasses.astuple(crop) for crop in crops]),
        "sizes": json_digest(target_sizes),
    }
    columns = target_columns(options.recipe.task, target_sizes, split)
    return _part(options.features, len(target_sizes), columns, description), target_sizes


def _own_size(crop: Crop, image: Size) -> Size:
    if crop.size == crop.scaled:
        return image
    height, width = cut_target(np.broadcast_to(np.uint8(0), image), crop).shape
    return height, width


def _maps(
    options: ProbeOptions, source: Source, labelled: LabelledSet, crops: list[Crop], precision: str
) -> tuple[StoredPart | None, Layout | None]:
    if not isinstance(source, ModelSource):
        return None, None
    grids: tuple[Grid, ...] = tuple(source.grid(crop.size) for crop in crops)
    layout = Layout(grids, source.spec.embed_dim, "float16")
    identity = source.identity()
    for key in ("checkpoint", "backbone_weights"):
        del identity[key]  # where the weights lie does not change them
    description = {
        "format": FORMAT,
        "maps": identity,
        "precision": precision,
        "images": labelled.image_fingerprint(),
        "fields": json_digest([dataclasses.astuple(crop) for crop in crops]),
    }
    return _part(options.features, len(crops), layout.columns, description), layout


def _part(folder: Path, num_rows: int, columns: dict[str, Column], description: dict[str, Any]) -> StoredPart:
    return StoredPart(folder / f"{json_digest(description)[:16]}.h5", num_rows, columns, description)
