"""Digests: golden values, and the memory of files that were read before."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
import torch

from brixel_cli.core import identity
from brixel_cli.core.identity import file_sha256, files_sha256, joint_digest, json_digest, tensors_sha256, text_digest
from brixel_cli.errors import BrixelError

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of the standard, FIPS 180-2


def old_file(path: Path, content: bytes) -> Path:
    """A file that changed an hour ago."""
    path.write_bytes(content)
    hour = time.time_ns() - 3600 * 10**9
    os.utime(path, ns=(hour, hour))
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files that were really read, with a memory of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read: list[Path] = []

    def reading(path: Path) -> str:
        read.append(path)
        return file_sha256(path)

    monkeypatch.setattr(identity, "file_sha256", reading)
    return read


def test_golden_digests(tmp_path: Path) -> None:
    path = old_file(tmp_path / "abc", b"abc")
    assert text_digest("abc") == file_sha256(path) == ABC
    assert files_sha256([path, path]) == [ABC, ABC]
    assert json_digest({"b": 1, "a": Path("x")}) == hashlib.sha256(b'{"a": "x", "b": 1}').hexdigest()
    assert joint_digest([("n", path)]) == hashlib.sha256(b"n\0" + ABC.encode()).hexdigest()
    assert joint_digest([("n", tmp_path / "gone")]) == hashlib.sha256(b"n\0").hexdigest()


def test_a_name_that_is_no_utf8_has_a_digest(tmp_path: Path, reads: list[Path]) -> None:
    path = old_file(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png")), b"abc")
    assert files_sha256([path]) == files_sha256([path]) == [ABC]
    assert reads == [path]
    assert joint_digest([(path.name, path)]) != joint_digest([("x.png", path)])


def test_tensors_count_by_name_shape_type_and_value() -> None:
    first = {"a": torch.tensor([1.0, 2.0])}
    assert tensors_sha256(first) == tensors_sha256({"a": torch.tensor([1.0, 2.0])})
    others = ({"b": first["a"]}, {"a": first["a"][None]}, {"a": first["a"].double()}, {"a": torch.tensor([1.0, 3.0])})
    assert len({tensors_sha256(other) for other in (first, *others)}) == 5


def test_an_unchanged_file_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    paths = [old_file(tmp_path / name, name.encode()) for name in "xyz"]
    told: list[int] = []
    first = files_sha256(paths)
    assert files_sha256(paths, told.append) == first == [text_digest(name) for name in "xyz"]
    assert sorted(reads) == paths
    assert told == [1, 1, 1]


def test_a_file_that_changed_is_read_again(tmp_path: Path, reads: list[Path]) -> None:
    path = old_file(tmp_path / "x", b"abc")
    files_sha256([path])
    path.write_bytes(b"abd")  # the same size; the time tells
    assert files_sha256([path]) == [text_digest("abd")]
    assert len(reads) == 2


def test_an_edit_in_place_that_keeps_size_and_time_is_noticed(tmp_path: Path, reads: list[Path]) -> None:
    path = old_file(tmp_path / "x", b"abc")
    before = path.stat()
    assert files_sha256([path]) == [ABC]
    time.sleep(0.05)  # the clock of a file system ticks in milliseconds
    path.write_bytes(b"abd")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert files_sha256([path]) == [text_digest("abd")]


def test_a_file_that_changed_a_moment_ago_is_not_remembered(tmp_path: Path, reads: list[Path]) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert files_sha256([tmp_path / "x"]) == files_sha256([tmp_path / "x"]) == [ABC]
    assert len(reads) == 2


@pytest.mark.parametrize("damage", ["no folder", "no database"])
def test_a_memory_that_cannot_be_used_costs_time_only(tmp_path: Path, reads: list[Path], damage: str) -> None:
    if damage == "no folder":
        (tmp_path / "cache").write_text("a file where the folder should be")
    else:
        (tmp_path / "cache" / "brixel").mkdir(parents=True)
        (tmp_path / "cache" / "brixel" / "sha256.sqlite").write_text("no database" * 1000)
    path = old_file(tmp_path / "x", b"abc")
    assert files_sha256([path]) == files_sha256([path]) == [ABC]
    assert len(reads) == 2


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BrixelError, match="gone cannot be read: No such file or directory. Make it readable, or rem"):
        files_sha256([tmp_path / "gone"])
