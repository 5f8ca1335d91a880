"""Predictions of any model as files, for the images of a labelled set: found by the images' names, read and checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from brixel_cli.config.labelled import IGNORE, NormalsConfig, ProbeRecipe
from brixel_cli.config.probe import PredictionsConfig
from brixel_cli.data import targets
from brixel_cli.data.dataset_files import first_lines
from brixel_cli.errors import BrixelError, UsageError

SUFFIXES = (".png", ".npy", ".tif", ".tiff")
DESCRIPTION = "predictions.json"
"""What `brixel probe --apply` writes beside its predictions, with the unit of their depth."""
DEPTH_UNITS = {1000: "millimetres", 100: "centimetres", 10: "decimetres", 1: "metres"}
"""Of stored depth: how many make a metre."""


def prediction_file(folder: Path, quantity: str, name: str) -> Path:
    """Where brixel writes a prediction of an image of a labelled set; `find_predictions` finds it."""
    return (folder / quantity / name).with_suffix(".png" if quantity == "segmentation" else ".npy")


def find_predictions(folder: Path, quantity: str, names: Sequence[str]) -> list[Path]:
    """The file of each image: its path below the set, or the longest end of it that is there, with another suffix.

    Args:
        folder: of the predictions; they may lie in a folder of it that is called as the quantity.
        quantity: `segmentation`, `depth` or `normals`.
        names: of the images, as `LabelledSet.names`.

    Raises:
        BrixelError: the folder or files are missing, or one file could be of two images.
    """
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder} of predictions.")
    folders = [folder / quantity] if (folder / quantity).is_dir() else [folder]
    found = [_find(folders[0], name) for name in names]
    missing = [name for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        stem = Path(missing[0]).with_suffix("")
        raise BrixelError(
            f"{folders[0]} has no {quantity} of {len(missing)} of the {len(names)} evaluated images:\n"
            f"{first_lines(missing)}\nExpected is {folders[0] / stem}.png, or {folders[0] / stem.name}.png; "
            f"also {', '.join(SUFFIXES[1:])}."
        )
    image_of: dict[Path, str] = {}
    paths = [path for path in found if path is not None]
    for name, path in zip(names, paths, strict=True):
        if image_of.setdefault(path, name) != name:
            raise BrixelError(
                f"{path} could be of {image_of[path]} and of {name}: lay the predictions into folders as the images."
            )
    return paths


def _find(folder: Path, name: str) -> Path | None:
    parts = Path(name).with_suffix("").parts
    tails = [folder.joinpath(*parts[at:]) for at in range(len(parts))]
    candidates = (tail.with_name(tail.name + suffix) for tail in tails for suffix in SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def depth_scale(folder: Path, config: PredictionsConfig) -> float:
    """Metres in one unit of a depth image: as the user says, else as the folder's description does, else 0.001.

    Raises:
        BrixelError: the description cannot be read.
    """
    path = folder / DESCRIPTION
    if config.scale is not None or not path.is_file():
        return config.scale or 0.001
    try:
        said: Any = json.loads(path.read_text(encoding="utf-8"))
        unit = str(said.get("units", {}).get("depth", "millimetres"))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BrixelError(f"{path} cannot be read: {error}. Remove it, or write the predictions again.") from error
    return next((1 / many for many, name in DEPTH_UNITS.items() if unit.startswith(name)), 0.001)


def read_prediction(
    path: Path, quantity: str, recipe: ProbeRecipe, config: PredictionsConfig, scale: float
) -> npt.NDArray[Any]:
    """A prediction of one image.

    Args:
        path: of the file.
        quantity: `segmentation`, `depth` or `normals`.
        recipe: of the labelled set.
        config: what the values mean.
        scale: metres in one unit of a depth image; .npy files are in metres.

    Returns:
        `segmentation`: classes (H, W) uint8; 255: none. `depth`: metres (H, W) float32, whatever the file says.
        `normals`: (3, H, W) float32, of any length.

    Raises:
        BrixelError: the file is damaged, is of another kind, or holds a value that is no class.
    """
    if quantity == "segmentation":
        return _classes(path, recipe, config)
    if quantity == "normals":
        own_normals = recipe.data.normals if config.values == "set" else None
        encoding: Literal["npy", "rgb"] = "npy" if path.suffix == ".npy" else "rgb"
        described = (own_normals or NormalsConfig()).model_copy(update={"encoding": encoding})
        return targets.read_vectors(path, described)
    values = targets.read_depth_values(path)
    own = recipe.data.depth if config.values == "set" else None
    if own is not None:
        units = values * (config.scale or own.scale)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (1 / units if own.inverse else units).astype(np.float32)
    return (values if path.suffix == ".npy" and config.scale is None else values * scale).astype(np.float32)


def check_counted(path: Path, quantity: str, prediction: npt.NDArray[Any], truth: npt.NDArray[Any]) -> None:
    """Raise a BrixelError where a prediction says nothing at pixels that are measured.

    Args:
        path: of the file.
        quantity: what it is of.
        prediction: as `read_prediction`.
        truth: labels (H, W), depth (1, H, W) or normals (3, H, W); 255 or 0 counts nowhere.
    """
    if quantity == "segmentation":
        empty, counts, what = prediction == IGNORE, truth != IGNORE, "no class"
    elif quantity == "depth":
        empty, counts = ~(np.isfinite(prediction) & (prediction > 0)), truth[0] > 0
        what = "no depth above 0"
    else:
        length = np.square(prediction).sum(0)
        empty, counts, what = ~(np.isfinite(length) & (length > 0)), (truth != 0).any(0), "no normal"
    count = int((empty & counts).sum())
    if count:
        raise BrixelError(
            f"{path} has {what} at {count:,} of the {int(counts.sum()):,} pixels that are measured: a prediction needs "
            "a value at each of them."
        )


def _classes(path: Path, recipe: ProbeRecipe, config: PredictionsConfig) -> npt.NDArray[np.uint8]:
    labels = recipe.data.labels
    assert labels is not None
    if config.values == "set" and path.suffix != ".npy":
        return targets.read_labels(path, labels)
    values = targets.read_classes(path)
    known = (values >= 0) & (values < len(labels.classes)) | (values == IGNORE)
    if not known.all():
        strangers, counts = np.unique(values[~known], return_counts=True)
        most = int(np.argmax(counts))
        more = f", and {len(strangers) - 1} more such values" if len(strangers) > 1 else ""
        raise BrixelError(
            f"{path}: the value {strangers[most]} ({int(counts[most]):,} pixels{more}) means no class: they are 0 to "
            f"{len(labels.classes) - 1}, in the order of the recipe. For the values of the set's own masks give "
            "--set predictions.values=set"
        )
    return values.astype(np.uint8)
