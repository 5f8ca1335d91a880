"""The methods that a benchmark compares: callables from the student's or the teacher's image to a map."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from brixel_cli.core.cost import count_bytes, count_parameters
from brixel_cli.core.identity import file_sha256
from brixel_cli.core.student import Student
from brixel_cli.engines.benchmarking.results import Kind, Size
from brixel_cli.engines.equal_cost import EQUAL_COST, enlarged_map, student_grid
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError, UsageError


@dataclass(frozen=True)
class Baseline:
    """A function (images, feature map, output grid) -> map on that grid.

    Attributes:
        reference: as given: `module:function` or `file.py:function`.
        name: of the function.
        function: `function(images, feature_map, output_size)`; see `__call__`.
        sha256: of the module's source file; empty where it has none.
    """

    reference: str
    name: str
    function: Callable[[Tensor, Tensor, Size], Any]
    sha256: str = ""

    def __call__(self, images: Tensor, feature_map: Tensor, output_size: Size) -> Tensor:
        """The function's map, checked.

        Args:
            images: (B, 3, H, W), normalised by the backbone's mean and standard deviation.
            feature_map: (B, D, h, w), the backbone's last map of them, float32.
            output_size: grid (oh, ow) that is wanted.

        Returns:
            (B, D, oh, ow), float32.

        Raises:
            BrixelError: the function returns something else.
        """
        output = self.function(images, feature_map, output_size)
        wanted = (*feature_map.shape[:2], *output_size)
        if not isinstance(output, Tensor) or tuple(output.shape) != wanted:
            found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise BrixelError(
                f"--baseline {self.reference} returned {found}, expected a tensor of shape {wanted}: (batch, channels "
                f"of the feature map, {output_size[0]}, {output_size[1]}). It was given images "
                f"{tuple(images.shape)}, feature map {tuple(feature_map.shape)} and output size {output_size}."
            )
        return output.float()


def load_baseline(reference: str) -> Baseline:
    """Import a baseline, `module:function` or `file.py:function`.

    Raises:
        UsageError: there is no such module, file or function.
    """
    where, colon, name = reference.rpartition(":")
    if not colon or not where or not name:
        raise UsageError(f"--baseline takes module:function or file.py:function, not {reference}.")
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except ImportError as error:
        raise UsageError(f"--baseline {reference}: {error}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"--baseline {reference}: {where} has no function {name}.")
    source = getattr(module, "__file__", None)
    return Baseline(reference, name, function, file_sha256(Path(source)) if source else "")


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"--baseline: no file {path}.")
    name = f"brixel_baseline_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Method:
    """One row before it is measured.

    Attributes:
        kind: what it is.
        label: what it is called.
        input_size: image (height, width) that it sees.
        grid: of its map (height, width).
        call: normalised images (B, 3, *input_size) -> map (B, D, *grid), float32.
        adapter_parameters: numbers in what comes on top of the backbone; a baseline's own are not known.
        weights_bytes: of all weights that it needs; without a baseline's own.
    """

    kind: Kind
    label: str
    input_size: Size
    grid: Size
    call: Callable[[Tensor], Tensor]
    adapter_parameters: int
    weights_bytes: int

    def input(self, batch_size: int, device: str | torch.device = "cpu") -> Tensor:
        """Images of random numbers."""
        return torch.randn(batch_size, 3, *self.input_size, device=device)


def make_methods(student: Student, size: Size, highres: bool, baselines: Sequence[Baseline] = ()) -> list[Method]:
    """The rows of one model at one size, in the order of the table.

    Args:
        student: frozen backbone and adapter, real or hollow.
        size: student input (height, width), multiples of the patch size.
        highres: whether the teacher is a row.
        baselines: functions from elsewhere.
    """
    backbone, factor = student.backbone, student.adapter.factor
    grid = (size[0] // backbone.patch_size, size[1] // backbone.patch_size)
    fine = student_grid(student, size)
    large = (size[0] * factor, size[1] * factor)
    frozen, adapter = count_bytes(backbone), count_bytes(student.adapter)

    def from_elsewhere(baseline: Baseline) -> Method:
        def call(images: Tensor) -> Tensor:
            return baseline(images, backbone.last_map(images), fine)

        return Method("baseline", baseline.name, size, fine, call, 0, frozen)

    methods = [
        Method("backbone", "backbone", size, grid, backbone.last_map, 0, frozen),
        replace(enlarged(student, size, size), kind="bilinear", label="bilinear"),
        *(from_elsewhere(baseline) for baseline in baselines),
        Method("student", "student", size, fine, student, count_parameters(student.adapter), frozen + adapter),
    ]
    if highres:
        methods.append(Method("teacher", "teacher", large, fine, backbone.last_map, 0, frozen))
    return methods


def enlarged(student: Student, input_size: Size, size: Size) -> Method:
    """The plain backbone at an input of its own, its map enlarged bilinearly to the grid of the student's at `size`."""
    frozen, call = count_bytes(student.backbone), enlarged_map(student, size)
    return Method("equal_cost", EQUAL_COST, input_size, student_grid(student, size), call, 0, frozen)


def in_precision(method: Method, runtime: Runtime, compiled: bool = False) -> Method:
    """A method in the arithmetic of a runtime, and compiled by torch if asked for."""
    call = torch.compile(method.call, dynamic=False) if compiled else method.call
    return replace(method, call=runtime.in_precision(call))
