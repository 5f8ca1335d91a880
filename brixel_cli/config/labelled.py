"""A labelled data set described for `brixel probe`: which files, what their values mean. Read by `files.py`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from brixel_cli.config.section import Rate, Section

Task = Literal["segmentation", "depth", "normals", "depth_normals", "matching", "propagation"]
LabelFree = Literal["matching", "propagation"]
LABEL_FREE: tuple[LabelFree, ...] = ("matching", "propagation")
"""Tasks without a head: nothing is trained, and there is no training split."""
Split = Literal["train", "evaluate"]
IGNORE = 255
"""Label of the pixels that count nowhere."""

_Values = Annotated[list[int], Field(min_length=1)]
_Colour = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]


class LabelsConfig(Section):
    """Masks of class numbers, or of colours. What a value means: `ignore`, then `ids` or `colours`, or `offset`."""

    files: str
    """Path of the mask of an image, as `data.images`."""
    classes: Annotated[list[str], Field(min_length=2, max_length=IGNORE)]
    """Names, in the order of their numbers from 0."""
    ignore: list[int] = [IGNORE]
    """Values in the file that count nowhere."""
    offset: int = 0
    """Added to every other value: -1 where the file counts from 1."""
    ids: dict[str, _Values] = {}
    """For each class the values in the file that mean it; empty: the value is the number of the class."""
    colours: dict[str, Annotated[list[_Colour], Field(min_length=1)]] = {}
    """For each class the colours [red, green, blue] that mean it, where the mask is a picture."""
    others: Literal["error", "ignore"] = "error"
    """Values or colours that mean no class: an error of the file, or pixels that count nowhere."""

    @model_validator(mode="after")
    def _consistent(self) -> LabelsConfig:
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise ValueError(f"labels.classes names '{twice}' twice")
        if sum((self.offset != 0, bool(self.ids), bool(self.colours))) > 1:
            raise ValueError("give one of labels.offset, labels.ids and labels.colours")
        for key, table in (("ids", self.ids), ("colours", self.colours)):
            unknown, missing = set(table) - set(self.classes), set(self.classes) - set(table)
            if table and (unknown or missing):
                names = sorted(unknown or missing)
                raise ValueError(
                    f"labels.{key} {'names no class of labels.classes' if unknown else 'lacks'}: {', '.join(names)}"
                )
            values = [str(value) for some in table.values() for value in some]
            if len(set(values)) < len(values):
                twice = next(value for value in values if values.count(value) > 1)
                raise ValueError(f"labels.{key} gives {twice} to two classes")
        return self


class CameraConfig(Section):
    """Focal lengths that differ from image to image; the principal point is then the middle of the image."""

    files: str
    """Path of the JSON file, a list of one record for each image, as `data.images`."""
    image: str
    """Key in a record: the image's file name."""
    focal: str
    """Key path in a record: the focal length in pixels of the file, e.g. `camera.focal_length`."""


class DepthConfig(Section):
    files: str
    """Path of the depth map of an image, as `data.images`: an image of 8, 16 or 32 bits, or .npy."""
    scale: Rate = 0.001
    """Metres in one unit of the file: 0.001 for millimetres."""
    inverse: bool = False
    """Whether the file holds inverse depth: metres are then 1 / (value x scale)."""
    range: Annotated[list[Rate], Field(min_length=2, max_length=2)] = [0.001, 10.0]
    """Least and most metres that count; 0 in the file never does."""
    invalid: list[float] = []
    """Values in the file, besides 0, that mean unknown."""
    crop: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=4, max_length=4)] | None = None
    """Pixels that are evaluated, [top, bottom, left, right] at the size of the file; null: all."""
    intrinsics: Annotated[list[float], Field(min_length=4, max_length=4)] | None = None
    """Of the camera, in pixels of the file: [fx, fy, cx, cy]; this or `camera` where normals are derived."""
    camera: CameraConfig | None = None
    """Files with the focal length of each image."""

    @model_validator(mode="after")
    def _consistent(self) -> DepthConfig:
        if self.range[0] >= self.range[1]:
            raise ValueError("depth.range must be [least, most]")
        if self.crop and (self.crop[0] >= self.crop[1] or self.crop[2] >= self.crop[3]):
            raise ValueError("depth.crop must be [top, bottom, left, right]")
        if self.intrinsics and min(self.intrinsics[:2]) <= 0:
            raise ValueError("depth.intrinsics must be [fx, fy, cx, cy], the focal lengths above 0")
        return self


class NormalsConfig(Section):
    """Surface normals, from files or derived from depth; x right, y down, z forward, facing the camera."""

    files: str | None = None
    """Path of the normals of an image, as `data.images`; null: derived from depth and intrinsics."""
    encoding: Literal["rgb", "npy"] = "rgb"
    """`rgb`: 2 x value / most - 1, black is invalid. `npy`: the vectors, (H, W, 3) or (3, H, W)."""
    axes: Annotated[list[Literal[-1, 1]], Field(min_length=3, max_length=3)] = [1, 1, 1]
    """Signs that turn the file's x, y, z into x right, y down, z forward."""
    radius: PositiveInt = 5
    """Derived: half the side of the fitting window, in pixels of the reduced depth map."""
    reduction: PositiveInt = 2
    """Derived: the depth map is fitted at every so many-th pixel."""
    tolerance: Rate = 0.04
    """Derived: metres by which a pixel may lie off the plane; about one step of the depth's quantisation."""


