"""Feature maps on disk: HDF5 files created whole, then filled row by row. The only importer of h5py.

All datasets are contiguous and of fixed shape, allocated before the first row is written, and the file's metadata is
never touched again: it opens with plain h5py at every moment, a kill costs at most the row in flight, and several
processes can fill disjoint rows. A row counts when its entry in `status` is 1.
"""

from __future__ import annotations

import json
import os
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from brixel_cli.core.files import check_disk, make_folder, replacing, writing
from brixel_cli.errors import BrixelError

STATUS = "status"
MISSING, DONE, FAILED = 0, 1, 2
ATTRIBUTES = "description"
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Column:
    """One dataset of a file, to be filled row by row.

    Attributes:
        shape: of a row.
        dtype: NumPy type name, such as `float16`.
        num_rows: rows of the dataset; None: as many as the file has.
        live: rows that will be filled, ascending; the others get no room on the disk. None: all of them.
    """

    shape: tuple[int, ...]
    dtype: str
    num_rows: int | None = None
    live: Sequence[int] | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def bytes_needed(num_rows: int, columns: Mapping[str, Column]) -> int:
    """Bytes of a file's datasets."""
    return num_rows + sum(column.row_bytes * _num_live(column, num_rows) for column in columns.values())


def create_store(
    path: Path,
    num_rows: int,
    columns: Mapping[str, Column],
    description: Mapping[str, Any],
    filled: Mapping[str, Array] | None = None,
    attributes: Mapping[str, str] | None = None,
) -> None:
    """Create a file with all rows allocated and none done; it appears under its name only when complete.

    Args:
        path: of the new .h5 file; its folder is made.
        num_rows: rows of `status`, and of every dataset that does not say otherwise.
        columns: datasets by name; a name with a slash is a dataset in a group.
        description: what the file holds, JSON-able; stored as the file's attribute `description`.
        filled: datasets whose values are known already; `status` may be among them. Bytes are UTF-8 text.
        attributes: further attributes of the file.

    Raises:
        BrixelError: it does not fit on the disk, or cannot be written.
    """
    make_folder(path.parent)
    contents = {STATUS: np.zeros(num_rows, np.uint8), **(filled or {})}
    needed = bytes_needed(num_rows, columns) + sum(array.nbytes for name, array in contents.items() if name != STATUS)
    check_disk(path.parent, needed, f"{path.name}")
    with replacing(path) as partial:
        with h5py.File(partial, "w") as file:
            for key, value in {ATTRIBUTES: json.dumps(description, sort_keys=True), **(attributes or {})}.items():
                file.attrs[key] = value
            for name, array in contents.items():
                text = array.dtype.kind == "S"
                dtype = h5py.string_dtype("utf-8", array.dtype.itemsize) if text else array.dtype
                file.create_dataset(name, data=array.astype(dtype), dtype=dtype)
            for name, column in columns.items():
                _allocate(file, name, column, num_rows)
            spans = [span for name, column in columns.items() for span in _live_spans(file[name], column)]
        with open(partial, "r+b") as raw:
            if hasattr(os, "posix_fallocate"):
                for offset, length in spans:
                    os.posix_fallocate(raw.fileno(), offset, length)
            os.fsync(raw.fileno())


def _num_live(column: Column, num_rows: int) -> int:
    if column.live is not None:
        return len(column.live)
    return num_rows if column.num_rows is None else column.num_rows


def _allocate(file: Any, name: str, column: Column, num_rows: int) -> None:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    group, _, leaf = name.rpartition("/")
    parent = file.require_group(group) if group else file
    space = h5py.h5s.create_simple((num_rows if column.num_rows is None else column.num_rows, *column.shape))
    h5py.h5d.create(parent.id, leaf.encode(), h5py.h5t.py_create(np.dtype(column.dtype)), space, layout)


def _live_spans(dataset: Any, column: Column) -> list[tuple[int, int]]:
    """(offset, length) in bytes of each run of rows that will be filled."""
    if not column.row_bytes or not len(dataset):
        return []
    rows = np.arange(len(dataset)) if column.live is None else np.asarray(column.live, dtype=np.int64)
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    start = dataset.id.get_offset()
    return [(start + int(run[0]) * column.row_bytes, len(run) * column.row_bytes) for run in runs if len(run)]


