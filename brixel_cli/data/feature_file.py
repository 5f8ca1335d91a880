"""The feature file that `brixel extract` writes: its schema, and two readers. Described in docs/FEATURES.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from brixel_cli.config.extract import Number, Storage
from brixel_cli.core.files import make_folder, read_npy, replacing
from brixel_cli.core.losses import Basis
from brixel_cli.core.weights import save_tensors
from brixel_cli.data.row_store import DONE, FAILED, Array, Column, Store, positions_within_size
from brixel_cli.errors import BrixelError

FORMAT = "brixel-features-1"
REASON_BYTES = 160
INDEX_NAME = "index.h5"
Grid = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Which row of which dataset each image has, before anything is computed.

    Args:
        grids: (height, width) of each image's map; None for images that will have none.
        channels: of every map.
        dtype: `float16`, `float32`, or `int8` with a float32 scale for each location.
        storage: `h5`, or the format of the single files; these leave the feature file without maps.
    """

    grids: tuple[Grid | None, ...]
    channels: int
    dtype: Number
    storage: Storage = "h5"

    @cached_property
    def rows_of_grid(self) -> dict[Grid, list[int]]:
        """Rows by grid, the grids in order of their first row."""
        rows: dict[Grid, list[int]] = {}
        for row, grid in enumerate(self.grids):
            if grid is not None:
                rows.setdefault(grid, []).append(row)
        return rows

    @cached_property
    def grid_rows(self) -> npt.NDArray[np.int64]:
        """Each image's row in the dataset of its grid; -1 for none. With one grid for all it is the image's own."""
        if len(self.rows_of_grid) == 1:
            within: Sequence[int] = range(len(self.grids))
        else:
            within = positions_within_size(self.grids)
        return np.array([-1 if grid is None else at for grid, at in zip(self.grids, within, strict=True)], np.int64)

    def dataset(self, part: str, row: int) -> tuple[str, int]:
        """The dataset that holds a part (`features`, `scale`) of an image's map, and the map's row in it."""
        grid = self.grids[row]
        mixed = len(self.rows_of_grid) > 1 and grid is not None
        return f"{part}/{grid[0]}x{grid[1]}" if grid and mixed else part, int(self.grid_rows[row])

    def shapes(self, grid: Grid) -> dict[str, Column]:
        """The datasets that one map consists of, without their place."""
        columns = {"features": Column((self.channels, *grid), self.dtype)}
        if self.dtype == "int8":
            columns["scale"] = Column((1, *grid), "float32")
        return columns

    @property
    def columns(self) -> dict[str, Column]:
        """Datasets of the feature file that are filled row by row."""
        columns: dict[str, Column] = {}
        if self.storage != "h5":
            return columns
        rows_of_grid = self.rows_of_grid
        for grid, rows in rows_of_grid.items():
            for name, column in self.shapes(grid).items():
                if len(rows_of_grid) == 1:
                    columns[name] = Column(column.shape, column.dtype, len(self.grids), rows)
                else:
                    columns[f"{name}/{grid[0]}x{grid[1]}"] = Column(column.shape, column.dtype, len(rows))
        return columns

    @property
    def bytes_needed(self) -> int:
        """Bytes of all maps, in whatever files."""
        return sum(
            column.row_bytes * len(rows)
            for grid, rows in self.rows_of_grid.items()
            for column in self.shapes(grid).values()
        )


def text_array(texts: Sequence[str], length: int | None = None) -> npt.NDArray[np.bytes_]:
    """Texts as fixed-length UTF-8; the longer ones cut, at a character, where a length in bytes is given."""
    encoded = [text.encode("utf-8", "replace") for text in texts]
    if length is not None:
        encoded = [text[:length].decode("utf-8", "ignore").encode() for text in encoded]
    return np.array(encoded, dtype=f"S{length or max((len(text) for text in encoded), default=1) or 1}")


def single_file_names(names: Sequence[str], storage: Storage) -> list[str]:
    """Names of the single files: the image's with another extension, or with one more where two would share it."""
    stems = [PurePosixPath(name).with_suffix("").as_posix() for name in names]
    folded = [stem.casefold() for stem in stems]
    shared = {stem for stem, count in Counter(folded).items() if count > 1}
    shared |= {name.casefold() for name in names}  # a.jpg.png must not become the a.jpg.npy of a.jpg
    return [
        f"{name if low in shared else stem}.{storage}" for name, stem, low in zip(names, stems, folded, strict=True)
    ]


def picture_names(names: Sequence[str]) -> list[str]:
    """Names of a PNG for each image: the image's, as `single_file_names` has it."""
    return [f"{name.removesuffix('.npy')}.png" for name in single_file_names(names, "npy")]


