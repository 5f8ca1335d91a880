"""Photographs: finding them, and reading any format that Pillow knows as upright 8-bit RGB."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from brixel_cli.errors import BrixelError

EXTENSIONS = (
    ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm",
    ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip


@dataclass(frozen=True)
class Photograph:
    """A readable photograph; `name` is its path inside the folder, height and width are those after rotation."""

    path: Path
    name: str
    height: int
    width: int


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why."""

    name: str
    reason: str


def load_image(path: Path) -> Image.Image:
    """Read an image as 8-bit RGB, EXIF orientation applied, 16-bit scaled to 8, transparency over white.

    Raises:
        BrixelError: the file is no image, is damaged, or cannot be opened; the message starts with the reason.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BrixelError(f"{_reason(error)}: {path}") from error


def scan_folder(folder: Path, min_side: int) -> tuple[list[Photograph], list[Skipped]]:
    """List the photographs below a folder, sorted by name, by their headers alone; those that will not do apart.

    Args:
        folder: searched recursively; hidden files and folders are passed over.
        min_side: least length of the shorter side in pixels.

    Raises:
        BrixelError: the folder is missing, or nothing in it can be used.
    """
    if not folder.is_dir():
        raise BrixelError(f"No folder of photographs at {folder}. Name yours with --images DIR.")
    found: list[Photograph] = []
    skipped: list[Skipped] = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if (
            path.suffix.lower() not in EXTENSIONS
            or not path.is_file()
            or any(p.startswith(".") for p in relative.parts)
        ):
            continue
        try:
            with Image.open(path) as image:
                width, height = image.size
                if _is_turned(image):
                    width, height = height, width
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            skipped.append(Skipped(str(relative), _reason(error)))
            continue
        if min(height, width) < min_side:
            skipped.append(Skipped(str(relative), f"too small: {width}x{height}, shorter side under {min_side}"))
        else:
            found.append(Photograph(path, str(relative), height, width))
    if not found:
        reasons = "".join(f"\n  {item.name}: {item.reason}" for item in skipped[:5])
        raise BrixelError(
            f"No usable photograph in {folder}: {len(skipped)} skipped.{reasons}\n"
            "Name another folder with --images DIR, or lower data.min_side."
        )
    return found, skipped


def describe_skipped(skipped: Sequence[Skipped], limit: int = 10) -> str:
    """The skipped files with their reasons, a line each."""
    lines = [f"  {item.name}: {item.reason}" for item in skipped[:limit]]
    return "\n".join(lines + ([f"  and {len(skipped) - limit} more"] if len(skipped) > limit else []))


def _is_turned(image: Image.Image) -> bool:
    """Whether the EXIF orientation turns an opened image by a quarter, unlike the size that it states."""
    if image.format == "TIFF":
        return False  # Pillow states the upright size of these
    if image.format == "PNG" and "exif" not in image.info:
        return False  # looking further would decode the whole image
    return int(image.getexif().get(0x0112, 1)) >= 5


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if image.mode.startswith("I;16") or values.max(initial=0) > 255:
            values = values / 257  # 16 bits: 65535 -> 255
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels (decompression bomb?)"
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
