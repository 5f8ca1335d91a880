"""Images: finding them, and reading them as upright 8-bit RGB. Files are not trusted: format and size are checked."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import re
import stat
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, UnidentifiedImageError

from brixel_cli.core.formatting import human_bytes, printable, utf8
from brixel_cli.core.memory import is_out_of_memory, main_memory
from brixel_cli.core.metrics import rows_by_domain
from brixel_cli.data.orientation import turn_of, turns_by_a_quarter
from brixel_cli.errors import BrixelError, UnreachedError

EXTENSIONS = (
    ".apng", ".avif", ".bmp", ".dds", ".dib", ".gif", ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf",
    ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".sgi", ".tga",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Of the formats below."""
FORMATS = (
    "AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "TGA",
    "TIFF", "WEBP",
)  # fmt: skip
"""Formats that Pillow decodes by itself. It chooses by a file's contents, and would hand EPS over to Ghostscript."""

MAX_PIXELS = 178_956_970
"""Images with more pixels are refused: half a gigabyte as RGB, Pillow's own threshold for a decompression bomb."""
LARGE_PIXELS = MAX_PIXELS // 2
"""What has more is not worth its exact pixels: a JPEG is decoded at a part of its size where that is enough."""
BYTES_PER_PIXEL = 10
"""At the most, from decoding an image to its resized pixels."""
STRIP_PIXELS = 1 << 22
"""So many are converted to RGB at a time."""
ANIMATED = frozenset({"GIF", "WEBP", "PNG", "AVIF", "TIFF"})
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class ImageFile:
    """A readable image file; `name` is its path inside the folder, height and width are those after rotation."""

    path: Path
    name: str
    height: int
    width: int


@dataclass(frozen=True)
class Contents:
    """An image file that is no file on this disk, such as a member of a tar: its bytes, to be read and sought in."""

    name: str
    file: BinaryIO

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why."""

    name: str
    reason: str


def load_image(path: Path | Contents, still: bool = False) -> Image.Image:
    """Read an image as `decoded` does, to keep all of it."""
    with decoded(path, still) as image:
        return image


@contextmanager
def decoded(
    path: Path | Contents, still: bool = False, enough: tuple[int, int] | None = None, over: int = 0
) -> Iterator[Image.Image]:
    """An image as 8-bit RGB, EXIF orientation applied, 16-bit scaled to 8, transparency over white.

    Until it is left, other large images wait to be decoded: make of it what is needed, and let go of it.

    Args:
        path: of the file, or its contents.
        still: whether to refuse files of several frames or pages, whose first would otherwise be taken.
        enough: height and width in pixels of which more are not needed: a JPEG with at least twice as many along both
            sides is decoded at a half, a quarter or an eighth of its size, no smaller than this, which takes much less
            time. None: every file is decoded at its own size.
        over: this is done for images of more pixels alone.

    Raises:
        BrixelError: the file is no image, is damaged or too large, or memory ran out, also within; the message starts
            with the reason.
    """
    with ExitStack() as stack:
        with open_image(path, still) as image:
            num_pixels = image.width * image.height
            if enough is not None and image.format == "JPEG" and num_pixels > over:
                height, width = reversed(enough) if turns_by_a_quarter(image) else enough
                image.draft(None, (width, height))
                if not image.info.get("progressive"):  # which is held whole for decoding
                    num_pixels = image.width * image.height
            _take_room(stack, num_pixels)
            picture = upright(image)
        del image
        try:
            yield picture
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise BrixelError(f"memory ran out with its {num_pixels:,} pixels: {path}") from error


def upright(image: Image.Image) -> Image.Image:
    """An opened image as 8-bit RGB, with its EXIF orientation applied: what `load_image` returns of a file.

    An orientation that is damaged or not defined changes nothing. In a PNG it counts where it comes before the pixels.
    """
    turn = turn_of(image)  # before decoding, as for the size
    image.load()
    if turn is not None:
        image = image.transpose(turn)
        image.info.pop("exif", None)
    return _to_rgb(image)


def read_size(path: Path | Contents, still: bool = False) -> tuple[int, int]:
    """Height and width of an image after rotation, from its header alone; arguments and errors as for `load_image`."""
    with open_image(path, still) as image:
        width, height = image.size
        return (width, height) if turns_by_a_quarter(image) else (height, width)


class _Room:
    """Shares of MAX_PIXELS that images in work take, in the threads of this process or in processes forked from it."""

    SHARES = 64

    def __init__(self, kind: ModuleType):
        self._free, self._turn = kind.Semaphore(self.SHARES), kind.Lock()

    @contextmanager
    def taken(self, num_pixels: int) -> Iterator[None]:
        shares = min(math.ceil(num_pixels * self.SHARES / MAX_PIXELS), self.SHARES)
        with self._turn:  # two that gather at once could wait for each other
            for _ in range(shares):
                self._free.acquire()
        try:
            yield
        finally:
            for _ in range(shares):
                self._free.release()


_room = _Room(threading)


def share_room() -> None:
    """Have the worker processes that are forked next take room from one store, so that all of them are bounded."""
    global _room
    _room = _Room(multiprocessing)


def room_for(num_pixels: int) -> AbstractContextManager[None]:
    """Wait until the images in work, with this one, have no more than MAX_PIXELS together."""
    return _room.taken(num_pixels)


def _take_room(stack: ExitStack, num_pixels: int) -> None:
    """Wait for room, where memory is short until no other image is in work; raises a ValueError if it is not enough."""
    needed = num_pixels * BYTES_PER_PIXEL
    large = num_pixels > STRIP_PIXELS
    stack.enter_context(room_for(MAX_PIXELS if large and needed > main_memory() else num_pixels))
    if large and needed > (free := main_memory()):
        sizes = f"{human_bytes(needed)} of memory, and {human_bytes(free)} are free"
        raise ValueError(f"too large for this machine: {num_pixels:,} pixels take {sizes}")


def file_stat(path: Path) -> os.stat_result:
    """The status of a regular file.

    Raises:
        BrixelError: nothing is there, it may not be looked at, or it is a folder, a pipe or a device, from which
            reading might never end; the message starts with the reason.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device, not a file")
    except (OSError, ValueError) as error:
        raise BrixelError(f"{_reason(error, path)}: {path}") from error
    return status


