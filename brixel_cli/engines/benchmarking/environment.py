"""Where figures are taken: processor, memory, arithmetic, versions."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from brixel_cli.engines.benchmarking.results import Environment
from brixel_cli.engines.runtime import Runtime


def describe_environment(runtime: Runtime) -> Environment:
    """The machine, as a table of results names it."""
    device = runtime.device
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    return Environment(
        device=device.type,
        processor=torch.cuda.get_device_name(device) if on_gpu else _processor(),
        threads=torch.get_num_threads(),
        memory_bytes=int(memory),
        precision=runtime.precision,
        system=f"{platform.system()} {platform.machine()}",
        versions={
            "brixel": version("brixel"),
            "torch": torch.__version__,
            "timm": version("timm"),
            "Python": platform.python_version(),
        },
    )


def _processor() -> str:
    """Name of the CPU: Linux gives it in a file only."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
