"""A small labelled set for tests, described by a recipe, with images, masks and depth maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from brixel_cli.config.files import load_recipe
from brixel_cli.config.labelled import ProbeRecipe
from brixel_cli.data.labelled import LabelledSet, Sample
from brixel_cli.errors import BrixelError

HEIGHT, WIDTH = 15, 22
DOWNLOAD = "Bake it at home."
TEXT = """
name: mine
task: segmentation
size: 28
data:
  root: data/mine
  download: Bake it at home.
  images: images/{split}/{name}.png
  train: {split: train}
  evaluate: {split: val}
  labels: {files: "labels/{split}/{name}.png", classes: [sky, sea, land]}
  depth: {files: "depth/{name}.png", intrinsics: [20, 20, 11, 7]}
  normals: {}
"""


def ramp() -> np.ndarray:
    """(H, W): the column plus 100 times the row."""
    return np.arange(HEIGHT)[:, None] * 100 + np.arange(WIDTH)[None]


def save(path: Path, values: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values, mode).save(path)
    return path


def save_image(path: Path, height: int = HEIGHT, width: int = WIDTH) -> Path:
    return save(path, np.full((height, width, 3), 90, np.uint8))


def make_root(tmp_path: Path) -> Path:
    """Three training images and one to evaluate, with masks of the classes 0 to 2 and void, and depth maps."""
    folder = tmp_path / "set"
    for name in ("train/a", "train/b", "train/town/c", "val/d"):
        save_image(folder / f"images/{name}.png")
        mask = (ramp() % 3).astype(np.uint8)
        mask[0, 0] = 255
        save(folder / f"labels/{name}.png", mask)
        depth = (1000 + ramp()).astype(np.uint16)
        depth[0, :2] = 0, 20_000
        save(folder / f"depth/{Path(name).relative_to(Path(name).parts[0])}.png", depth)
    return folder


def recipe(tmp_path: Path, *changes: str) -> ProbeRecipe:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return load_recipe(str(path), changes, ProbeRecipe)


def opened(root: Path, *changes: str, split: str = "train") -> LabelledSet:
    return LabelledSet(recipe(root.parent, *changes), split, root)  # type: ignore[arg-type]


def first(root: Path, *changes: str) -> Sample:
    return opened(root, *changes).load(0)


def fault(root: Path, *changes: str) -> str:
    with pytest.raises(BrixelError) as caught:
        first(root, *changes)
    return str(caught.value).replace(str(root), "ROOT")


def how(*lines: str) -> str:
    return "\n".join(
        [
            *lines,
            DOWNLOAD,
            "Put it into ROOT, or name the folder where it is with --data DIR (--probe-data DIR of brixel benchmark).",
        ]
    )