def encode(
    maps: Tensor, dtype: Number, basis: Basis | None, spare: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], list[bool]]:
    """Maps (B, D, h, w) in the form in which they are stored, and which of them hold finite numbers only.

    int8 has a float32 `scale` (B, 1, h, w): the largest absolute value at a location over 127.

    Args:
        maps: of the model.
        dtype: number format to store.
        basis: principal components to project on; None: the maps themselves.
        spare: an earlier result that is no longer needed, whose memory may be used again: fresh memory costs time.
    """
    if basis is not None:
        maps = Basis(basis.components.to(maps.device), basis.mean.to(maps.device)).project(maps)
    largest = torch.maximum(maps.amax(dim=(1, 2, 3)), -maps.amin(dim=(1, 2, 3)))
    finite = largest <= (torch.finfo(torch.float16).max if dtype == "float16" else torch.finfo(torch.float32).max)
    if dtype == "int8":
        scale = (maps.abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        quantised = (maps / scale).round_().clamp_(-127, 127).to(torch.int8)
        return {"features": quantised, "scale": scale}, finite.tolist()
    if dtype == "float16" and spare is not None and spare["features"].shape == maps.shape:
        return {"features": spare["features"].copy_(maps)}, finite.tolist()
    return {"features": maps.to(getattr(torch, dtype), memory_format=torch.preserve_format)}, finite.tolist()


def dequantise(values: Mapping[str, Array]) -> npt.NDArray[np.float32]:
    """A map as float32 from the datasets it was stored in."""
    features = values["features"].astype(np.float32)
    return features * values["scale"] if "scale" in values else features


class MapWriter:
    """Writes maps where a layout puts them: into the feature file, or into one file for each image, under its name.

    Args:
        store: the feature file, to be written to.
        layout: with which it was made.
    """

    def __init__(self, store: Store, layout: Layout):
        self.store, self.layout = store, layout
        self._names = [bytes(name).decode() for name in store.array("paths")] if layout.storage != "h5" else []
        self._files = single_file_names(self._names, layout.storage) if self._names else []

    def write(self, row: int, values: Mapping[str, Array]) -> None:
        """Store the datasets of one image's map, then mark the row as done.

        Raises:
            BrixelError: the disk refuses it.
        """
        if self._files:
            path = self.store.path.parent / self._files[row]
            make_folder(path.parent)
            if self.layout.storage == "npy":
                with replacing(path) as partial, open(partial, "wb") as file:
                    np.save(file, values["features"])
            else:
                tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()}
                description = json.dumps(self.store.description, sort_keys=True)
                save_tensors(path, tensors, {"format": FORMAT, "path": self._names[row], "description": description})
        else:
            for part, value in values.items():
                name, place = self.layout.dataset(part, row)
                self.store.put(name, place, value)
        self.store.mark(row, DONE)


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
        self.paths: list[str] = [bytes(name).decode() for name in store.array("paths")]
        self.status = store.status
        self.original_size, self.model_size, self.grid_size = (
            np.array(store.array(name)) for name in ("original_size", "model_size", "grid_size")
        )
        self._grid_row = np.array(store.array("grid_row"))
        self._numbers = {name: row for row, name in enumerate(self.paths)}
        storage = self.description["storage"]
        self._single = None if storage == "h5" else single_file_names(self.paths, storage)

    def __len__(self) -> int:
        return len(self.paths)

    def __contains__(self, key: object) -> bool:
        return key in self._numbers

    def __reduce__(self) -> tuple[type[FeatureFile], tuple[Path]]:
        return type(self), (self.path,)  # a worker of a DataLoader opens it anew: memory maps would be copied whole

    @property
    def rows(self) -> list[int]:
        """Rows that are done."""
        return [int(row) for row in np.flatnonzero(self.status == DONE)]

    @property
    def failures(self) -> dict[str, str]:
        """Images that failed, with their reasons."""
        reasons = self._store.array("reason")
        return {self.paths[row]: bytes(reasons[row]).decode() for row in np.flatnonzero(self.status == FAILED)}

    @property
    def single_files(self) -> list[Path]:
        """The file of each image, row for row, whether it is there yet or not; none where one file holds all maps."""
        return [self.path.parent / name for name in self._single or []]

    @property
    def pca(self) -> tuple[Array, Array] | None:
        """Components (D, K) and mean (D) of the stored scores; None where the maps are the model's own."""
        if "pca_components" not in self._store:
            return None
        return np.array(self._store.array("pca_components")), np.array(self._store.array("pca_mean"))

    def stored(self, key: int | str) -> dict[str, Array]:
        """An image's datasets as stored: `features` (D, h, w), and `scale` (1, h, w) where they are int8.

        Args:
            key: row, or name as in `paths`.

        Raises:
            KeyError, IndexError: there is no such image.
            BrixelError: its map is not there: missing or failed.
        """
        row = self._numbers[key] if isinstance(key, str) else range(len(self))[key]
        if self.status[row] != DONE:
            reason = self.failures.get(self.paths[row], "not computed yet; run the same brixel extract again")
            raise BrixelError(f"{self.path} has no features of {self.paths[row]}: {reason}.")
        if self._single is not None:
            return _read_single(self.path.parent / self._single[row])
        grid = "x".join(str(int(side)) for side in self.grid_size[row])
        names = {kind: kind if kind in self._store else f"{kind}/{grid}" for kind in ("features", "scale")}
        return {
            kind: np.array(self._store.array(name)[self._grid_row[row]])
            for kind, name in names.items()
            if name in self._store
        }

    def __getitem__(self, key: int | str) -> npt.NDArray[np.float32]:
        """An image's map (D, h, w), float32; arguments and errors as for `stored`."""
        return dequantise(self.stored(key))


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


def _read_single(path: Path) -> dict[str, Array]:
    try:
        if path.suffix == ".npy":
            return {"features": read_npy(path)}
        with safe_open(path, framework="np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # NumPy and safetensors raise several kinds on damaged files
        raise BrixelError(f"{path} cannot be read: {error}. Delete it and the index, and extract again.") from error