class PosesConfig(Section):
    files: str
    """Path of the pose of an image, as `data.images`: a text file of 4x4 numbers, from the camera's coordinates (x
    right, y down, z forward) to those of the scene, in metres."""


class SplitConfig(Section):
    split: str
    """What `{split}` stands for, e.g. train."""
    only: str | None = None
    """Wildcard that the path of an image, as below the root, must match, e.g. `*/multiview*`; null: all."""


class DataSetConfig(Section):
    """Where a labelled set lies, and what its files mean.

    Paths are relative to `root`. `{split}` is the split's name. `{name}` is any text, folders included, and the same
    in the paths of an image and its targets; so is `{folder}`, where one placeholder is not enough. `*` is any text
    without a slash.
    """

    root: str
    """Folder of the set; --data takes another."""
    download: str = ""
    """What to download, from where, under which licence, and how it has to lie in `root`; not needed for a set of
    one's own."""
    images: str
    """Path of an image, e.g. `images/{split}/{name}.jpg`."""
    list_file: str | None = None
    """File with one name a line, e.g. `{split}.txt`; further words of a line are {column2}, {column3}, {column4}.
    Null: every file that `images` fits."""
    train: SplitConfig | None = None
    """Images that heads are trained on; not for matching and propagation, which train nothing."""
    evaluate: SplitConfig
    """Images that are evaluated."""
    labels: LabelsConfig | None = None
    """Read for segmentation, and for propagation, where the classes are the background and the objects."""
    depth: DepthConfig | None = None
    """Read for depth, for normals that are derived from it, and for matching."""
    normals: NormalsConfig | None = None
    """Read for normals."""
    poses: PosesConfig | None = None
    """Read for matching."""

    @model_validator(mode="after")
    def _placeholders(self) -> DataSetConfig:
        columns = {"column2", "column3", "column4"} if self.list_file else set()
        self._check("list_file", self.list_file or "", {"split"})
        self._check("images", self.images, {"split", "name"} | (columns or {"folder"}))
        if "{name}" not in self.images and not columns:
            raise ValueError("data.images needs {name} in its path, or data.list_file")
        known = {"split", "name"} | columns | ({"folder"} if "{folder}" in self.images else set())
        targets: dict[str, LabelsConfig | DepthConfig | NormalsConfig | CameraConfig | PosesConfig | None] = {
            "labels": self.labels,
            "depth": self.depth,
            "normals": self.normals,
            "depth.camera": self.depth.camera if self.depth else None,
            "poses": self.poses,
        }
        for key, section in targets.items():
            if section is not None and section.files is not None:
                self._check(f"{key}.files", section.files, known)
        return self

    @staticmethod
    def _check(key: str, path: str, known: set[str]) -> None:
        for word in re.findall(r"\{([^}]*)\}", path):
            if word not in known:
                raise ValueError(f"data.{key}: {{{word}}} stands for nothing; known here: {', '.join(sorted(known))}")


class ProbeRecipe(Section):
    """A probe: a task on a labelled set, under a named protocol."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the data set in tables and result files."""
    task: Task
    protocol: str = "quick"
    """Named rules of training and evaluation; --protocol takes another."""
    size: PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    """The student's input in pixels: the short side, or [height, width]."""
    data: DataSetConfig

    @property
    def num_classes(self) -> int:
        """Classes of a segmentation; 0 of other tasks."""
        return len(self.data.labels.classes) if self.task == "segmentation" and self.data.labels else 0

    @model_validator(mode="after")
    def _consistent(self) -> ProbeRecipe:
        data, task = self.data, self.task
        if task not in LABEL_FREE and data.train is None:
            raise ValueError(f"task {task} needs the section data.train")
        if task in ("segmentation", "propagation") and data.labels is None:
            raise ValueError(f"task {task} needs the section data.labels")
        if task in ("depth", "depth_normals", "matching") and data.depth is None:
            raise ValueError(f"task {task} needs the section data.depth")
        if task == "matching" and data.poses is None:
            raise ValueError("task matching needs the section data.poses")
        if task == "matching" and data.depth and not (data.depth.intrinsics or data.depth.camera):
            raise ValueError("task matching needs data.depth.intrinsics or camera")
        if task in ("normals", "depth_normals"):
            if data.normals is None:
                raise ValueError(f"task {task} needs the section data.normals ({{}}: derived from depth)")
            if data.normals.files is None and not (data.depth and (data.depth.intrinsics or data.depth.camera)):
                raise ValueError("normals without data.normals.files are derived: give data.depth.intrinsics or camera")
        return self
