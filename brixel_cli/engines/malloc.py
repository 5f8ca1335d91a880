"""How the C library hands out memory: glibc's options for long runs on a CPU. Elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
LARGEST_INT = 2**31 - 1


def share_pools() -> None:
    """Have threads take memory from two common pools, not from one of their own each that only it can use again.

    Otherwise each thread's pool would keep the largest image that the thread has ever decoded.
    """
    _call("mallopt", M_ARENA_MAX, 2)


def keep_freed(device: torch.device) -> None:
    """Keep freed memory for the next step of a training on a CPU, whose tensors have the same sizes.

    Otherwise each large tensor is mapped from the system anew, page by page, and returned when it is freed.
    """
    if device.type == "cpu":
        _call("mallopt", M_MMAP_MAX, 0)
        _call("mallopt", M_TRIM_THRESHOLD, LARGEST_INT)


def map_every_tensor() -> None:
    """Have memory of 64 KiB and more mapped from the system, and unmapped when it is freed: peaks can be measured."""
    _call("mallopt", M_MMAP_THRESHOLD, 64 * 1024)


def give_back() -> None:
    """Return memory that is free within the process to the system."""
    gc.collect()
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function: Callable[..., Any] | None = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
