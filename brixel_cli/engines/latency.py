"""Times of calls, interleaved: one of each in every round, so that a drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from brixel_cli.engines.runtime import call_seconds

MIN_ROUNDS = 3
MOST_ROUNDS = 200


@dataclass(frozen=True)
class Latency:
    """Seconds of a call on one batch: median, 10 % and 90 % quantile over interleaved rounds."""

    median: float
    low: float
    high: float
    rounds: int
    compile_seconds: float | None = None

    @staticmethod
    def of(seconds: list[float], compile_seconds: float | None = None) -> Latency:
        """Of single times; quantiles lie between neighbours, by linear interpolation."""
        low, *_, high = statistics.quantiles(seconds, n=10, method="inclusive")
        return Latency(statistics.median(seconds), low, high, len(seconds), compile_seconds)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    compiled: bool = False,
    min_rounds: int = MIN_ROUNDS,
) -> dict[str, Latency]:
    """Time calls in rounds, one of each in every round, until the time is up; a first round does not count.

    Args:
        calls: by name.
        device: on which they run.
        seconds: for all rounds together.
        compiled: whether the first call of each compiles it, and is reported as such.
        min_rounds: rounds that are made in any case.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    first = {name: call_seconds(call, device) for name, call in calls.items()}
    if compiled:
        for call in calls.values():
            call()
    began = time.perf_counter()
    for number in range(MOST_ROUNDS):
        if number >= min_rounds and time.perf_counter() - began > seconds:
            break
        for name, call in calls.items():
            times[name].append(call_seconds(call, device))
    return {name: Latency.of(times[name], first[name] if compiled else None) for name in calls}
