"""Feature files that come from anywhere: crafted, compressed, damaged, cut. None does harm; each says what is wrong."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import Listener, every_row
from test_feature_file import SHAPE, make_file
from typer.testing import CliRunner

import brixel_cli
from brixel_cli.app import app
from brixel_cli.core.identity import checksum, earlier_checksum
from brixel_cli.data.checksums import CHECKSUM, CHECKSUMS
from brixel_cli.data.feature_layout import Layout, MapWriter
from brixel_cli.data.row_store import Store
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.errors import BrixelError, UsageError


def rewrite(path: Path, **changed) -> None:
    """Put other values into datasets or attributes of a file, without its checksums, as a forger would."""
    with h5py.File(path, "r+") as file:
        file.attrs.pop(CHECKSUMS, None)
        for name, value in changed.items():
            if name in file:
                del file[name]
                file[name] = value
            else:
                file.attrs[name] = value


def described(path: Path, **changed) -> None:
    """Change keys of a file's description."""
    with h5py.File(path) as file:
        description = json.loads(file.attrs["description"])
    rewrite(path, description=json.dumps(description | changed))


def flip(path: Path, name: str, byte: int = 0) -> None:
    """Flip a bit of a dataset, as a failing disk does."""
    with h5py.File(path) as file:
        at = file[name].id.get_offset() + byte
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def packed(path: Path, target: Path) -> None:
    """Copy a file as `h5repack -f GZIP=4` does."""
    with h5py.File(path) as old, h5py.File(target, "w") as new:
        new.attrs.update(old.attrs)
        for name in list(old):
            new.create_dataset(name, data=old[name][()], dtype=old[name].dtype, chunks=True, compression="gzip")


@pytest.mark.parametrize("name", ["../victim", "/ABSOLUTE/victim", "a/../../victim", "..", "", "a\0b.png"])
def test_names_that_lead_out_of_the_folder_are_refused(extract_options, tmp_path: Path, listener: Listener, name: str):
    victim = tmp_path / "victim.npy"
    np.save(victim, np.zeros((64, 16, 16), np.float16))
    output = tmp_path / "maps"
    extract(extract_options(output=output, storage="npy"), listener)
    names = np.array([name.replace("/ABSOLUTE", str(tmp_path)).encode(), *[b"a long enough name.png" * 9] * 7])
    rewrite(output / "index.h5", paths=names)
    with pytest.raises(BrixelError, match="leads out of its folder"):
        brixel_cli.FeatureFile(output)
    with pytest.raises(UsageError, match=r"leads out of its folder(.|\n)*--overwrite replaces feature files only"):
        extract(extract_options(output=output, storage="npy", overwrite=True), listener)
    assert victim.exists()


def test_a_storage_that_is_none_is_refused(extract_options, tmp_path: Path, listener: Listener):
    output = tmp_path / "maps"
    extract(extract_options(output=output, storage="npy"), listener)
    described(output / "index.h5", storage="py")
    (output / "0.py").write_text("precious")
    with pytest.raises(BrixelError, match="its storage is 'py'"):
        brixel_cli.FeatureFile(output)
    with pytest.raises(UsageError, match="its storage is 'py'"):
        extract(extract_options(output=output, storage="npy", overwrite=True), listener)
    assert (output / "0.py").exists()


def test_overwrite_removes_nothing_behind_a_link(extract_options, photographs: Path, tmp_path: Path, listener):
    shutil.copytree(photographs, tmp_path / "in" / "sub")
    chosen = extract_options(inputs=[str(tmp_path / "in")], output=tmp_path / "maps", storage="npy", overwrite=True)
    extract(chosen, listener)
    shutil.move(tmp_path / "maps" / "sub", tmp_path / "elsewhere")
    (tmp_path / "maps" / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BrixelError, match="lies behind a link that leads out of"):
        extract(chosen, listener)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 8


