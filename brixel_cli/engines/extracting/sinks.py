"""Where computed maps go: into the feature file, or into a file for each image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from brixel_cli.core.files import replacing
from brixel_cli.core.weights import save_tensors
from brixel_cli.data.feature_file import FORMAT, single_file_names
from brixel_cli.data.row_store import Array, Store
from brixel_cli.engines.extracting.plan import ExtractPlan


class Sink(Protocol):
    """Takes the datasets of one image."""

    def write(self, row: int, values: Mapping[str, Array]) -> None:
        """Store one image's datasets; when this returns, the row may be marked as done."""


class StoreSink:
    """Writes into the feature file itself."""

    def __init__(self, plan: ExtractPlan, store: Store):
        self.store = store
        self.places = plan.layout.grid_rows
        mixed = len(plan.layout.rows_of_grid) > 1
        self.suffixes = [f"/{grid[0]}x{grid[1]}" if mixed and grid else "" for grid in plan.layout.grids]

    def write(self, row: int, values: Mapping[str, Array]) -> None:
        """Store one image's datasets."""
        for name, value in values.items():
            self.store.put(name + self.suffixes[row], int(self.places[row]), value)


class SingleFileSink:
    """Writes one .npy or .safetensors file for each image, under the image's own path; each appears when complete."""

    def __init__(self, plan: ExtractPlan, store: Store):
        self.folder = plan.output
        self.storage = plan.options.storage
        self.names = [item.name for item in plan.inputs.items]
        self.files = single_file_names(self.names, self.storage)
        self.description = json.dumps(store.description, sort_keys=True)

    def write(self, row: int, values: Mapping[str, Array]) -> None:
        """Store one image's datasets."""
        path: Path = self.folder / self.files[row]
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.storage == "npy":
            with replacing(path) as partial, open(partial, "wb") as file:
                np.save(file, values["features"])
        else:
            tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()}
            metadata = {"format": FORMAT, "path": self.names[row], "description": self.description}
            save_tensors(path, tensors, metadata)


def make_sink(plan: ExtractPlan, store: Store) -> Sink:
    """The sink for the format asked for."""
    return StoreSink(plan, store) if plan.options.storage == "h5" else SingleFileSink(plan, store)
