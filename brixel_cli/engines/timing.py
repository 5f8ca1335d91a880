"""How long a call takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def call_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, work that it leaves to a GPU included."""
    _synchronise(device)
    began = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
