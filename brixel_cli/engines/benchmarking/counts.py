"""What rows cost, counted on hollow models: no weights are read, and nothing is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from brixel_cli.core.backbone import Backbone
from brixel_cli.core.cost import Cost, count_cost, count_parameters, fake_tensors, hollow
from brixel_cli.core.student import Student
from brixel_cli.core.vit_formula import vit_flop
from brixel_cli.engines.benchmarking.contenders import Contender, Size, make_contenders
from brixel_cli.engines.benchmarking.models import Candidate
from brixel_cli.engines.benchmarking.results import BudgetRow, Row

LARGEST_SIDE = 4096
"""Pixels; no larger input is looked for."""


def count_rows(candidate: Candidate, size: Size, highres: bool, batch_size: int) -> list[Row]:
    """The rows of one model at one size, with all that can be known without running them.

    Raises:
        SizeError: the size is no multiple of the patch.
    """
    student = candidate.hollow()
    with fake_tensors(), torch.inference_mode():
        hollow(student)
        return _count_rows(candidate, student, size, highres, batch_size)


def _count_rows(candidate: Candidate, student: Student, size: Size, highres: bool, batch_size: int) -> list[Row]:
    rows = []
    for contender in make_contenders(student, size, highres):
        one = _count(contender, 1)
        peak = one.peak_bytes if batch_size == 1 else _count(contender, batch_size).peak_bytes
        rows.append(_row(candidate, student.backbone, size, contender, one, peak))
    trunk = rows[0].gflop
    return [replace(row, counted_vit_gflop=row.gflop if row.kind == "teacher" else trunk) for row in rows]


def count_baselines(
    candidate: Candidate, contenders: Sequence[Contender], backbone: Backbone, size: Size, batch_size: int
) -> list[Row]:
    """Rows of baselines, counted while they run: what they do need not work without numbers."""
    rows = []
    with torch.inference_mode():
        for contender in contenders:
            device = next(backbone.parameters()).device
            one, batch = (contender.input(count, device) for count in (1, batch_size))
            counted = count_cost(partial(contender.call, one))
            peak = count_cost(partial(contender.call, batch)).peak_bytes
            rows.append(_row(candidate, backbone, size, contender, counted, peak))
    return rows


def largest_sizes(candidate: Candidate, labels: Sequence[str], budget_bytes: int, batch_size: int) -> list[BudgetRow]:
    """For each row the largest square student input whose weights and counted peak stay within a budget.

    A row that does not fit at a single patch has no entry.
    """
    student = candidate.hollow()
    patch = student.backbone.patch_size
    found = []
    with fake_tensors(), torch.inference_mode():
        hollow(student)

        def total(label: str, patches: int) -> int:
            size = (patches * patch, patches * patch)
            contender = next(row for row in make_contenders(student, size, True) if row.label == label)
            return contender.weights_bytes + _count(contender, batch_size).peak_bytes

        for label in labels:
            fits, too_many = 0, LARGEST_SIDE // patch + 1
            while too_many - fits > 1:
                middle = (fits + too_many) // 2
                fits, too_many = (middle, too_many) if total(label, middle) <= budget_bytes else (fits, middle)
            if fits:
                size = (fits * patch, fits * patch)
                bytes_needed = total(label, fits)
                found.append(BudgetRow(candidate.name, label, size, bytes_needed, "counted", fits=True, largest=True))
    return found


def _count(contender: Contender, batch_size: int) -> Cost:
    images = contender.input(batch_size)
    return count_cost(lambda: contender.call(images))


def _row(
    candidate: Candidate, backbone: Backbone, size: Size, contender: Contender, cost: Cost, peak_bytes: int
) -> Row:
    return Row(
        model=candidate.name,
        kind=contender.kind,
        label=contender.label,
        size=size,
        input_size=contender.input_size,
        grid=contender.grid,
        frozen_parameters=count_parameters(backbone),
        adapter_parameters=contender.adapter_parameters,
        gflop=cost.flop / 1e9,
        formula_gflop=vit_flop(backbone.shape, *contender.input_size) / 1e9,
        counted_vit_gflop=None,
        uncounted=cost.uncounted,
        weights_bytes=contender.weights_bytes,
        peak_bytes=peak_bytes,
        memory="counted",
    )
