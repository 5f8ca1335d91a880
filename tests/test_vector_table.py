"""Vectors as a table of parquet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import brixel_cli
from brixel_cli.config.extract import ExtractOptions
from brixel_cli.core import extras
from brixel_cli.data import vector_table
from brixel_cli.data.row_store import Store
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.errors import BrixelError, UsageError

parquet = pytest.importorskip("pyarrow.parquet", reason="needs pip install 'brixel[parquet]'")
VECTORS = {"storage": "parquet", "fields": ("cls", "pooled")}


@pytest.mark.parametrize("at_once", [3, 4096])
def test_the_table_holds_what_the_feature_file_holds(
    extract_options, mixed: Path, listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(vector_table, "ROWS_AT_ONCE", at_once)
    (mixed / "05.png").write_bytes(b"no image")
    done = extract(extract_options(inputs=[str(mixed)], output=tmp_path / "out", **VECTORS), listener)
    assert [path.name for path in done.pictures] == ["vectors.parquet"]
    file = parquet.ParquetFile(tmp_path / "out" / "vectors.parquet")
    table, features = file.read(), brixel_cli.FeatureFile(tmp_path / "out")
    assert table.column("path").to_pylist() == [f"{n:02}.png" for n in range(10) if n != 5]
    assert table.column("height").to_pylist()[:3] == [96, 96, 160]
    assert str(table.schema.field("cls").type) == "fixed_size_list<element: halffloat>[64]"
    for part in ("cls", "pooled"):
        stored = np.stack([features.get(row, part) for row in features.rows])
        np.testing.assert_array_equal(np.array(table.column(part).to_pylist(), np.float32), stored)
    assert json.loads(table.schema.metadata[b"brixel"])["fields"] == ["cls", "pooled"]
    assert file.num_row_groups == (3 if at_once == 3 else 1)


def test_int8_has_its_scale_beside_it(extract_options, listener, tmp_path: Path) -> None:
    extract(extract_options(output=tmp_path / "out", dtype="int8", **VECTORS), listener)
    table, features = parquet.read_table(tmp_path / "out" / "vectors.parquet"), brixel_cli.FeatureFile(tmp_path / "out")
    values, scale = (np.array(table.column(name).to_pylist()) for name in ("cls", "cls_scale"))
    np.testing.assert_allclose(values[4] * scale[4], features.get(4, "cls"), rtol=1e-6)
    assert str(table.schema.field("cls").type) == "fixed_size_list<element: int8>[64]"


def test_a_stopped_run_goes_on_and_writes_the_table_again(extract_options, listener, tmp_path: Path) -> None:
    options = extract_options(output=tmp_path / "out", pca=3, **VECTORS)
    table = extract(options, listener).output / "vectors.parquet"
    before = table.read_bytes()
    store = Store(tmp_path / "out" / "index.h5", writable=["status"])
    store.mark(2, 0)
    store.flush()
    table.unlink()
    assert extract(options, listener).num_computed == 1
    assert table.read_bytes() == before
    assert parquet.read_table(table).schema.field("pooled").type.list_size == 3


def test_duckdb_reads_the_table(extract_options, listener, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb", reason="needs pip install duckdb")
    extract(extract_options(output=tmp_path / "out", dtype="float32", **VECTORS), listener)
    query = f"select path, pooled from '{tmp_path / 'out' / 'vectors.parquet'}' order by path limit 1"
    ((name, vector),) = duckdb.sql(query).fetchall()
    expected = brixel_cli.FeatureFile(tmp_path / "out").get(name, "pooled")
    np.testing.assert_array_equal(np.array(vector, np.float32), expected)


def test_what_is_no_vector_is_refused() -> None:
    for changes in ({}, {"fields": ("cls",), "layers": (2,)}):
        with pytest.raises(UsageError, match="--format parquet is for vectors: name them, as in --fields cls,pooled"):
            ExtractOptions(["photos"], storage="parquet", **changes)


def test_a_missing_package_is_named(extract_options, listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"--format parquet needs pyarrow, not installed: pip install 'brixel\[parquet\]'"
    ):
        extract(extract_options(**VECTORS), listener)


def test_a_table_that_cannot_be_written_leaves_the_vectors(
    extract_options, listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet.ParquetWriter, "write_table", full)
    options = extract_options(output=tmp_path / "out", **VECTORS)
    with pytest.raises(BrixelError, match=r"vectors.parquet cannot be written: No space left on device"):
        extract(options, listener)
    assert len(brixel_cli.FeatureFile(tmp_path / "out").rows) == 8
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.h5"]
