"""`--curve`: fidelity against cost, of students and of the plain backbone at many inputs, towards one teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brixel_cli.config.benchmark import BenchmarkOptions
from brixel_cli.config.distill import ViewConfig
from brixel_cli.core.adapter import resize
from brixel_cli.core.extras import require
from brixel_cli.core.files import make_folder, write_text
from brixel_cli.core.formatting import human_size, now
from brixel_cli.core.student import Student
from brixel_cli.data.images import ImageFile
from brixel_cli.data.resizing import snap
from brixel_cli.data.views import Views
from brixel_cli.drawing.charts import SERIES, Line, line_chart
from brixel_cli.engines.benchmarking.cost import count_row
from brixel_cli.engines.benchmarking.environment import Record, describe_environment
from brixel_cli.engines.benchmarking.fidelity import measure_fidelity
from brixel_cli.engines.benchmarking.methods import Method, enlarged, in_precision, make_methods
from brixel_cli.engines.benchmarking.models import find_candidates, find_images_of, sizes_of
from brixel_cli.engines.benchmarking.results import Row, Size
from brixel_cli.engines.latency import interleaved
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime, memory_errors
from brixel_cli.errors import UsageError

FORMAT = "brixel-curve-1"
BACKBONE = "backbone"
NUM_INPUTS = 9
"""Of the plain backbone, in equal ratios."""
SMALLEST = 0.75
"""The first of them over the smallest input of a student; the last is the teacher's."""
Cost = Callable[[Row], float | None]


@dataclass(frozen=True)
class Curve(Record):
    """What a curve found out, as curve.json has it.

    Attributes:
        batch_size: images at once, in timing.
        backbone: timm name.
        teacher_size: its input (height, width) in pixels, towards which all rows are compared.
        images: folder of the images.
        num_images: that were compared.
        rows: `backbone` at each input, then each student at its own; maps are enlarged bilinearly to the teacher's
            grid. Recovered gaps are between the backbone at the smallest student's input and the teacher.
        format: of the file.
    """

    batch_size: int
    backbone: str
    teacher_size: Size
    images: str
    num_images: int
    rows: tuple[Row, ...]
    format: str = FORMAT

    @property
    def lines(self) -> dict[str, list[Row]]:
        """The rows by label, by input."""
        labels = dict.fromkeys(row.label for row in self.rows)
        return {
            label: sorted((row for row in self.rows if row.label == label), key=lambda row: math.prod(row.input_size))
            for label in labels
        }

    def worth(self, row: Row, cost: Cost) -> float | None:
        """The cost at which the plain backbone comes as close to the teacher, over the row's; None out of its range."""
        known = [(quality(other), cost(other)) for other in self.lines[BACKBONE]]
        points = [(cosine, math.log(value)) for cosine, value in known if value]
        own = cost(row)
        cosines = np.maximum.accumulate([cosine for cosine, _ in points])
        if not own or not cosines[0] <= quality(row) <= cosines[-1]:
            return None
        return math.exp(np.interp(quality(row), cosines, [value for _, value in points])) / own

    def chart(self) -> str:
        """The figure: cosine similarity against time and against arithmetic."""
        colours = [name for name in SERIES if name != "grey"]
        pairs = list(zip(self.lines.items(), ["grey", *colours * len(self.lines)], strict=False))

        def lines(cost: Cost) -> list[Line]:
            return [
                Line(label, colour, tuple((value, quality(row)) for row in rows if (value := cost(row))))
                for (label, rows), colour in pairs
            ]

        return line_chart(
            f"Cosine similarity to the teacher at {human_size(self.teacher_size)} px",
            lines(lambda row: row.seconds and row.seconds * 1e3),
            f"ms, whole pass of {self.batch_size}" if self.batch_size > 1 else "ms, whole pass",
            "cosine",
            log_x=True,
            beside=("GFLOP", lines(lambda row: row.gflop)),
        )


def quality(row: Row) -> float:
    """Cosine similarity to the teacher: the mean over domains, where images lie in several folders."""
    assert row.fidelity is not None
    return row.fidelity.mean_over_domains("cosine")


