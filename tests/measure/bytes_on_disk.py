"""Count what a million images take on disk: python tests/measure/bytes_on_disk.py [--grid 32 --channels 384 --images 64]

Random feature maps and vectors are written by the code of the command, for each choice, and the bytes of all files are
counted. What a file takes besides its rows, with none of them, is taken off before the rest is scaled to a million.
Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from brixel_cli.core.formatting import human_bytes
from brixel_cli.core.losses import Basis
from brixel_cli.data.checksums import CHECKSUM
from brixel_cli.data.feature_file import FeatureFile
from brixel_cli.data.feature_index import INDEX_NAME, REASON_BYTES
from brixel_cli.data.feature_layout import Layout, MapWriter, encode_parts, text_array
from brixel_cli.data.row_store import REASON, Store, create_store
from brixel_cli.data.vector_table import TABLE_NAME, write_table

CHOICES = [
    ("h5", ("map",), "float32", None),
    ("h5", ("map",), "float16", None),
    ("h5", ("map",), "int8", None),
    ("h5", ("map",), "float16", 64),
    ("h5", ("map",), "int8", 64),
    ("npy", ("map",), "float16", None),
    ("safetensors", ("map",), "float16", None),
    ("safetensors", ("map",), "int8", None),
    ("zarr", ("map",), "float16", None),
    ("zarr", ("map",), "int8", None),
    ("zarr", ("map",), "float16", 64),
    ("h5", ("cls", "pooled"), "float16", None),
    ("h5", ("cls", "pooled"), "int8", None),
    ("zarr", ("cls", "pooled"), "float16", None),
    ("zarr", ("cls", "pooled"), "int8", None),
    ("parquet", ("cls", "pooled"), "float32", None),
    ("parquet", ("cls", "pooled"), "float16", None),
    ("parquet", ("cls", "pooled"), "int8", None),
    ("parquet", ("pooled",), "float16", 64),
]


def written(folder: Path, layout: Layout, channels: int, pca: int | None) -> int:
    """Bytes of all files with a row for each grid of the layout; the table alone where there is one."""
    count = len(layout.grids)
    path = folder / ("features.h5" if layout.storage == "h5" else INDEX_NAME)
    filled = {
        "paths": text_array([f"{row:09}.jpg" for row in range(count)]),
        REASON: text_array([""] * count, REASON_BYTES),
        CHECKSUM: np.zeros(count, np.uint64),
        "sha256": text_array(["0" * 64] * count),
        "grid_row": layout.grid_rows,
        "grid_size": np.array(layout.grids, np.int32).reshape(count, 2),
        **{name: np.ones((count, 2), np.int32) for name in ("original_size", "model_size")},
        **{name: np.zeros(count, np.int64) for name in ("file_size", "modified")},
    }
    description = {"storage": layout.storage, "dtype": layout.dtype, "pca": pca, "embed_dim": channels, "source": "student",
                   "factor": 4, **layout.described}  # fmt: skip
    create_store(path, count, layout.columns, description, filled, {"format": layout.format})
    store = Store(path, writable=True)
    writer, random = MapWriter(store, layout), torch.Generator().manual_seed(0)
    basis = None if pca is None else Basis(torch.eye(channels, pca), torch.zeros(channels))
    shapes = {"map": ("features", (channels, *layout.grids[0])) if count else None}  # type: ignore[misc]
    for row in range(count):
        tokens = {"cls": ("cls", (channels,)), "pooled": ("pooled", (channels,))} | shapes
        parts = {tokens[field][0]: torch.randn(1, *tokens[field][1], generator=random) for field in layout.fields}
        values, _ = encode_parts(parts, layout.dtype, basis)
        writer.write([row], {name: [value[0].contiguous().numpy()] for name, value in values.items()})
    if layout.storage == "parquet":
        write_table(FeatureFile(path))
        return (folder / TABLE_NAME).stat().st_size
    if layout.storage == "zarr":
        FeatureFile(path).describe_arrays()
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=int, default=32)
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--images", type=int, default=64)
    options = parser.parse_args()
    sys.stdout.write("| `--format` | stored | `--dtype` | a million images |\n|---|---|---|---:|\n")
    for storage, fields, dtype, pca in CHOICES:
        sizes = []
        for count in (options.images, 2 * options.images):
            grids = ((options.grid, options.grid),) * count
            layout = Layout(grids, pca or options.channels, dtype, storage, fields, (), options.channels)  # type: ignore[arg-type]
            with tempfile.TemporaryDirectory() as folder:
                sizes.append(written(Path(folder), layout, options.channels, pca))
        what = ", ".join(fields) + (f", `--pca {pca}`" if pca else "")
        size = human_bytes((sizes[1] - sizes[0]) * 1_000_000 / options.images)
        sys.stdout.write(f"| `{storage}` | {what} | `{dtype}` | {size} |\n")


if __name__ == "__main__":
    main()
