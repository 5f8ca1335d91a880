"""Files that appear under their name only when they are complete, and the room that they need on a disk."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import re
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image

from brixel_cli.core.formatting import human_bytes
from brixel_cli.errors import BrixelError, UsageError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # only POSIX has it
    fcntl = None
_PARSER = threading.Lock()
"""NumPy parses the header of a .npy file as Python, in which CPython 3.11 fails where two threads are in its parser."""
_POSITION = threading.Lock()
"""Where the system has no positioned writes: threads would move the one position of an open file for each other."""
MOST_PIECES = 1024
"""That one call of the system writes."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system without locks answers."""
LONGEST_NAME = 255
"""Bytes of a name that file systems take."""
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_held: set[int] = set()
"""Open files that hold locks. A forked process closes its own, so that it cannot outlive its parent with the lock."""


def _drop_locks() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_locks)


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

    The name holds host and process, so that two processes never write to the same one; it is removed after a failure,
    and what a killed process has left by `clear_partials`.

    Raises:
        BrixelError: the file cannot be written.
    """
    end = f".{_HOST}.{os.getpid()}.partial"
    partial = path.with_name(os.fsdecode(os.fsencode(path.name)[: LONGEST_NAME - len(end)]) + end)
    with writing(path):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):  # a read-only disk would object once more
                partial.unlink(missing_ok=True)


def open_to_fill(path: Path) -> int:
    """A file that is there, opened for `write_at`; what it holds stays.

    Raises:
        OSError: it cannot be opened.
    """
    return os.open(path, os.O_WRONLY | getattr(os, "O_BINARY", 0))  # else Windows writes two bytes for each newline


def write_at(descriptor: int, pieces: Sequence[memoryview], place: int) -> None:
    """Write all bytes from a place of an open file on, in any thread; other bytes of the file stay as they are.

    Args:
        descriptor: from `open_to_fill`.
        pieces: bytes, one piece after the other.
        place: offset of the first byte.

    Raises:
        OSError: the disk refuses it.
    """
    for start in range(0, len(pieces), MOST_PIECES):
        left = list(pieces[start : start + MOST_PIECES])
        while left:
            written = _write_some(descriptor, left, place)
            place += written
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]


def _write_some(descriptor: int, pieces: Sequence[memoryview], place: int) -> int:
    """Write from a place of an open file on as much as the system takes at once; returns the number of bytes."""
    if hasattr(os, "pwritev"):
        return os.pwritev(descriptor, pieces, place)
    if hasattr(os, "pwrite"):  # some builds for macOS
        return os.pwrite(descriptor, pieces[0], place)
    with _POSITION:  # Windows
        os.lseek(descriptor, place, os.SEEK_SET)
        return os.write(descriptor, pieces[0])


def clear_partials(output: Path) -> None:
    """Remove what processes of this host that are gone have left half written: of a file, or anywhere in a folder."""
    beside = output.parent.glob("*.partial") if output.parent.is_dir() else ()
    own = [path for path in beside if path.name.startswith(f"{output.name}.")]
    for path in (*own, *output.rglob("*.partial")):
        found = re.search(rf"\.{_HOST}\.(\d+)\.partial$", path.name)
        if found and not psutil.pid_exists(int(found[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; raises as `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG atomically; raises as `replacing`."""
    with replacing(path) as partial:
        picture.save(partial, format="PNG")


def check_picture(path: Path) -> None:
    """Read a PNG of ours again; raises an OSError or a SyntaxError where it is damaged."""
    with Image.open(path, formats=["PNG"]) as picture:
        picture.verify()


def check_files(checks: Mapping[Path, Callable[[Path], object]]) -> dict[Path, str]:
    """Read files again: for each what is wrong with it, or an empty text.

    Args:
        checks: what reads each file, and raises an error where it is damaged.
    """
    found = {}
    for path, check in checks.items():
        try:
            if not path.is_file():
                raise OSError("it is missing")
            check(path)
            found[path] = ""
        except (BrixelError, OSError, SyntaxError, ValueError, LookupError, TypeError, RecursionError) as error:
            found[path] = str(error).splitlines()[0] if str(error) else type(error).__name__
    return found


