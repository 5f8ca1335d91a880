"""The feature file that `brixel extract` writes: what it has to be like, and two readers. See docs/FEATURES.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from brixel_cli.config.extract import Number, Storage
from brixel_cli.core.files import check_regular, read_npy
from brixel_cli.core.formatting import human_size
from brixel_cli.core.sampling import Points, covered_part, read_at
from brixel_cli.data.feature_layout import FORMAT, Grid, inside, map_checksum, single_file_names
from brixel_cli.data.row_store import (
    CHECKSUM,
    DONE,
    FAILED,
    MISSING,
    REASON,
    STATUS,
    Array,
    Store,
    reading,
)
from brixel_cli.errors import BrixelError

REASON_BYTES = 160
INDEX_NAME = "index.h5"
REPAIR = "The same brixel extract again computes what is damaged."
_INDEX = {
    "paths": ("S", ()),
    STATUS: ("u", ()),
    REASON: ("S", ()),
    "original_size": ("i", (2,)),
    "model_size": ("i", (2,)),
    "grid_size": ("i", (2,)),
    "grid_row": ("i", ()),
}
_LATER = {"file_size": ("i", ()), "modified": ("i", ()), "sha256": ("S", ()), CHECKSUM: ("u", ())}
"""Kind of number and shape of a row of the datasets that have a row for each image; older files lack the second."""
_COUNTS = dict.fromkeys(("res", "factor", "patch_size", "embed_dim", "pca"), 1 << 20) | {"threads": 1024}
"""Counts of the description, with what none of them comes near."""


def dequantise(values: Mapping[str, Array]) -> npt.NDArray[np.float32]:
    """A map as float32 from the datasets it was stored in."""
    features = values["features"].astype(np.float32)
    return features * values["scale"] if "scale" in values else features


class FeatureFile:
    """Reads what `brixel extract` wrote: the .h5 file, or the folder of single files.

    Attributes:
        description: what the numbers are: model, weights with SHA-256, sizes, normalisation, versions.
        paths: the images, below the folder `description["root"]`.
        status: of each image: 0 missing, 1 done, 2 failed; as of opening.
        original_size, model_size, grid_size: (height, width) of each image, of what the model saw, of its map.

    Raises:
        BrixelError: the file is missing, damaged, or of another format.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.is_dir():
            self.path = self.path / INDEX_NAME
        if not self.path.is_file():
            raise BrixelError(f"No feature file at {path}. Make one: brixel extract --input DIR --output {path}")
        self._store = store = Store(self.path)
        found = store.attributes.get("format", "unmarked")
        if found != FORMAT:
            raise BrixelError(f"{self.path} is no feature file of format {FORMAT}: {found}.")
        self.description = store.description
        if store.damaged:
            raise BrixelError(
                f"{self.path}: the datasets {', '.join(store.damaged)} have changed since they were written. "
                "The same brixel extract again restores what follows from the images; otherwise delete the file."
            )
        with reading(self.path):
            _check_description(self.description)
            _check_index(store)
            self.paths: list[str] = [bytes(name).decode() for name in store.array("paths")]
            self.status = store.status
            self.original_size, self.model_size, self.grid_size = (
                np.array(store.array(name)) for name in ("original_size", "model_size", "grid_size")
            )
            self._grid_row = np.array(store.array("grid_row"))
            storage: Storage = self.description["storage"]
            if storage == "h5":
                self._check_maps()
            else:
                _check_names(self.paths)
        self._numbers = {name: row for row, name in enumerate(self.paths)}
        self._single = None if storage == "h5" else single_file_names(self.paths, storage)

    def _check_maps(self) -> None:
        """Raise a ValueError where the datasets of the maps are not those of the grids that the rows name."""
        placed = self._grid_row >= 0
        channels = self.description.get("pca") or self.description.get("embed_dim")
        stored = self.description.get("dtype")
        for height, width in np.unique(self.grid_size[placed], axis=0).tolist():
            rows = placed & (self.grid_size == (height, width)).all(axis=1)
            for part in ("features", "scale") if stored == "int8" else ("features",):
                name = self._dataset(part, (height, width))
                shape, dtype = self._store.kind(name)
                planes = 1 if part == "scale" else channels
                if shape[2:] != (height, width) or len(shape) != 4 or planes not in (None, shape[1]):
                    raise ValueError(f"its dataset {name} has the shape {shape}")
                number = "float32" if part == "scale" else stored
                if number not in (None, dtype.name):
                    raise ValueError(f"its dataset {name} holds {dtype.name}, and {number} was written")
                if self._grid_row[rows].max() >= shape[0]:
                    raise ValueError(f"its dataset {name} has {shape[0]} rows")

    def _dataset(self, part: str, grid: Grid) -> str:
        return part if part in self._store else f"{part}/{human_size(grid)}"

    def __len__(self) -> int:
        return len(self.paths)

    def __contains__(self, key: object) -> bool:
        return key in self._numbers

    def __reduce__(self) -> tuple[type[FeatureFile], tuple[Path]]:
        return type(self), (self.path,)  # a worker of a DataLoader opens it anew: memory maps would be copied whole

    @property
    def rows(self) -> list[int]:
        """Rows that are done.

        Raises:
            BrixelError: the status of a row is damaged.
        """
        odd = np.flatnonzero(self.status > FAILED)
        if len(odd):
            raise BrixelError(f"{self.path}: {self.paths[odd[0]]} (row {odd[0]}): {self.damage(int(odd[0]))}. {REPAIR}")
        return [int(row) for row in np.flatnonzero(self.status == DONE)]

    @property
    def failures(self) -> dict[str, str]:
        """Images that failed, with their reasons."""
        reasons = self._store.array(REASON)
        return {
            self.paths[row]: bytes(reasons[row]).decode(errors="replace")
            for row in np.flatnonzero(self.status == FAILED)
        }

    @property
    def single_files(self) -> list[Path]:
        """The file of each image, row for row, whether it is there yet or not; none where one file holds all maps.

        Raises:
            BrixelError: one of them lies outside of the folder, behind a link.
        """
        return [inside(self.path.parent, name) for name in self._single or []]

    @property
    def has_checksums(self) -> bool:
        """Whether damage of its maps can be noticed; older files have no checksums."""
        return CHECKSUM in self._store

    def damage(self, row: int, thorough: bool = True) -> str:
        """What is wrong with a row; empty for a row that is whole, missing or failed.

        Args:
            row: of the file.
            thorough: whether all of its map is read; else only its status, and the header of its single file.
        """
        status = int(self.status[row])
        if status not in (MISSING, DONE, FAILED):
            return f"its status is {status}, not 0, 1 or 2"
        if status == FAILED:
            return "" if self._store.array(REASON)[row] else "it failed for no reason"
        if status == MISSING:
            return "" if self._grid_row[row] >= 0 else "it is neither failed nor has a map"
        if not thorough and self._single is None and self._grid_row[row] >= 0:
            return ""
        try:
            values = self.stored(row, mapped=not thorough)
        except BrixelError as error:
            return str(error)
        if not thorough:
            return ""
        if self.has_checksums and map_checksum(values) != self._store.array(CHECKSUM)[row]:
            return "its map has changed since it was written"
        return "" if all(np.isfinite(value).all() for value in values.values()) else "its map is not finite"

    @property
    def pca(self) -> tuple[Array, Array] | None:
        """Components (D, K) and mean (D) of the stored scores; None where the maps are the model's own."""
        if "pca_components" not in self._store:
            return None
        return np.array(self._store.array("pca_components")), np.array(self._store.array("pca_mean"))

    def stored(self, key: int | str, mapped: bool = False) -> dict[str, Array]:
        """An image's datasets as stored: `features` (D, h, w), and `scale` (1, h, w) where they are int8.

        Args:
            key: row, or name as in `paths`.
            mapped: whether the values of a single .npy file are read only when they are used.

        Raises:
            KeyError, IndexError: there is no such image.
            BrixelError: its map is not there: missing or failed.
        """
        row = self._numbers[key] if isinstance(key, str) else range(len(self))[key]
        if self.status[row] != DONE:
            missing = "not computed yet; run the same brixel extract again"
            reason = self.failures.get(self.paths[row]) or self.damage(row) or missing
            raise BrixelError(f"{self.path} has no features of {self.paths[row]}: {reason}.")
        height, width = (int(side) for side in self.grid_size[row])
        if self._single is not None:
            return _read_single(self.path.parent / self._single[row], (height, width), mapped)
        place = int(self._grid_row[row])
        if place < 0:
            raise BrixelError(f"{self.path}: {self.paths[row]} is done, but has no map. {REPAIR}")
        names = {part: self._dataset(part, (height, width)) for part in ("features", "scale")}
        return {part: self._store.read(name, [place])[0] for part, name in names.items() if name in self._store}

    def __getitem__(self, key: int | str) -> npt.NDArray[np.float32]:
        """An image's map (D, h, w), float32; arguments and errors as for `stored`."""
        return dequantise(self.stored(key))

    def at(
        self,
        key: int | str,
        size: Sequence[int] | None = None,
        points: Points | None = None,
        out: npt.NDArray[np.float32] | None = None,
    ) -> npt.NDArray[np.float32]:
        """An image's map at pixels of the image, bilinear; no bytes on disk, and little memory besides the result.

        Args:
            key: row, or name as in `paths`.
            size: height and width in pixels to which the map is resized; default without `points`: the image's own
                (with `fit` centre: that of the square that the model saw).
            points: [[y, x], ...] in pixels of the upright image; they need not be whole.
            out: float32 array to be filled, such as a `numpy.memmap` for what does not fit into memory.

        Returns:
            (D, *size), or (N, D) for N points; float32.

        Raises:
            UsageError: both size and points are given, one is no size or points, or a point lies outside of the image.
            KeyError, IndexError, BrixelError: as `stored`; BrixelError also where the result does not fit into memory.
        """
        map_ = torch.from_numpy(self[key])
        row = self._numbers[key] if isinstance(key, str) else range(len(self))[key]
        whole, seen = ((int(height), int(width)) for height, width in (self.original_size[row], self.model_size[row]))
        part = covered_part(whole, seen, str(self.description.get("fit")))
        return read_at(map_, part, size, points, out).numpy()


