"""The student's rival at equal cost: the plain backbone at a larger input, whose map is enlarged bilinearly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from brixel_cli.core.formatting import human_size
from brixel_cli.core.student import Student
from brixel_cli.engines.benchmarking.latency import Latency, interleaved
from brixel_cli.engines.benchmarking.methods import EQUAL_COST, Method, enlarged, in_precision, make_methods
from brixel_cli.engines.benchmarking.results import Size
from brixel_cli.engines.runtime import Runtime, call_seconds

TRIALS = 3
MARGIN = 1.25
"""Inputs that take so many times the student's time in a few calls need not be timed with care."""
ROUNDS = 15


@torch.inference_mode()
def find_rivals(student: Student, size: Size, runtime: Runtime, batch_size: int = 1) -> list[Method]:
    """The plain backbone at `size` and at larger inputs, as long as one may take no longer than the student.

    Their labels tell them apart; the one that is chosen by `choose_rival` has its final label.

    Args:
        student: with the backbone.
        size: the student's input (height, width) in pixels.
        runtime: device and precision.
        batch_size: images at once.
    """
    adapted = next(method for method in make_methods(student, size, highres=False) if method.kind == "student")
    limit = MARGIN * _fastest(adapted, runtime, batch_size)
    larger = itertools.takewhile(lambda method: _fastest(method, runtime, batch_size) <= limit, _larger(student, size))
    found = [enlarged(student, size, size), *larger]
    return [replace(method, label=f"{method.label} {human_size(method.input_size)}") for method in found]


def choose_rival(rivals: Sequence[Method], times: Mapping[str, Latency], limit: float) -> Method:
    """The one with the largest input whose median time is within the limit in seconds; else the first."""
    within = [method for method in rivals if times[method.label].median <= limit]
    return replace(within[-1] if within else rivals[0], label=EQUAL_COST)


@torch.inference_mode()
def equal_cost_size(student: Student, size: Size, runtime: Runtime, seconds: float = 2.0) -> Size:
    """The largest input of the plain backbone that takes no longer than the student, measured in interleaved rounds.

    Args:
        student: with the backbone.
        size: the student's input (height, width) in pixels.
        runtime: device and precision.
        seconds: of timing.
    """
    rivals = find_rivals(student, size, runtime)
    adapted = make_methods(student, size, highres=False)[-1]
    timed = [in_precision(method, runtime) for method in (adapted, *rivals)]
    calls = {method.label: partial(method.call, method.input(1, runtime.device)) for method in timed}
    times = interleaved(calls, runtime.device, seconds, min_rounds=ROUNDS)
    return choose_rival(rivals, times, times[adapted.label].median).input_size


def _larger(student: Student, size: Size) -> Iterator[Method]:
    """At inputs of the same proportions, one patch more of the shorter side each, up to the teacher's."""
    patch, short = student.backbone.patch_size, min(size) // student.backbone.patch_size
    for patches in range(short + 1, short * student.adapter.factor + 1):
        height, width = (round(side * patches / short / patch) * patch for side in size)
        yield enlarged(student, (height, width), size)


def _fastest(method: Method, runtime: Runtime, batch_size: int) -> float:
    call = partial(in_precision(method, runtime).call, method.input(batch_size, runtime.device))
    call()
    return min(call_seconds(call, runtime.device) for _ in range(TRIALS))
