"""The student's rival at equal cost: the plain backbone at a larger input, whose map is enlarged bilinearly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from brixel_cli.core.adapter import resize
from brixel_cli.core.student import Student
from brixel_cli.engines.latency import Latency, interleaved
from brixel_cli.engines.runtime import Runtime, call_seconds

EQUAL_COST = "backbone, equal cost"
TRIALS = 3
MARGIN = 1.25
"""Inputs that take so many times the student's time in a few calls need not be timed with care."""
ROUNDS = 15
Size = tuple[int, int]


def student_grid(student: Student, size: Size) -> Size:
    """Grid (height, width) of the student's map at an input of `size` pixels."""
    patch, factor = student.backbone.patch_size, student.adapter.factor
    return size[0] // patch * factor, size[1] // patch * factor


def enlarged_map(student: Student, size: Size) -> Callable[[Tensor], Tensor]:
    """The plain backbone of any images, its map enlarged bilinearly to the grid of the student's at `size`."""
    grid = student_grid(student, size)
    return lambda images: resize(student.backbone.last_map(images), grid)


@torch.inference_mode()
def find_rivals(student: Student, size: Size, runtime: Runtime, batch_size: int = 1) -> list[Size]:
    """The student's input, and the larger ones at which the plain backbone may take no longer, by a few calls each.

    They have the same proportions, one patch more of the shorter side each, up to the teacher's.

    Args:
        student: with the backbone.
        size: the student's input (height, width) in pixels.
        runtime: device and precision.
        batch_size: images at once.
    """
    patch = student.backbone.patch_size
    short, plain = min(size) // patch, enlarged_map(student, size)

    def fastest(call: Callable[[Tensor], Tensor], input_size: Size) -> float:
        timed = _timed(call, input_size, runtime, batch_size)
        timed()
        return min(call_seconds(timed, runtime.device) for _ in range(TRIALS))

    limit = MARGIN * fastest(student, size)
    larger = (
        (round(size[0] * patches / short / patch) * patch, round(size[1] * patches / short / patch) * patch)
        for patches in range(short + 1, short * student.adapter.factor + 1)
    )
    return [size, *itertools.takewhile(lambda input_size: fastest(plain, input_size) <= limit, larger)]


def choose_rival(rivals: Sequence[Size], times: Mapping[Size, Latency], limit: float) -> Size:
    """The largest input whose median time is within the limit in seconds; else the first."""
    return next((size for size in reversed(rivals) if times[size].median <= limit), rivals[0])


@torch.inference_mode()
def equal_cost_size(student: Student, size: Size, runtime: Runtime, seconds: float = 2.0) -> Size:
    """The largest input of the plain backbone that takes no longer than the student, measured in interleaved rounds.

    Args:
        student: with the backbone.
        size: the student's input (height, width) in pixels.
        runtime: device and precision.
        seconds: of timing; at least `ROUNDS` rounds are made.
    """
    rivals, plain = find_rivals(student, size, runtime), enlarged_map(student, size)
    calls = {str(rival): _timed(plain, rival, runtime, 1) for rival in rivals}
    found = interleaved(
        {"student": _timed(student, size, runtime, 1), **calls}, runtime.device, seconds, min_rounds=ROUNDS
    )
    return choose_rival(rivals, {rival: found[str(rival)] for rival in rivals}, found["student"].median)


def _timed(call: Callable[[Tensor], Tensor], size: Size, runtime: Runtime, batch_size: int) -> Callable[[], Tensor]:
    return partial(runtime.in_precision(call), torch.randn(batch_size, 3, *size, device=runtime.device))
