"""Outputs that go to an object store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import brixel_cli
from brixel_cli.app import app
from brixel_cli.config.extract_words import named_output
from brixel_cli.config.shard import Shard
from brixel_cli.data import remote
from brixel_cli.engines.extracting import extraction
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.errors import BrixelError, UsageError

fsspec = pytest.importorskip("fsspec", reason="needs pip install 'brixel[remote]'")


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """An object store in memory; the current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.0)
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()


@pytest.fixture
def options(extract_options):
    def made(text: str = "memory://bucket/deep/photos.h5", **more):
        path, upload = named_output(text)
        return extract_options(output=path, upload=upload, **more)

    return made


def test_the_output_is_copied_when_it_is_complete(there, options, listener, tmp_path: Path) -> None:
    done = extract(options(), listener)
    assert (done.uploaded, done.output, done.num_computed) == ("memory://bucket/deep/photos.h5", Path("photos.h5"), 8)
    assert there.cat("/bucket/deep/photos.h5") == (tmp_path / "photos.h5").read_bytes()
    assert json.loads(there.cat("/bucket/deep/photos.h5.done"))["computed"] == 8
    assert brixel_cli.FeatureFile("photos.h5").rows == list(range(8))


def test_a_part_that_is_there_is_passed_over_on_another_machine(
    there, options, listener, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = options(shard=Shard(2, 2), strict=True)
    extract(part, listener)
    assert there.exists("/bucket/deep/photos.00002-of-00002.h5")
    (tmp_path / "photos.00002-of-00002.h5").unlink()  # another machine has not got it
    monkeypatch.setattr(extraction, "make_plan", lambda *_: pytest.fail("it was planned"))
    again = extract(part, listener)
    assert (again.num_images, again.num_before, again.num_computed, again.failures) == (4, 4, 0, {})
    with pytest.raises(
        UsageError,
        match=r"photos.00002-of-00002.h5 was computed with other options or another model: brixel extract --",
    ):
        extract(options(shard=Shard(2, 2), dtype="int8"), listener)


def test_the_command_says_where_the_output_is(there, options, extract_options, listener, tmp_path: Path) -> None:
    plain = extract_options()
    words = ["extract", "--input", *plain.inputs, "--res", "64", "--checkpoint", plain.checkpoint, "--device", "cpu",
             "--output", "memory://bucket/a.h5", "--json"]  # fmt: skip
    assert json.loads(CliRunner().invoke(app, words).stdout)["output"] == "memory://bucket/a.h5"
    (tmp_path / "a.h5").unlink()
    again = CliRunner().invoke(app, words)
    assert json.loads(again.stdout)["computed"] == 0
    assert "memory://bucket/a.h5 is complete" in again.stderr
    joined = CliRunner().invoke(app, ["extract", "--join", "x.*.h5", "--output", "memory://bucket/b.h5"])
    assert (joined.exit_code, "--join makes a file on this disk" in joined.stderr) == (2, True)


def test_a_store_that_takes_nothing_leaves_the_file_and_is_tried_again(
    there, options, listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("no")

    with monkeypatch.context() as patch:
        patch.setattr(type(there), "put_file", refused)
        with pytest.raises(
            BrixelError,
            match=r"photos.h5 is complete, but was not copied to memory://bucket/deep/photos.h5: not fetched",
        ):
            extract(options(), listener)
    assert not there.exists("/bucket/deep/photos.h5.done")
    assert extract(options(), listener).num_computed == 0
    assert there.exists("/bucket/deep/photos.h5.done")


def test_a_copy_that_is_cut_off_is_no_copy(there, options, listener, monkeypatch: pytest.MonkeyPatch) -> None:
    put = type(there).put_file
    monkeypatch.setattr(
        type(there), "put_file", lambda self, lpath, rpath: (put(self, lpath, rpath), self.pipe_file(rpath, b"xy"))
    )
    with pytest.raises(BrixelError, match=r"cut off: 2 of [\d,]+ bytes are there"):
        extract(options(), listener)


def test_a_note_that_says_nothing_is_not_believed(there, options, listener) -> None:
    there.pipe_file("/bucket/deep/photos.h5.done", b"{}")
    assert extract(options(), listener).num_computed == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://host/photos.h5", "--output https://...: a web server takes no files"),
        ("s3://bucket/photos", "--output s3://...: name an .h5 file in the bucket"),
        ("s3://bucket/.h5", "--output s3://...: name an .h5 file in the bucket"),
    ],
)
def test_other_outputs_are_refused(text: str, message: str, extract_options) -> None:
    with pytest.raises(UsageError, match=message):
        named_output(text)
    with pytest.raises(UsageError, match="--output of a URL is an .h5 file: leave out --format zarr"):
        extract_options(upload="s3://bucket/a.h5", storage="zarr")
    with pytest.raises(UsageError, match="output is a file on this disk in Python"):
        brixel_cli.extract("photos", output="s3://bucket/a.h5")
