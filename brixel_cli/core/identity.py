"""What files hold, in short: knows them again when they were moved, copied or checked out anew."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from brixel_cli.errors import BrixelError


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Sequence[Path], progress: Callable[[int], object] = lambda _: None) -> list[str]:
    """SHA-256 (hex) of the bytes of each file, in order; several are read at once.

    Args:
        paths: of the files.
        progress: told 1 after each file.

    Raises:
        BrixelError: one of them cannot be read.
    """
    found = []
    with ThreadPoolExecutor() as pool:
        for digest in pool.map(_sha256, paths):
            found.append(digest)
            progress(1)
    return found


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise BrixelError(f"{path} cannot be read: {error.strerror}. Make it readable, or take it away.") from error
