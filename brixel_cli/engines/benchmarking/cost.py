"""What rows cost: arithmetic and memory counted on hollow models, and the peak memory of calls, measured."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from brixel_cli.config.benchmark import BenchmarkOptions
from brixel_cli.core.backbone import Backbone
from brixel_cli.core.cost import Cost, count_cost, count_parameters, fake_tensors, hollow
from brixel_cli.engines.baselines import load_baseline
from brixel_cli.engines.benchmarking.methods import Method, enlarged, in_precision, make_methods
from brixel_cli.engines.benchmarking.models import Candidate
from brixel_cli.engines.benchmarking.results import BudgetRow, Row, Size
from brixel_cli.engines.runtime import Runtime, map_every_tensor, return_free_memory
from brixel_cli.errors import BrixelError

LARGEST_SIDE = 4096
"""Pixels; no larger input is looked for."""
PASSES = 5
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def count_rows(candidate: Candidate, size: Size, highres: bool, batch_size: int) -> list[Row]:
    """The rows of one model at one size, with all that can be known without running them.

    Raises:
        SizeError: the size is no multiple of the patch.
    """
    student = candidate.spec.load_student("meta")
    with fake_tensors(), torch.inference_mode():
        hollow(student)
        methods = make_methods(student, size, highres)
        return [count_row(candidate.name, method, student.backbone, size, batch_size) for method in methods]


def count_row(model: str, method: Method, backbone: Backbone, size: Size, batch_size: int) -> Row:
    """One row, counted. Outside of `fake_tensors` it runs: baselines need not work without numbers."""
    device = next(backbone.parameters()).device
    one = _count(method, 1, device)
    peak = one.peak_bytes if batch_size == 1 else _count(method, batch_size, device).peak_bytes
    return Row(
        model=model,
        kind=method.kind,
        label=method.label,
        size=size,
        input_size=method.input_size,
        grid=method.grid,
        frozen_parameters=count_parameters(backbone),
        adapter_parameters=method.adapter_parameters,
        gflop=one.flop / 1e9,
        uncounted=one.uncounted,
        weights_bytes=method.weights_bytes,
        peak_bytes=peak,
        memory="counted",
    )


def _count(method: Method, batch_size: int, device: torch.device) -> Cost:
    images = method.input(batch_size, device)
    return count_cost(lambda: method.call(images))


def largest_sizes(candidate: Candidate, labels: Sequence[str], budget_bytes: int, batch_size: int) -> list[BudgetRow]:
    """For each row the largest square student input whose weights and counted peak stay within a budget.

    A row that does not fit at a single patch has no entry.
    """
    student = candidate.spec.load_student("meta")
    patch = student.backbone.patch_size
    found = []
    with fake_tensors(), torch.inference_mode():
        hollow(student)

        def total(label: str, patches: int) -> int:
            methods = make_methods(student, (patches * patch, patches * patch), highres=True)
            method = next(method for method in methods if method.label == label)
            return method.weights_bytes + _count(method, batch_size, torch.device("cpu")).peak_bytes

        for label in labels:
            fits, too_many = 0, LARGEST_SIDE // patch + 1
            while too_many - fits > 1:
                middle = (fits + too_many) // 2
                fits, too_many = (middle, too_many) if total(label, middle) <= budget_bytes else (fits, middle)
            if fits:
                size, needed = (fits * patch, fits * patch), total(label, fits)
                found.append(BudgetRow(candidate.name, label, size, needed, "counted", fits=True, largest=True))
    return found


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


def peak_in_fresh_process(candidate: Candidate, row: Row, options: BenchmarkOptions) -> PeakMemory | None:
    """Peak resident memory of one row on the CPU, in a process that does nothing else.

    The process loads the model with random weights (their values make no difference to memory) and makes a first
    call. Before each of five further calls it returns free memory to the system; the peak is the highest resident
    size during the call minus that before it, and the median of the five is taken. The C library is told to take every
    tensor from the system and return it at once, so that the figure is of what is in use, not of a fragmented heap.

    Returns:
        The figures; None where the process was killed, as for want of memory.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        work = (candidate.randomised(), row, options, torch.get_num_threads())
        try:
            return pool.submit(_measure, *work).result()
        except BrokenProcessPool:
            return None


@torch.inference_mode()
def _measure(candidate: Candidate, row: Row, options: BenchmarkOptions, threads: int) -> PeakMemory:
    torch.set_num_threads(threads)
    map_every_tensor()
    student = candidate.spec.load_student("cpu")
    baselines = [load_baseline(reference) for reference in options.baselines]
    methods = [*make_methods(student, row.size, True, baselines), enlarged(student, row.input_size, row.size)]
    method = in_precision(
        next(method for method in methods if method.label == row.label), Runtime("cpu", options.precision)
    )
    images = method.input(options.batch_size)
    return_free_memory()
    loaded = _resident("VmRSS")
    method.call(images)
    return_free_memory()
    kept = _resident("VmRSS") - loaded
    peaks = []
    for _ in range(PASSES):
        return_free_memory()
        before = _resident("VmRSS")
        _CLEAR.write_text(_RESET_PEAK)
        method.call(images)
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
