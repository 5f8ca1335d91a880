"""What files hold, in short: knows them again when they were moved, copied or checked out anew."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from brixel_cli.errors import BrixelError


def files_sha256(paths: Sequence[Path]) -> list[str]:
    """SHA-256 (hex) of the bytes of each file, in order; several are read at once.

    Raises:
        BrixelError: one of them cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BrixelError(f"{path} cannot be read: {error.strerror}. Make it readable, or take it away.") from error
