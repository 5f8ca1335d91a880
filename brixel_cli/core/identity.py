"""Digests of files, tensors and settings: by these, caches and resumed runs know what they were made of.

Checksums of arrays, by which damage is noticed, are cheaper, and no safeguard against forgery.

The SHA-256 of a file is remembered by its path, size and times of change (of its contents, and of its entry) in a small
database of the user's cache folder (`$XDG_CACHE_HOME/brixel`, by default `~/.cache/brixel`), so that a large set of
images is read only once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from brixel_cli.errors import BrixelError

if TYPE_CHECKING:
    from torch import Tensor

SETTLED_SECONDS = 2.0
"""A file that changed a shorter time ago is not remembered: a second change might leave size and time as they are."""
FOLD_WORDS = 1021
"""8-byte words that `earlier_checksum` adds up; a prime, so that a page of the disk in another's place is noticed."""


def json_digest(value: Any) -> str:
    """SHA-256 (hex) of a value as JSON with sorted keys; what JSON does not know counts by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 (hex) of a text in UTF-8; the bytes of a file name that are none stay apart."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names and values; the same however and in whatever file the tensors were stored."""
    import torch  # not with the module: what only writes rows does without

    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def checksum(*arrays: npt.NDArray[Any]) -> int:
    """XXH3, 64 bits, over the bytes of arrays, one after the other; as fast as memory is read."""
    digest = xxhash.xxh3_64()
    for array in arrays:
        digest.update(_as_bytes(array).data)
    return digest.intdigest()


def earlier_checksum(*arrays: npt.NDArray[Any]) -> int:
    """What versions before XXH3 wrote; their files are still checked.

    CRC-32 over the bytes of arrays, of which all whole blocks of 1,021 8-byte words are added up to one before.
    """
    value = 0
    for array in arrays:
        data = _as_bytes(array)
        whole = len(data) - len(data) % (8 * FOLD_WORDS)
        folded = np.add.reduce(data[:whole].view("<u8").reshape(-1, FOLD_WORDS), axis=0)
        value = zlib.crc32(data[whole:].data, zlib.crc32(folded.data, value))
    return value


def _as_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def library_versions() -> dict[str, str]:
    """Versions of all that the numbers of a model depend on."""
    return {name: version(name) for name in ("brixel", "torch", "timm", "pillow")}


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read now.

    Raises:
        BrixelError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BrixelError(f"{path} cannot be read: {error.strerror}. Make it readable, or remove it.") from error


def files_sha256(paths: Sequence[Path], progress: Callable[[int], object] = lambda _: None) -> list[str]:
    """SHA-256 (hex) of the bytes of each file, in order; known from before where path, size and time are the same.

    Args:
        paths: of the files.
        progress: called with 1 after each file.

    Raises:
        BrixelError: one of them cannot be read.
    """
    found = []
    with _Memory() as memory, ThreadPoolExecutor() as pool:
        keys = [_key(path) for path in paths]
        known = memory.recall(keys)
        read = pool.map(file_sha256, (path for path, key in zip(paths, keys, strict=True) if key not in known))
        for key in keys:
            digest = known.get(key) or next(read)
            memory.remember(key, digest)
            found.append(digest)
            progress(1)
    return found


def joint_digest(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 (hex) over the names and contents of files, in their order; an unreadable file counts by its name."""
    whole = hashlib.sha256()
    for name, path in files:
        whole.update(name.encode("utf-8", "surrogatepass") + b"\0")
        with contextlib.suppress(BrixelError):
            whole.update(files_sha256([path])[0].encode())
    return whole.hexdigest()


_Key = tuple[str, int, int, int]
"""Absolute path, bytes, time of the last change, which programs can set, and of the entry, which they cannot, in ns."""


def _key(path: Path) -> _Key:
    name = os.fsencode(path.absolute()).decode("utf-8", "backslashreplace")  # a database takes no other bytes
    try:
        stat = path.stat()
    except OSError:  # reading it will say why
        return name, -1, -1, -1
    return name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class _Memory:
    """Digests of earlier calls. Where the database cannot be used, nothing is remembered and nothing fails."""

    def __init__(self) -> None:
        self._new: list[tuple[str, int, int, int, str]] = []
        self._connection: sqlite3.Connection | None = None
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brixel"
        with contextlib.suppress(OSError, sqlite3.Error):
            cache.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(cache / "sha256.sqlite", timeout=5)
            self._connection.execute(
                "create table if not exists contents"
                " (path text primary key, bytes int, modified int, changed int, sha256 text)"
            )

    def __enter__(self) -> _Memory:
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is None:
            return
        with contextlib.suppress(sqlite3.Error), self._connection:
            self._connection.executemany("insert or replace into contents values (?, ?, ?, ?, ?)", self._new)
        self._connection.close()

    def recall(self, keys: Iterable[_Key]) -> dict[_Key, str]:
        """The digests that are known of files that have not changed since."""
        known: dict[_Key, str] = {}
        if self._connection is None:
            return known
        with contextlib.suppress(sqlite3.Error):
            for key in keys:
                query = "select sha256 from contents where path = ? and bytes = ? and modified = ? and changed = ?"
                row = self._connection.execute(query, key).fetchone()
                if row is not None:
                    known[key] = str(row[0])
        return known

    def remember(self, key: _Key, digest: str) -> None:
        """Keep a digest for later calls."""
        if 0 <= key[2] < time.time_ns() - SETTLED_SECONDS * 1e9:
            self._new.append((*key, digest))
