"""Labelled sets: images with their class masks, depth maps and surface normals, found and checked by description."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from brixel_cli.probe_recipe import ProbeRecipe, Split


@dataclass(frozen=True)
class Sample:
    """An image with its targets, all of the same height and width; targets that the task does not need are None.

    Attributes:
        name: of the image: its path below the root of the set.
        image: 8-bit RGB.
        labels: (H, W) uint8, class numbers; 255 counts nowhere.
        depth: (H, W) float32, metres; 0 counts nowhere.
        normals: (3, H, W) float32, unit vectors, x right, y down, z forward, facing the camera; 0 counts nowhere.
        valid: (H, W) bool, the pixels that are evaluated: inside `depth.crop` where the recipe has one, else all.
    """

    name: str
    image: Image.Image
    labels: npt.NDArray[np.uint8] | None
    depth: npt.NDArray[np.float32] | None
    normals: npt.NDArray[np.float32] | None
    valid: npt.NDArray[np.bool_]


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
        self.names: list[str] = []

    def __len__(self) -> int:
        return len(self.names)

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of an image, from its header."""
        raise NotImplementedError

    def load(self, row: int) -> Sample:
        """Read an image and its targets.

        Raises:
            BrixelError: a file is damaged; image and target differ in size; a label is no class; no depth is valid.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 (hex) over recipe section, names, file sizes and modification times; for resuming."""
        raise NotImplementedError
