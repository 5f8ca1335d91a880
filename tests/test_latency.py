"""Latency: interleaving, quantiles and limits, with a clock that the test moves."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from brixel_cli.engines.latency import MIN_ROUNDS, Latency, interleaved

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def taking(clock: list[float], seconds: list[float], order: list[str], name: str) -> Callable[[], None]:
    """A call that takes these seconds in turn, the last one for ever."""

    def call() -> None:
        clock[0] += seconds.pop(0) if len(seconds) > 1 else seconds[0]
        order.append(name)

    return call


def test_calls_are_interleaved_after_a_first_call_that_does_not_count(clock: list[float]) -> None:
    order: list[str] = []
    calls = {
        "fast": taking(clock, [50.0, 1.0], order, "fast"),
        "slow": taking(clock, [90.0, 2.0, 3.0, 7.0, 4.0], order, "slow"),
    }
    found = interleaved(calls, CPU, seconds=1.0)
    # Warm-up of both, then rounds of both: 3 at least, though the first took 3 seconds.
    assert order == ["fast", "slow"] * (1 + MIN_ROUNDS)
    assert (found["fast"].median, found["fast"].rounds) == (1.0, 3)
    assert found["slow"].median == 3.0  # of 2, 3, 7
    assert found["slow"].compile_seconds is None


def test_rounds_go_on_until_the_time_is_up(clock: list[float]) -> None:
    calls = {"one": taking(clock, [1.0], [], "one"), "two": taking(clock, [1.0], [], "two")}
    # Rounds of 2 s begin while no more than 15 s are past: at 0, 2, ..., 14.
    assert interleaved(calls, CPU, seconds=15.0)["one"].rounds == 8


def test_quantiles_by_hand() -> None:
    # 11 values, 0 to 10: the 10 % quantile lies at place 1 of 0..10, the 90 % at place 9, whatever their order.
    latency = Latency.of([float(value) for value in (10, 9, 8, 7, 6, 0, 1, 2, 3, 4, 5)])
    assert (latency.low, latency.median, latency.high, latency.rounds) == (1.0, 5.0, 9.0, 11)


def test_compilation_is_timed_apart(clock: list[float]) -> None:
    order: list[str] = []
    found = interleaved({"one": taking(clock, [30.0, 5.0, 1.0], order, "one")}, CPU, seconds=1.0, compiled=True)
    # The first call compiles, the second warms up.
    assert (found["one"].compile_seconds, found["one"].median) == (30.0, 1.0)
    assert len(order) == 2 + MIN_ROUNDS
