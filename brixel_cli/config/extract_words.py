"""What the values of three options of `brixel extract` mean, as they stand on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from brixel_cli.config.extract import Field
from brixel_cli.errors import UsageError


def named_fields(text: str) -> tuple[Field, ...]:
    """Fields, separated by commas; whether they are any, `ExtractOptions` checks."""
    return cast(tuple[Field, ...], tuple(text.split(",")) if text else ())


def named_output(text: str | None) -> tuple[Path | None, str | None]:
    """The output on this disk, and the URL that it is copied to; of a URL, the file of its name in the current folder.

    Raises:
        UsageError: the URL is of a web server, which takes no files, or names no file.
    """
    if text is None or "://" not in text:
        return None if text is None else Path(text), None
    scheme, _, rest = text.partition("://")
    name = rest.rpartition("/")[2]
    if scheme.lower() in ("http", "https"):
        raise UsageError(
            f"--output {scheme}://...: a web server takes no files. Name a bucket, or a file on this disk."
        )
    if not name.removesuffix(".h5") or not name.endswith(".h5"):
        raise UsageError(f"--output {scheme}://...: name an .h5 file in the bucket, such as s3://bucket/photos.h5.")
    return Path(name), text


def named_layers(text: str | None) -> tuple[int, ...]:
    """Numbers of blocks, separated by commas.

    Raises:
        UsageError: one is no number.
    """
    words = text.split(",") if text else []
    if odd := [word for word in words if not (word.isdecimal() and len(word) < 7)]:
        raise UsageError(f"--layers takes numbers of blocks from 0 up, by commas, such as 5,8,11; not {odd[0][:40]!r}.")
    return tuple(map(int, words))
