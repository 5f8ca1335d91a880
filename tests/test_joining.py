"""Parts of several shards as one file: the rows of one process, and what is missing is named."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import Listener, every_row, make_photograph
from printed_json import checked
from test_feature_verifying import as_earlier
from typer.testing import CliRunner

import brixel_cli
from brixel_cli.app import app
from brixel_cli.config.shard import Shard
from brixel_cli.data.checksums import CHECKSUM
from brixel_cli.data.feature_layout import FORMAT, Layout
from brixel_cli.data.row_store import MISSING, REASON, STATUS, Store, create_store
from brixel_cli.engines.extracting import joining
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.engines.extracting.joining import join
from brixel_cli.engines.extracting.verification import verify
from brixel_cli.errors import BrixelError, UsageError


@pytest.fixture
def parts(extract_options, mixed: Path, tmp_path: Path, listener: Listener):
    """Three parts of eleven images of three shapes, one of which cannot be read; and their options."""
    (mixed / "04b.png").write_text("no image")
    options = extract_options(inputs=[str(mixed)], batch_size=1, output=tmp_path / "out" / "photos.h5")
    for number in (1, 2, 3):
        extract(replace(options, shard=Shard(number, 3)), listener)
    return options


def tiny_part(folder: Path, number: int, count: int, rows: int = 2, grid: tuple[int, int] = (2, 3)) -> Path:
    """A part without a model behind it, whose values are its number."""
    layout = Layout((grid,) * rows, 4, "float16")
    split = {"number": number, "count": count, "num_inputs": rows * count, "sha256": "0" * 64}
    description = {"storage": "h5", "dtype": "float16", "factor": 1, "shard": split, "threads": 1, "asked": ["--res", "64"],
                   "batch_sizes": {"64x64": 1}}  # fmt: skip
    filled = {
        "paths": np.array([f"{number:05d}_{row}.png".encode() for row in range(rows)]),
        REASON: np.zeros(rows, "S160"),
        CHECKSUM: np.zeros(rows, np.uint64),
        **{name: np.array([grid] * rows, np.int32) for name in ("original_size", "model_size", "grid_size")},
        "grid_row": layout.grid_rows,
    }
    path = Shard(number, count).path(folder / "tiny.h5")
    create_store(path, rows, layout.columns, description, filled, {"format": FORMAT})
    store = Store(path, writable=True)
    for row in range(rows):
        store.write([row], {"features": [np.full((4, *grid), number, np.float16)]})
    return path


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_joined_file_is_that_of_one_process(
    extract_options, mixed: Path, tmp_path: Path, listener: Listener, copy: bool, dtype: str
) -> None:
    (mixed / "04b.png").write_text("no image")
    options = extract_options(inputs=[str(mixed)], batch_size=1, output=tmp_path / "out" / "photos.h5", dtype=dtype)
    for number in (1, 2, 3):
        extract(replace(options, shard=Shard(number, 3)), listener)
    whole = extract(replace(options, output=tmp_path / "whole.h5"), listener).output
    done = join(str(tmp_path / "out" / "photos.*.h5"), tmp_path / "photos.h5", copy, False, listener)
    assert (done.num_parts, done.num_images, done.num_failed, done.copied) == (3, 11, 1, copy)
    assert every_row(done.output) == every_row(whole)
    expected, found = brixel_cli.FeatureFile(whole), brixel_cli.FeatureFile(done.output)
    assert found.paths == expected.paths
    assert found.failures == expected.failures != {}
    assert found.description == expected.description
    for name in set(Store(whole)):
        if not name.startswith(("features", "scale")):
            np.testing.assert_array_equal(Store(done.output).array(name), Store(whole).array(name))
    assert verify(done.output, listener).damaged == {}
    with h5py.File(done.output) as file, h5py.File(whole) as one:  # plain h5py
        assert set(file["features"]) == set(one["features"]) != set()
        for grid in file["features"]:
            assert np.array_equal(file["features"][grid][:], one["features"][grid][:])
    if copy:
        shutil.rmtree(tmp_path / "out")
        assert every_row(done.output) == every_row(whole)
        assert extract(replace(options, output=done.output), listener).num_computed == 0  # which may be continued


def test_images_of_one_grid_are_read_in_three_lines(tmp_path: Path, listener: Listener) -> None:
    for number in (1, 2):
        tiny_part(tmp_path, number, 2)
    join(str(tmp_path / "tiny.*.h5"), tmp_path / "tiny.h5", False, False, listener)
    file = h5py.File(tmp_path / "tiny.h5")
    assert file["features"].shape == (4, 4, 2, 3)
    assert [float(feature_map.max()) for feature_map in file["features"]] == [1, 1, 2, 2]
    dataset = brixel_cli.FeatureDataset(tmp_path / "tiny.h5")
    assert [(float(m.min()), name) for m, name in dataset] == [
        (1, "00001_0.png"), (1, "00001_1.png"), (2, "00002_0.png"), (2, "00002_1.png"),
    ]  # fmt: skip


def test_parts_of_one_grid_each_become_a_file_of_several(tmp_path: Path, listener: Listener) -> None:
    for number, grid in ((1, (2, 3)), (2, (3, 2)), (3, (2, 3))):
        tiny_part(tmp_path, number, 3, grid=grid)
    join(str(tmp_path / "tiny.*.h5"), tmp_path / "tiny.h5", False, False, listener)
    with h5py.File(tmp_path / "tiny.h5") as file:
        assert {grid: rows.shape for grid, rows in file["features"].items()} == {
            "2x3": (4, 4, 2, 3),
            "3x2": (2, 4, 3, 2),
        }
        assert file["grid_row"][:].tolist() == [0, 1, 0, 1, 2, 3]
    features = brixel_cli.FeatureFile(tmp_path / "tiny.h5")
    assert [float(features[row].max()) for row in range(6)] == [1, 1, 2, 2, 3, 3]


def test_more_parts_than_files_may_be_open_are_read(tmp_path: Path, listener: Listener) -> None:
    count = 60
    for number in range(1, count + 1):
        tiny_part(tmp_path, number, count, rows=1)
    join(str(tmp_path / "tiny.*.h5"), tmp_path / "tiny.h5", False, False, listener)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, most[1]))
    try:
        features = brixel_cli.FeatureFile(tmp_path / "tiny.h5")
        assert [float(features[row].max()) for row in range(count)] == list(range(1, count + 1))
        again = Listener()
        join(str(tmp_path / "tiny.*.h5"), tmp_path / "again.h5", False, False, again)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
    assert len(again.warned) == (count > 0.9 * (used + 30))


def test_plain_h5py_and_many_parts_are_warned_of(
    tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        tiny_part(tmp_path, number, 2)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2, 2))
    join(str(tmp_path / "tiny.*.h5"), tmp_path / "tiny.h5", False, False, listener)
    assert "reads zeros from those beyond the 2 files that a process may open here: ulimit -n 4" in listener.warned[0]


def test_what_is_missing_is_named_with_the_command_that_completes_it(parts, tmp_path: Path, listener: Listener) -> None:
    folder = tmp_path / "out"
    whole = every_row(folder / "photos.00002-of-00003.h5")
    (folder / "photos.00002-of-00003.h5").unlink()
    (folder / "photos.00003-of-00003.h5").rename(folder / "photos.00003-of-00003.h5.unfinished")
    Store(folder / "photos.00003-of-00003.h5.unfinished", writable=[STATUS]).mark(1, MISSING)
    with pytest.raises(BrixelError, match="2 of 3 parts are not complete") as error:
        join(str(folder / "photos.*.h5"), tmp_path / "photos.h5", False, False, listener)
    lines = str(error.value).splitlines()
    assert lines[1:3] == [
        "photos.00002-of-00003.h5: not there", "photos.00003-of-00003.h5: 1 of 4 images are left",
    ]  # fmt: skip
    assert lines[3].endswith(" The same with --shard 3/3 completes the others.")
    command = (
        lines[3]
        .removeprefix("This completes the first: ")
        .removesuffix(" The same with --shard 3/3 completes the others.")
    )
    done = CliRunner().invoke(app, [*shlex.split(command)[1:], "--device", "cpu"])
    assert "1 of 4 images failed" in done.stderr
    assert every_row(folder / "photos.00002-of-00003.h5") == whole
    assert not (tmp_path / "photos.h5").exists()


@pytest.mark.parametrize("status", [MISSING, 255])
def test_a_part_whose_rows_were_damaged_is_named(parts, status: int, tmp_path: Path, listener: Listener) -> None:
    Store(tmp_path / "out" / "photos.00001-of-00003.h5", writable=[STATUS]).mark(1, status)
    with pytest.raises(
        BrixelError, match="1 of 3 parts are not complete:\nphotos.00001.*: 1 images are to be computed again"
    ):
        join(str(tmp_path / "out" / "photos.*.h5"), tmp_path / "photos.h5", False, False, listener)


def test_a_part_of_another_run_is_named(parts, mixed: Path, tmp_path: Path, listener: Listener) -> None:
    pattern = str(tmp_path / "out" / "photos.*.h5")
    other = replace(parts, res=96, output=tmp_path / "other" / "photos.h5", shard=Shard(2, 3))
    path = tmp_path / "out" / "photos.00002-of-00003.h5"
    shutil.copy(extract(other, listener).output, path)
    with pytest.raises(
        BrixelError, match=r"(?s)00002-of-00003.h5 does not belong with .*res: 64 -> 96.*--shard 2/3 --over"
    ):
        join(pattern, tmp_path / "photos.h5", False, False, listener)
    make_photograph(mixed / "99.png", 5)  # the same options, and an image more
    extract(replace(other, res=64, output=parts.output, overwrite=True), listener)
    with pytest.raises(BrixelError, match="does not belong with .*\n.*num_inputs: 11 -> 12"):
        join(pattern, tmp_path / "photos.h5", False, False, listener)


def test_parts_under_wrong_names_are_noticed(tmp_path: Path, listener: Listener) -> None:
    first, second = (tiny_part(tmp_path, number, 2) for number in (1, 2))
    shutil.copy(first, second)
    with pytest.raises(BrixelError, match=r"00002-of-00002.h5 is shard 1/2 by its contents. Give it its name"):
        join(str(tmp_path / "tiny.*.h5"), tmp_path / "tiny.h5", False, False, listener)


@pytest.mark.parametrize("copy", [True, False])
def test_parts_of_an_earlier_version_keep_their_checksums(tmp_path: Path, listener: Listener, copy: bool) -> None:
    paths = [tiny_part(tmp_path, number, 2) for number in (1, 2)]
    as_earlier(paths[1])
    with pytest.raises(BrixelError, match="datasets of the index: grid_row, .*, xxh3 -> checksum, grid_row, "):
        join(str(tmp_path / "tiny.*.h5"), tmp_path / "tiny.h5", copy, False, listener)
    as_earlier(paths[0])
    joined = join(str(tmp_path / "tiny.*.h5"), tmp_path / "tiny.h5", copy, False, listener).output
    assert verify(joined, listener).damaged == {}
    with h5py.File(joined if copy else paths[1], "r+") as file:
        file["features"][-1, 0, 0, 0] = 5
    assert verify(joined, listener).damaged == {"00002_1.png": "its map has changed since it was written"}


def test_an_image_in_two_parts_is_named(tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tiny_part(tmp_path, number, 2) for number in (1, 2)]
    read = joining._read(paths[0])
    monkeypatch.setattr(
        joining, "_read", lambda path: replace(read, path=path, description=joining.Store(path).description)
    )
    with pytest.raises(
        BrixelError, match=r"00001_0.png is in several parts of .*Compute all parts again from one list"
    ):
        join(str(tmp_path / "tiny.*.h5"), tmp_path / "tiny.h5", False, False, listener)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: path.unlink(),
            "its part tiny.00002-of-00002.h5 is missing: put it there, or join the parts again",
        ),
        (lambda path: path.write_bytes(path.read_bytes() + b"0"), "its part tiny.00002-of-00002.h5 has another size"),
    ],
)
def test_a_joined_file_whose_parts_are_gone_is_not_read_as_zeros(
    tmp_path: Path, listener: Listener, change, message: str
) -> None:
    for number in (1, 2):
        path = tiny_part(tmp_path, number, 2)
    join(str(tmp_path / "tiny.*.h5"), tmp_path / "tiny.h5", False, False, listener)
    change(path)
    with pytest.raises(BrixelError, match=message):
        brixel_cli.FeatureFile(tmp_path / "tiny.h5")


@pytest.mark.parametrize("attribute", [{}, {"../secret.h5": 1}, {"/etc/passwd": 1}])
def test_a_joined_file_from_anywhere_reads_its_own_folder_alone(
    tmp_path: Path, listener: Listener, attribute: dict[str, int]
) -> None:
    folder = tmp_path / "below"
    for number in (1, 2):
        tiny_part(folder, number, 2)
    join(str(folder / "tiny.*.h5"), folder / "tiny.h5", False, False, listener)
    with h5py.File(folder / "tiny.h5", "r+") as file:
        file.attrs["parts"] = json.dumps(attribute)
    with pytest.raises(BrixelError, match="lies in other files|lies outside of its folder"):
        brixel_cli.FeatureFile(folder / "tiny.h5")


def test_a_link_of_a_part_to_another_file_is_not_followed(tmp_path: Path, listener: Listener) -> None:
    folder = tmp_path / "below"
    part = tiny_part(folder, 1, 1)
    join(str(part), folder / "tiny.h5", False, False, listener)
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["features"] = np.full((2, 4, 2, 3), 7, np.float16)
    with h5py.File(part, "r+") as file:
        del file["features"]
        file["features"] = h5py.ExternalLink("../secret.h5", "features")
    with h5py.File(folder / "tiny.h5", "r+") as file:
        file.attrs["parts"] = json.dumps({part.name: part.stat().st_size})
    with pytest.raises(BrixelError, match="has no dataset features of its own"):
        brixel_cli.FeatureFile(folder / "tiny.h5")[0]


def test_a_part_is_never_replaced_by_the_joined_file(tmp_path: Path, listener: Listener) -> None:
    paths = [tiny_part(tmp_path, number, 2) for number in (1, 2)]
    before = paths[0].read_bytes()
    with pytest.raises(UsageError, match="is one of the parts, which would be lost: give another --output"):
        join(str(tmp_path / "tiny.*.h5"), paths[0], False, True, listener)
    assert paths[0].read_bytes() == before


def test_a_thousand_parts_open_at_once(tmp_path: Path, listener: Listener) -> None:
    count = 1000
    for number in range(1, count + 1):
        tiny_part(tmp_path, number, count, rows=1)
    join(str(tmp_path / "tiny.*.h5"), tmp_path / "tiny.h5", False, False, listener)
    began = time.process_time()
    features = brixel_cli.FeatureFile(tmp_path / "tiny.h5")
    assert time.process_time() - began < 2
    assert [float(features[row].max()) for row in (0, 499, 999)] == [1, 500, 1000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--join", "none.*.h5", "--output", "a.h5"], "--join none.*.h5: no parts have such names"),
        (["--join", "*.h5", "--output", "a.h5"], "names parts of several outputs: b.*-of-00002.h5, c.*-of-00001.h5"),
        (["--join", "c.*.h5"], "--join needs the name of the file to be made: --output FILE.h5"),
        (["--join", "c.*.h5", "--output", "a.h5", "--input", "x"], "leave out --input, --shard and --dry-run"),
        (["--join", "c.*.h5", "--output", "a.h5", "--verify", "c.h5"], "--join, --verify and --export each are"),
        (["--copy", "--input", "x"], "--copy goes with --join"),
        (["--join", "c.*.h5", "--output", "there.h5"], "there.h5 is there already. Give --overwrite"),
        (["--join", "c.*.h5", "--output", "d/a.h5"], "does not lie below .*d, the folder of the output"),
    ],
)
def test_what_cannot_be_joined_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, number, count in (("b", 1, 2), ("c", 1, 1)):
        tiny_part(tmp_path, number, count).rename(tmp_path / f"{name}.{number:05d}-of-{count:05d}.h5")
    (tmp_path / "there.h5").write_text("")
    (tmp_path / "d").mkdir()
    done = CliRunner().invoke(app, ["extract", *arguments])
    assert done.exit_code == 2
    assert message.split(".*")[0] in done.stderr.replace("\n  ", " ")


def test_the_command_joins(tmp_path: Path) -> None:
    for number in (1, 2):
        tiny_part(tmp_path, number, 2)
    command = ["extract", "--join", str(tmp_path / "tiny.*.h5"), "--output", str(tmp_path / "tiny.h5")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0
    assert "The maps stay in the parts" in done.stdout
    result = checked("extract-join", CliRunner().invoke(app, [*command, "--overwrite", "--copy", "--json"]).stdout)
    assert result["num_images"] == 4
    assert result["copied"] is True


def test_a_damaged_part_is_named(tmp_path: Path, listener: Listener) -> None:
    path = tiny_part(tmp_path, 1, 1)
    with h5py.File(path, "r+") as file:
        file["grid_size"][0] = 7
    with pytest.raises(
        BrixelError, match=r"tiny.00001-of-00001.h5 cannot be joined: its datasets grid_size are damaged"
    ):
        join(str(tmp_path / "tiny.*.h5"), tmp_path / "tiny.h5", False, False, listener)


def test_only_feature_files_are_replaced(tmp_path: Path, listener: Listener) -> None:
    tiny_part(tmp_path, 1, 1)
    (tmp_path / "mine.h5").write_text("precious")
    with pytest.raises(BrixelError, match="is not a feature file"):
        join(str(tmp_path / "tiny.*.h5"), tmp_path / "mine.h5", False, True, listener)
    assert (tmp_path / "mine.h5").read_text() == "precious"
    with pytest.raises(UsageError, match="is there already"):
        join(str(tmp_path / "tiny.*.h5"), tmp_path / "mine.h5", False, False, listener)


@pytest.mark.parametrize("lacks", ["grid_row", "paths", "original_size"])
def test_a_part_without_a_dataset_of_the_index_is_named(tmp_path: Path, listener: Listener, lacks: str) -> None:
    whole, damaged = (tiny_part(tmp_path, number, 2) for number in (1, 2))
    with h5py.File(damaged, "r+") as file:
        del file[lacks]
    with pytest.raises(BrixelError) as caught:
        join(str(tmp_path / "tiny.*.h5"), tmp_path / "all.h5", False, False, listener)
    assert str(caught.value).startswith(f"{damaged} cannot be joined: ")
    assert lacks in str(caught.value)
    assert str(caught.value).endswith("The command that wrote it computes it again.")
    assert whole.exists()
    assert not (tmp_path / "all.h5").exists()
