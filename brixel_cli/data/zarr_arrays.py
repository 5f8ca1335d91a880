"""Rows of feature files as arrays of Zarr, version 3, filled in place.

The chunk of an array is one row, uncompressed, so all chunks have the same number of bytes, and their places in a shard
are known before any of them is written. A shard is the chunks one after the other, and then their index: the offset and
the length of each (https://zarr-specs.readthedocs.io, sharding codec 1.0). A shard is a valid file as soon as it is
there; rows that are not written yet read as zeros. No package is needed for this.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from brixel_cli.core.files import (
    check_regular,
    inside,
    make_folder,
    open_to_fill,
    replacing,
    write_at,
    write_text,
    writing,
)
from brixel_cli.data.columns import Column
from brixel_cli.data.row_store import Array
from brixel_cli.errors import BrixelError

GROUP_NAME = "features.zarr"
SHARD_BYTES = 1 << 28
MOST_CHUNKS = 4096
"""Of a shard: a reader reads the index of all of them, 16 bytes each, before the first row."""
ENTRY = np.dtype([("offset", "<u8"), ("length", "<u8")])
ABSENT = (1 << 64) - 1
"""Offset and length of a chunk that is not there."""
AXES: dict[int, tuple[str, ...]] = {1: (), 2: ("values",), 3: ("tokens", "values"), 4: ("channels", "y", "x")}
"""Names of the dimensions after the first, for arrays of so many dimensions."""
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


class ZarrArrays:
    """Arrays with a row for each image, or for each image of a grid; they come into being with their first row.

    Args:
        folder: of the group.
        columns: arrays by name; a name with a slash is an array in a group.
        num_rows: of the arrays that do not say otherwise.
    """

    def __init__(self, folder: Path, columns: Mapping[str, Column], num_rows: int):
        self.folder, self._columns, self._num_rows = folder, columns, num_rows
        self._filled: set[Path] = set()
        self._has_size = cache(self._has_size_now)

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def put(self, name: str, rows: Sequence[int], values: Sequence[Array]) -> None:
        """Write rows of an array.

        Raises:
            BrixelError: the disk refuses it.
        """
        column = self._columns[name]
        dtype = np.dtype(column.dtype).newbyteorder("<")
        for row, value in zip(rows, values, strict=True):
            if value.shape != column.shape:
                raise ValueError(f"{name}: a row has shape {column.shape}, not {value.shape}")
            path, place = self._place(name, row)
            with writing(path):
                if path not in self._filled:
                    self._begin(path, name, row)
                _fill(path, np.ascontiguousarray(value, dtype), place)

    def read(self, name: str, row: int) -> Array:
        """A row of an array.

        Raises:
            BrixelError: its shard is missing or cut off.
        """
        column = self._columns[name]
        path, place = self._place(name, row)
        try:
            check_regular(path)
            if not self._has_size(path, self._shard_bytes(name, row)):
                raise ValueError("it is cut off")
            with path.open("rb") as file:
                file.seek(place)
                data = file.read(column.row_bytes)
            values = np.frombuffer(bytearray(data), np.dtype(column.dtype).newbyteorder("<"))
            return values.astype(column.dtype, copy=False).reshape(column.shape)
        except (OSError, ValueError) as error:
            raise BrixelError(
                f"{path} cannot be read: {error}. The same brixel extract again computes what is damaged."
            ) from error

    def damage(self, name: str, row: int) -> str:
        """Why the shard of a row cannot be read; empty where it can. Its contents are not looked at."""
        path, _ = self._place(name, row)
        return "" if self._has_size(path, self._shard_bytes(name, row)) else f"{path} is missing or cut off"

    def clear(self) -> None:
        """Remove the arrays with all that is in their folder.

        Raises:
            BrixelError: the disk refuses it, or the folder is a link.
        """
        with writing(self.folder), suppress(FileNotFoundError):
            shutil.rmtree(self.folder)

    def flush(self) -> None:
        """Wait until all that was written is on the disk; errors as `put`."""
        for path in sorted(self._filled):
            with writing(path), path.open("rb+") as file:
                os.fsync(file.fileno())

    def describe(self, index: Mapping[str, Array], texts: Mapping[str, Sequence[str]], attributes: Any) -> None:
        """Write what readers need besides the rows: kinds of all arrays, and small arrays as a whole.

        Args:
            index: arrays with known values.
            texts: arrays of text.
            attributes: of the group, JSON-able.

        Raises:
            BrixelError: the disk refuses it.
        """
        groups = {""} | {name.rpartition("/")[0] for name in self._columns}
        for group in sorted(groups):
            named = {"attributes": attributes} if not group else {}
            self._write_json(group, {"zarr_format": 3, "node_type": "group", "attributes": {}} | named)
        for name, column in self._columns.items():
            chunk = [1, *column.shape]
            codec = {"chunk_shape": chunk, "codecs": [LITTLE], "index_codecs": [LITTLE], "index_location": "end"}
            shape, sharding = [self._count(name), *column.shape], {"name": "sharding_indexed", "configuration": codec}
            self._write_array(name, shape, column.dtype, [self._chunks(name), *column.shape], sharding)
        for name, values in index.items():
            self._write_array(name, values.shape, values.dtype.name, values.shape, LITTLE)
            data = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
            self._write_chunk(name, values.ndim, data)
        for name, words in texts.items():
            encoded = [word.encode() for word in words]
            data = struct.pack("<I", len(words)) + b"".join(struct.pack("<I", len(word)) + word for word in encoded)
            self._write_array(name, [len(words)], "string", [len(words)], {"name": "vlen-utf8"}, fill="")
            self._write_chunk(name, 1, data)

    def _count(self, name: str) -> int:
        found = self._columns[name].num_rows
        return self._num_rows if found is None else found

    def _chunks(self, name: str) -> int:
        """Chunks, which are rows, of a shard."""
        least = SHARD_BYTES // max(self._columns[name].row_bytes, 1)
        return max(min(least, MOST_CHUNKS, self._count(name)), 1)

    def _place(self, name: str, row: int) -> tuple[Path, int]:
        """The shard of a row, and where the row begins in it."""
        column = self._columns[name]
        if not 0 <= row < self._count(name):
            raise ValueError(f"{name} has {self._count(name)} rows, and no row {row}")
        shard, chunk = divmod(row, self._chunks(name))
        return self._chunk_file(name, shard, 1 + len(column.shape)), chunk * column.row_bytes

    def _chunk_file(self, name: str, number: int, dimensions: int) -> Path:
        return self.folder.joinpath(*name.split("/"), "c", str(number), *["0"] * (dimensions - 1))

    def _used(self, name: str, row: int) -> int:
        """Chunks of the shard of a row that the array has rows for."""
        chunks = self._chunks(name)
        return min(chunks, self._count(name) - row // chunks * chunks)

    def _shard_bytes(self, name: str, row: int) -> int:
        return self._used(name, row) * self._columns[name].row_bytes + self._chunks(name) * ENTRY.itemsize

    def _has_size_now(self, path: Path, size: int) -> bool:
        try:
            return path.is_file() and path.stat().st_size == size
        except OSError:
            return False

    def _begin(self, path: Path, name: str, row: int) -> None:
        """Make the shard of a row, where it is not there yet: its index comes last, and gives it its size."""
        make_folder(inside(self.folder.parent, str(path.relative_to(self.folder.parent))).parent)
        size = self._shard_bytes(name, row)
        if not self._has_size_now(path, size):
            row_bytes, used = self._columns[name].row_bytes, self._used(name, row)
            index = np.full(self._chunks(name), ABSENT, np.uint64).repeat(2).view(ENTRY)
            index["offset"][:used], index["length"][:used] = np.arange(used) * row_bytes, row_bytes
            path.touch()
            os.truncate(path, min(path.stat().st_size, used * row_bytes))
            _fill(path, index, used * row_bytes)
        self._filled.add(path)

    def _write_array(
        self, name: str, shape: Sequence[int], dtype: str, chunk: Sequence[int], codec: Any, fill: object = 0
    ) -> None:
        """Write the metadata of an array. Those that have a row for each image share their first dimension."""
        own = [f"{name.replace('/', '_')}_{axis}" for axis in ("rows", *AXES[len(shape)])]
        metadata = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill,
            "codecs": [codec],
            "dimension_names": ["image" if shape[0] == self._num_rows else own[0], *own[1:]],
            "attributes": {},
        }
        self._write_json(name, metadata)

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        path = inside(self.folder.parent, f"{self.folder.name}/{name}/zarr.json")
        make_folder(path.parent)
        write_text(path, json.dumps(value, indent=1) + "\n")

    def _write_chunk(self, name: str, dimensions: int, data: bytes) -> None:
        path = self._chunk_file(name, 0, dimensions)
        make_folder(path.parent)
        with replacing(path) as partial:
            partial.write_bytes(data)


def _fill(path: Path, values: Array, place: int) -> None:
    """Write values into a file that is there, from a place on."""
    descriptor = open_to_fill(path)
    try:
        write_at(descriptor, [values.reshape(-1).view(np.uint8).data], place)
    finally:
        os.close(descriptor)
