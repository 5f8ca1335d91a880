"""How numbers and texts from outside are written: for people, and as JSON and CSV for programs."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories: control characters, those that are invisible or turn the direction, surrogates, line ends."""


def printable(text: str) -> str:
    r"""A text from outside, such as a file's name, on one line and as harmless to a terminal as it looks.

    What would not be seen, or could move the cursor, is written as its escape, such as \x1b or \n.
    """
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in UNSEEN else char for char in text
    )


def printable_lines(text: str, indent: str = "") -> str:
    """A text of ours in which names from outside may stand: each line printable, all but the first indented."""
    return f"\n{indent}".join(map(printable, text.split("\n")))


def utf8(text: str) -> str:
    """A file's name as it can be written in UTF-8; what is not of it becomes its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def human_bytes(count: float) -> str:
    """A number of bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_seconds(seconds: float | None) -> str:
    """A time for people: 29.1 ms, 1.25 s, 3.4 min, 2.5 h; a dash where it is not known."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1e3:,.1f} ms"
    if seconds < 120:
        return f"{seconds:,.2f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def human_count(count: int) -> str:
    """A large number in millions: 22.1M."""
    return f"{count / 1e6:,.1f}M" if count >= 100_000 else f"{count / 1e6:,.2f}M" if count else "0"


def human_percent(share: float | None) -> str:
    """A share: 12.5%; a dash where it is not known."""
    return "-" if share is None or math.isnan(share) else f"{share:.1%}"


def human_size(size: tuple[int, int]) -> str:
    """Height and width: 112x112. Names of datasets hold sizes in this form."""
    return f"{size[0]}x{size[1]}"


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV; None and nan are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if value is None or value != value else value for value in row] for row in rows)
    return text.getvalue()


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON as the standard has it: nan and infinity become null, other objects their text."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=str)


def now() -> str:
    """Date and time, ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Stored:
    """A dataclass of results that is kept as JSON."""

    def to_json(self) -> str:
        """As its file has it; nan becomes null."""
        return to_json(dataclasses.asdict(self), indent=2) + "\n"  # type: ignore[call-overload]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