def _opened(path: Path) -> Any:
    """The file, read-only and unlocked, so that it can be filled meanwhile."""
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        if "locking flag" not in str(error):
            raise
        return h5py.File(path, "r")  # this process has it open already, with h5py's default


def positions_within_size(sizes: Sequence[Hashable]) -> list[int]:
    """Each row's position among the rows of its size: its row in the dataset of that size."""
    counts: Counter[Hashable] = Counter()
    positions = []
    for size in sizes:
        positions.append(counts[size])
        counts[size] += 1
    return positions


def batches_of_one_size(rows: Sequence[int], size: Callable[[int], Hashable], at_once: int) -> list[list[int]]:
    """Rows in batches of at most `at_once`, those of a batch of one size; sizes in the order of their first row."""
    of_size: dict[Hashable, list[int]] = {}
    for row in rows:
        of_size.setdefault(size(row), []).append(row)
    return [same[at : at + at_once] for same in of_size.values() for at in range(0, len(same), at_once)]


class Store:
    """A file made by `create_store`, opened for reading or for filling rows.

    Rows are written with positioned writes: they cost no memory of ours, and outlive the process once written.

    Args:
        path: of the file.
        writable: whether rows will be written.

    Raises:
        BrixelError: the file is missing, damaged, or not one of ours.
    """

    def __init__(self, path: Path, writable: bool = False):
        places: dict[str, tuple[int | None, tuple[int, ...], np.dtype[Any]]] = {}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                places[name] = item.id.get_offset(), item.shape, item.dtype

        try:
            with _opened(path) as file:
                self.attributes = {key: str(value) for key, value in file.attrs.items()}
                self.description: dict[str, Any] = json.loads(self.attributes[ATTRIBUTES])
                file.visititems(visit)
        except (OSError, KeyError, ValueError) as error:
            raise BrixelError(f"{path} is not a feature file of brixel, or is damaged: {error}") from error
        self.path = path
        self._places = places
        self._rows: dict[str, Array] = {
            name: np.empty(shape, dtype) if offset is None else np.memmap(path, dtype, "r", offset, shape)
            for name, (offset, shape, dtype) in places.items()
        }
        self._file = os.open(path, os.O_WRONLY) if writable else -1
        if writable:
            weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._rows[STATUS])

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    @property
    def status(self) -> npt.NDArray[np.uint8]:
        """Status of every row, copied: 0 missing, 1 done, 2 failed."""
        return np.array(self._rows[STATUS])

    @property
    def missing(self) -> npt.NDArray[np.int64]:
        """Numbers of the rows that are not done."""
        return np.flatnonzero(self._rows[STATUS] != DONE)

    def array(self, name: str) -> Array:
        """A whole dataset, not copied; read-only."""
        return self._rows[name]

    def put(self, name: str, row: int, value: Array) -> None:
        """Write one row of one dataset.

        Raises:
            ValueError: the value has not the shape of a row, or the store was opened read-only.
            BrixelError: the disk refuses it.
        """
        if self._file < 0:
            raise ValueError(f"{self.path} was opened read-only")
        offset, shape, dtype = self._places[name]
        if value.shape != shape[1:]:
            raise ValueError(f"{name}: a row has shape {shape[1:]}, not {value.shape}")
        data = np.ascontiguousarray(value, dtype=dtype).reshape(-1).view(np.uint8).data
        place = (offset or 0) + row * len(data)
        with writing(self.path):
            while data:
                written = os.pwrite(self._file, data, place)
                data, place = data[written:], place + written

    def mark(self, row: int, status: int) -> None:
        """Set the status of a row, after its values."""
        self.put(STATUS, row, np.array(status, np.uint8))

    def write(self, row: int, values: Mapping[str, Array]) -> None:
        """Write one row of every dataset, then mark it done."""
        for name, value in values.items():
            self.put(name, row, value)
        self.mark(row, DONE)

    def flush(self) -> None:
        """Wait until all that was written is on the disk."""
        os.fsync(self._file)

    def read(self, name: str, rows: Sequence[int]) -> Array:
        """Rows of a dataset, copied, in the order asked for."""
        return np.asarray(self._rows[name][list(rows)])
