"""The methods that a benchmark compares: callables from the student's or the teacher's image to a map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brixel_cli.core.cost import count_bytes, count_parameters
from brixel_cli.core.student import Student
from brixel_cli.data.views import resize_view
from brixel_cli.engines.baselines import Baseline
from brixel_cli.engines.benchmarking.results import Kind, Size
from brixel_cli.engines.equal_cost import EQUAL_COST, enlarged_map, student_grid
from brixel_cli.engines.runtime import Runtime


@dataclass(frozen=True)
class Method:
    """One row before it is measured.

    Attributes:
        kind: what it is.
        label: what it is called.
        input_size: image (height, width) that it sees; of a baseline, the larger of its own and the backbone's.
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
        seen, both = baseline.guide_size(size), baseline.whole_pass(backbone, factor)

        def call(images: Tensor) -> Tensor:
            return both(images if seen == size else resize_view(images, size), images)

        return Method("baseline", baseline.name, seen, fine, call, 0, frozen)

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
