"""What all options have in common: typed sections, and texts of the user's that mean a size, bytes or a device."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from brixel_cli.errors import UsageError

Device = str
"""`auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `engines.runtime` says what each means."""
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Side = PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
"""A size in pixels: one side, or [height, width]."""
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Frozen, and closed: a key that is not listed is a fault, never silently dropped."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def height_width(side: Side) -> tuple[int, int]:
    """A size as (height, width)."""
    return (side, side) if isinstance(side, int) else (side[0], side[1])


MOST_SIZES = 5
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """`4GB`, `512 MiB` or a plain number as bytes; GB is 10^9, GiB 2^30.

    Raises:
        UsageError: it is none of these.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS or float(match[1]) == 0:
        raise UsageError(f"--budget must be a size such as 4GB, 512MiB or 800MB, not {text}.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_sizes(text: str, patch_size: int) -> list[tuple[int, int]]:
    """Sizes (height, width) in pixels: `112`, `96x128`, `84,112,168`, or a range `128..512`.

    A range has both ends and up to three sizes between, in equal ratios; its sizes are rounded to the patch.
    Sizes given one by one are taken as they are.

    Raises:
        UsageError: the text is none of these, or a range runs backwards.
    """
    sizes: list[tuple[int, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:(x|\.\.)\s*(\d+))?\s*", part)
        if match is None or int(match[1]) == 0 or (match[3] is not None and int(match[3]) == 0):
            raise UsageError(f"--sizes takes 112, 96x128, 84,112,168 or 128..512, in pixels; not {text}.")
        first, last = int(match[1]), int(match[3] or match[1])
        if match[2] != "..":
            sizes.append((first, last))
            continue
        if last <= first:
            raise UsageError(f"--sizes {part.strip()}: the range runs from the smaller size to the larger.")
        for step in range(MOST_SIZES):
            side = first * (last / first) ** (step / (MOST_SIZES - 1))
            side = max(round(side / patch_size), 1) * patch_size
            sizes.append((side, side))
    return list(dict.fromkeys(sizes))
