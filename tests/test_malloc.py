"""The C library's options, as they are asked for; each in a process of its own, as they stay."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

FAULTS = """
import resource, sys
import torch
from brixel_cli.engines import malloc
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    malloc.keep_freed(torch.device("cpu"))
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
    from brixel_cli.engines import malloc

    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    malloc.keep_freed(torch.device("cpu"))
    malloc.give_back()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("ctypes.CDLL", lambda _: pytest.fail("asked for glibc"))
    malloc.share_pools()
