"""`brixel --version`, and with --verbose what a report of a bug should name."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from brixel_cli.cli.console import print_notes
from brixel_cli.core.extras import EXTRAS, missing

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "h5py",
    "pillow",
    "safetensors",
    "huggingface_hub",
    "typer",
    "rich",
)


def show_version(number: str, verbose: bool) -> None:
    """The version to stdout; verbose: also Python, system, device, and versions of packages."""
    print_notes([f"brixel {number}"])
    if not verbose:
        return
    import torch  # takes seconds

    from brixel_cli.engines.benchmarking.environment import processor_name
    from brixel_cli.engines.runtime import find_device

    device = find_device("auto")
    print_notes([
        f"installed in {Path(__file__).parent.parent}",
        f"Python {platform.python_version()}, {platform.platform()}",
        f"device {device}: {processor_name(device)}, {torch.get_num_threads()} threads, CUDA {torch.version.cuda}",
        *(f"{name} {_installed(name)}" for name in PACKAGES),
        *(f"extra {name}: {_state(name)}" for name in EXTRAS),
    ])  # fmt: skip


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def _state(extra: str) -> str:
    lacking = missing(extra)
    return f"without {', '.join(lacking)}" if lacking else "installed"
