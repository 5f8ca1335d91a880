"""Peak memory of a call above the loaded weights: of a fresh process on a CPU, of the allocator on a GPU."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from brixel_cli.engines.benchmarking.baselines import load_baseline
from brixel_cli.engines.benchmarking.contenders import make_contenders
from brixel_cli.engines.benchmarking.models import Candidate
from brixel_cli.engines.runtime import map_every_tensor, return_free_memory
from brixel_cli.errors import BrixelError

PASSES = 5
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass(frozen=True)
class PeakMemory:
    """Bytes above the loaded weights.

    Attributes:
        peak_bytes: most that is in use during a call.
        kept_bytes: what the libraries keep after a first call, such as compiled kernels and thread pools; not in the
            peak. None on a GPU.
    """

    peak_bytes: int
    kept_bytes: int | None


def can_measure(device: torch.device) -> bool:
    """Whether the peak of a call can be measured here: on a CUDA device, or on the CPU under Linux."""
    return device.type == "cuda" or (device.type == "cpu" and _CLEAR.exists())


def peak_in_fresh_process(
    candidate: Candidate, size: tuple[int, int], label: str, batch_size: int, baselines: tuple[str, ...] = ()
) -> PeakMemory | None:
    """Peak resident memory of one row on the CPU, in a process that does nothing else.

    The process loads the model with random weights (what they are makes no difference to memory) and makes a first
    call. Before each of five further calls it gives free memory back to the system; the peak is the highest resident
    size during the call minus that before it, and the median of the five is taken. The C library is told to take every
    tensor from the system and give it back at once, so that the figure is of what is in use, not of how its heap
    happens to be cut up.

    Returns:
        The figures; None where the process was killed, as for want of memory.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        bare = replace(candidate, weights="random", stored=None, recipe=None)
        work = (bare, size, label, batch_size, baselines, torch.get_num_threads())
        try:
            return pool.submit(_measure, *work).result()
        except BrokenProcessPool:
            return None


@torch.inference_mode()
def _measure(
    candidate: Candidate, size: tuple[int, int], label: str, batch_size: int, baselines: tuple[str, ...], threads: int
) -> PeakMemory:
    torch.set_num_threads(threads)
    map_every_tensor()
    student = candidate.load("cpu")
    rows = make_contenders(student, size, True, [load_baseline(reference) for reference in baselines])
    row = next(row for row in rows if row.label == label)
    images = row.input(batch_size)
    return_free_memory()
    loaded = _resident("VmRSS")
    row.call(images)
    return_free_memory()
    kept = _resident("VmRSS") - loaded
    peaks = []
    for _ in range(PASSES):
        return_free_memory()
        before = _resident("VmRSS")
        _CLEAR.write_text(_RESET_PEAK)
        row.call(images)
        peaks.append(_resident("VmHWM") - before)
    return PeakMemory(max(int(statistics.median(peaks)), 0), max(kept, 0))


@torch.inference_mode()
def peak_on_gpu(call: Callable[[], object], device: torch.device) -> PeakMemory:
    """Peak of torch's allocator on a CUDA device during a call, beyond what was allocated before."""
    call()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return PeakMemory(torch.cuda.max_memory_allocated(device) - before, None)


def _resident(field: str) -> int:
    """A field of the process's status, in bytes: VmRSS now, VmHWM at most since it was reset."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise BrixelError(f"{_STATUS} has no {field}: peak memory cannot be measured here.")
