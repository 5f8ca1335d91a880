"""Tars in WebDataset's convention: their images in order, found by headers alone, each read without unpacking."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from brixel_cli.data.members import Member, Window, has_image_name, measured, named_once
from brixel_cli.errors import BrixelError, UnreachedError

TAR_EXTENSION = ".tar"
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
BLOCK = 512
LONGEST_HEADER = 1 << 20
"""Bytes that a header may have; one that asks for more, and so for memory, is damaged."""
OF_DATASET = re.compile(r"__[^/]*__($|/)")
"""Names of members that describe the data set itself, which WebDataset passes over too."""


class _Headers(Window):
    """A tar as `tarfile` reads it: no header takes more memory than one may."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def tar_members(file: BinaryIO, num_bytes: int) -> Iterator[Member]:
    """The images of a tar, in order, those that cannot be used with their reasons.

    Members are taken by their extension. The rest of a damaged tar becomes one member whose name tells where it begins.

    Args:
        file: the tar; read forwards.
        num_bytes: its size.

    Raises:
        BrixelError: it is not a tar, or a compressed one; the message is the reason.
        UnreachedError: it did not come.
    """
    yield from named_once(_members(file, num_bytes))


def _members(file: BinaryIO, num_bytes: int) -> Iterator[Member]:
    at, damage = 0, ""
    tar = None
    try:
        headers = cast(io.BytesIO, _Headers(file, 0, num_bytes))
        tar = tarfile.open(fileobj=headers, mode="r:", errors="surrogateescape")  # noqa: SIM115
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # which would hold all of them
            if info.size < 0 or tar.offset <= at:
                raise tarfile.ReadError("an entry of a negative size")
            if has_image_name(info.name) and not OF_DATASET.match(info.name) and not info.isdir():
                yield _member(file, info, num_bytes)
            if tar.offset > num_bytes:
                raise tarfile.ReadError("it ends within an entry")
            at = tar.offset
        file.seek(at)
        if any(file.read(BLOCK)):
            raise tarfile.ReadError("no header of an entry")
    except UnreachedError:
        raise
    except Exception as error:  # on damaged headers tarfile raises all kinds, ValueError and RecursionError among them
        damage = str(error) if isinstance(error, tarfile.TarError) else type(error).__name__
    if damage and tar is None:
        file.seek(0)
        raise BrixelError(_no_tar(file.read(6), num_bytes))
    if damage:
        yield Member(f"#{at}", (at, 0), 0, 0, 0, f"the tar is damaged from byte {at:,} on: {damage}")


def _member(file: BinaryIO, info: tarfile.TarInfo, num_bytes: int) -> Member:
    part = (info.offset_data, info.size)
    reason = ""
    if not info.isreg():
        reason = "a link, pipe or device, not a file"
    elif info.issparse():
        reason = "a sparse file"
    elif sum(part) > num_bytes:
        reason = f"cut off: {max(num_bytes - part[0], 0):,} of {info.size:,} bytes"
    return measured(info.name, part, cast(BinaryIO, Window(file, *part)), info.size, reason)


def _no_tar(start: bytes, num_bytes: int) -> str:
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "a compressed tar: decompress it, for images do not get smaller"
    return "not a tar" if num_bytes else "empty: 0 bytes"


def read_part(path: Path, start: int, size: int) -> bytes:
    """Bytes of a local file.

    Raises:
        BrixelError: it cannot be read, or has become shorter; the message is the reason.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(size)
    except OSError as error:
        raise BrixelError(error.strerror or "cannot be read") from error
    if len(data) < size:
        raise BrixelError(f"cut off: {len(data):,} of {size:,} bytes")
    return data
