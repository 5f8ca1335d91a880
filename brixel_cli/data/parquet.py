"""Parquet files with a column of images, as data sets of Hugging Face have it (the extra `parquet`)."""

from __future__ import annotations

import io
import ntpath
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, BinaryIO

from brixel_cli.core.extras import require
from brixel_cli.core.memory import check_memory, main_memory
from brixel_cli.data.members import Member, measured, named_once
from brixel_cli.errors import BrixelError, UnreachedError, UsageError

PARQUET_EXTENSION = ".parquet"
PREFERRED = ("image", "img", "jpg", "jpeg", "png", "webp")
"""Names of an image column where there are several, the first that is there; of plain bytes, the only ones taken."""
LACKING = "the row has no bytes of an image; a path to another file is not followed"


class Parquet:
    """A parquet file whose images are read in order; going back starts their row group anew.

    Args:
        open_file: opens the file for reading; called again after an error.
        column: of the images; None: the one that looks like it.

    Raises:
        UsageError: pyarrow is missing, or the file has no such column, or several.
        BrixelError: it is no parquet file that can be read; the message is the reason.
        UnreachedError: it did not come.
    """

    def __init__(self, open_file: Callable[[], BinaryIO], column: str | None = None):
        self._open_file, self._lock = open_file, Lock()
        with self._opened(None) as file:
            self._metadata = file.metadata
            self._columns = _image_columns(file.schema_arrow, column)
        self._batches: Iterator[tuple[bytes | None, str | None]] = iter(())
        self._group, self._next = -1, 0

    def members(self) -> Iterator[Member]:
        """The images of all row groups, in order, each named by its path in the file where it has one, else by row.

        A damaged row group becomes one member with the reason.

        Raises:
            BrixelError, UnreachedError: as of the class.
        """
        yield from named_once(self._members())

    def read(self, group: int, rows: Sequence[int]) -> list[bytes]:
        """The bytes of images of a row group, of ascending rows.

        Raises:
            BrixelError: the file is damaged there, or was changed; the message is the reason.
            UnreachedError: they did not come.
        """
        with self._lock:
            if group != self._group or rows[0] < self._next:
                self._group, self._next, self._batches = group, 0, self._images(group)
            found = []
            wanted = iter(rows)
            row = next(wanted)
            try:
                for data, _ in self._batches:
                    self._next += 1
                    if self._next - 1 == row:
                        found.append(data or b"")
                        row = next(wanted, -1)
                        if row < 0:
                            return found
            except BaseException:
                self._group = -1  # what was read of it is lost
                raise
        raise BrixelError(f"row group {group} ends before row {row}")

    def _members(self) -> Iterator[Member]:
        number, digits = 0, len(str(self._metadata.num_rows))
        for group in range(self._metadata.num_row_groups):
            try:
                for row, (data, path) in enumerate(self._images(group)):
                    name = path or f"{number:0{digits}d}"
                    if ntpath.isabs(name) or name.startswith("/"):  # where the image once was on another machine
                        name = ntpath.basename(name)
                    number += 1
                    reason = "" if data else LACKING
                    yield measured(name, (group, row), io.BytesIO(data or b""), len(data or b""), reason)
            except UnreachedError:
                raise
            except BrixelError as error:
                yield Member(f"#row_group_{group}", (group, 0), 0, 0, 0, str(error))

    def _images(self, group: int) -> Iterator[tuple[bytes | None, str | None]]:
        """Bytes and path of each row of a group; one at a time, as many rows may name one large image."""
        self._check_memory(group)
        with self._opened(self._metadata) as file:
            batches = iter(file.iter_batches(1, row_groups=[group], columns=self._columns))
            while (batch := _sound(lambda: next(batches, None))) is not None:
                of_bytes, of_paths = _values(batch.column(0))
                for data, path in zip(of_bytes, of_paths, strict=True):
                    yield data.as_py(), path.as_py() if path is not None else None

    def _check_memory(self, group: int) -> None:
        """Raise a BrixelError where what a row group says of its size does not fit into memory."""
        found = _sound(lambda: self._metadata.row_group(group))
        columns = [found.column(number) for number in range(found.num_columns)]
        sizes = [(column.total_compressed_size, column.total_uncompressed_size) for column in columns
                 if column.path_in_schema in self._columns]  # fmt: skip
        advice = "Write the file with smaller row groups."
        check_memory(sum(map(max, sizes)), main_memory(), f"Row group {group}", advice)

    @contextmanager
    def _opened(self, metadata: Any) -> Iterator[Any]:
        require("parquet", "A parquet file")
        from pyarrow import parquet

        with self._open_file() as file:
            yield _sound(lambda: parquet.ParquetFile(file, metadata=metadata))


def _sound(call: Callable[[], Any]) -> Any:
    """The result of a call of pyarrow, whose errors on damaged files become ours."""
    try:
        return call()
    except (BrixelError, MemoryError):
        raise
    except Exception as error:  # ArrowInvalid and OSError, and others of damaged Thrift
        raise BrixelError(f"not a parquet file that can be read: {str(error).splitlines()[0][:90]}") from error


def _values(column: Any) -> tuple[Any, Any]:
    """Bytes and paths of a column of images."""
    import pyarrow as pa

    if not pa.types.is_struct(column.type):
        return column, [None] * len(column)
    names = [column.type.field(number).name for number in range(column.type.num_fields)]
    parts = dict(zip(names, column.flatten(), strict=True))
    return parts["bytes"], parts.get("path", [None] * len(column))


def _image_columns(schema: Any, column: str | None) -> list[str]:
    """What is to be read of a file: the image column's bytes and paths.

    Raises:
        UsageError: there is no such column, or several.
    """
    import pyarrow as pa

    def is_bytes(kind: Any) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    found = {}
    for item in schema:
        kind = item.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type):
            found[item.name] = [f"{item.name}.bytes", *([f"{item.name}.path"] * (kind.get_field_index("path") >= 0))]
        elif is_bytes(kind) and (item.name == column or item.name.lower() in PREFERRED):
            found[item.name] = [item.name]
    chosen = [column] if column else [name for name in PREFERRED if name in found][:1] or list(found)
    if len(chosen) == 1 and chosen[0] in found:
        return found[chosen[0]]
    if column:
        raise UsageError(f"--column {column}: no column of images; there are {', '.join(found) or 'none'}.")
    if found:
        raise UsageError(f"Several columns of images: name one with --column, of {', '.join(found)}.")
    raise UsageError(
        f"No column of images among {', '.join(schema.names)[:200]}: it has fields bytes and path, as data sets of "
        "Hugging Face have it, or holds the bytes of image files; name that one with --column."
    )
