"""Images: finding them, and reading any format that Pillow knows as upright 8-bit RGB."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from brixel_cli.errors import BrixelError

EXTENSIONS = (
    ".apng", ".avif", ".bmp", ".dds", ".dib", ".gif", ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf",
    ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".sgi", ".tga",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Of the formats that Pillow reads by itself; its stubs for HDF5 and the like are left out."""


MAX_PIXELS = 178_956_970
"""Images with more pixels are refused: half a gigabyte as RGB, Pillow's own threshold for a decompression bomb."""
ANIMATED = frozenset({"GIF", "WEBP", "PNG", "AVIF", "TIFF"})


@dataclass(frozen=True)
class Photograph:
    """A readable image file; `name` is its path inside the folder, height and width are those after rotation."""

    path: Path
    name: str
    height: int
    width: int


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why."""

    name: str
    reason: str


def load_image(path: Path, still: bool = False, enough: tuple[int, int] | None = None) -> Image.Image:
    """Read an image as 8-bit RGB, EXIF orientation applied, 16-bit scaled to 8, transparency over white.

    Args:
        path: of the file.
        still: whether to refuse files of several frames or pages, whose first would otherwise be taken.
        enough: height and width in pixels of which more are not needed: a JPEG with at least twice as many along both
            sides is decoded at a half, a quarter or an eighth of its size, no smaller than this, which takes much less
            time. None: every file is decoded at its own size.

    Raises:
        BrixelError: the file is no image, is damaged or too large; the message starts with the reason.
    """
    with open_image(path, still) as image:
        if enough is not None and image.format == "JPEG":
            height, width = reversed(enough) if _is_turned(image) else enough
            image.draft(None, (width, height))
        image.load()
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image that was opened elsewhere, made what `load_image` returns."""
    return _to_rgb(_upright(image))


def read_size(path: Path, still: bool = False) -> tuple[int, int]:
    """Height and width of an image after rotation, from its header alone; arguments and errors as for `load_image`."""
    with open_image(path, still) as image:
        width, height = image.size
        return (width, height) if _is_turned(image) else (height, width)


@contextmanager
def open_image(path: Path, still: bool = False) -> Iterator[Image.Image]:
    """An image whose header has been read and found harmless; any error within becomes a BrixelError."""
    try:
        with Image.open(path) as image:
            if not image.width:  # Pillow knows some formats by name alone
                ours = ", such as a feature file of brixel" if image.format == "HDF5" else ""
                raise ValueError(f"a file of {image.format}{ours}, not an image")
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width}x{image.height}, over {MAX_PIXELS:,}"
                raise ValueError(f"too many pixels (decompression bomb?): {size}")
            if still and image.format in ANIMATED and getattr(image, "is_animated", False):
                raise ValueError("animated, or several pages: save the one you want, or give it as a video")
            yield image
    except Exception as error:  # on damaged files Pillow raises all kinds, struct.error and IndexError among them
        raise BrixelError(f"{_reason(error, path)}: {path}") from error


def files_below(folder: Path, extensions: Collection[str] = EXTENSIONS) -> list[Path]:
    """Files below a folder that have one of these extensions, sorted; hidden files and folders are passed over."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in extensions
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]


def scan_folder(folder: Path, min_side: int) -> tuple[list[Photograph], list[Skipped]]:
    """List the images below a folder, sorted by name, by their headers alone; those that will not do apart.

    Args:
        folder: searched recursively; hidden files and folders are passed over.
        min_side: least length of the shorter side in pixels.

    Raises:
        BrixelError: the folder is missing, or nothing in it can be used.
    """
    if not folder.is_dir():
        raise BrixelError(f"No folder of images at {folder}. Name yours with --images DIR.")
    found: list[Photograph] = []
    skipped: list[Skipped] = []
    for path in files_below(folder):
        relative = path.relative_to(folder)
        try:
            height, width = read_size(path)
        except BrixelError as error:
            skipped.append(Skipped(str(relative), str(error).removesuffix(f": {path}")))
            continue
        if min(height, width) < min_side:
            skipped.append(Skipped(str(relative), f"too small: {width}x{height}, shorter side under {min_side}"))
        else:
            found.append(Photograph(path, str(relative), height, width))
    if not found:
        others = sum(path.is_file() for path in folder.rglob("*")) - len(skipped)
        reasons = f"\n{describe_skipped(skipped, 5)}" if skipped else ""
        raise BrixelError(
            f"No usable image in {folder}: {len(skipped)} skipped, "
            f"{others} files with other extensions.{reasons}\n"
            "Name another folder with --images DIR, or lower data.min_side."
        )
    return found, skipped


def describe_skipped(skipped: Sequence[Skipped], limit: int = 10) -> str:
    """The skipped files with their reasons, a line each."""
    lines = [f"  {item.name}: {item.reason}" for item in skipped[:limit]]
    return "\n".join(lines + ([f"  and {len(skipped) - limit} more"] if len(skipped) > limit else []))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a damaged EXIF block: the pixels may be sound
        return 1


def _is_turned(image: Image.Image) -> bool:
    """Whether the EXIF orientation turns an opened image by a quarter, unlike the size that it states."""
    if image.format == "TIFF":
        return False  # Pillow states the upright size of these
    if image.format == "PNG" and "exif" not in image.info:
        return False  # looking further would decode the whole image
    return _orientation(image) >= 5


def _upright(image: Image.Image) -> Image.Image:
    if _orientation(image) == 1:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as above
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        most = values.max(initial=0)
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
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read" if path.stat().st_size else "empty: 0 bytes"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels (decompression bomb?)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
