"""Texts of the user that mean a size, bytes or a device. Without pydantic, which would slow down `--help`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from brixel_cli.errors import UsageError


def device_name(text: str) -> str:
    """The text, unless it names no device, which is a ValueError."""
    if re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", text) is None:
        raise ValueError(f"a device is auto, cpu, cuda, cuda:1 (the second GPU) or mps; found {text}")
    return text


Device = str
"""`auto`, `cpu`, `cuda`, `cuda:N` or `mps`."""
Precision = Literal["auto", "float32", "bfloat16", "float16"]
"""Arithmetic of the networks. `auto`: bfloat16 where the device computes in it; on other GPUs float16, in training
float32; elsewhere float32."""


def check_device(text: str, option: str = "--device") -> None:
    """Raise a UsageError that names the option unless the text names a device."""
    try:
        device_name(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}.") from error


def height_width(side: int | Sequence[int]) -> tuple[int, int]:
    """A size as (height, width)."""
    return (side, side) if isinstance(side, int) else (side[0], side[1])


MOST = 1_000_000
"""Of pixels of a side, images at once and the like: more is a slip, and would overflow somewhere."""


def check_counts(counts: Mapping[str, int | None]) -> None:
    """Raise a UsageError for an option, by name, that is neither None nor from 1 to a million."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}.")
        if value is not None and value > MOST:
            raise UsageError(f"{name} must be at most {MOST:,}, not {value:.6g}.")


MOST_SIZES = 5
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """`4GB`, `512 MiB` or a plain number as bytes; GB is 10^9, GiB 2^30.

    Raises:
        UsageError: it is none of these.
    """
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS or float(match[1]) == 0:
        raise UsageError(f"--budget must be a size such as 4GB, 512MiB or 800MB, not {_short(text)}.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_size(text: str, option: str = "--res") -> int | list[int]:
    """A size in pixels: `112`, or `288x384` as [height, width].

    Args:
        text: of the user.
        option: names it in errors.

    Raises:
        UsageError: it is neither.
    """
    match = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:x\s*([0-9]{1,6}))?\s*", text.lower())
    sides = [int(side) for side in match.groups() if side] if match else []
    if not sides or min(sides) == 0:
        raise UsageError(
            f"{option} takes a side in pixels, such as 112, or HEIGHTxWIDTH, such as 288x384; not {_short(text)}."
        )
    return sides[0] if len(sides) == 1 else sides


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."


def parse_sizes(text: str, patch_size: int, option: str = "--res") -> list[tuple[int, int]]:
    """Sizes (height, width) in pixels: `112`, `96x128`, `84,112,168`, or a range `128..512`.

    A range has both ends and up to three sizes between, in equal ratios; its sizes are rounded to the patch.
    Sizes given one by one are taken as they are.

    Raises:
        UsageError: the text is none of these, or a range runs backwards.
    """
    sizes: list[tuple[int, int]] = []
    for part in text.split(","):
        ends = [height_width(parse_size(end, option)) for end in part.split("..")]
        if len(ends) == 1:
            sizes += ends
            continue
        (first, _), (last, _) = ends[0], ends[-1]
        if len(ends) > 2 or any(height != width for height, width in ends) or last <= first:
            raise UsageError(f"{option} {part.strip()}: a range runs from a smaller side to a larger one: 128..512.")
        for step in range(MOST_SIZES):
            side = first * (last / first) ** (step / (MOST_SIZES - 1))
            side = max(round(side / patch_size), 1) * patch_size
            sizes.append((side, side))
    return list(dict.fromkeys(sizes))


def scheduled_rate(schedule: str, peak: float, step: int, total: int, warmup_steps: int) -> float:
    """Learning rate of a step.

    Args:
        schedule: from the peak to zero by half a cosine (`cosine`) or in proportion (`linear`); or `constant`.
        peak: the rate after the warm-up.
        step: from 0 to total - 1.
        total: steps of the training.
        warmup_steps: over which the rate rises linearly from zero; at most a tenth of the training is used.
    """
    warmup = min(warmup_steps, total // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    done, length = step - warmup, max(total - warmup, 1)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done / length))
    return peak * (1 - done / length) if schedule == "linear" else peak


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The question whether the nearest of the known words was meant, after a space; empty where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""
