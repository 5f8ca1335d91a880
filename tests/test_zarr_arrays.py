"""Feature maps and vectors as arrays of Zarr, read by the packages zarr and xarray and by our own reader."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import brixel_cli
from brixel_cli.app import app
from brixel_cli.data import zarr_arrays
from brixel_cli.data.columns import Column
from brixel_cli.data.feature_layout import MapWriter
from brixel_cli.data.row_store import Store
from brixel_cli.data.zarr_arrays import ZarrArrays
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.errors import BrixelError

zarr = pytest.importorskip("zarr", reason="needs pip install 'brixel[zarr]'")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr_arrays, "MOST_CHUNKS", 3)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="zarr")
        yield


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_shard_is_its_chunks_and_then_their_index(tmp_path: Path) -> None:
    arrays = ZarrArrays(tmp_path / "a.zarr", {"x": Column((2,), "int8")}, 4)
    arrays.put("x", [1, 3], [np.array([1, 2], np.int8), np.array([-1, 5], np.int8)])
    place = {at: value.to_bytes(8, "little") for at, value in enumerate([0, 2, 4, (1 << 64) - 1])}
    # Three chunks of two bytes; the second shard has one. Of each chunk its offset, then its length; absent ones are all ones.
    whole = bytes([0, 0, 1, 2, 0, 0]) + place[0] + place[1] + place[1] + place[1] + place[2] + place[1]
    last = bytes([255, 5]) + place[0] + place[1] + 4 * place[3]
    assert files(tmp_path / "a.zarr") == {"x/c/0/0": whole, "x/c/1/0": last}
    arrays.describe({}, {}, {})
    found = zarr.open_group(tmp_path / "a.zarr", mode="r")["x"]
    assert found[:].tolist() == [[0, 0], [1, 2], [0, 0], [-1, 5]]
    assert (found.chunks, found.shards) == ((1, 2), (3, 2))
    assert arrays.read("x", 3).tolist() == [-1, 5]
    with pytest.raises(ValueError, match="x has 4 rows, and no row 4"):
        arrays.put("x", [4], [np.zeros(2, np.int8)])
    with pytest.raises(ValueError, match=r"x: a row has shape \(2,\), not \(3,\)"):
        arrays.put("x", [0], [np.zeros(3, np.int8)])


@pytest.mark.parametrize(("dtype", "pca"), [("float16", None), ("int8", 3)])
def test_zarr_and_our_reader_give_the_rows_of_the_h5_file(
    extract_options, mixed: Path, listener, tmp_path: Path, dtype, pca
) -> None:
    (mixed / "05.png").write_bytes(b"no image")
    options = {"inputs": [str(mixed)], "fields": ("map", "cls", "pooled"), "layers": (2,), "dtype": dtype, "pca": pca}
    plain = brixel_cli.FeatureFile(extract(extract_options(output=tmp_path / "a.h5", **options), listener).output)
    done = extract(extract_options(output=tmp_path / "out", storage="zarr", **options), listener)
    assert done.pictures == [tmp_path / "out" / "features.zarr"]
    features = brixel_cli.FeatureFile(tmp_path / "out")
    assert (features.parts, features.rows, features.failures) == (plain.parts, plain.rows, plain.failures)
    group = zarr.open_group(tmp_path / "out" / "features.zarr", mode="r")
    assert json.loads(json.dumps(group.attrs["brixel"])) == features.description
    assert list(group["paths"][:]) == plain.paths
    assert group["status"][:].tolist() == [1] * 5 + [2] + [1] * 4
    for row in plain.rows:
        size = "x".join(map(str, group["grid_size"][row]))
        for part, expected in plain.stored(row).items():
            np.testing.assert_array_equal(features.stored(row)[part], expected)
            array, place = (
                (group[part], row) if part.startswith(("cls", "pooled")) else (None, int(group["grid_row"][row]))
            )
            if part in ("features", "scale"):
                array = group[f"{part}/{size}"]
            if array is not None:
                np.testing.assert_array_equal(array[place], expected)
    np.testing.assert_array_equal(np.asarray(group["pca_mean"]) if pca else 0, plain.pca[1] if pca else 0)
    xarray = pytest.importorskip("xarray", reason="needs pip install xarray")
    with xarray.open_zarr(tmp_path / "out" / "features.zarr", consolidated=False) as found:
        assert found["cls"].dims == ("image", "cls_values")
        np.testing.assert_array_equal(found["cls"].isel(image=4).values, features.stored(4)["cls"])
    with xarray.open_zarr(tmp_path / "out" / "features.zarr", group="features", consolidated=False) as found:
        assert found[size].dims == tuple(f"features_{size}_{axis}" for axis in ("rows", "channels", "y", "x"))


def test_a_stopped_run_is_continued_and_leaves_the_same_bytes(
    extract_options, listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = extract_options(output=tmp_path / "out", storage="zarr")
    extract(options, listener)
    expected = files(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    written, write = [], MapWriter.write

    def stop(self: MapWriter, rows: list[int], values: object) -> None:
        write(self, rows, values)  # type: ignore[arg-type]
        written.extend(rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MapWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(options, listener)
    group = zarr.open_group(tmp_path / "out" / "features.zarr", mode="r")
    assert group["status"][:].tolist() == [0] * 8  # those of the beginning, until a run ends
    assert group["features"][written[0]].any()
    assert extract(options, listener).num_computed == 8 - len(written)
    assert files(tmp_path / "out") == expected
    assert extract(options, listener).num_computed == 0


def test_damage_is_found_and_computed_again(extract_options, listener, tmp_path: Path) -> None:
    options = extract_options(output=tmp_path / "out", storage="zarr")
    extract(options, listener)
    expected = files(tmp_path / "out")
    shards = tmp_path / "out" / "features.zarr" / "features" / "c"
    first, second, third = (shards / str(number) / "0" / "0" / "0" for number in range(3))
    data = bytearray(first.read_bytes())
    data[5] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-1])
    found = CliRunner().invoke(app, ["extract", "--verify", str(tmp_path / "out"), "--json"])
    damaged = json.loads(found.stdout)["damaged"]
    assert damaged.pop("0.png") == "its map has changed since it was written"
    assert list(damaged) == ["3.png", "4.png", "5.png"]
    assert all("cannot be read: it is cut off" in reason for reason in damaged.values())
    status = zarr.open_group(tmp_path / "out" / "features.zarr", mode="r")["status"][:]
    assert status.tolist() == [0, 1, 1, 0, 0, 0, 1, 1]
    assert extract(options, listener).num_computed == 4
    third.unlink()
    with pytest.raises(BrixelError, match="cannot be read: it is missing, or no regular file"):
        brixel_cli.FeatureFile(tmp_path / "out")["6.png"]
    # A finished output is looked at quickly, but this is seen.
    assert extract(options, listener).num_computed == 2
    assert any("6.png: " in said and "is missing or cut off" in said for said in listener.warned)
    assert files(tmp_path / "out") == expected


def test_overwriting_leaves_nothing_of_before_and_follows_no_links(extract_options, listener, tmp_path: Path) -> None:
    output = tmp_path / "out"
    extract(extract_options(output=output, storage="zarr", layers=(2,)), listener)
    assert (output / "features.zarr" / "layer_2").is_dir()
    extract(extract_options(output=output, storage="zarr", overwrite=True), listener)
    assert not (output / "features.zarr" / "layer_2").exists()
    shutil.move(output / "features.zarr", tmp_path / "elsewhere")
    (output / "features.zarr").symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path / "elsewhere")
    with pytest.raises(BrixelError, match="features.zarr cannot be written: Cannot call rmtree on a symbolic link"):
        extract(extract_options(output=output, storage="zarr", overwrite=True), listener)
    with pytest.raises(BrixelError, match="zarr.json lies behind a link that leads out of"):
        extract(extract_options(output=output, storage="zarr"), listener)
    assert files(tmp_path / "elsewhere") == before


def test_a_full_disk_leaves_what_was_written(
    extract_options, listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = extract_options(output=tmp_path / "out", storage="zarr", batch_size=1)
    left = [3]

    def full(path: Path, values: np.ndarray, place: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        fill(path, values, place)

    fill = zarr_arrays._fill
    with monkeypatch.context() as patch:
        patch.setattr(zarr_arrays, "_fill", full)
        with pytest.raises(BrixelError, match="cannot be written: No space left on device"):
            extract(options, listener)
    done = int((Store(tmp_path / "out" / "index.h5").status == 1).sum())
    assert 0 < done < 3
    assert extract(options, listener).num_computed == 8 - done
