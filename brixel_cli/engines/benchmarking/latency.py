"""How long calls take: all of them in turn, round by round, so that a drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from brixel_cli.engines.benchmarking.results import Latency
from brixel_cli.engines.runtime import call_seconds

MIN_ROUNDS = 3
MOST_ROUNDS = 200


@dataclass
class Timed:
    """Times of one call, in seconds."""

    compile_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def latency(self) -> Latency:
        """Median and 10 % and 90 % quantiles, between neighbours by linear interpolation."""
        low, *_, high = statistics.quantiles(self.seconds, n=10, method="inclusive")
        return Latency(statistics.median(self.seconds), low, high, len(self.seconds), self.compile_seconds)


@torch.inference_mode()
def interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, compiled: bool = False
) -> dict[str, Latency]:
    """Time calls in turn, round after round, until the time is up; at least 3 rounds, after one that is not counted.

    Args:
        calls: by name.
        device: on which they run.
        seconds: for all rounds together.
        compiled: whether the first call of each compiles it, and is reported as such.
    """
    timed = {name: Timed() for name in calls}
    for name, call in calls.items():
        first = call_seconds(call, device)
        if compiled:
            timed[name].compile_seconds = first
            call()
    began = time.perf_counter()
    for number in range(MOST_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - began > seconds:
            break
        for name, call in calls.items():
            timed[name].seconds.append(call_seconds(call, device))
    return {name: row.latency for name, row in timed.items()}
