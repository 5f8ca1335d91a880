"""Feature files that were damaged after they were written: what finds it, and what computes those rows again."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import Listener, every_row
from printed_json import checked
from test_feature_damage import flip, packed
from typer.testing import CliRunner

import brixel_cli
from brixel_cli.app import app
from brixel_cli.core.identity import earlier_checksum
from brixel_cli.data.checksums import CHECKSUM, CHECKSUMS
from brixel_cli.data.row_store import Store
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.engines.models import FeatureExtractor


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_flipped_bit_is_found_and_that_row_alone_computed_again(
    extract_options, listener: Listener, monkeypatch: pytest.MonkeyPatch, dtype: str
):
    done = extract(extract_options(dtype=dtype, batch_size=1), listener)
    expected = every_row(done.output)
    whole = done.output.read_bytes()
    assert CliRunner().invoke(app, ["extract", "--verify", str(done.output)]).exit_code == 0
    with h5py.File(done.output) as file:
        sizes = {name: file[name][0].nbytes for name in ("features", "scale") if name in file}
    part = "scale" if "scale" in sizes else "features"
    flip(done.output, "features", 2 * sizes["features"] + 77)
    flip(done.output, part, 5 * sizes[part])
    found = CliRunner().invoke(app, ["extract", "--verify", str(done.output), "--json"])
    assert found.exit_code == 1
    damaged = dict.fromkeys(("2.png", "5.png"), "its map has changed since it was written")
    assert checked("extract-verify", found.stdout)["damaged"] == damaged
    assert f"2 of 8 images in {done.output} are damaged. Give the command that wrote it again" in found.stderr
    seen = []
    maps = FeatureExtractor.maps
    monkeypatch.setattr(FeatureExtractor, "maps", lambda self, pixels: seen.append(len(pixels)) or maps(self, pixels))
    again = extract(extract_options(dtype=dtype), listener)
    assert (again.num_computed, seen) == (2, [1, 1])
    assert every_row(done.output) == expected
    assert done.output.read_bytes() == whole


def test_an_interrupted_output_is_read_again_and_a_finished_one_is_not(
    extract_options, listener: Listener, monkeypatch: pytest.MonkeyPatch
):
    done = extract(extract_options(), listener)
    whole = done.output.read_bytes()
    flip(done.output, "features", 77)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "read", lambda *_: pytest.fail("a map was read"))
        assert extract(extract_options(), listener).num_computed == 0
    Store(done.output, writable=True).mark(5, 0)
    assert extract(extract_options(), listener).num_computed == 2
    assert any("1 damaged images are computed again; 0.png: its map has changed" in said for said in listener.warned)
    assert done.output.read_bytes() == whole


def test_single_files_of_a_finished_output_are_looked_at_as_far_as_their_headers(
    extract_options, tmp_path: Path, listener: Listener
):
    for storage in ("npy", "safetensors"):
        chosen = extract_options(output=tmp_path / storage, storage=storage)
        extract(chosen, listener)
        expected = {path.name: path.read_bytes() for path in chosen.output.iterdir()}
        one, two, three = (chosen.output / f"{number}.{storage}" for number in (1, 2, 3))
        one.unlink()
        os.mkfifo(one)
        two.write_bytes(expected[two.name][:-1])
        three.write_bytes(expected[three.name][:-1] + b"\x11")
        assert "no regular file" in brixel_cli.FeatureFile(chosen.output).damage(1)
        assert extract(chosen, listener).num_computed == 2
        assert {path.name for path in chosen.output.iterdir() if path.read_bytes() != expected[path.name]} == {
            three.name
        }


def test_damage_that_cannot_be_marked_is_warned_of(extract_options, tmp_path: Path, listener: Listener):
    done = extract(extract_options(), listener)
    flip(done.output, "features", 77)
    packed(done.output, tmp_path / "packed.h5")
    found = CliRunner().invoke(app, ["extract", "--verify", str(tmp_path / "packed.h5")])
    assert found.exit_code == 1
    assert "stay marked as done, and will not be computed again: " in " ".join(found.stderr.split())


@pytest.mark.parametrize("storage", ["npy", "safetensors"])
def test_single_files_that_are_gone_cut_or_changed_are_made_again(
    extract_options, tmp_path: Path, listener: Listener, storage
):
    output = tmp_path / "maps"
    extract(extract_options(output=output, storage=storage), listener)
    expected = {path.name: path.read_bytes() for path in output.iterdir()}
    (output / f"1.{storage}").unlink()
    (output / f"2.{storage}").write_bytes(expected[f"2.{storage}"][:-9])
    (output / f"3.{storage}").write_bytes(expected[f"3.{storage}"][:-1] + b"\x11")
    (output / f"4.{storage}").write_bytes(b"")
    shutil.copy(output / f"6.{storage}", output / f"5.{storage}")
    found = CliRunner().invoke(app, ["extract", "--verify", str(output), "--json"])
    assert found.exit_code == 1
    assert set(checked("extract-verify", found.stdout)["damaged"]) == {f"{number}.png" for number in range(1, 6)}
    assert extract(extract_options(output=output, storage=storage), listener).num_computed == 5
    assert {path.name: path.read_bytes() for path in output.iterdir()} == expected
    assert CliRunner().invoke(app, ["extract", "--verify", str(output)]).exit_code == 0


def as_earlier(path: Path) -> None:
    """Give a file the checksums of versions before XXH3."""
    features, store = brixel_cli.FeatureFile(path), Store(path)
    maps = {row: features.stored(row) for row in features.rows}
    sums = [earlier_checksum(*(maps[row][part] for part in sorted(maps[row]))) for row in range(len(features))]
    fixed = {name: earlier_checksum(store.array(name)) for name in store.fixed}
    fixed["description"] = zlib.crc32(store.attributes["description"].encode())
    with h5py.File(path, "r+") as file:
        del file[CHECKSUM], file.attrs[CHECKSUMS]
        file["checksum"], file.attrs["checksums"] = np.array(sums, np.uint32), json.dumps(fixed)


@pytest.mark.parametrize("storage", ["h5", "npy"])
def test_a_file_of_an_earlier_version_is_checked_and_continued_with_its_checksums(
    extract_options, tmp_path: Path, listener: Listener, storage: str
):
    chosen = extract_options(
        output=tmp_path / ("maps.h5" if storage == "h5" else "maps"), storage=storage, batch_size=1
    )
    index = extract(chosen, listener).output
    index = index / "index.h5" if index.is_dir() else index
    as_earlier(index)
    before = index.read_bytes()
    assert CliRunner().invoke(app, ["extract", "--verify", str(chosen.output)]).exit_code == 0
    if storage == "h5":
        flip(index, "features", 77)
        found = CliRunner().invoke(app, ["extract", "--verify", str(index), "--json"])
        assert checked("extract-verify", found.stdout)["damaged"] == {
            "0.png": "its map has changed since it was written"
        }
    Store(index, writable=True).mark(5, 0)
    with h5py.File(index, "r+") as file:
        file["model_size"][1] = 7
        file["checksum"][5] = 0
    assert extract(chosen, listener).num_computed == (2 if storage == "h5" else 1)
    assert any("the damaged datasets model_size were restored" in said for said in listener.warned)
    assert index.read_bytes() == before
    with h5py.File(index, "r+") as file:
        file.attrs["checksums"] = "[]"
    assert "its checksums are no JSON object" in CliRunner().invoke(app, ["extract", "--verify", str(index)]).stderr


def test_a_file_without_checksums_is_checked_as_far_as_can_be(extract_options, tmp_path: Path, listener: Listener):
    done = extract(extract_options(), listener)
    expected = every_row(done.output)
    with h5py.File(done.output, "r+") as file:
        del file[CHECKSUM], file.attrs[CHECKSUMS]
        file["features"][4, 0, 0, 0] = np.nan
    found = CliRunner().invoke(app, ["extract", "--verify", str(done.output), "--json"])
    assert checked("extract-verify", found.stdout)["damaged"] == {"4.png": "its map is not finite"}
    shown = CliRunner().invoke(app, ["extract", "--verify", str(done.output)])
    assert "Without checksums" in shown.stdout
    assert extract(extract_options(), listener).num_computed == 1
    assert every_row(done.output) == expected


@pytest.mark.parametrize(
    "arguments",
    [["--input", "x"], ["--dry-run"], ["--export", "x.onnx"], ["--shard", "1/2"]],
    ids=lambda value: value[0],
)
def test_verify_stands_alone(tmp_path: Path, arguments: list[str]):
    found = CliRunner().invoke(app, ["extract", "--verify", str(tmp_path / "f.h5"), *arguments])
    assert found.exit_code == 2
    assert "--verify reads a feature file: leave out --input, --shard, --export and --dry-run" in found.stderr
    missing = CliRunner().invoke(app, ["extract", "--verify", str(tmp_path / "f.h5")])
    assert (missing.exit_code, "No feature file at" in missing.stderr) == (1, True)
