"""Tars and parquet files of photographs, as tests of inputs write them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """A tar of these files, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_parquet(path: Path, images: Sequence[Mapping[str, object] | None], **more: object) -> Path:
    """A parquet file with a column `image` of bytes and path, and labels, in row groups of three."""
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, object] = {"label": list(range(len(images))), "image": list(images), **more}
    parquet.write_table(pa.table(columns), path, row_group_size=3)
    return path
