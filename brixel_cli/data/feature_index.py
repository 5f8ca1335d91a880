"""What a feature file must be like to be read: its description, its index, and the single files beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from safetensors import safe_open

from brixel_cli.config.extract import Field, Number, Storage
from brixel_cli.core.files import check_regular, read_npy
from brixel_cli.data.checksums import ROW_SUMS
from brixel_cli.data.feature_layout import MAP, PLAIN, Grid, Layout
from brixel_cli.data.row_store import REASON, STATUS, Array, Store
from brixel_cli.errors import BrixelError

INDEX_NAME = "index.h5"
REPAIR = "The same brixel extract again computes what is damaged."
REASON_BYTES = 160
_INDEX = {
    "paths": ("S", ()),
    STATUS: ("u", ()),
    REASON: ("S", ()),
    "original_size": ("i", (2,)),
    "model_size": ("i", (2,)),
    "grid_size": ("i", (2,)),
    "grid_row": ("i", ()),
}
_LATER = {"file_size": ("i", ()), "modified": ("i", ()), "sha256": ("S", ()), **dict.fromkeys(ROW_SUMS, ("u", ()))}
"""Kind of number and shape of a row of the datasets that have a row for each image; older files lack the second."""
_COUNTS = dict.fromkeys(("res", "factor", "patch_size", "embed_dim", "pca", "num_registers"), 1 << 20) | {
    "threads": 1024
}
"""Counts of the description, with what none of them comes near."""


def read_single(path: Path, grid: Grid, mapped: bool, layout: Layout | None) -> dict[str, Array]:
    """What a single file holds, of whose values none is read yet where they are mapped."""
    try:
        check_regular(path)
        if path.suffix == ".npy":
            values = {MAP: read_npy(path, mapped)}
        else:
            with safe_open(path, framework="pt") as file:  # which maps them
                values = {key: file.get_tensor(key).numpy() for key in file.keys()}  # noqa: SIM118
        if layout is None and values[MAP].shape[1:] != grid:
            raise ValueError(f"its map has the shape {values[MAP].shape}")
        for name, column in layout.shapes(grid).items() if layout else ():
            if values[name].shape != column.shape:
                raise ValueError(f"its {name} has the shape {values[name].shape}")
        return values
    except Exception as error:  # NumPy and safetensors raise several kinds on damaged files
        raise BrixelError(f"{path} cannot be read: {error}. {REPAIR}") from error


def check_description(description: Mapping[str, Any]) -> None:
    """Raise a ValueError for values that no extraction writes."""
    known = {"storage": get_args(Storage), "dtype": (None, *get_args(Number))}
    for key, allowed in known.items():
        if description.get(key) not in allowed:
            raise ValueError(f"its {key} is {description.get(key)!r}")
    fields, layers = (description.get(key, default) for key, default in PLAIN.items())
    if not isinstance(fields, list) or not set(map(str, fields)) <= set(get_args(Field)):
        raise ValueError(f"its fields are {fields!r}")
    if not isinstance(layers, list) or not all(type(layer) is int and 0 <= layer < 1 << 20 for layer in layers):
        raise ValueError(f"its layers are {layers!r}")
    for key, most in _COUNTS.items():
        value = description.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f"its {key} is {value!r}")


def check_index(store: Store) -> None:
    """Raise a ValueError where a dataset with a row for each image is missing, or has another type or shape."""
    for name, (kind, shape) in (_INDEX | {name: of for name, of in _LATER.items() if name in store}).items():
        found, dtype = store.kind(name)
        if found != (len(store), *shape) or dtype.kind != kind:
            raise ValueError(f"its dataset {name} has the shape {found} of {dtype}")


def check_names(names: Sequence[str]) -> None:
    """Raise a ValueError where the name of an image would lead out of the folder of single files."""
    for name in names:
        path = PurePosixPath(name)
        if not path.name or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"the name {name!r} leads out of its folder")
