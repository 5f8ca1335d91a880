"""Vectors of a feature file as a table of Apache Parquet: a row for each image, a column for each kind of vector."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brixel_cli.core.files import replacing
from brixel_cli.data.feature_file import FeatureFile
from brixel_cli.data.feature_layout import scale_of
from brixel_cli.data.row_store import in_batches

TABLE_NAME = "vectors.parquet"
ROWS_AT_ONCE = 4096
"""Rows of a group of the table, which are held in memory together."""


def write_table(features: FeatureFile) -> Path:
    """Write the vectors of all images that are done into a table beside the feature file, which is replaced at once.

    Columns: `path`, `height` and `width` of the image, then each of the file's parts as a list of fixed length, in the
    number format that is stored; int8 with a column of scales, by which the values are to be multiplied. Registers are
    one list, token after token. The description of the file is metadata of the table, `brixel`.

    Args:
        features: with `cls`, `registers` or `pooled`.

    Raises:
        BrixelError: the table cannot be written, or the file is damaged.
    """
    import pyarrow
    from pyarrow import parquet

    path = features.path.with_name(TABLE_NAME)
    rows = features.rows
    packed = features.description["dtype"] == "int8"  # which Parquet has as 4 bytes; in a dictionary they are one
    metadata = {"brixel": json.dumps(features.description, sort_keys=True)}
    with replacing(path) as partial:
        writer: Any = None
        try:
            for some in in_batches(rows, ROWS_AT_ONCE) or [[]]:
                table = pyarrow.table(_columns(features, some, pyarrow)).replace_schema_metadata(metadata)
                if writer is None:
                    writer = parquet.ParquetWriter(partial, table.schema, compression="none", use_dictionary=packed)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()
    return path


def _columns(features: FeatureFile, rows: Sequence[int], pyarrow: Any) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "path": pyarrow.array([features.paths[row] for row in rows], pyarrow.string()),
        "height": pyarrow.array(features.original_size[list(rows), 0]),
        "width": pyarrow.array(features.original_size[list(rows), 1]),
    }
    stored = [features.stored(row) for row in rows]
    for part in features.parts:
        for name in (part, scale_of(part)):
            if stored and name not in stored[0]:
                continue
            values = np.stack([each[name] for each in stored]) if stored else np.zeros((0, 1), np.float16)
            flat = values.reshape(len(rows), -1)
            columns[name] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat.reshape(-1)), flat.shape[1])
    return columns