def test_a_compressed_file_is_read_and_never_written(extract_options, tmp_path: Path, listener: Listener):
    done = extract(extract_options(), listener)
    expected = every_row(done.output)
    rewrite(done.output, status=np.array([1, 0] + [1] * 6, np.uint8))
    packed(done.output, tmp_path / "packed.h5")
    features = brixel_cli.FeatureFile(tmp_path / "packed.h5")
    found = every_row(tmp_path / "packed.h5")
    assert found == {name: row for name, row in expected.items() if name != "1.png"}
    assert len(features) == 8
    before = (tmp_path / "packed.h5").read_bytes()
    with pytest.raises(BrixelError, match=r"not written to, as it is compressed, .* \(features, reason, status\)"):
        extract(extract_options(output=tmp_path / "packed.h5"), listener)
    assert (tmp_path / "packed.h5").read_bytes() == before


def test_datasets_kept_in_other_files(tmp_path: Path):
    store = make_file(tmp_path / "f.h5", Layout(((2, 3),) * 2, 4, "float16"))
    store.mark(0, 1)
    values = np.arange(48, dtype=np.float16).reshape(2, *SHAPE)
    outside = tmp_path / "deep" / "f.h5"
    outside.parent.mkdir()
    for path, raw in ((tmp_path / "f.h5", tmp_path / "raw"), (outside, tmp_path / "raw")):
        if path == outside:
            shutil.copy(tmp_path / "f.h5", path)
        values.tofile(raw)
        with h5py.File(path, "r+") as file:
            del file["features"]
            file.create_dataset("features", values.shape, "float16", external=[(str(raw), 0, values.nbytes)])
    assert np.array_equal(brixel_cli.FeatureFile(tmp_path / "f.h5")[0], values[0])
    with pytest.raises(BrixelError, match="not written to"):
        Store(tmp_path / "f.h5", writable=True)
    with pytest.raises(BrixelError, match="its dataset features lies in other files"):
        brixel_cli.FeatureFile(outside)


def test_text_of_variable_length_is_no_pointer(tmp_path: Path):
    path = tmp_path / "f.h5"
    make_file(path, Layout(((2, 3),) * 2, 4, "float16")).mark(0, 1)
    with h5py.File(path, "r+") as file:
        file["notes"] = ["one", "two"]  # somebody's own
    assert len(brixel_cli.FeatureFile(path)) == 2
    for name in ("reason", "paths"):
        shutil.copy(path, tmp_path / "g.h5")
        rewrite(tmp_path / "g.h5", **{name: ["one", "two"]})
        with pytest.raises(BrixelError, match=f"its dataset {name} has the shape .* of object"):
            brixel_cli.FeatureFile(tmp_path / "g.h5")


def test_datasets_lie_inside_the_file_and_fit_the_rows(tmp_path: Path):
    path = tmp_path / "f.h5"
    make_file(path, Layout(((2, 3),) * 3, 4, "float16")).mark(0, 1)
    whole = path.read_bytes()
    with h5py.File(path) as file:
        at = file["features"].id.get_offset()
    offset = at.to_bytes(8, "little")
    assert whole.count(offset) == 1
    path.write_bytes(whole.replace(offset, (len(whole) - 8).to_bytes(8, "little")))
    with pytest.raises(BrixelError, match="is damaged: "):
        brixel_cli.FeatureFile(path)
    path.write_bytes(whole)
    for name, values in {
        "status": np.zeros(3, np.float32),
        "grid_row": np.array([0, 1, 3]),
        "grid_size": np.full((3, 2), 2, np.int32),
        "original_size": np.zeros((2, 2), np.int32),
        "features": np.zeros((3, 5), np.float16),
        "model_size": np.zeros((3, 2), np.float32),
    }.items():
        path.write_bytes(whole)
        rewrite(path, **{name: values})
        with pytest.raises(BrixelError, match=r"status of its rows|its dataset \w+ has"):
            brixel_cli.FeatureFile(path)


