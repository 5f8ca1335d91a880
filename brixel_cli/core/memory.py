"""Memory of this machine: how much a process can still take, and errors that mean that there was not enough."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from brixel_cli.core.formatting import human_bytes
from brixel_cli.errors import BrixelError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate", "alloc_failed")
CONTAINER = Path("/sys/fs/cgroup")
"""Where Linux has the limits of a container."""


def main_memory() -> int:
    """Bytes that this process can still take: what the machine has available, and what container and ulimit allow."""
    return max(min(int(psutil.virtual_memory().available), _container_memory(), _address_space()), 0)


def check_memory(needed: int, free: int, what: str, advice: str) -> None:
    """Raise a BrixelError where `what` needs more bytes than are free; `advice` is a sentence."""
    if needed > free:
        raise BrixelError(
            f"{what} needs about {human_bytes(needed)} of memory, and {human_bytes(free)} are free. {advice}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on whatever device."""
    kinds = {"MemoryError", "OutOfMemoryError"}  # the latter is torch's
    text = str(error).lower()
    return type(error).__name__ in kinds or any(part in text for part in OUT_OF_MEMORY)


def _container_memory() -> int:
    try:
        most, used = (int((CONTAINER / f"memory.{name}").read_text()) for name in ("max", "current"))
        told = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
        return most - used + int(told.get("inactive_file", 0))  # of the files that it has read, and can forget
    except (OSError, ValueError):  # no container, or one without a limit
        return sys.maxsize


def _address_space() -> int:
    try:
        import resource
    except ImportError:  # only POSIX has it
        return sys.maxsize
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    return sys.maxsize if most == resource.RLIM_INFINITY else most - int(psutil.Process().memory_info().vms)
