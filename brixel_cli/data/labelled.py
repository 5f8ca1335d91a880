"""Labelled sets: images with their class masks, depth maps and surface normals, read and checked by description."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from brixel_cli.config.labelled import ProbeRecipe, Split
from brixel_cli.core.identity import files_sha256, text_digest
from brixel_cli.data import targets
from brixel_cli.data.dataset_files import Entry, find_entries
from brixel_cli.data.images import decoded, read_size
from brixel_cli.errors import BrixelError

_NAMES_AND_NUMBERS = re.compile(r"\S*/\S*|[\d.,x]*\d")


@dataclass(frozen=True)
class Sample:
    """The targets of an image, all of its height and width; those that the task does not need are None.

    Attributes:
        name: of the image: its path below the root of the set.
        labels: (H, W) uint8, class numbers; 255 counts nowhere.
        depth: (H, W) float32, metres; 0 counts nowhere.
        normals: (3, H, W) float32, unit vectors, x right, y down, z forward, facing the camera; 0 counts nowhere.
        valid: (H, W) bool, the pixels that are evaluated: inside `depth.crop` where the recipe has one, else all.
        pose: (4, 4) float64, from the camera's coordinates (x right, y down, z forward) to the scene's, in metres.
        camera: (fx, fy, cx, cy) in pixels, where the task needs it.
    """

    name: str
    labels: npt.NDArray[np.uint8] | None
    depth: npt.NDArray[np.float32] | None
    normals: npt.NDArray[np.float32] | None
    valid: npt.NDArray[np.bool_]
    pose: npt.NDArray[np.float64] | None = None
    camera: Sequence[float] | None = None


class LabelledSet:
    """One split of a labelled set; files are found on construction, read by `load`.

    Args:
        recipe: describes the set and names the task, which decides what targets are read.
        split: `train` or `evaluate`.
        root: folder of the set in place of the recipe's.

    Attributes:
        names: paths of the images below the root, sorted, or in the order of the list file.

    Raises:
        BrixelError: folder, list, image or target missing; the message says what to download and where to put it.
    """

    def __init__(self, recipe: ProbeRecipe, split: Split, root: Path | None = None):
        self.recipe, self.split = recipe, split
        self.root = root or Path(recipe.data.root)
        self._entries = find_entries(recipe, split, self.root, _patterns(recipe))
        self.names = [entry.name for entry in self._entries]
        self._sha256: dict[Path, str] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of an image, from its header.

        Raises:
            BrixelError: it is no image, or damaged.
        """
        return read_size(self._entries[row].image)

    def load(self, row: int, derive: bool = True) -> Sample:
        """Read the targets of an image, which is decoded too: a damaged one is found before anything is computed.

        Args:
            row: of the set.
            derive: whether normals that have no files are derived from depth, which takes most of the time.

        Raises:
            BrixelError: a file is damaged; image and target differ in size; a label is no class; no depth is valid.
        """
        entry = self._entries[row]
        with decoded(entry.image) as image:
            return self._targets(entry, (image.height, image.width), derive)

    def _targets(self, entry: Entry, size: tuple[int, int], derive: bool) -> Sample:
        data, task = self.recipe.data, self.recipe.task
        labels, depth, normals, valid = None, None, None, np.ones(size, bool)
        pose, camera = None, None
        if "labels" in entry.files:
            assert data.labels is not None
            labels = targets.read_labels(entry.files["labels"], data.labels)
            _match(entry, "labels", size, labels.shape)
        if "depth" in entry.files:
            assert data.depth is not None
            depth = targets.read_depth(entry.files["depth"], data.depth)
            _match(entry, "depth", size, depth.shape)
            valid = targets.evaluated(entry.files["depth"], depth, data.depth)
        if task in ("normals", "depth_normals"):
            assert data.normals is not None
            if "normals" in entry.files:
                normals = targets.read_normals(entry.files["normals"], data.normals)
                _match(entry, "normals", size, normals.shape[1:])
            elif derive:
                assert depth is not None
                assert data.depth is not None
                camera = targets.read_camera(entry.image, size, entry.files.get("camera"), data.depth)
                normals = targets.derive_normals(entry.files["depth"], depth, camera, data.normals)
        if "poses" in entry.files:
            assert data.depth is not None
            pose = targets.read_pose(entry.files["poses"])
            camera = targets.read_camera(entry.image, size, entry.files.get("camera"), data.depth)
        return Sample(entry.name, labels, None if task == "normals" else depth, normals, valid, pose, camera)

    def errors(self, progress: Callable[[int], object] = lambda _: None) -> list[str]:
        """Read every image with its targets: one message for each that cannot be used; `progress` is as below.

        Normals are not derived for this.
        """

        def error(row: int) -> str | None:
            try:
                self.load(row, derive=False)
            except BrixelError as error:
                return str(error)
            return None

        found = []
        with ThreadPoolExecutor() as pool:
            for message in pool.map(error, range(len(self))):
                found += [message] if message else []
                progress(1)
        return found

    def files(self) -> list[Path]:
        """Every image and every file that the task needs, each once."""
        paths = [path for entry in self._entries for path in (entry.image, *entry.files.values())]
        return list(dict.fromkeys(paths))

    def read_contents(self, progress: Callable[[int], object] = lambda _: None) -> None:
        """Take the SHA-256 of every file, which fingerprints need; `progress` is told 1 after each.

        Raises:
            BrixelError: a file cannot be read.
        """
        paths = self.files()
        self._sha256 = dict(zip(paths, files_sha256(paths, progress), strict=True))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of task, description and split, and of the names and contents of all files.

        Raises:
            BrixelError: a file cannot be read.
        """
        about = f"{self.recipe.task} {self.split} {self.recipe.data.model_dump_json(exclude={'root', 'download'})}"
        return self._digest(about, [path for entry in self._entries for path in (entry.image, *entry.files.values())])

    def image_fingerprint(self) -> str:
        """SHA-256 (hex) of the names and contents of the images alone: their maps depend on them.

        What the targets mean, and which of them the task needs, does not change it; errors as for `fingerprint`.
        """
        return self._digest("", [entry.image for entry in self._entries])

    def _digest(self, about: str, paths: Sequence[Path]) -> str:
        if not self._sha256:
            self.read_contents()
        return text_digest(about + "".join(f"\n{path.relative_to(self.root)} {self._sha256[path]}" for path in paths))


def all_errors(errors: Sequence[str], num_images: int) -> BrixelError:
    """One error that reports many, those that differ only in names and numbers together."""
    alike: dict[str, list[str]] = {}
    for error in errors:
        alike.setdefault(_NAMES_AND_NUMBERS.sub("#", error), []).append(error)
    lines = [f"  {len(some)}x: {some[0]}" if len(some) > 1 else f"  {some[0]}" for some in alike.values()]
    return BrixelError(
        f"{len(errors)} of {num_images} labelled images cannot be used:\n" + "\n".join(lines) + "\n"
        "Correct or remove these files, or change what the recipe says of them."
    )


def _patterns(recipe: ProbeRecipe) -> dict[str, str]:
    """Which files the task needs for each image."""
    data, task = recipe.data, recipe.task
    patterns: dict[str, str] = {}
    if task in ("segmentation", "propagation") and data.labels is not None:
        patterns["labels"] = data.labels.files
    if task == "matching" and data.poses is not None:
        patterns["poses"] = data.poses.files
    derived = task in ("normals", "depth_normals") and data.normals is not None and data.normals.files is None
    if data.depth is not None and (task in ("depth", "depth_normals", "matching") or derived):
        patterns["depth"] = data.depth.files
    if task in ("normals", "depth_normals") and data.normals is not None and data.normals.files is not None:
        patterns["normals"] = data.normals.files
    if (derived or task == "matching") and data.depth is not None and data.depth.camera is not None:
        patterns["camera"] = data.depth.camera.files
    return patterns


def _match(entry: Entry, kind: str, size: tuple[int, ...], found: tuple[int, ...]) -> None:
    if size == found:
        return
    turned = " One of them is turned: look at the EXIF orientation of the image." if size == found[::-1] else ""
    raise BrixelError(
        f"{entry.image} is {size[1]}x{size[0]} pixels, but its {kind}, {entry.files[kind]}, {found[1]}x{found[0]}: "
        f"they have to be of the same size.{turned}"
    )
