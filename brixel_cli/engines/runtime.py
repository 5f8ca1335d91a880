"""Where a run takes place: device, arithmetic and processes, through accelerate."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from brixel_cli.config.distill import RunConfig
from brixel_cli.errors import UsageError

Item = TypeVar("Item")


class Runtime:
    """Device, precision and processes of a run; the only user of accelerate.

    Args:
        config: the recipe's `run` section.
        device_option: what to call the choice of the device in errors.

    Raises:
        UsageError: the device asked for is not there.
    """

    def __init__(self, config: RunConfig, device_option: str = "run.device"):
        available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if config.device != "auto" and not available.get(config.device, False):
            present = ", ".join(name for name, there in available.items() if there)
            raise UsageError(
                f"{device_option} is {config.device}, which this machine does not have; present: {present}."
            )
        self.accelerator = Accelerator(cpu=config.device == "cpu")
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.bfloat16 = config.precision == "bfloat16" or (
            config.precision == "auto" and _computes_in_bfloat16(self.device.type)
        )

    @property
    def precision(self) -> str:
        """Arithmetic of the networks, as a recipe says it."""
        return "bfloat16" if self.bfloat16 else "float32"

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return bool(self.accelerator.is_main_process)

    def autocast(self) -> AbstractContextManager[None]:
        """The networks' arithmetic; losses stay outside."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        reduced: Tensor = self.accelerator.reduce(tensor, "mean") if self.world_size > 1 else tensor
        return reduced

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, on every process."""
        sent: Tensor = broadcast(tensor.contiguous()) if self.world_size > 1 else tensor
        return sent

    def gather(self, items: list[Item]) -> list[Item]:
        """The lists of all processes, joined in the order of the processes."""
        joined: list[Item] = gather_object(items) if self.world_size > 1 else items
        return joined

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()


def library_versions() -> dict[str, str]:
    """Versions of all that the numbers of a model depend on."""
    return {name: version(name) for name in ("brixel", "torch", "timm", "pillow")}


def _computes_in_bfloat16(device: str) -> bool:
    """Whether a device has bfloat16 arithmetic in hardware; emulated, it is slower than float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device == "cpu" and bool(probe())
