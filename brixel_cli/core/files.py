"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from brixel_cli.errors import BrixelError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what stands there takes the place of `path` on leaving.

    Raises:
        BrixelError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise BrixelError(
            f"{path} cannot be written: {error.strerror}. Make room, or choose another folder."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; raises as `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG atomically; raises as `replacing`."""
    with replacing(path) as partial:
        picture.save(partial, format="PNG")