def test_many_grids_take_one_descriptor(tmp_path: Path):
    grids = tuple((height, width) for height in range(1, 16) for width in range(1, 16))
    store = make_file(tmp_path / "f.h5", Layout(grids, 2, "int8"))
    writer = MapWriter(store, Layout(grids, 2, "int8"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, limits[1]))
    try:
        for row, grid in enumerate(grids):
            writer.write(
                [row], {"features": [np.ones((2, *grid), np.int8)], "scale": [np.ones((1, *grid), np.float32)]}
            )
        features = brixel_cli.FeatureFile(tmp_path / "f.h5")
        assert [features[row].shape for row in features.rows] == [(2, *grid) for grid in grids]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_an_earlier_checksum_by_hand():
    import zlib

    words = np.arange(2 * 1021 + 3, dtype="<u8")
    folded = words[:1021] + words[1021 : 2 * 1021]
    assert earlier_checksum(words) == zlib.crc32(words[2 * 1021 :].tobytes(), zlib.crc32(folded.tobytes()))
    page = np.random.default_rng(0).integers(0, 255, 64 * 4096, np.uint8)
    assert earlier_checksum(page[:9]) == zlib.crc32(page[:9].tobytes(), zlib.crc32(bytes(8 * 1021)))


def test_a_checksum_is_xxh3_over_all_bytes():
    # The first is XXH3's of no bytes, as its authors give it.
    assert checksum() == checksum(np.zeros(0)) == 0x2D06800538D394C2
    page = np.random.default_rng(0).integers(0, 255, (64, 4096), np.uint8)
    assert checksum(page) == checksum(page.reshape(-1)) == checksum(page[:40], page[40:].view(np.float16))
    assert checksum(page.T) == checksum(page.T.copy())
    swapped = page[[1, 0, *range(2, 64)]]
    flipped = page.copy()
    flipped[63, 4095] ^= 1
    assert len({checksum(page), checksum(swapped), checksum(flipped), checksum(page[:63])}) == 4


def test_rows_are_written_with_the_checksums_of_their_stored_values(tmp_path: Path):
    grids = ((1, 2), (2, 1), (1, 2), (1, 2))
    store = make_file(tmp_path / "f.h5", Layout(grids, 2, "float16"), {CHECKSUM: np.zeros(4, np.uint64)})
    maps = [np.full((2, 1, 2), 1 / 3 + row, np.float64) for row in (0, 3, 2)]
    MapWriter(store, Layout(grids, 2, "float16")).write([0, 3, 2], {"features": maps})
    features = brixel_cli.FeatureFile(tmp_path / "f.h5")
    assert features.status.tolist() == [1, 0, 1, 1]
    for row, expected in zip((0, 3, 2), maps, strict=True):
        assert np.array_equal(features.stored(row)["features"], expected.astype(np.float16))
        assert features.damage(row) == ""
        assert store.array(CHECKSUM)[row] == checksum(expected.astype(np.float16))


def test_a_status_that_is_none_is_an_error_that_names_the_row(extract_options, listener: Listener):
    done = extract(extract_options(), listener)
    expected = every_row(done.output)
    for state, reason in ((7, r"its status is 7, not 0, 1 or 2"), (2, "it failed for no reason")):
        with h5py.File(done.output, "r+") as file:
            file["status"][3] = state
        if state == 7:
            for read in (lambda features: features.rows, lambda features: features["3.png"]):
                with pytest.raises(BrixelError, match=rf"3.png.*: {reason}"):
                    read(brixel_cli.FeatureFile(done.output))
        found = CliRunner().invoke(app, ["extract", "--verify", str(done.output), "--json"])
        assert json.loads(found.stdout)["damaged"] == {"3.png": reason}
        assert extract(extract_options(), listener).num_computed == 1
        assert every_row(done.output) == expected


