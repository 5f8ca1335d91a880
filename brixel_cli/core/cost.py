"""What a computation costs, counted without doing it: FLOP and memory on fake tensors that hold no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


@dataclass(frozen=True)
class Cost:
    """Cost of one call.

    Attributes:
        flop: floating-point operations; a multiply-add is 2; attention counted, elementwise operations not.
        peak_bytes: most bytes of tensors alive at once beyond those that were there before.
        uncounted: operators that do arithmetic the count does not know, such as `aten.grid_sampler_2d`.
    """

    flop: int
    peak_bytes: int
    uncounted: tuple[str, ...]


_HEAVY_UNCOUNTED = ("grid_sampler", "fft", "upsample", "svd", "einsum")


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# The counter knows attention on GPUs only.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop}


class _Memory(TorchDispatchMode):
    """Adds up the storages that operators create, and takes them off again when they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = 0
        self.peak = 0
        self.seen: set[int] = set()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        self.operators.add(str(func.overloadpacket))
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if id(storage) not in known and id(storage) not in self.seen:
                self._track(storage)
        return output

    def _track(self, storage: Any) -> None:
        size, key = storage.nbytes(), id(storage)

        def freed() -> None:
            self.alive -= size
            self.seen.discard(key)

        self.seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, freed)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within this, modules and tensors made have shapes and devices but no memory; see `hollow`."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def hollow(module: nn.Module, device: str = "cpu") -> None:
    """Move a module that was built on the meta device to `device`, without memory; call within `fake_tensors`."""
    module.to_empty(device=device)


def count_cost(call: Callable[[], Any]) -> Cost:
    """Count what `call` costs, without computing; call within `fake_tensors` with hollow modules."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter, _Memory() as memory:
        result = call()
    del result
    uncounted = sorted(name for name in memory.operators if any(part in name for part in _HEAVY_UNCOUNTED))
    return Cost(counter.get_total_flops(), memory.peak, tuple(uncounted))


def count_flop(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call, which is carried out; counted as `Cost.flop`."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        call()
    return int(counter.get_total_flops())


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module, trained or frozen."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
