"""What the values in a target file mean: class masks, depth maps, surface normals, and the camera behind them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from brixel_cli.config.labelled import IGNORE, DepthConfig, LabelsConfig, NormalsConfig
from brixel_cli.core.files import read_npy
from brixel_cli.data.images import file_stat, open_image
from brixel_cli.data.normals import normals_from_depth
from brixel_cli.errors import BrixelError

NO_CLASS = -1


def read_labels(path: Path, config: LabelsConfig) -> npt.NDArray[np.uint8]:
    """Class numbers (H, W) of a mask; 255 where it counts nowhere.

    Raises:
        BrixelError: the file is damaged, is of another kind, or holds a value that is no class.
    """
    if config.colours:
        with open_image(path) as image:
            red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.int64), -1, 0)
        values = red << 16 | green << 8 | blue
    else:
        values = read_classes(path)
    known, classes = _tables(config)
    places = np.searchsorted(known, values).clip(max=len(known) - 1)
    labels = np.where(known[places] == values, classes[places], NO_CLASS)
    strangers = labels == NO_CLASS
    if strangers.any() and config.others == "error":
        raise BrixelError(_no_class(path, values[strangers], config))
    labels[strangers] = IGNORE
    return labels.astype(np.uint8)


def read_classes(path: Path) -> npt.NDArray[np.int64]:
    """The numbers (H, W) of a mask, whatever they mean.

    Raises:
        BrixelError: the file is damaged or of another kind.
    """
    values = (
        read_npy(path)
        if path.suffix.lower() == ".npy"
        else _read_plane(path, "a mask of class numbers; for one of colours give data.labels.colours")
    )
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise BrixelError(
            f"{path} has the shape {values.shape} of {values.dtype}; a mask is (height, width) of integers."
        )
    return values.astype(np.int64)


def read_depth(path: Path, config: DepthConfig) -> npt.NDArray[np.float32]:
    """Depth (H, W) in metres; 0 where it is unknown or out of range.

    Raises:
        BrixelError: the file is damaged or of another kind, or no pixel is in range.
    """
    values = read_depth_values(path)
    unknown = ~np.isfinite(values) | (values == 0) | np.isin(values, config.invalid)
    units = np.where(unknown, 1, values) * config.scale
    metres = 1 / np.where(units == 0, np.inf, units) if config.inverse else units
    least, most = config.range
    depth = np.where(unknown | (metres < least) | (metres > most), 0, metres).astype(np.float32)
    if not depth.any():
        known = metres[~unknown]
        what = f"{known.min():.4g} to {known.max():.4g} m" if known.size else "every pixel is unknown"
        raise BrixelError(
            f"{path} has no valid depth: {what}, with data.depth.scale {config.scale:g}; "
            f"valid are {least:g} to {most:g} m, data.depth.range."
        )
    return depth


def read_depth_values(path: Path) -> npt.NDArray[np.float64]:
    """The numbers (H, W) of a depth map, in whatever unit.

    Raises:
        BrixelError: the file is damaged or of another kind.
    """
    values = read_npy(path) if path.suffix.lower() == ".npy" else _read_plane(path, "a depth map of one channel")
    if values.ndim != 2:
        raise BrixelError(f"{path} has the shape {values.shape}; a depth map is (height, width).")
    return values.astype(np.float64)


def evaluated(path: Path, depth: npt.NDArray[np.float32], config: DepthConfig) -> npt.NDArray[np.bool_]:
    """Mask (H, W) of the evaluation crop.

    Raises:
        BrixelError: the crop reaches over the border, or has no valid depth in it.
    """
    inside = np.ones(depth.shape, bool)
    if config.crop is None:
        return inside
    top, bottom, left, right = config.crop
    if bottom > depth.shape[0] or right > depth.shape[1]:
        raise BrixelError(
            f"{path} is {depth.shape[1]}x{depth.shape[0]} pixels, but data.depth.crop {config.crop} "
            f"([top, bottom, left, right]) reaches to {right}x{bottom}."
        )
    inside[:] = False
    inside[top:bottom, left:right] = True
    if not depth[inside].any():
        raise BrixelError(
            f"{path} has no valid depth inside data.depth.crop {config.crop} ([top, bottom, left, right])."
        )
    return inside


def read_vectors(path: Path, config: NormalsConfig) -> npt.NDArray[np.float32]:
    """Vectors (3, H, W) as the file has them, of any length, turned by the signs of `axes`.

    Raises:
        BrixelError: the file is damaged or of another kind.
    """
    if config.encoding == "npy":
        values = read_npy(path).astype(np.float32)
        if values.ndim != 3 or 3 not in (values.shape[0], values.shape[-1]):
            raise BrixelError(
                f"{path} has the shape {values.shape}; normals are (height, width, 3) or (3, height, width)."
            )
        vectors = values if values.shape[0] == 3 else np.moveaxis(values, -1, 0)
    else:
        with open_image(path) as image:
            if image.mode not in ("RGB", "RGBA"):
                raise BrixelError(f"{image.mode} pixels, expected RGB that encodes normals as 2 x value / 255 - 1")
            coded = np.moveaxis(np.asarray(image.convert("RGB"), np.float32), -1, 0)
        vectors = np.where(coded.any(0), coded * (2 / 255) - 1, 0)
    return vectors * np.array(config.axes, np.float32)[:, None, None]


def read_normals(path: Path, config: NormalsConfig) -> npt.NDArray[np.float32]:
    """Unit normals (3, H, W); x right, y down, z forward, facing the camera; 0 where they are unknown.

    Raises:
        BrixelError: the file is damaged or of another kind, or its normals point away from the camera.
    """
    vectors = np.nan_to_num(read_vectors(path, config))
    length = np.sqrt((vectors**2).sum(0))
    known = length > 0.5  # the codes of 0, such as grey, have a length of next to nothing
    normals: npt.NDArray[np.float32] = np.where(known, vectors / np.where(known, length, 1), 0).astype(np.float32)
    if not known.any():
        raise BrixelError(f"{path} has no valid normal; see data.normals.encoding.")
    if normals[2][known].mean() > 0:
        raise BrixelError(
            f"{path}: its normals point away from the camera, z > 0 on average. Turn them with data.normals.axes, "
            "the signs that make x point right, y down and z forward."
        )
    return normals


def derive_normals(
    path: Path, depth: npt.NDArray[np.float32], intrinsics: Sequence[float], config: NormalsConfig
) -> npt.NDArray[np.float32]:
    """Normals (3, H, W) of a depth map; see `normals_from_depth`.

    Raises:
        BrixelError: no plane fits anywhere.
    """
    normals = normals_from_depth(depth, intrinsics, config.radius, config.reduction, config.tolerance)
    if not normals.any():
        raise BrixelError(
            f"{path}: no normal can be derived. Are data.depth.intrinsics right, "
            f"data.normals.tolerance ({config.tolerance:g} m) and radius large enough?"
        )
    return normals


def read_camera(image: Path, size: tuple[int, int], path: Path | None, config: DepthConfig) -> Sequence[float]:
    """Intrinsics [fx, fy, cx, cy] of an image of this (height, width), in pixels.

    Raises:
        BrixelError: the file that holds the focal lengths is damaged, or lacks this image.
    """
    if config.camera is None or path is None:
        assert config.intrinsics is not None
        return config.intrinsics
    records = _read_records(path, config.camera.image)
    value: Any = records.get(image.name)
    for key in config.camera.focal.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, int | float) or not value > 0:
        raise BrixelError(
            f"{path} has no focal length for {image.name}: expected a record whose {config.camera.image} is the file's "
            f"name, with a number above 0 at {config.camera.focal}."
        )
    return [float(value), float(value), size[1] / 2, size[0] / 2]


@lru_cache(maxsize=64)
def _read_records(path: Path, key: str) -> dict[str, dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return {str(record[key]): record for record in records}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrixelError(f"{path} is no JSON list of records with the key {key}.") from error


def read_pose(path: Path) -> npt.NDArray[np.float64]:
    """Pose (4, 4) of a camera, from its coordinates to those of the scene.

    Raises:
        BrixelError: the file holds something else.
    """
    try:
        file_stat(path)  # reading a pipe or a device might never end
        numbers = [float(word) for word in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise BrixelError(f"{path} is no pose: {error}. Expected are 4 lines of 4 numbers.") from error
    if len(numbers) != 16 or not np.isfinite(numbers).all():
        raise BrixelError(f"{path} is no pose: expected are 4 lines of 4 finite numbers; found {len(numbers)} numbers.")
    pose = np.array(numbers, np.float64).reshape(4, 4)
    turn = pose[:3, :3]
    if np.abs(turn @ turn.T - np.eye(3)).max() > 0.01 or np.linalg.det(turn) < 0:
        raise BrixelError(
            f"{path} is no pose: its first three rows and columns are no rotation. Leave the image out, or correct it."
        )
    return pose


def _tables(config: LabelsConfig) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Known values of a mask, sorted, and the class of each; a colour is one number, 0xRRGGBB."""
    meaning: dict[int, int] = {}
    if config.colours:
        for number, name in enumerate(config.classes):
            meaning |= {red << 16 | green << 8 | blue: number for red, green, blue in config.colours[name]}
    else:
        for number, name in enumerate(config.classes):
            meaning |= dict.fromkeys(config.ids[name] if config.ids else [number - config.offset], number)
        meaning |= dict.fromkeys(config.ignore, IGNORE)
    known = np.array(sorted(meaning), np.int64)
    return known, np.array([meaning[value] for value in known.tolist()], np.int64)