class FeatureDataset(Dataset[tuple[Tensor, str]]):
    """The maps that are done, as a torch dataset of (map (D, h, w) float32, name); sizes differ where grids do.

    Args:
        path: of a feature file, or of a folder of single files.
    """

    def __init__(self, path: str | Path):
        self.file = FeatureFile(path)
        self.rows = self.file.rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        row = self.rows[index]
        return torch.from_numpy(self.file[row]), self.file.paths[row]


def _read_single(path: Path, grid: Grid, mapped: bool = False) -> dict[str, Array]:
    """The map of a single file, of whose values none is read yet where they are mapped."""
    try:
        check_regular(path)
        if path.suffix == ".npy":
            values = {"features": read_npy(path, mapped)}
        else:
            with safe_open(path, framework="pt") as file:  # which maps them
                values = {key: file.get_tensor(key).numpy() for key in file.keys()}  # noqa: SIM118
        if values["features"].shape[1:] != grid:
            raise ValueError(f"its map has the shape {values['features'].shape}")
        return values
    except Exception as error:  # NumPy and safetensors raise several kinds on damaged files
        raise BrixelError(f"{path} cannot be read: {error}. {REPAIR}") from error


def _check_description(description: Mapping[str, Any]) -> None:
    """Raise a ValueError for values that no extraction writes."""
    known = {"storage": get_args(Storage), "dtype": (None, *get_args(Number))}
    for key, allowed in known.items():
        if description.get(key) not in allowed:
            raise ValueError(f"its {key} is {description.get(key)!r}")
    for key, most in _COUNTS.items():
        value = description.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f"its {key} is {value!r}")


def _check_index(store: Store) -> None:
    """Raise a ValueError where a dataset with a row for each image is missing, or has another type or shape."""
    for name, (kind, shape) in (_INDEX | {name: of for name, of in _LATER.items() if name in store}).items():
        found, dtype = store.kind(name)
        if found != (len(store), *shape) or dtype.kind != kind:
            raise ValueError(f"its dataset {name} has the shape {found} of {dtype}")


def _check_names(names: Sequence[str]) -> None:
    """Raise a ValueError where the name of an image would lead out of the folder of single files."""
    for name in names:
        path = PurePosixPath(name)
        if not path.name or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"the name {name!r} leads out of its folder")
