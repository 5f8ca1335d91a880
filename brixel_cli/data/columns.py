"""Datasets that are filled row by row, and the room that they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


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


def _num_live(column: Column, num_rows: int) -> int:
    if column.live is not None:
        return len(column.live)
    return num_rows if column.num_rows is None else column.num_rows