def _no_class(path: Path, strangers: npt.NDArray[np.int64], config: LabelsConfig) -> str:
    values, counts = np.unique(strangers, return_counts=True)
    most = int(np.argmax(counts))
    value, count = int(values[most]), int(counts[most])
    pixels = "1 pixel" if count == 1 else f"{count:,} pixels"
    more = f", and {len(values) - 1} more such values" if len(values) > 1 else ""
    classes = f"the recipe has {len(config.classes)} classes"
    if config.colours:
        colour = [value >> 16, value >> 8 & 255, value & 255]
        return (
            f"{path}: the colour {colour} ({pixels}{more}) means no class: {classes}. "
            "Add it to data.labels.colours, or set data.labels.others to ignore."
        )
    first, last = -config.offset, len(config.classes) - 1 - config.offset
    values_known = "the values of data.labels.ids" if config.ids else f"{first} to {last}"
    return (
        f"{path}: the value {value} ({pixels}{more}) means no class: {classes}, {values_known}, and ignores "
        f"{', '.join(map(str, config.ignore)) or 'nothing'}. See data.labels.classes, offset, ids and ignore; "
        "data.labels.others: ignore leaves such pixels out."
    )


def _read_plane(path: Path, expected: str) -> npt.NDArray[Any]:
    """The values of an image of one channel, or of three equal ones; palettes are not looked up."""
    with open_image(path) as image:
        image.load()
        values = np.asarray(image)
        if values.ndim == 3:
            if (values[..., :3] != values[..., :1]).any():
                raise BrixelError(f"{image.mode} pixels, expected {expected}")
            values = values[..., 0]
    return values