@torch.inference_mode()
def measure_curve(options: BenchmarkOptions, reporter: Reporter) -> tuple[Curve, list[Path]]:
    """Measure and draw the curve of the models that the options name; writes curve.json and curve.svg.

    Args:
        options: as given; `sizes` are those of the students.
        reporter: hears of stages, warnings and progress.

    Raises:
        UsageError: the students have several backbones, or there are no images or no trained student.
        BrixelError: weights or images cannot be read, or memory does not suffice.
    """
    require("report", "--curve")
    runtime = Runtime(options.device, options.precision)
    candidates = find_candidates(options, reporter)
    first = candidates[0]
    if len({candidate.spec.backbone for candidate in candidates}) > 1:
        raise UsageError("--curve compares students of one backbone: name them with --models.")
    images = find_images_of(first, options, reporter)
    if images is None or any(candidate.spec.stored is None for candidate in candidates):
        raise UsageError("--curve needs a trained student and images: --checkpoint STUDENT --images DIR.")
    patch = first.spec.patch_size
    sizes = {candidate.name: sizes_of(candidate, options) for candidate in candidates}
    large = max(
        ((size[0] * item.spec.factor, size[1] * item.spec.factor) for item in candidates for size in sizes[item.name]),
        key=math.prod,
    )
    home = min((size for some in sizes.values() for size in some), key=math.prod)
    students = {candidate.name: candidate.spec.load_student(str(runtime.device)) for candidate in candidates}
    methods = [*_backbones(students[first.name], home, large, patch)]
    grid = large[0] // patch, large[1] // patch
    for name, student in students.items():
        methods += [_enlarged_student(student, name, size, grid) for size in sizes[name]]
    make_folder(options.output)
    with memory_errors(f"with inputs of up to {human_size(large)} px", "Give a smaller --res or --batch-size."):
        rows = _measure(options, runtime, methods, first.name, students[first.name], large, images.files, reporter)
    curve = Curve(
        command=options.command,
        created=now(),
        environment=describe_environment(runtime),
        batch_size=options.batch_size,
        backbone=first.spec.backbone,
        teacher_size=large,
        images=images.folder,
        num_images=len(rows[0].fidelity.images) if rows[0].fidelity else 0,
        rows=tuple(rows),
    )
    files = {options.output / "curve.json": curve.to_json(), options.output / "curve.svg": curve.chart()}
    for path, text in files.items():
        write_text(path, text)
    return curve, list(files)


def _backbones(student: Student, home: Size, large: Size, patch: int) -> list[Method]:
    """The plain backbone at the smallest student's input, which recovered gaps start from, and at the other inputs."""
    most = large[0] / home[0]
    ratios = [SMALLEST * (most / SMALLEST) ** (number / (NUM_INPUTS - 1)) for number in range(NUM_INPUTS)]
    inputs = [home, *((snap(home[0] * ratio, patch), snap(home[1] * ratio, patch)) for ratio in ratios)]
    size = large[0] // student.adapter.factor, large[1] // student.adapter.factor
    return [
        replace(enlarged(student, own, size), kind="bilinear", label=f"{BACKBONE} {human_size(own)}")
        for own in dict.fromkeys(inputs)
    ]


def _enlarged_student(student: Student, name: str, size: Size, grid: Size) -> Method:
    method = make_methods(student, size, highres=False)[-1]

    def call(images: Tensor) -> Tensor:
        return resize(student(images), grid)

    return replace(method, label=f"{name} {human_size(size)}", grid=grid, call=call)


def _measure(
    options: BenchmarkOptions,
    runtime: Runtime,
    made: Sequence[Method],
    model: str,
    student: Student,
    large: Size,
    files: Sequence[ImageFile],
    reporter: Reporter,
) -> list[Row]:
    backbone = student.backbone
    methods = [in_precision(method, runtime) for method in made]
    calls = {method.label: partial(method.call, method.input(options.batch_size, runtime.device)) for method in methods}
    reporter.say(f"time of {len(methods)} rows")
    times = interleaved(calls, runtime.device, options.seconds)
    views = Views(files, ViewConfig(teacher_size=list(large), factor=2), 0)
    found = measure_fidelity(methods, views, backbone, reporter, f"fidelity, teacher {human_size(large)} px")
    return [
        replace(
            count_row(model, method, backbone, method.input_size, options.batch_size),
            label=method.label.rpartition(" ")[0],
            latency=times[method.label],
            fidelity=found[method.label],
        )
        for method in methods
    ]