def test_an_image_that_cannot_be_used_is_failed_again(extract_options, mixed: Path, listener: Listener):
    (mixed / "bad.png").write_text("text")
    done = extract(extract_options(inputs=[str(mixed)]), listener)
    failures = brixel_cli.FeatureFile(done.output).failures
    for state in (0, 1, 9):
        with h5py.File(done.output, "r+") as file:
            file["status"][10] = state
        found = CliRunner().invoke(app, ["extract", "--verify", str(done.output), "--json"])
        assert list(json.loads(found.stdout)["damaged"]) == ["bad.png"]
        assert extract(extract_options(inputs=[str(mixed)]), listener).failures == failures


def test_the_index_is_restored_from_the_images(extract_options, listener: Listener):
    done = extract(extract_options(), listener)
    whole = done.output.read_bytes()
    for name in ("paths", "grid_size", "sha256", "original_size"):
        flip(done.output, name, 2)
        with pytest.raises(BrixelError, match=f"the datasets {name} have changed since they were written"):
            brixel_cli.FeatureFile(done.output)
        assert CliRunner().invoke(app, ["extract", "--verify", str(done.output)]).exit_code == 1
        assert extract(extract_options(), listener).num_computed == 0
        assert done.output.read_bytes() == whole
    data = bytearray(whole)
    data[whole.index(b'"embed_dim": 64') + 14] ^= 1
    done.output.write_bytes(data)
    with pytest.raises(BrixelError, match="its description has changed since it was written"):
        brixel_cli.FeatureFile(done.output)


@pytest.mark.parametrize("change", ["deleted", "a group", "another type", "a link"])
def test_an_index_that_cannot_be_restored_is_an_error(extract_options, listener: Listener, change: str):
    done = extract(extract_options(), listener)
    with h5py.File(done.output, "r+") as file:
        del file["original_size"]
        if change == "a group":
            file.create_group("original_size")
        elif change == "another type":
            file["original_size"] = np.zeros((8, 3), np.int64)
        elif change == "a link":
            file["original_size"] = h5py.ExternalLink("other.h5", "x")
    whole = done.output.read_bytes()
    with pytest.raises(BrixelError, match="the datasets original_size have changed since they were written"):
        extract(extract_options(), listener)
    assert done.output.read_bytes() == whole


ODD = [
    ("description", 7), ("description", "[]"), ("description", "{"), ("description", np.zeros(3)),
    ("description", "[" * 100_000), ("description", h5py.Empty("S1")), ("description", "null"),
    ("format", 1), ("format", np.array([b"x", b"y"])), ("format", "brixel-features-9"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), ODD, ids=[f"{key}-{number}" for number, (key, _) in enumerate(ODD)])
def test_odd_attributes_are_errors(extract_options, listener: Listener, key: str, value: object):
    done = extract(extract_options(), listener)
    rewrite(done.output, **{key: value})
    with pytest.raises(BrixelError, match=r"out.h5 is no.* feature file"):
        brixel_cli.FeatureFile(done.output)
    with pytest.raises(BrixelError, match=r"out.h5 is .*(damaged|not brixel-features-1)"):
        extract(extract_options(), listener)


@pytest.mark.parametrize(
    "changed",
    [
        {"batch_sizes": {"64x80": -1}}, {"batch_sizes": {"64x80": "4"}}, {"batch_sizes": {"64x80": 0}},
        {"batch_sizes": {}}, {"batch_sizes": [4]}, {"batch_sizes": None}, {"batch_sizes": {"64x80": 1.5}},
        {"threads": 0}, {"threads": "2"}, {"threads": 10**9}, {"threads": None}, {"threads": True},
        {"dtype": "float64"}, {"dtype": ["float16"]}, {"storage": None}, {"storage": {}}, {"embed_dim": 65},
        {"patch_size": -1}, {"factor": "4"}, {"pca": 2**30}, {"versions": 3}, {"student": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_odd_descriptions_are_errors(extract_options, listener: Listener, changed: dict):
    done = extract(extract_options(), listener)
    described(done.output, **changed)
    if list(changed) == ["versions"]:
        extract(extract_options(), listener)  # other versions are warned of
        return
    with pytest.raises((BrixelError, UsageError), match="out.h5 (is damaged|is not a feature file|was begun with)"):
        extract(extract_options(), listener)