@contextmanager
def open_image(path: Path | Contents, still: bool = False) -> Iterator[Image.Image]:
    """An image whose header has been read and found harmless; any error within becomes a BrixelError."""
    if isinstance(path, Path):
        file_stat(path)
    try:
        with Image.open(path if isinstance(path, Path) else path.file, formats=FORMATS) as image:
            if not image.width * image.height:
                raise ValueError("an image without pixels")
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width}x{image.height}, over {MAX_PIXELS:,}"
                raise ValueError(f"too many pixels (decompression bomb?): {size}")
            if still and image.format in ANIMATED and getattr(image, "is_animated", False):
                raise ValueError("animated, or several pages: save the one you want, or give it as a video")
            yield image
    except UnreachedError:
        raise
    except Exception as error:  # on damaged files Pillow raises all kinds, struct.error and IndexError among them
        raise BrixelError(f"{_reason(error, path)}: {path}") from error


def name_below(folder: Path, path: Path) -> str:
    """A file's path below a folder as UTF-8, which our own files are; bytes that are not become their escapes."""
    return utf8(path.relative_to(folder).as_posix())


def is_folder(path: Path) -> bool:
    """Whether there is a folder at a path.

    Raises:
        BrixelError: it may not be looked at.
    """
    try:
        if path.is_dir():
            os.scandir(path).close()
            return True
    except OSError as error:
        raise BrixelError(f"The folder {path} cannot be read: {error.strerror}. Name another one.") from error
    return False


def files_below(
    folder: Path, extensions: Collection[str] = EXTENSIONS, unreadable: list[Path] | None = None
) -> list[Path]:
    """Files below a folder that have one of these extensions, sorted; hidden files and folders are passed over.

    Folders that may not be looked into are added to `unreadable`.
    """
    return [Path(name) for name in file_names_below(folder, extensions, unreadable)]


def file_names_below(folder: Path, extensions: Collection[str], unreadable: list[Path] | None = None) -> list[str]:
    """The paths of `files_below` as texts, as there may be a million."""

    def refused(error: OSError) -> None:
        if unreadable is not None:
            unreadable.append(Path(error.filename))

    found = []
    for parent, folders, names in os.walk(folder, onerror=refused):
        folders[:] = [name for name in folders if not name.startswith(".")]
        chosen = [name for name in names if not name.startswith(".") and extension_of(name) in extensions]
        found += [path for name in chosen if _may_be_file(path := os.path.join(parent, name))]
    return sorted(found, key=lambda path: path.split(os.sep))


