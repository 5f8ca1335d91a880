"""A GPU that is not there: tensors with device "cuda" that have shapes and number formats, but no numbers.

Torch's FakeTensorMode raises where an operator meets tensors of two devices, as a real GPU would. What depends on
values (a number read from a tensor, how many places of a mask are true) gets an answer here: 1, and all of them. The
graph for gradients is built, but cannot be run backwards: that needs a driver.

Torch for Linux knows no device "mps", not even a fake one. So the fake "cuda" can be told to have MPS's operators only:
those without a kernel for MPS raise, and so does float64.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from brixel_cli.core.backbone import Backbone, load_backbone

Made = TypeVar("Made")
Module = TypeVar("Module", bound=nn.Module)
aten = torch.ops.aten
_real_numpy = Tensor.numpy
MIXED = "same device"
"""Part of what torch says, by several ways, where devices are mixed."""


class MissingOnMpsError(RuntimeError):
    """An operator or a number format that MPS does not have."""


class _Answers(TorchDispatchMode):
    """Answers what fake tensors cannot; all other operators go on to the FakeTensorMode below."""

    def __init__(self, mps_operators: bool):
        super().__init__()
        self.mps_operators = mps_operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        if func is aten.equal.default:
            return True
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            _check_indices(args[0], args[1])
            args = (args[0], _without_masks(args[1]), *args[2:])
        if func is aten.nonzero.default:
            output = _everywhere(args[0])
        elif func is aten.bincount.default:
            output = args[0].new_empty(kwargs.get("minlength", args[-1]), dtype=torch.int64)
        else:
            output = func(*args, **kwargs)
        if self.mps_operators:
            _check_mps(func, [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)])
        return output


def _everywhere(mask: Tensor) -> Tensor:
    return mask.new_empty((mask.numel(), mask.dim()), dtype=torch.int64)


def _without_masks(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Masks as lists of places."""
    found: list[Tensor | None] = []
    for index in indices:
        found += _everywhere(index).unbind(1) if index is not None and index.dtype == torch.bool else [index]
    return found


def _check_indices(tensor: Tensor, indices: list[Tensor | None]) -> None:
    """Indices may be on the CPU, or where the tensor is; FakeTensorMode does not look."""
    for index in indices:
        if index is not None and index.device.type not in ("cpu", tensor.device.type):
            raise RuntimeError(
                f"Indices should be on the CPU or on the same device as the tensor ({tensor.device}): {index.device}."
            )


def _check_mps(func: Any, tensors: list[Tensor]) -> None:
    there = [tensor for tensor in tensors if tensor.device.type == "cuda"]
    if any(tensor.dtype == torch.float64 for tensor in there):
        raise MissingOnMpsError(f"{func} with float64")
    if there and func.name().removeprefix("aten::") in _missing_on_mps():
        raise MissingOnMpsError(f"{func} has no kernel for MPS")


@cache
def _missing_on_mps() -> frozenset[str]:
    """Operators that have kernels for the CPU, and none for MPS, by the list that comes with torch."""
    torchgen = pytest.importorskip("torchgen")
    listed = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries: dict[str, str] = {}
    for entry in listed.read_text(encoding="utf-8").split("\n- func: ")[1:]:
        entries[entry[: entry.index("(")]] = entry
    missing = set()
    for name, entry in entries.items():
        delegate = re.search(r"structured_delegate: (\S+)", entry)
        kernels = entries.get(delegate.group(1), entry) if delegate else entry
        dispatch = kernels.partition("dispatch:")[2].partition("autogen:")[0]
        if re.search(r"\bCPU\b", dispatch) and not re.search(r"\bMPS\b|Composite", dispatch):
            missing.add(name)
    assert len(missing) < len(entries) / 2
    return frozenset(missing)


def _numpy(tensor: Tensor, force: bool = False) -> np.ndarray:
    if not isinstance(tensor, FakeTensor):
        return _real_numpy(tensor, force=force)
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert {tensor.device} device type tensor to numpy")
    return np.ones(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


@contextmanager
def fake_gpu(mps_operators: bool = False) -> Iterator[None]:
    """Within this, device "cuda" can be named; mixing devices raises a RuntimeError that says `MIXED`."""
    generator = torch.Generator
    with pytest.MonkeyPatch.context() as patch:
        # Autocast for "cuda" is switched off where there is no GPU; random states of a GPU need its driver.
        patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        patch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
        patch.setattr("torch.random.fork_rng", lambda *_, **__: nullcontext())
        patch.setattr("torch.Generator", lambda _="cpu": generator())
        patch.setattr("torch.Tensor.numpy", _numpy)
        with FakeTensorMode(allow_non_fake_inputs=True), _Answers(mps_operators):
            yield


def real(build: Callable[[], Made]) -> Made:
    """Something built as if there were no fakes; for use within `fake_gpu`."""
    with _disable_current_modes():
        return build()


def on_gpu(build: Callable[[], Module], device: str = "cuda") -> Module:
    """Build a module with real numbers, then move it to the fake GPU, as `Module.to` would; call within `fake_gpu`.

    What a module holds besides parameters and buffers stays where it was.
    """
    module = real(build)

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)

    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(moved(parameter), parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, moved(buffer))
    return module


def backbone_on_gpu(dtype: str = "float32") -> Backbone:
    """A small backbone on the fake GPU."""
    return on_gpu(lambda: load_backbone("test_vit", "random", dtype))
