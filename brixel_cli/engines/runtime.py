"""Where a run takes place: device, precision and processes; memory, time and versions of what it runs on.

torch alone is used, so that a second `Runtime` of a process has the device that it was asked for.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from brixel_cli.config.base import Precision, check_device
from brixel_cli.core.memory import is_out_of_memory, main_memory
from brixel_cli.errors import BrixelError, UsageError

Item = TypeVar("Item")

LONGEST_WAIT = timedelta(hours=12)
"""For the slowest process; torchrun ends all of them where one fails."""


OF_COLLECTIVES = ("gloo", "nccl", "closed by peer", "reset by peer", "broken pipe")
"""What errors of collectives say where another process has ended."""


class Runtime:
    """Device, precision and processes of a run.

    Several processes are those that torchrun has started; on GPUs each has the card of its LOCAL_RANK.

    Args:
        device: `auto` (CUDA where there is a card, else the CPU), `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: of the networks. `auto` takes bfloat16 where the device computes in it; else, on CUDA, float16 for
            inference; else float32.
        training: whether gradients are computed, which float16 would need scaling for.
        device_option: what to call the choice of the device in errors.

    Attributes:
        device: with its index, where there are several of its kind.
        dtype: the networks' arithmetic. float32 is full float32: TF32 is off.
        rank, world_size: number of this process among all, and how many there are.

    Raises:
        UsageError: the device asked for is not there.
    """

    def __init__(
        self,
        device: str = "auto",
        precision: Precision = "auto",
        *,
        training: bool = False,
        device_option: str = "--device",
    ):
        self.rank, self.world_size = (int(os.environ.get(name, low)) for name, low in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.device = find_device(device, device_option, self.world_size)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        # On Ampere and later, convolutions would otherwise compute with 10 bits of mantissa.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        name = _automatic_precision(self.device.type, training) if precision == "auto" else precision
        self.dtype: torch.dtype = getattr(torch, name)
        if self.world_size > 1 and not distributed.is_initialized():
            backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backends, timeout=LONGEST_WAIT)
            atexit.register(distributed.destroy_process_group)  # its threads would end the process with an abort

    @property
    def precision(self) -> str:
        """Arithmetic of the networks, as the option says it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def autocast(self, device: str | None = None) -> AbstractContextManager[None]:
        """The networks' arithmetic; losses stay outside. On another kind of device, it is counted."""
        return torch.autocast(device or self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def in_precision(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A model in this arithmetic, which gives float32."""

        def computed(*images: Tensor) -> Tensor:
            with self.autocast():
                return call(*images).float()

        return computed

    def parallel(self, module: nn.Module) -> nn.Module:
        """A module on this device whose gradients are averaged over all processes."""
        module = module.to(self.device)
        if self.world_size == 1:
            return module
        return DistributedDataParallel(module, device_ids=[self.device] if self.device.type == "cuda" else None)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        if self.world_size == 1:
            return tensor
        total = tensor.clone()
        distributed.all_reduce(total)
        return total / self.world_size

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, on every process."""
        tensor = tensor.contiguous()
        if self.world_size > 1:
            distributed.broadcast(tensor, src=0)
        return tensor

    def gather(self, items: list[Item]) -> list[Item]:
        """The lists of all processes, joined in the order of the processes."""
        if self.world_size == 1:
            return items
        lists: list[list[Item]] = [[] for _ in range(self.world_size)]
        distributed.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def first_only(self, work: Callable[[], object]) -> None:
        """Have the first process do what the others wait for; where it fails by a BrixelError, all of them end.

        Raises:
            BrixelError: of the work, in the first process.
        """
        error: BrixelError | None = None
        if self.is_first:
            try:
                work()
            except BrixelError as caught:
                error = caught
        if self.gather([error])[0] is not None:
            raise error or SystemExit(1)  # the first process reports it

    @contextmanager
    def losing_others(self, advice: str) -> Iterator[None]:
        """Turn the loss of another process, of which a collective or torchrun's SIGTERM tells, into a BrixelError.

        Args:
            advice: a sentence that says how to go on.
        """
        if self.world_size == 1:
            yield
            return

        def ended(*_: object) -> None:
            raise BrixelError(f"{_lost(processes)} {advice}")

        processes = self.gather([(socket.gethostname(), os.getpid())])
        before = signal.signal(signal.SIGTERM, ended)
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error) or not any(sign in str(error).lower() for sign in OF_COLLECTIVES):
                raise
            raise BrixelError(f"{_lost(processes)} {advice}") from error
        finally:
            signal.signal(signal.SIGTERM, before)

    def wait(self) -> None:
        """Until every process is here."""
        if self.world_size > 1:
            distributed.all_reduce(torch.zeros(1))  # on the CPU: what a card still has to do does not matter


def _lost(processes: Sequence[tuple[str, int]]) -> str:
    """Which of these (host, PID) are gone from this host, once that is seen; sockets close before a process ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which comes soon: the message is to be told once
    for _ in range(20):
        here = [(rank, pid) for rank, (host, pid) in enumerate(processes) if host == socket.gethostname()]
        gone = [str(rank) for rank, pid in here if not _is_alive(pid)]
        if gone:
            return f"Process {' and '.join(gone)} of the {len(processes)} of this run has gone: killed, or it failed."
        time.sleep(0.05)
    return "Another process of this run has gone, on another machine, or torchrun was told to end."


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def without_sync(module: nn.Module) -> AbstractContextManager[None]:
    """A backward pass whose gradients stay in this process, to be added to those of the next one."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def find_device(name: str, option: str = "--device", world_size: int = 1) -> torch.device:
    """The device that a text of the user's means; errors as `Runtime`."""
    check_device(name, option)
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, index = name.partition(":")
    if kind == "auto":
        kind = "cuda" if cards else "cpu"  # not MPS, on which nothing of this has been run yet
    if kind == "cpu":
        return torch.device("cpu")
    number = int(index or os.environ.get("LOCAL_RANK", "0"))
    if world_size > 1 and (index or kind == "mps"):
        raise UsageError(f"{option} is {name}, but torchrun started {world_size} processes: give cuda or cpu.")
    has_mps = torch.backends.mps.is_available()
    if not (has_mps if kind == "mps" else number < cards):
        present = ", ".join(["cpu", *(f"cuda:{card}" for card in range(cards)), *(["mps"] if has_mps else [])])
        wanted = f"{name} of process {number}" if world_size > 1 else name
        raise UsageError(f"{option} is {wanted}, which this machine does not have; present: {present}.")
    return torch.device(kind, number) if kind == "cuda" else torch.device(kind)


def _automatic_precision(kind: str, training: bool) -> str:
    """bfloat16 only where it is computed in hardware: emulated, it is slower than float32."""
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
        return "float32" if training else "float16"
    in_hardware = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if kind == "cpu" and in_hardware() else "float32"


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


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still take on a device; on CUDA with the freed blocks that torch keeps for itself."""
    if device.type != "cuda":
        return main_memory()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


@contextmanager
def memory_errors(doing: str, advice: str) -> Iterator[None]:
    """Turn memory running out into a BrixelError.

    Args:
        doing: what was being done, such as `in a step of 8 images of 224x224 pixels`.
        advice: a sentence with the options to change.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise BrixelError(f"Out of memory {doing}. {advice}") from error


def release_cached(device: torch.device) -> None:
    """Return the freed blocks that torch keeps to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


# How glibc hands out memory; with another C library nothing happens. Of its malloc.h:
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
LARGEST_INT = 2**31 - 1


def share_memory_pools() -> None:
    """Have threads take memory from two common pools, not from one of their own each that only it can use again.

    Otherwise each thread's pool would keep the largest image that the thread has ever decoded.
    """
    _call_libc("mallopt", M_ARENA_MAX, 2)


def keep_freed_memory(device: torch.device) -> None:
    """Keep freed memory for the next step of a training on a CPU, whose tensors have the same sizes.

    Otherwise each large tensor is mapped from the system anew, page by page, and returned when it is freed.
    """
    if device.type == "cpu":
        _call_libc("mallopt", M_MMAP_MAX, 0)
        _call_libc("mallopt", M_TRIM_THRESHOLD, LARGEST_INT)


def map_every_tensor() -> None:
    """Have memory of 64 KiB and more mapped from the system, and unmapped when it is freed: peaks can be measured."""
    _call_libc("mallopt", M_MMAP_THRESHOLD, 64 * 1024)


def return_free_memory() -> None:
    """Return memory that is free within the process to the system."""
    gc.collect()
    _call_libc("malloc_trim", 0)


def _call_libc(name: str, *arguments: int) -> None:
    function: Callable[..., Any] | None = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
