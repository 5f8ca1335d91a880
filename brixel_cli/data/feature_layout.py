"""Where the feature map of each image goes, and how it is stored: as a row of a feature file, or as a single file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brixel_cli.config.extract import SINGLE_FILES, Field, Number, Storage
from brixel_cli.core.files import LONGEST_NAME, inside, make_folder, replacing
from brixel_cli.core.formatting import human_size
from brixel_cli.core.identity import text_digest
from brixel_cli.core.losses import Basis
from brixel_cli.core.weights import save_tensors
from brixel_cli.data.columns import Column
from brixel_cli.data.grouping import positions_within_size
from brixel_cli.data.row_store import Array, Store
from brixel_cli.data.zarr_arrays import GROUP_NAME, ZarrArrays

FORMAT, FORMAT_OF_PARTS = "brixel-features-1", "brixel-features-2"
"""The second has other datasets than the feature map, or besides it."""
MAP = "features"
"""Dataset of the feature map."""
PROJECTED = (MAP, "pooled")
"""Datasets of which principal components are stored, where they are asked for."""
PLAIN: dict[str, Any] = {"fields": ["map"], "layers": []}
"""What a description of `FORMAT` leaves out."""
Grid = tuple[int, int]


def dataset_of(field: Field) -> str:
    """The dataset of a field."""
    return MAP if field == "map" else field


def layer_name(layer: int) -> str:
    """The dataset of the map of a block of the transformer, 0-based."""
    return f"layer_{layer}"


def scale_of(part: str) -> str:
    """The dataset of the scale of an int8 dataset."""
    return "scale" if part == MAP else f"{part}_scale"


def is_map(part: str) -> bool:
    """Whether a dataset, or that whose scale it is, holds a map: a row for each image of its grid."""
    return part in (MAP, "scale") or part.startswith("layer_")


@dataclass(frozen=True)
class Layout:
    """Which row of which dataset each image has, before anything is computed.

    Args:
        grids: (height, width) of each image's map; None for images that will have none.
        channels: of every map.
        dtype: `float16`, `float32`, or `int8` with a float32 scale for each location.
        storage: `h5`, or the format of other files; single files leave the feature file without maps.
        fields: what is stored of the last block.
        layers: 0-based blocks whose maps are stored too.
        embed_dim: channels of tokens and of the maps of blocks; None: as many as `channels`.
        num_registers: register tokens of the backbone.
        factor: grid of the map over the grid of the blocks.
    """

    grids: tuple[Grid | None, ...]
    channels: int
    dtype: Number
    storage: Storage = "h5"
    fields: tuple[Field, ...] = ("map",)
    layers: tuple[int, ...] = ()
    embed_dim: int | None = None
    num_registers: int = 0
    factor: int = 1

    @property
    def format(self) -> str:
        """What the file calls its format."""
        return FORMAT if self.fields == ("map",) and not self.layers else FORMAT_OF_PARTS

    @property
    def described(self) -> dict[str, Any]:
        """What the description of a file of `FORMAT_OF_PARTS` says besides."""
        if self.format == FORMAT:
            return {}
        registers = {"num_registers": self.num_registers} if "registers" in self.fields else {}
        return {"fields": list(self.fields), "layers": list(self.layers), **registers}

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
        """The dataset that holds a part (such as `features`, `scale`) of an image, and the image's row in it."""
        grid = self.grids[row]
        if grid is None or not is_map(part):
            return part, row
        return self._named(part, grid), int(self.grid_rows[row])

    def _named(self, part: str, grid: Grid) -> str:
        """The dataset of a part of all images of a grid."""
        if len(self.rows_of_grid) == 1 or not is_map(part):
            return part
        return f"{part}/{human_size(self._of_blocks(grid) if part.startswith('layer_') else grid)}"

    def _of_blocks(self, grid: Grid) -> Grid:
        return grid[0] // self.factor, grid[1] // self.factor

    def shapes(self, grid: Grid) -> dict[str, Column]:
        """The datasets that one image's values consist of, without their place."""
        tokens = self.embed_dim or self.channels
        of_field: dict[Field, tuple[int, ...]] = {
            "map": (self.channels, *grid),
            "cls": (tokens,),
            "registers": (self.num_registers, tokens),
            "pooled": (self.channels,),
        }
        shapes = {dataset_of(field): of_field[field] for field in self.fields}
        shapes |= {layer_name(layer): (tokens, *self._of_blocks(grid)) for layer in self.layers}
        columns = {part: Column(shape, self.dtype) for part, shape in shapes.items()}
        if self.dtype == "int8":  # channels come first in maps, and last in tokens
            scales = {part: (1, *shape[1:]) if is_map(part) else (*shape[:-1], 1) for part, shape in shapes.items()}
            columns |= {scale_of(part): Column(shape, "float32") for part, shape in scales.items()}
        return columns

    @property
    def columns(self) -> dict[str, Column]:
        """Datasets of the feature file that are filled row by row."""
        return {} if self.storage in (*SINGLE_FILES, "zarr") else self.all_columns

    @property
    def all_columns(self) -> dict[str, Column]:
        """All datasets that are filled row by row, in the feature file or beside it."""
        columns: dict[str, Column] = {}
        rows_of_grid = self.rows_of_grid
        for grid, rows in rows_of_grid.items():
            for name, column in self.shapes(grid).items():
                if len(rows_of_grid) == 1 or not is_map(name):
                    usable = sorted(row for some in rows_of_grid.values() for row in some)
                    columns[name] = Column(column.shape, column.dtype, len(self.grids), usable)
                else:
                    columns[self._named(name, grid)] = Column(column.shape, column.dtype, len(rows))
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
    """Names of the single files: the image's with another extension, or with one more where two would share it.

    One that is too long for a file system is cut, and ends with the first digits of the SHA-256 of the image's name.
    """
    stems = [PurePosixPath(name).with_suffix("").as_posix() for name in names]
    folded = [stem.casefold() for stem in stems]
    shared = {stem for stem, count in Counter(folded).items() if count > 1}
    shared |= {name.casefold() for name in names}  # a.jpg.png must not become the a.jpg.npy of a.jpg
    return [
        _shortened(f"{name if low in shared else stem}.{storage}", name)
        for name, stem, low in zip(names, stems, folded, strict=True)
    ]


