"""The feature file that `brixel extract` writes: what it has to be like, and two readers. See docs/FEATURES.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from brixel_cli.config.extract import SINGLE_FILES, Storage
from brixel_cli.core.files import inside, writing
from brixel_cli.core.formatting import human_size
from brixel_cli.core.sampling import Points, covered_part, read_at
from brixel_cli.data.feature_index import INDEX_NAME, REPAIR, check_description, check_index, check_names, read_single
from brixel_cli.data.feature_layout import (
    FORMAT,
    FORMAT_OF_PARTS,
    MAP,
    PLAIN,
    Grid,
    Layout,
    is_map,
    scale_of,
    single_file_names,
    zarr_arrays,
)
from brixel_cli.data.row_store import DONE, FAILED, MISSING, REASON, STATUS, Array, Store, reading
from brixel_cli.errors import BrixelError


def dequantise(values: Mapping[str, Array], part: str = MAP) -> npt.NDArray[np.float32]:
    """A map, or another part of an image, as float32 from the datasets it was stored in."""
    found, scale = values[part].astype(np.float32), scale_of(part)
    return found * values[scale] if scale in values else found


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
        if found not in (FORMAT, FORMAT_OF_PARTS):
            raise BrixelError(
                f"{self.path} is no feature file of format {FORMAT} or {FORMAT_OF_PARTS}: {found}. "
                "A newer version of brixel may read it."
            )
        self.description = store.description
        if store.damaged:
            raise BrixelError(
                f"{self.path}: the datasets {', '.join(store.damaged)} have changed since they were written. "
                "The same brixel extract again restores what follows from the images; otherwise delete the file."
            )
        with reading(self.path):
            check_description(self.description)
            check_index(store)
            self.paths: list[str] = [bytes(name).decode() for name in store.array("paths")]
            self.status = store.status
            self.original_size, self.model_size, self.grid_size = (
                np.array(store.array(name)) for name in ("original_size", "model_size", "grid_size")
            )
            self._grid_row = np.array(store.array("grid_row"))
            storage: Storage = self.description["storage"]
            described = found != FORMAT or storage == "zarr"
            self._layout = self._described_layout(storage) if described else None
            self._arrays = zarr_arrays(self.path, self._layout) if self._layout else None
            if storage in SINGLE_FILES:
                check_names(self.paths)
            elif self._layout is None:
                self._check_maps()
            else:
                self._check_parts(self._layout)
        self._numbers = {name: row for row, name in enumerate(self.paths)}
        self._single = single_file_names(self.paths, storage) if storage in SINGLE_FILES else None

    def _described_layout(self, storage: Storage) -> Layout:
        """The datasets of a file of `FORMAT_OF_PARTS`, or of arrays beside it."""
        described = PLAIN | self.description
        channels, student = described["pca"] or described["embed_dim"], described["source"] == "student"
        return Layout(
            tuple(
                (int(h), int(w)) if at >= 0 else None for (h, w), at in zip(self.grid_size, self._grid_row, strict=True)
            ),
            channels,
            described["dtype"],
            storage,
            tuple(described["fields"]),
            tuple(described["layers"]),
            described["embed_dim"],
            self._store.kind("registers")[0][1] if "registers" in self._store else described.get("num_registers", 0),
            described["factor"] if student else 1,
        )

    def _check_parts(self, layout: Layout) -> None:
        """Raise a ValueError where a dataset that the description names has another shape or type."""
        for name, column in layout.columns.items():
            num_rows = len(self) if column.num_rows is None else column.num_rows
            shape, dtype = self._store.kind(name)
            if shape != (num_rows, *column.shape) or dtype.name != column.dtype:
                raise ValueError(f"its dataset {name} has the shape {shape} of {dtype}")
        if (self._grid_row >= len(self)).any():
            raise ValueError("its grid_row names rows that are not there")

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

    @property
    def parts(self) -> list[str]:
        """What it holds of each image: `features`, which is the map, `cls`, `registers`, `pooled`, `layer_11`, ..."""
        if self._layout is None:
            return [MAP]
        return [part for part in self._layout.shapes((1, 1)) if not part.endswith("scale")]

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

    def clear(self) -> None:
        """Remove the file, and the single files and arrays beside it, nothing else.

        Raises:
            BrixelError: the disk refuses it, or a single file lies behind a link.
        """
        for file in self.single_files:
            with writing(file):
                file.unlink(missing_ok=True)
        if self._arrays is not None:
            self._arrays.clear()
        self.path.unlink()

    def describe_arrays(self) -> Path:
        """Write the index of a file with arrays beside it into their group, for readers of Zarr; returns the group.

        Raises:
            BrixelError: the disk refuses it.
        """
        assert self._arrays is not None
        named = ("original_size", "grid_size", "grid_row", STATUS, "pca_components", "pca_mean")
        index = {name: np.array(self._store.array(name)) for name in named if name in self._store}
        reasons = [bytes(reason).decode(errors="replace") for reason in self._store.array(REASON)]
        self._arrays.describe(index, {"paths": self.paths, REASON: reasons}, {"brixel": self.description})
        return self._arrays.folder

    @property
    def has_checksums(self) -> bool:
        """Whether damage of its maps can be noticed; older files have no checksums."""
        return self._store.has_checksums

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
            if (arrays := self._arrays) is None:
                return ""
            return next(filter(None, (arrays.damage(*self._place(part, row)) for part in self.parts)), "")
        try:
            values = self.stored(row, mapped=not thorough)
        except BrixelError as error:
            return str(error)
        if not thorough:
            return ""
        if not self._store.intact(row, (values[part] for part in sorted(values))):
            return "its map has changed since it was written"
        return "" if all(np.isfinite(value).all() for value in values.values()) else "its map is not finite"

    @property
    def pca(self) -> tuple[Array, Array] | None:
        """Components (D, K) and mean (D) of the stored scores; None where the maps are the model's own."""
        if "pca_components" not in self._store:
            return None
        return np.array(self._store.array("pca_components")), np.array(self._store.array("pca_mean"))

    def stored(self, key: int | str, mapped: bool = False, part: str | None = None) -> dict[str, Array]:
        """An image's datasets as stored: `features` (D, h, w), and `scale` (1, h, w) where they are int8; other parts.

        Args:
            key: row, or name as in `paths`.
            mapped: whether the values of a single .npy file are read only when they are used.
            part: which of `parts`, with its scale; None: all of them.

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
        wanted = self.parts if part is None else [part]
        if part is not None and part not in self.parts:
            raise BrixelError(
                f"{self.path} has no {part} of its images; it has {', '.join(self.parts)}. "
                "--fields and --layers of brixel extract choose what is stored."
            )
        if self._single is not None:
            found = read_single(self.path.parent / self._single[row], (height, width), mapped, self._layout)
            return {name: found[name] for each in wanted for name in (each, scale_of(each)) if name in found}
        place = int(self._grid_row[row])
        if place < 0:
            raise BrixelError(f"{self.path}: {self.paths[row]} is done, but has no map. {REPAIR}")
        places = {name: self._place(name, row) for each in wanted for name in (each, scale_of(each))}
        if self._arrays is not None:
            return {name: self._arrays.read(at, n) for name, (at, n) in places.items() if at in self._arrays}
        return {name: self._store.read(at, [n])[0] for name, (at, n) in places.items() if at in self._store}

    def _place(self, part: str, row: int) -> tuple[str, int]:
        """The dataset that holds a part of an image, and the image's row in it."""
        if self._layout is not None:
            name = self._layout.dataset(part, row)[0]
            return name, int(self._grid_row[row]) if is_map(part) else row
        height, width = self.grid_size[row].tolist()
        return self._dataset(part, (height, width)), int(self._grid_row[row])

    def get(self, key: int | str, part: str = MAP) -> npt.NDArray[np.float32]:
        """What is stored of an image, float32: one of `parts`, such as `cls` (D) or `layer_11` (D, h, w).

        Raises:
            KeyError, IndexError: there is no such image.
            BrixelError: it is missing or failed, or the file has no such part.
        """
        return dequantise(self.stored(key, part=part), part)

    def __getitem__(self, key: int | str) -> npt.NDArray[np.float32]:
        """An image's map (D, h, w), float32; arguments and errors as for `stored`."""
        return self.get(key)

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
        if MAP not in self.file.parts:
            raise BrixelError(
                f"{path} holds no feature maps, only {', '.join(self.file.parts)}: --fields was without map."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        row = self.rows[index]
        return torch.from_numpy(self.file[row]), self.file.paths[row]
