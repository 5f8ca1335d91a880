"""Feature maps on disk: HDF5 files created whole, then filled row by row.

All datasets are contiguous and of fixed shape, allocated before the first row is written, and the file's metadata is
never touched again: it opens with plain h5py at every moment, a kill costs at most the rows in flight, and several
processes can fill disjoint rows. A row counts when its entry in `status` is 1.

A file may come from anywhere. Its datasets are mapped only where they lie in it as numbers or text of fixed length;
compressed or chunked ones are read through h5py, and such a file is never written to.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from brixel_cli.core.files import check_disk, make_folder, open_to_fill, replacing, write_at, writing
from brixel_cli.data.checksums import DESCRIPTION, ROW_SUMS, XXH3, fixed_sums, kind_of_rows
from brixel_cli.data.columns import Column, bytes_needed
from brixel_cli.data.virtual_rows import PARTS, VirtualColumn, VirtualRows, add_virtual, check_parts, opened
from brixel_cli.errors import BrixelError

STATUS, REASON = "status", "reason"
"""Datasets that change after the file was created, besides its columns and the checksums of rows."""
MISSING, DONE, FAILED = 0, 1, 2
RESERVE = 1 << 20
"""Bytes that the structure of a file takes at most, besides its datasets."""
MOST_UNPACKED = 1 << 31
"""Bytes of a dataset that is compressed and read at once; a small file could ask for any number."""
Array = npt.NDArray[Any]


def num_open(status: Array) -> int:
    """How many rows are still to be computed: neither done nor failed, also with a status that is none of the three."""
    return int((~np.isin(status, (DONE, FAILED))).sum())


def create_store(
    path: Path,
    num_rows: int,
    columns: Mapping[str, Column],
    description: Mapping[str, Any],
    filled: Mapping[str, Array] | None = None,
    attributes: Mapping[str, str] | None = None,
    virtual: Mapping[str, VirtualColumn] | None = None,
) -> None:
    """Create a file with all rows allocated and none done; it appears under its name only when complete.

    Args:
        path: of the new .h5 file; its folder is made.
        num_rows: rows of `status`, and of every dataset that does not say otherwise.
        columns: datasets by name; a name with a slash is a dataset in a group.
        description: what the file holds, JSON-able; stored as the file's attribute `description`.
        filled: datasets whose values are known already; `status` may be among them. Bytes are UTF-8 text.
        attributes: further attributes of the file.
        virtual: datasets whose rows lie in other files.

    Raises:
        BrixelError: it does not fit on the disk, or cannot be written.
    """
    make_folder(path.parent)
    contents = {STATUS: np.zeros(num_rows, np.uint8), **(filled or {})}
    needed = bytes_needed(num_rows, columns) + sum(array.nbytes for name, array in contents.items() if name != STATUS)
    check_disk(path.parent, needed, f"{path.name}")
    text = json.dumps(description, sort_keys=True)
    fixed = {name: array for name, array in contents.items() if name not in (STATUS, REASON, *ROW_SUMS)}
    sums = json.dumps(XXH3.fixed(text, fixed), sort_keys=True)
    with replacing(path) as partial:
        # HDF5 may crash on a full disk: whether there is room for what it writes itself, plain zeros tell.
        partial.write_bytes(bytes(sum(array.nbytes for array in contents.values()) + len(text) + RESERVE))
        try:
            with h5py.File(partial, "w") as file:
                for key, value in {DESCRIPTION: text, XXH3.attribute: sums, **(attributes or {})}.items():
                    file.attrs[key] = value
                for name, array in contents.items():
                    is_text = array.dtype.kind == "S"
                    dtype = h5py.string_dtype("utf-8", array.dtype.itemsize) if is_text else array.dtype
                    file.create_dataset(name, data=array.astype(dtype), dtype=dtype, track_times=False)
                for name, column in columns.items():
                    _allocate(file, name, column, num_rows)
                for name, rows in (virtual or {}).items():
                    add_virtual(file, name, rows)
                spans = [span for name, column in columns.items() for span in _live_spans(file[name], column)]
        except RuntimeError as error:  # what the disk objects to, in the library's own words
            raise OSError(str(error)) from error
        with open(partial, "r+b") as raw:
            if hasattr(os, "posix_fallocate"):
                for offset, length in spans:
                    os.posix_fallocate(raw.fileno(), offset, length)
            os.fsync(raw.fileno())


def _allocate(file: Any, name: str, column: Column, num_rows: int) -> None:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)  # files of the same rows are the same bytes
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


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file leads to into a BrixelError that says what to do."""
    try:
        yield
    except BrixelError:
        raise
    except Exception as error:  # HDF5, NumPy and JSON have a kind of their own for every damage
        raise BrixelError(
            f"{path} is not a feature file of brixel, or is damaged: {error}. "
            "Name another file, or delete this one and make it again."
        ) from error


