"""Images that lie in a larger file: what is known of each, by what name, and how far a name from outside is trusted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from brixel_cli.core.files import SizedFile
from brixel_cli.core.formatting import utf8
from brixel_cli.core.identity import text_digest
from brixel_cli.data.images import EXTENSIONS, Contents, read_size
from brixel_cli.errors import BrixelError, UnreachedError

LONGEST_NAME = 1024
"""Bytes of a member's name; every row of a feature file has room for the longest of all names."""
MOST_BYTES = 1 << 30
"""Of an image that is read into memory whole."""


@dataclass(frozen=True)
class Member:
    """An image of an archive.

    Attributes:
        name: below the archive; harmless as a path.
        part: where it lies: first byte and number of bytes in a tar, row group and row of it in a parquet file.
        height, width: in pixels after rotation; 0 where the header cannot be read.
        num_bytes: of the image file.
        reason: why it cannot be used; empty for a usable one.
    """

    name: str
    part: tuple[int, int]
    height: int
    width: int
    num_bytes: int
    reason: str = ""


class Window(SizedFile):
    """A part of a file as a file.

    Args:
        file: the whole.
        start: first byte of the part.
        size: bytes of the part.
    """

    def __init__(self, file: BinaryIO, start: int, size: int):
        super().__init__(size)
        self._file, self._start = file, start

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._size - self._at, 0)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data


def measured(name: str, part: tuple[int, int], file: BinaryIO, num_bytes: int, reason: str = "") -> Member:
    """A member with the size of its image, by its header, or with the reason why it cannot be used.

    Args:
        name: as the archive has it.
        part: as of `Member`.
        file: the image alone.
        num_bytes: of the image.
        reason: why it is not even looked at.

    Raises:
        UnreachedError: the header did not come.
    """
    name, unsafe = safe_name(name)
    reason = reason or unsafe or (f"too large: {num_bytes:,} bytes, over {MOST_BYTES:,}" * (num_bytes > MOST_BYTES))
    height = width = 0
    if not reason:
        try:
            height, width = read_size(Contents("", file), still=True)
        except UnreachedError:
            raise
        except BrixelError as error:
            reason = str(error).removesuffix(": ")
    return Member(name, part, height, width, num_bytes, reason)


def safe_name(name: str) -> tuple[str, str]:
    """A name from outside as a path below a folder, and why the image of that name is refused, if it is."""
    parts = [part for part in utf8(name).split("/") if part not in ("", ".")]
    reason = "its name leads out of its folder" if ".." in parts or "\0" in name else ""
    plain = "/".join("__" if part == ".." else part for part in parts).replace("\0", "_") or "_"
    if len(plain.encode()) > LONGEST_NAME:
        reason = reason or f"its name is too long: {len(plain.encode()):,} bytes, over {LONGEST_NAME:,}"
        plain = f"{plain.encode()[:64].decode('utf-8', 'ignore')}~{text_digest(name)[:16]}"
    return plain, reason


def has_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image; hidden ones are not, as in folders."""
    path = PurePosixPath(name)
    return path.suffix.lower() in EXTENSIONS and not any(
        part.startswith(".") and part not in (".", "..") for part in path.parts
    )


def named_once(members: Iterator[Member]) -> Iterator[Member]:
    """Members of which no two have the same name: the later ones are refused, under a name of their own."""
    seen: set[str] = set()
    for member in members:
        name, count = member.name, 1
        while name in seen:
            count += 1
            name = f"{member.name}#{count}"
        seen.add(name)
        if name != member.name:
            member = Member(name, member.part, 0, 0, member.num_bytes, "an earlier image has the same name")
        yield member
