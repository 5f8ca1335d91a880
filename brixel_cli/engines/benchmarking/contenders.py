"""The ways to a map that a benchmark sets side by side: callables on the student's or the teacher's image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brixel_cli.core.adapter import resize
from brixel_cli.core.cost import count_parameters
from brixel_cli.core.student import Student
from brixel_cli.engines.benchmarking.baselines import Baseline
from brixel_cli.engines.benchmarking.results import Kind

Size = tuple[int, int]


@dataclass(frozen=True)
class Contender:
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


def make_contenders(student: Student, size: Size, highres: bool, baselines: Sequence[Baseline] = ()) -> list[Contender]:
    """The rows of one model at one size, in the order of the table.

    Args:
        student: frozen backbone and adapter, real or hollow.
        size: student input (height, width), multiples of the patch size.
        highres: whether the teacher is a row.
        baselines: functions from elsewhere.
    """
    backbone, factor = student.backbone, student.adapter.factor
    tokens = (size[0] // backbone.patch_size, size[1] // backbone.patch_size)
    fine = (tokens[0] * factor, tokens[1] * factor)
    large = (size[0] * factor, size[1] * factor)
    frozen, adapter = num_bytes(backbone), num_bytes(student.adapter)

    def bilinear(images: Tensor) -> Tensor:
        return resize(backbone.last_map(images), fine)

    def from_elsewhere(baseline: Baseline) -> Contender:
        def call(images: Tensor) -> Tensor:
            return baseline(images, backbone.last_map(images), fine)

        return Contender("baseline", baseline.name, size, fine, call, 0, frozen)

    rows = [
        Contender("backbone", "backbone", size, tokens, backbone.last_map, 0, frozen),
        Contender("bilinear", "bilinear", size, fine, bilinear, 0, frozen),
        *(from_elsewhere(baseline) for baseline in baselines),
        Contender("student", "student", size, fine, student, count_parameters(student.adapter), frozen + adapter),
    ]
    if highres:
        rows.append(Contender("teacher", "teacher", large, fine, backbone.last_map, 0, frozen))
    return rows


def num_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
