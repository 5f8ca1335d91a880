"""Where figures are taken: processor, memory, arithmetic, versions."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from brixel_cli.core.formatting import Stored
from brixel_cli.core.identity import library_versions
from brixel_cli.engines.runtime import Runtime


@dataclass(frozen=True)
class Environment:
    """Where figures were taken.

    Attributes:
        device: `cpu`, `cuda` or `mps`.
        processor: name of the CPU or GPU.
        threads: of the computation, on a CPU.
        memory_bytes: that the device has in all.
        precision: arithmetic of the networks: `float32`, `bfloat16` or `float16`.
        system: operating system.
        versions: of brixel, torch, timm and Python.
        tf32: whether a GPU rounds float32 products to 10 bits of mantissa; brixel switches this off.
    """

    device: str
    processor: str
    threads: int
    memory_bytes: int
    precision: str
    system: str
    versions: dict[str, str]
    tf32: bool = False

    @property
    def hardware(self) -> str:
        """The processor, with what its speed depends on."""
        return f"{self.processor} ({self.device}, {self.threads} threads)"


@dataclass(frozen=True)
class Record(Stored):
    """The head of what a benchmark keeps.

    Attributes:
        command: the line that makes it again.
        created: date and time, ISO 8601, UTC.
        environment: where.
    """

    command: str
    created: str
    environment: Environment


def describe_environment(runtime: Runtime) -> Environment:
    """This machine."""
    on_gpu = runtime.device.type == "cuda"
    memory = torch.cuda.get_device_properties(runtime.device).total_memory if on_gpu else psutil.virtual_memory().total
    versions = {name: number for name, number in library_versions().items() if name != "pillow"}
    return Environment(
        device=runtime.device.type,
        processor=processor_name(runtime.device),
        threads=torch.get_num_threads(),
        memory_bytes=int(memory),
        precision=runtime.precision,
        system=f"{platform.system()} {platform.machine()}",
        versions={**versions, "Python": platform.python_version()},
        tf32=on_gpu and torch.backends.cuda.matmul.allow_tf32,
    )


def processor_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU, which Linux has in a file only."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
