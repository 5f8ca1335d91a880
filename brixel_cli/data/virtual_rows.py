"""Datasets whose rows lie in the parts of a joined file: made as HDF5's virtual datasets, and read part by part.

HDF5 itself keeps every part open that it has read from. Where the system lets a process open no more files, it gives
zeros for the rows of the others, without an error. So rows are read from the parts here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

PARTS = "parts"
"""Attribute of a joined file: JSON with the bytes of each part, by its name below the folder of the joined file."""


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of a dataset, and where they lie.

    Attributes:
        start: first row.
        count: rows.
        part: name of the file, below the folder of the joined one.
        dataset: of the part.
        source: first row of it.
    """

    start: int
    count: int
    part: str
    dataset: str
    source: int


@dataclass(frozen=True)
class VirtualColumn:
    """A dataset to be made of rows of other files.

    Attributes:
        shape: with the rows.
        dtype: NumPy type name.
        runs: of rows; those of none read as zeros.
        rows_of: rows of each part's dataset, by part and dataset.
    """

    shape: tuple[int, ...]
    dtype: str
    runs: Sequence[Run]
    rows_of: Mapping[tuple[str, str], int]


def opened(path: Path) -> Any:
    """The file, read-only and unlocked, so that it can be filled meanwhile."""
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        if "locking flag" not in str(error):
            raise
        return h5py.File(path, "r")  # this process has it open already, with h5py's default


def add_virtual(file: Any, name: str, column: VirtualColumn) -> None:
    """Make a virtual dataset in a file opened with h5py."""
    layout = h5py.VirtualLayout(column.shape, column.dtype)
    for run in column.runs:
        rows = column.rows_of[run.part, run.dataset]
        source = h5py.VirtualSource(run.part, run.dataset, (rows, *column.shape[1:]), column.dtype)
        layout[run.start : run.start + run.count] = source[run.source : run.source + run.count]
    file.create_virtual_dataset(name, layout)


def check_parts(path: Path, attribute: str | None) -> dict[str, Path]:
    """The parts of a joined file, by name.

    Args:
        path: of the joined file.
        attribute: `PARTS` of it; None where it has none.

    Raises:
        ValueError: one is missing, has changed, or lies elsewhere.
    """
    folder, parts = path.resolve().parent, {}
    for name, size in json.loads(attribute or "{}").items():
        parts[name] = part = folder / name
        if PurePosixPath(name).is_absolute() or not part.resolve().is_relative_to(folder):
            raise ValueError(f"its part {name} lies outside of its folder")
        if not part.is_file():
            raise ValueError(f"its part {name} is missing: put it there, or join the parts again")
        if part.stat().st_size != size:
            raise ValueError(f"its part {name} has another size than when it was joined: join the parts again")
    return parts


class VirtualRows:
    """A virtual dataset of a joined file, read row by row from its parts.

    Args:
        name: of the dataset.
        item: as h5py has it.
        parts: of the file; see `check_parts`.

    Raises:
        ValueError: its rows lie in other files, or otherwise than `add_virtual` has them.
    """

    def __init__(self, name: str, item: Any, parts: Mapping[str, Path]):
        self.shape: tuple[int, ...] = item.shape
        self.dtype: np.dtype[Any] = item.dtype
        self.nbytes: int = item.nbytes
        self._runs: list[Run] = []
        self._paths = parts
        self._open: tuple[str, Any] = "", None
        for mapping in item.virtual_sources():
            (start, *_), (last, *ends) = mapping.vspace.get_select_bounds()
            (source, *_), (source_last, *_) = mapping.src_space.get_select_bounds()
            if mapping.file_name not in parts:
                raise ValueError(f"its dataset {name} lies in other files")
            whole = [end + 1 for end in ends] == list(self.shape[1:])
            if not whole or last - start != source_last - source:
                raise ValueError(f"its dataset {name} is made of pieces of rows")
            self._runs.append(Run(start, last - start + 1, mapping.file_name, mapping.dset_name, source))
        self._runs.sort(key=lambda run: run.start)
        self._starts = np.array([run.start for run in self._runs], np.int64)

    def __getitem__(self, row: int | tuple[()]) -> npt.NDArray[Any]:
        """A row, or, for the empty tuple, all rows; rows of no part are zeros."""
        if isinstance(row, tuple):
            return np.stack([self[at] for at in range(self.shape[0])])
        place = int(np.searchsorted(self._starts, row, side="right")) - 1
        run = self._runs[place] if place >= 0 else None
        if run is None or row >= run.start + run.count:
            return np.zeros(self.shape[1:], self.dtype)
        name, file = self._open
        if name != run.part:
            file = opened(self._paths[run.part])
            self._open = run.part, file  # rows come mostly in order; the one before is closed with its last user
        dataset = self._own_dataset(file, run)
        if dataset.is_virtual or dataset.external or (dataset.shape[1:], dataset.dtype) != (self.shape[1:], self.dtype):
            raise ValueError(f"the dataset {run.dataset} of its part {run.part} is another than was joined")
        values: npt.NDArray[Any] = dataset[run.source + row - run.start]
        return values

    def _own_dataset(self, file: Any, run: Run) -> Any:
        """The dataset of a run, from its part, found without links, which may lead to other files."""
        found = file
        for name in run.dataset.strip("/").split("/"):
            if not isinstance(found.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"its part {run.part} has no dataset {run.dataset} of its own")
            found = found[name]
        return found