def _shortened(file: str, name: str) -> str:
    folder, slash, last = file.rpartition("/")
    if len(last.encode()) <= LONGEST_NAME:
        return file
    end = f"~{text_digest(name)[:16]}{PurePosixPath(last).suffix}"
    start = last.encode()[: LONGEST_NAME - len(end)].decode("utf-8", "ignore")
    return f"{folder}{slash}{start}{end}"


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


def encode_parts(
    parts: Mapping[str, Tensor], dtype: Number, basis: Basis | None, spare: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], list[bool]]:
    """Maps (B, D, h, w) and tokens (B, D) or (B, R, D) by dataset, each in the form of `encode`; arguments as there."""
    stored: dict[str, Tensor] = {}
    finite = np.ones(len(next(iter(parts.values()))), bool)
    for part, values in parts.items():
        as_map = values
        if not is_map(part):  # each token is a location
            as_map = values.reshape(len(values), -1, values.shape[-1]).transpose(1, 2)[..., None]
        again = {MAP: spare[MAP]} if spare and part == MAP else None
        encoded, fine = encode(as_map, dtype, basis if part in PROJECTED else None, again)
        for kind, tensor in encoded.items():
            name = part if kind == MAP else scale_of(part)
            whole = tensor if is_map(part) else tensor[..., 0].transpose(1, 2)
            stored[name] = whole if is_map(part) else whole.reshape(*values.shape[:-1], tensor.shape[1])
        finite &= np.array(fine)
    return stored, [bool(value) for value in finite]


def zarr_arrays(path: Path, layout: Layout) -> ZarrArrays | None:
    """The arrays beside a feature file; None where its rows are stored otherwise."""
    if layout.storage != "zarr":
        return None
    return ZarrArrays(path.with_name(GROUP_NAME), layout.all_columns, len(layout.grids))


class MapWriter:
    """Writes images where a layout puts them: into the feature file, or into one file for each image, under its name.

    Args:
        store: the feature file, to be written to.
        layout: with which it was made.
    """

    def __init__(self, store: Store, layout: Layout):
        self.store, self.layout = store, layout
        self._arrays = zarr_arrays(store.path, layout)
        self._names = [bytes(name).decode() for name in store.array("paths")] if layout.storage in SINGLE_FILES else []
        self._files = single_file_names(self._names, layout.storage) if self._names else []

    def write(self, rows: Sequence[int], values: Mapping[str, Sequence[Array]]) -> None:
        """Store images of one size, then mark their rows as done.

        Args:
            rows: of the feature file.
            values: by dataset of an image, such as `features`, its values for each of the rows.

        Raises:
            BrixelError: the disk refuses it.
        """
        parts = sorted(values)
        if self._files:
            for row, *of_row in zip(rows, *(values[part] for part in parts), strict=True):
                self._write_file(row, dict(zip(parts, of_row, strict=True)))
                self.store.settle([row], [of_row])
            return
        columns: dict[str, Sequence[Array]] = {}
        places: dict[str, Sequence[int]] = {}
        for part in parts:
            found = [self.layout.dataset(part, row) for row in rows]
            (name,) = {name for name, _ in found}
            columns[name], places[name] = values[part], [place for _, place in found]
        if self._arrays is None:
            self.store.write(rows, columns, places)
            return
        for name, of_rows in columns.items():
            self._arrays.put(name, places[name], of_rows)
        self.store.settle(rows, [[of_rows[at] for of_rows in columns.values()] for at in range(len(rows))])

    def flush(self) -> None:
        """Wait until what was written beside the feature file is on the disk; errors as `write`."""
        if self._arrays is not None:
            self._arrays.flush()

    def _write_file(self, row: int, values: Mapping[str, Array]) -> None:
        path = inside(self.store.path.parent, self._files[row])
        make_folder(path.parent)
        if self.layout.storage == "npy":
            with replacing(path) as partial, open(partial, "wb") as file:
                np.save(file, values["features"])
        else:
            tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()}
            description = json.dumps(self.store.description, sort_keys=True)
            metadata = {"format": self.layout.format, "path": self._names[row], "description": description}
            save_tensors(path, tensors, metadata)
