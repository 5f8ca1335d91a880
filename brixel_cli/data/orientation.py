"""How an image has to be turned to be upright: from its EXIF orientation."""

from __future__ import annotations

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What each EXIF orientation asks for; 1 and all that are not defined ask for nothing."""


def _orientation(image: Image.Image) -> object:
    try:
        # Not the PNG's own method, which decodes the whole image to look for EXIF behind the pixels.
        return Image.Image.getexif(image).get(ORIENTATION)
    except Exception:  # a damaged EXIF block: the pixels may be sound
        return None


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """How the pixels are to be turned to be upright; Pillow turns those of a TIFF itself."""
    orientation = _orientation(image)
    return TURNS.get(orientation) if isinstance(orientation, int) and image.format != "TIFF" else None


def turns_by_a_quarter(image: Image.Image) -> bool:
    """Whether height and width are exchanged between an opened image and the upright one."""
    quarters = (5, 6, 7, 8)
    if isinstance(image, TiffImageFile):  # states its upright size, unless the orientation is in its XMP alone
        return (_orientation(image) in quarters) != (image.tag_v2.get(ORIENTATION) in quarters)
    return turn_of(image) in [TURNS[orientation] for orientation in quarters]
