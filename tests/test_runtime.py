"""Device, precision, processes and memory of a run; the C library's options each in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TWO_RANKS

from brixel_cli.core.memory import is_out_of_memory
from brixel_cli.engines.runtime import Runtime, free_memory, memory_errors
from brixel_cli.errors import BrixelError, UsageError


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards that compute in bfloat16, as far as torch can be asked without a driver."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


def test_each_runtime_of_a_process_has_the_device_that_it_was_asked_for(cards: None) -> None:
    asked = ["cpu", "cuda:1", "cuda", "auto", "cpu"]
    devices = [Runtime(name).device for name in asked]
    assert devices == [torch.device(name) for name in ("cpu", "cuda:1", "cuda:0", "cuda:0", "cpu")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:2", "run.device is cuda:2, which this machine does not have; present: cpu, cuda:0, cuda:1"),
        ("gpu", "run.device: a device is auto, cpu, cuda, cuda:1"),
        ("cuda:", "run.device: a device is auto, .*; found cuda:"),
    ],
)
def test_a_device_that_is_not_there_is_refused(cards: None, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Runtime(name, device_option="run.device")


def test_each_process_has_a_card_of_its_own(cards: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    for name, value in {"WORLD_SIZE": "3", "RANK": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Runtime("auto").device == torch.device("cuda:1")
    with pytest.raises(UsageError, match="--device is cuda:0, but torchrun started 3 processes: give cuda or cpu"):
        Runtime("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="cuda of process 2, which this machine does not have; present: cpu, cuda:0"):
        Runtime("cuda")


def test_automatic_choice_passes_over_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert Runtime("auto").device == torch.device("cpu")
    assert Runtime("mps").device == torch.device("mps")


def test_operators_that_mps_lacks_run_on_the_cpu() -> None:
    code = "import brixel_cli, os; print(os.environ['PYTORCH_ENABLE_MPS_FALLBACK'])"
    bare = {key: value for key, value in os.environ.items() if key != "PYTORCH_ENABLE_MPS_FALLBACK"}
    for given, expected in (({}, "1"), ({"PYTORCH_ENABLE_MPS_FALLBACK": "0"}, "0")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=bare | given, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("native", "training", "expected"),
    [(True, False, "bfloat16"), (True, True, "bfloat16"), (False, False, "float16"), (False, True, "float32")],
)
def test_automatic_precision_is_what_the_card_computes_in(
    cards: None, monkeypatch: pytest.MonkeyPatch, native: bool, training: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert Runtime("cuda", training=training).precision == expected
    assert Runtime("cuda", "float32", training=training).precision == "float32"


def test_float32_is_full_float32() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    runtime = Runtime("cpu", "float32")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    with runtime.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_blocks_that_torch_keeps_count_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free_memory(torch.device("cuda")) == 1_300  # 1,000 of the driver's, and 500 - 200 of torch's own


def test_running_out_of_memory_is_recognised() -> None:
    errors = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't "
              "allocate memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]  # fmt: skip
    assert all(map(is_out_of_memory, errors))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with (
        pytest.raises(BrixelError, match="Out of memory in a step. Lower --res."),
        memory_errors("in a step", "Lower --res."),
    ):
        raise errors[0]
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("in a step", "Lower --res."):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


PROCESSES = """
import sys, torch
from torch import nn
from brixel_cli.engines.runtime import Runtime, without_sync
runtime = Runtime("cpu", "float32")
model = nn.Linear(1, 1, bias=False)
nn.init.ones_(model.weight)
parallel = runtime.parallel(model)
with without_sync(parallel):
    parallel(torch.tensor([[1.0 + runtime.rank]])).sum().backward()
parallel(torch.tensor([[10.0 * (1 + runtime.rank)]])).sum().backward()
mean = runtime.mean(torch.tensor(2.0 * runtime.rank)).item()
first = runtime.from_first(torch.tensor([7 - runtime.rank])).item()
gathered = runtime.gather([runtime.rank, "x"])
runtime.wait()
sys.stdout.write(f"{mean} {first} {gathered} {model.weight.grad.item()}\\n")
"""


def test_two_processes_share_means_gradients_and_lists(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(PROCESSES)
    done = subprocess.run([sys.executable, *TWO_RANKS, str(tmp_path / "run.py")], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Gradient: the pass without exchange gives 1 and 2, the other 10 and 20; what travels are the sums 11 and 22.
    assert done.stdout.splitlines() == ["1.0 7 [0, 'x', 1, 'x'] 16.5"] * 2


FAULTS = """
import resource, sys
import torch
from brixel_cli.engines.runtime import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory(torch.device("cpu"))
def step():
    for _ in range(20):
        torch.ones(12_000_000)  # 48 MB: beyond what glibc keeps of itself
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's options")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < 100 < faults("leave")


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from brixel_cli.engines.runtime import keep_freed_memory, return_free_memory, share_memory_pools

    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    keep_freed_memory(torch.device("cpu"))
    return_free_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("ctypes.CDLL", lambda _: pytest.fail("asked for glibc"))
    share_memory_pools()
