"""Feature maps on disk: HDF5 files created whole, then filled row by row. The only importer of h5py.

All datasets are contiguous and of fixed shape, allocated before the first row is written, and the file's metadata is
never touched again: it opens with plain h5py at every moment, a kill costs at most the row in flight, and several
processes can fill disjoint rows. A row counts when its entry in `status` is 1.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from brixel_cli.errors import BrixelError

STATUS = "status"
DONE = 1
ATTRIBUTES = "description"


@dataclass(frozen=True)
class Column:
    """One dataset of a file: the shape of a row, and a NumPy type name such as `float16`."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def bytes_needed(num_rows: int, columns: Mapping[str, Column]) -> int:
    """Bytes of a file's datasets."""
    return num_rows * (1 + sum(column.row_bytes for column in columns.values()))


def human_bytes(count: float) -> str:
    """A number of bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raise a BrixelError where `needed` bytes do not fit on the disk of `folder`, which need not exist yet."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise BrixelError(
            f"{what} needs {human_bytes(needed)}, but {existing} has {human_bytes(free)} free. "
            "Make room, choose another folder, or ask for less."
        )


def create_store(path: Path, num_rows: int, columns: Mapping[str, Column], description: Mapping[str, Any]) -> None:
    """Create a file with all rows allocated and none done; it appears under its name only when complete.

    Args:
        path: of the new .h5 file; its folder is made.
        num_rows: rows of every dataset.
        columns: datasets by name.
        description: what the file holds, JSON-able; stored as the file's attribute `description`.

    Raises:
        BrixelError: it does not fit on the disk.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BrixelError(f"The folder {path.parent} cannot be made: {error.strerror}. Choose another one.") from error
    needed = bytes_needed(num_rows, columns)
    check_disk(path.parent, needed, f"{path.name}")
    partial = path.with_name(path.name + ".partial")
    with h5py.File(partial, "w") as file:
        file.attrs[ATTRIBUTES] = json.dumps(description, sort_keys=True)
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_layout(h5py.h5d.CONTIGUOUS)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        for name, column in columns.items():
            space = h5py.h5s.create_simple((num_rows, *column.shape))
            h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(column.dtype)), space, layout)
        file.create_dataset(STATUS, data=np.zeros(num_rows, np.uint8))
    try:
        with open(partial, "r+b") as raw:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(raw.fileno(), 0, max(partial.stat().st_size, 1))
            os.fsync(raw.fileno())
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BrixelError(f"{path} could not be created with {human_bytes(needed)}: {error.strerror}.") from error
    os.replace(partial, path)


class Store:
    """A file made by `create_store`, opened for reading or for filling rows.

    Args:
        path: of the file.
        writable: whether rows will be written.

    Raises:
        BrixelError: the file is missing, damaged, or not one of ours.
    """

    def __init__(self, path: Path, writable: bool = False):
        try:
            with h5py.File(path, "r", locking=False) as file:
                self.description: dict[str, Any] = json.loads(file.attrs[ATTRIBUTES])
                places = {
                    name: (dataset.id.get_offset(), dataset.shape, dataset.dtype) for name, dataset in file.items()
                }
        except (OSError, KeyError, ValueError) as error:
            raise BrixelError(f"{path} is not a feature file of brixel, or is damaged: {error}") from error
        self.path = path
        self._rows: dict[str, npt.NDArray[Any]] = {
            name: np.memmap(path, dtype, "r+" if writable else "r", offset, shape)
            for name, (offset, shape, dtype) in places.items()
        }

    def __len__(self) -> int:
        return len(self._rows[STATUS])

    @property
    def missing(self) -> npt.NDArray[np.int64]:
        """Numbers of the rows that are not done."""
        return np.flatnonzero(self._rows[STATUS] != DONE)

    def write(self, row: int, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write one row of every dataset, then mark it done."""
        for name, value in values.items():
            self._rows[name][row] = value
        self._rows[STATUS][row] = DONE

    def read(self, name: str, rows: Sequence[int]) -> npt.NDArray[Any]:
        """Rows of a dataset, copied, in the order asked for."""
        return np.asarray(self._rows[name][list(rows)])