def extension_of(name: str) -> str:
    """What a file's name, or its path as text, ends with: `.jpg`, in lower case; empty where there is none."""
    return os.path.splitext(name)[1].lower()


def _may_be_file(path: str | Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:  # a file that may not be looked at is taken: whoever opens it says why
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # those of links that lead nowhere


def share_out(images: Sequence[ImageFile], most: int) -> list[ImageFile]:
    """The first ones, `most` at most: of images in folders of several domains, as many of each as there are."""
    domains = rows_by_domain(image.name for image in images) or {"": list(range(len(images)))}
    turns = sorted((turn, row) for rows in domains.values() for turn, row in enumerate(rows))
    return [images[row] for row in sorted(row for _, row in turns[:most])]


def scan_folder(folder: Path, min_side: int) -> tuple[list[ImageFile], list[Skipped]]:
    """List the images below a folder, sorted by name, by their headers alone; those that will not do apart.

    Args:
        folder: searched recursively; hidden files and folders are passed over.
        min_side: least length of the shorter side in pixels.

    Raises:
        BrixelError: the folder is missing, or nothing in it can be used.
    """
    if not is_folder(folder):
        raise BrixelError(f"No folder of images at {folder}. Name yours with --images DIR.")
    found: list[ImageFile] = []
    skipped: list[Skipped] = []
    unreadable: list[Path] = []
    for path in files_below(folder, unreadable=unreadable):
        name = name_below(folder, path)
        try:
            height, width = read_size(path)
        except BrixelError as error:
            skipped.append(Skipped(name, str(error).removesuffix(f": {path}")))
            continue
        if min(height, width) < min_side:
            skipped.append(Skipped(name, f"too small: {width}x{height}, shorter side under {min_side}"))
        else:
            found.append(ImageFile(path, name, height, width))
    skipped += [Skipped(f"{name_below(folder, path)}/", "a folder that cannot be read") for path in unreadable]
    if not found:
        others = sum(_may_be_file(path) for path in folder.rglob("*")) - len(skipped)
        reasons = f"\n{describe_skipped(skipped, 5)}" if skipped else ""
        raise BrixelError(
            f"No usable image in {folder}: {len(skipped)} skipped, "
            f"{others} files with other extensions.{reasons}\n"
            "Name another folder with --images DIR, or lower data.min_side."
        )
    return found, skipped


def describe_skipped(skipped: Sequence[Skipped], limit: int = 10) -> str:
    """The skipped files with their reasons, a line each."""
    lines = [printable(f"  {item.name}: {item.reason}") for item in skipped[:limit]]
    return "\n".join(lines + ([f"  and {len(skipped) - limit} more"] if len(skipped) > limit else []))


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, made strip by strip, so that no other copy of the whole image is needed."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    rows = max(STRIP_PIXELS // image.width, 1)
    strips = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    most = max(_values(image.crop(strip)).max(initial=0) for strip in strips) if _is_numeric(image) else 0
    whole = Image.new("RGB", image.size)
    for strip in strips:
        whole.paste(_strip_to_rgb(image.crop(strip), most), strip)
    return whole


def _is_numeric(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _values(image: Image.Image) -> npt.NDArray[np.float64]:
    return np.nan_to_num(np.asarray(image, dtype=np.float64))


def _strip_to_rgb(image: Image.Image, most: float) -> Image.Image:
    """A part of an image as RGB; `most` is the largest value of the whole one."""
    if _is_numeric(image):
        values = _values(image)
        if image.mode == "F" and most <= 1:
            values = values * 255
        elif image.mode.startswith("I;16") or most > 255:
            values = values / 257  # 16 bits: 65535 -> 255
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return converted
    return image.convert("RGB")


def _reason(error: Exception, path: Path | Contents) -> str:
    if isinstance(error, UnidentifiedImageError):
        with path.open("rb") if isinstance(path, Path) else nullcontext(path.file) as file:
            file.seek(0)
            start = file.read(len(HDF5_SIGNATURE))
        if start == HDF5_SIGNATURE:
            return "a file of HDF5, such as a feature file of brixel, not an image"
        return "not an image of a format that brixel reads" if start else "empty: 0 bytes"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels (decompression bomb?)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