def check_regular(path: Path) -> None:
    """Raise an OSError unless a path is that of a regular file: opening a pipe would wait for ever."""
    if not path.is_file():
        raise OSError("it is missing, or no regular file")


def read_npy(path: Path, mapped: bool = False) -> npt.NDArray[Any]:
    """The array of a .npy file, which may be read in several threads at once.

    Args:
        path: of the file.
        mapped: whether no more than its header is read now.

    Raises:
        BrixelError: the file is missing, damaged, shorter than its header says, or holds anything but real numbers.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            with _PARSER:
                version = np.lib.format.read_magic(file)
                if version not in ((1, 0), (2, 0), (3, 0)):
                    raise ValueError(f"its version is {version}")
                read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
                shape, columns_first, dtype = read(file)
            count, there = math.prod(shape), os.fstat(file.fileno()).st_size - file.tell()
            if dtype.kind not in "biuf" or dtype.subdtype is not None:
                raise ValueError(f"it holds {'Python objects' if dtype.hasobject else dtype}, not real numbers")
            if min(shape, default=0) < 0:
                raise ValueError(f"its shape is {shape}")
            if count * dtype.itemsize > there:
                raise ValueError(f"its header says {count * dtype.itemsize} bytes, and {there} follow")
            if mapped and count:
                return np.memmap(path, dtype, "r", file.tell(), shape, "F" if columns_first else "C")
            values = np.fromfile(file, dtype, count)
        return values.reshape(shape, order="F" if columns_first else "C")
    except Exception as error:  # of many kinds: NumPy takes a header for Python, and evaluates it
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise BrixelError(f"{path} is no .npy file that can be read: {reason}") from error


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other processes from writing the same output, through a file beside it that is removed afterwards.

    The system holds the lock for as long as this process lives, so that one left behind by a killed process does not
    count; what such a process left half written is removed. The file says who holds it. It lies in a folder beside
    which nothing can be written. Where the file system has no locks, nothing is kept from anybody.

    Raises:
        BrixelError: another process holds the lock.
    """
    output = output.resolve()
    path = output.with_name(f"{output.name}.lock")
    make_folder(path.parent)
    if output.is_dir() and not os.access(path.parent, os.W_OK):
        path = output / ".lock"
    with writing(path):
        descriptor = _lock(path)
    if descriptor is None:
        with contextlib.suppress(OSError):  # it may have ended this moment
            holder = path.read_text(encoding="utf-8", errors="replace").strip()
            raise BrixelError(
                f"{output} is being written by another process ({holder}). Wait until it ends, or name another output."
            )
        raise BrixelError(f"{output} was being written by another process until now. Give the same command again.")
    _held.add(descriptor)
    try:
        clear_partials(output)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """An open file that holds the lock; None where another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:  # else its holder has removed it meanwhile
                os.truncate(descriptor, 0)
                who = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
                os.write(descriptor, who.encode())
                return descriptor
        os.close(descriptor)


class SizedFile(io.RawIOBase):
    """A file to read from, of a size that is known: its position, for those that define `read`.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int):
        self._size, self._at = size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The position of the next byte to be read."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position, as `io.IOBase.seek`, and return it; it may lie beyond the end."""
        self._at = max(offset + (0, self._at, self._size)[whence], 0)
        return self._at


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        BrixelError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BrixelError(f"The folder {path} cannot be made: {error.strerror}. Choose another one.") from error


def refuse_others(folder: Path, theirs: Sequence[Path], mark: str) -> None:
    """Refuse a folder with files that brixel may not replace, as what it would have written beside them is not there.

    Args:
        folder: in which they lie.
        theirs: the files; none: the folder is taken.
        mark: what is missing, such as `results.json of a probe`.

    Raises:
        UsageError: there are such files.
    """
    if theirs:
        raise UsageError(
            f"{folder} holds {theirs[0].relative_to(folder)}, but no {mark}: brixel does not replace files of others. "
            "Name another folder with --output, or delete them."
        )


def inside(folder: Path, name: str) -> Path:
    """The path of a file to be written or removed below a folder.

    Raises:
        BrixelError: a link on the way leads out of it.
    """
    path = folder / name
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise BrixelError(f"{path} lies behind a link that leads out of {folder}. Remove it, or name another --output.")
    return path


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
