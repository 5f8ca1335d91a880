"""Files that appear under their name only when they are complete, and the room that they need on a disk."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from brixel_cli.core.formatting import human_bytes
from brixel_cli.errors import BrixelError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into a BrixelError that says how to go on."""
    try:
        yield
    except OSError as error:
        raise BrixelError(
            f"{path} cannot be written: {error.strerror or error}. What was finished stays: make room or choose "
            "another folder, and give the same command again."
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; on leaving, that file takes the place of `path` in one step.

    The name holds the process, so that two processes never write to the same one; it is removed after a failure.

    Raises:
        BrixelError: the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):  # a read-only disk would object once more
                partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; raises as `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG atomically; raises as `replacing`."""
    with replacing(path) as partial:
        picture.save(partial, format="PNG")


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        BrixelError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BrixelError(f"The folder {path} cannot be made: {error.strerror}. Choose another one.") from error


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raise a BrixelError where `needed` bytes do not fit on the disk of `folder`, which need not exist yet."""
    free = free_bytes(folder)
    if needed > free:
        raise BrixelError(
            f"{what} needs {human_bytes(needed)}, but {_existing(folder)} has {human_bytes(free)} free. "
            "Make room, choose another folder, or ask for less."
        )


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