class Store:
    """A file made by `create_store`, opened for reading or for filling rows.

    Rows are read from one map of the file, and written with positioned writes: they cost no memory of ours, and outlive
    the process once written.

    Attributes:
        path: of the file.
        attributes: of the file, as text.
        description: what the file holds.
        damaged: the datasets that never change, and have other bytes than when the file was created.

    Args:
        path: of the file.
        writable: whether rows will be written: of all datasets, or of those named and `status`.

    Raises:
        BrixelError: the file is missing, damaged, not one of ours, or, to be written, not contiguous.
    """

    def __init__(self, path: Path, writable: bool | Collection[str] = False):
        self.path = path
        self._places: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        self._rows: dict[str, Any] = {}  # by name a view into the map, or, where that cannot be, h5py's dataset
        with reading(path), ExitStack() as stack:
            file = stack.enter_context(opened(path))
            self.attributes = {key: str(value) for key, value in file.attrs.items()}
            self.description: dict[str, Any] = json.loads(self.attributes[DESCRIPTION])
            if not isinstance(self.description, dict):
                raise ValueError("its description is no JSON object")
            with path.open("rb") as raw:
                self._map = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
            self._parts = check_parts(path, self.attributes.get(PARTS))
            file.visititems(self._find)
            status = self._rows.get(STATUS)
            if status is None or status.dtype != np.uint8 or len(status.shape) != 1:
                raise ValueError("it has no status of its rows")
            self._fixed = fixed_sums(self.attributes)
            self.damaged = self._compared()
            if len(self._places) < len(self._rows):
                stack.pop_all()  # stays open, as long as its datasets are
        self._file = -1
        if writable:
            names = self._rows if writable is True else {STATUS, *writable}
            apart = sorted(set(names) & set(self._rows) - set(self._places))
            if apart:
                raise BrixelError(
                    f"{path} can be read, but not written to, as it is compressed, chunked or kept in several files "
                    f"({', '.join(apart[:3])}). Name another output, or unpack it: h5repack -f NONE -l CONTI OLD NEW"
                )
            with writing(path):
                self._file = open_to_fill(path)
            weakref.finalize(self, os.close, self._file)

    def _find(self, name: str, item: Any) -> None:
        """Take up a dataset of the file: map it where its bytes lie in the file just as NumPy has them."""
        if not isinstance(item, h5py.Dataset):
            return
        outside = [Path(part[0]) for part in item.external or []]
        folder = self.path.resolve().parent
        if item.is_virtual:
            self._rows[name] = VirtualRows(name, item, self._parts)
            return
        if not all(other.resolve().is_relative_to(folder) for other in outside):
            raise ValueError(f"its dataset {name} lies in other files")
        shape, dtype, offset = item.shape, item.dtype, item.id.get_offset()
        if shape is not None and not dtype.hasobject and 0 in shape:
            self._places[name], self._rows[name] = (0, shape, dtype), np.empty(shape, dtype)
        elif offset is None or shape is None or dtype.hasobject or outside or not _is_plain(item):
            self._rows[name] = item
        else:
            if offset + item.nbytes > len(self._map):
                raise ValueError(f"its dataset {name} ends beyond the end of the file")
            self._places[name] = offset, shape, dtype
            self._rows[name] = np.ndarray(shape, dtype, self._map, offset)

    def _compared(self) -> list[str]:
        kind, expected = self._fixed
        if expected and kind.fixed(self.attributes[DESCRIPTION], {})[DESCRIPTION] != expected[DESCRIPTION]:
            raise ValueError("its description has changed since it was written")
        return [
            name for name in self.fixed if name not in self or kind.shown(kind.of(self.array(name))) != expected[name]
        ]

    @property
    def fixed(self) -> list[str]:
        """The datasets that never change; none in files of versions that did not know checksums."""
        return [name for name in self._fixed[1] if name != DESCRIPTION]

    @property
    def has_checksums(self) -> bool:
        """Whether changes of its rows are noticed."""
        return kind_of_rows(self._rows) is not None

    def __len__(self) -> int:
        return len(self._rows[STATUS])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    @property
    def status(self) -> npt.NDArray[np.uint8]:
        """Status of every row, copied: 0 missing, 1 done, 2 failed."""
        return np.array(self.array(STATUS))

    @property
    def missing(self) -> npt.NDArray[np.int64]:
        """Numbers of the rows that are not done."""
        return np.flatnonzero(self.array(STATUS) != DONE)

    def kind(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and number format of a dataset; errors as `array`."""
        found = self._dataset(name)
        return found.shape or (), found.dtype

    def array(self, name: str) -> Array:
        """A whole dataset, not copied where it is mapped; read-only.

        Raises:
            BrixelError: there is no such dataset, or it cannot be read.
        """
        found = self._dataset(name)
        if isinstance(found, np.ndarray):
            return found
        with reading(self.path):
            if found.nbytes > MOST_UNPACKED:
                raise ValueError(f"its dataset {name} would take {found.nbytes} bytes")
            return np.asarray(found[()])

    def _dataset(self, name: str) -> Any:
        with reading(self.path):
            if name not in self._rows:
                raise ValueError(f"it has no dataset {name}")
        return self._rows[name]

    def put(self, name: str, rows: Sequence[int], values: Sequence[Array]) -> None:
        """Write rows of one dataset; those that follow each other with one call of the system.

        Raises:
            ValueError: there is no such row, a value has not its shape, or the store was opened read-only.
            BrixelError: the disk refuses it.
        """
        offset, shape, dtype = self._place(name)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        pieces: list[memoryview] = []
        for row, value in zip(rows, values, strict=True):
            if value.shape != shape[1:]:
                raise ValueError(f"{name}: a row has shape {shape[1:]}, not {value.shape}")
            if not 0 <= row < shape[0]:
                raise ValueError(f"{name} has {shape[0]} rows, and no row {row}")
            pieces.append(_bytes(value, dtype))
        at = 0
        while at < len(rows):
            end = at + 1
            while end < len(rows) and rows[end] == rows[end - 1] + 1:
                end += 1
            self._write(pieces[at:end], offset + rows[at] * row_bytes)
            at = end

    def put_strip(self, name: str, row: int, first: int, value: Array) -> None:
        """Write a strip (D, r, w) of a row that is a map (D, h, w), from line `first` of it on; errors as `put`."""
        offset, shape, dtype = self._place(name)
        height = value.shape[1]
        if value.shape != (shape[1], height, shape[3]):
            raise ValueError(f"{name}: a row has shape {shape[1:]}, not {value.shape}")
        if not (0 <= row < shape[0] and 0 <= first <= shape[2] - height):
            raise ValueError(f"{name} has {shape[0]} rows, and no row {row} with lines {first} to {first + height}")
        line = shape[3] * dtype.itemsize
        for channel, plane in enumerate(value):
            self._write([_bytes(plane, dtype)], offset + ((row * shape[1] + channel) * shape[2] + first) * line)

    def _place(self, name: str) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
        if self._file < 0:
            raise ValueError(f"{self.path} was opened read-only")
        return self._places[name]

    def _write(self, pieces: Sequence[memoryview], place: int) -> None:
        try:
            write_at(self._file, pieces, place)
        except OSError:
            with writing(self.path):
                raise

    def restore(self, name: str, values: Array) -> bool:
        """Write a damaged dataset again where these are its values, as its checksum tells; whether they are."""
        offset, shape, dtype = self._places.get(name, (0, (), None))
        kind, expected = self._fixed
        same = shape == values.shape and dtype == values.dtype
        if not same or kind.shown(kind.of(values)) != expected[name]:
            return False
        self._write([_bytes(values, values.dtype)], offset)
        return True

    def mark(self, row: int, status: int) -> None:
        """Set the status of a row, after its values."""
        self.put(STATUS, [row], [np.array(status, np.uint8)])

    def write(
        self,
        rows: Sequence[int],
        values: Mapping[str, Sequence[Array]],
        places: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Write rows, then their checksums where the file has checksums, then mark them done; errors as `put`.

        Args:
            rows: of `status`.
            values: by dataset, of each of these rows; in the order of the checksum.
            places: the rows within those datasets that have not all rows.
        """
        stored = {}
        for name, arrays in values.items():
            dtype = self._place(name)[2]
            stored[name] = [np.asarray(array, dtype, order="C") for array in arrays]
            self.put(name, (places or {}).get(name, rows), stored[name])
        self.settle(rows, [[arrays[at] for arrays in stored.values()] for at in range(len(rows))])

    def settle(self, rows: Sequence[int], values: Iterable[Iterable[Array]]) -> None:
        """Write the checksums of rows' values where the file has checksums, and mark them done; errors as `put`."""
        if kind := kind_of_rows(self._rows):
            self.put(kind.dataset, rows, [np.array(kind.of(*of_row), np.uint64) for of_row in values])
        self.put(STATUS, rows, [np.array(DONE, np.uint8)] * len(rows))

    def intact(self, row: int, values: Iterable[Array]) -> bool:
        """Whether these are the values that a row was written with; also where the file has no checksums."""
        kind = kind_of_rows(self._rows)
        return kind is None or bool(kind.of(*values) == self.array(kind.dataset)[row])

    def flush(self) -> None:
        """Wait until all that was written is on the disk; errors as `put`."""
        with writing(self.path):
            os.fsync(self._file)

    def read(self, name: str, rows: Sequence[int]) -> Array:
        """Rows of a dataset, copied, in the order asked for; errors as `array`."""
        found = self._rows.get(name)
        if isinstance(found, np.ndarray):
            return np.asarray(found[list(rows)])
        found = self._dataset(name)
        with reading(self.path):
            return np.stack([found[row] for row in rows])


def _bytes(array: Array, dtype: np.dtype[Any]) -> memoryview:
    return np.ascontiguousarray(array, dtype=dtype).reshape(-1).view(np.uint8).data


def _is_plain(item: Any) -> bool:
    """Whether the bytes of a dataset are just those that NumPy has for its type."""
    return item.dtype.kind == "S" or bool(h5py.h5t.py_create(item.dtype).equal(item.id.get_type()))
