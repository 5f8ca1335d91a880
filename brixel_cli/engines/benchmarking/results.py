"""What a benchmark found out, and its form on disk: results.json for programs, results.csv for spreadsheets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal, TypeVar

from pydantic import AliasChoices, Field, TypeAdapter, ValidationError

from brixel_cli.core.formatting import csv_text, human_size
from brixel_cli.core.metrics import FIDELITY, domain_of
from brixel_cli.engines.benchmarking.environment import Record
from brixel_cli.engines.benchmarking.probes import ProbeResult
from brixel_cli.engines.latency import Latency
from brixel_cli.errors import BrixelError

FORMAT = "brixel-benchmark-1"
FILE_NAME = "results.json"
TABLE_NAME = "results.csv"
Kept = TypeVar("Kept")

Kind = Literal["backbone", "bilinear", "equal_cost", "student", "baseline", "teacher"]
How = Literal["measured", "counted"]
Size = tuple[int, int]
"""Height and width."""
FIGURES = ("l1", "cosine", "cosine_p5", "cosine_worst", "edge", "spectral")
"""Of a `Fidelity`, as tables have them."""

RecoveredGaps = Annotated[dict[str, float | None], Field(validation_alias=AliasChoices("recovered_gap", "gap_closed"))]
"""By metric; files of earlier versions call them `gap_closed`."""


@dataclass(frozen=True)
class Settings:
    """What was asked for. Rows measured under other settings are not taken up again.

    Attributes:
        highres: whether the teacher's rows were asked for.
        batch_size: images at once.
        compiled: whether torch.compile was used.
        seconds: of timing for each model and size.
        max_images: images for the fidelity, at most.
        baselines: functions from elsewhere, as `module:function` or `file.py:function`.
        budget_bytes: memory budget to be answered, or None.
        baselines_sha256: of the source files of these functions.
    """

    highres: bool
    batch_size: int
    compiled: bool
    seconds: float
    max_images: int
    baselines: tuple[str, ...]
    budget_bytes: int | None
    baselines_sha256: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A model of the benchmark.

    Attributes:
        name: of the recipe or run folder; unique, and what rows refer to.
        backbone: timm name.
        weights: where the backbone's weights are from: `random`, `pretrained` or a path.
        student: the trained student's file, or None where the adapter has random weights.
        student_sha256: of its weights; empty without one.
        adapter: `fusion` or `deformable`.
        dtype: in which the weights are held.
        embed_dim, patch_size: of the backbone.
        factor: output grid over token grid; teacher input over student input.
        trained_size: student input (height, width) in pixels of the training, or of the recipe; None: not known.
        images: folder of the images of the fidelity, or None where there are none.
        num_images: how many; those that turn out damaged are left out of the fidelity.
        weights_sha256: of the backbone's file of weights; empty where `weights` is no file.
        images_sha256: of the names and contents of the images; empty where there are none.
    """

    name: str
    backbone: str
    weights: str
    student: str | None
    student_sha256: str
    adapter: str
    dtype: str
    embed_dim: int
    patch_size: int
    factor: int
    trained_size: Size | None
    images: str | None
    num_images: int
    weights_sha256: str = ""
    images_sha256: str = ""


@dataclass(frozen=True)
class ImageFidelity:
    """Fidelity of one image's map to the teacher's; `cosine_p5` is the 5th percentile over its locations."""

    name: str
    l1: float
    cosine: float
    cosine_p5: float
    edge: float
    spectral: float


@dataclass(frozen=True)
class Fidelity:
    """Fidelity to the teacher over all images; what the metrics are is in `core.metrics.fidelity`.

    Attributes:
        l1, cosine, edge, spectral: means over images.
        cosine_p5: 5th percentile over all locations of all images.
        cosine_worst: of the image with the lowest mean cosine.
        recovered_gap: by metric, (row - bilinear) / (teacher - bilinear): 1 is the teacher; None where there is no gap.
        images: image by image.
        gap_spread: standard errors of the recovered gaps.
        domains: recovered gap in cosine, with its standard error, of the images of each first folder of their names,
            and the mean of these as `mean`; empty where there are fewer than two folders.
    """

    l1: float
    cosine: float
    cosine_p5: float
    cosine_worst: float
    edge: float
    spectral: float
    recovered_gap: RecoveredGaps
    images: tuple[ImageFidelity, ...]
    gap_spread: dict[str, float | None] = field(default_factory=dict)
    domains: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)

    def mean_over_domains(self, metric: str) -> float:
        """Of a metric of the images: the mean over domains of their means; over images where there are no domains."""
        groups: dict[str, list[float]] = {}
        for image in self.images:
            groups.setdefault(domain_of(image.name) if self.domains else "", []).append(getattr(image, metric))
        return fmean(fmean(group) for group in groups.values())

    @property
    def worst_images(self) -> list[ImageFidelity]:
        """Images by cosine similarity, worst first."""
        return sorted(self.images, key=lambda image: image.cosine)


@dataclass(frozen=True)
class Row:
    """One way to a map, for one model and one size.

    Attributes:
        model: name of its `Model`.
        kind: what it is.
        label: what it is called: its kind, or the baseline's own name.
        size: student input S (height, width) in pixels, the same for all rows that are compared.
        input_size: image (height, width) that the row sees: S; for the teacher `factor` times that, for the backbone
            at equal cost the largest at which it takes no longer than the student, for a baseline its guide image.
        grid: of its map (height, width).
        frozen_parameters, adapter_parameters: numbers; a baseline's own are not known, and left at 0.
        gflop: of one image; a multiply-add is 2, attention counted. None where it cannot be counted.
        uncounted: operators that do arithmetic which `gflop` lacks.
        weights_bytes: of its weights.
        peak_bytes: beyond the weights, on one batch.
        memory: how `peak_bytes` was obtained.
        kept_bytes: what the libraries keep after a first call (kernels, thread pools), not in `peak_bytes`; or None.
        latency: None where the row was not run.
        fidelity: None where there are no real weights, no images or nothing to compare.
        note: why something is missing; may be empty.
    """

    model: str
    kind: Kind
    label: str
    size: Size
    input_size: Size
    grid: Size
    frozen_parameters: int
    adapter_parameters: int
    gflop: float | None
    uncounted: tuple[str, ...]
    weights_bytes: int
    peak_bytes: int | None
    memory: How
    kept_bytes: int | None = None
    latency: Latency | None = None
    fidelity: Fidelity | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, Size, str]:
        """What names a row within a benchmark."""
        return self.model, self.size, self.label

    @property
    def seconds(self) -> float | None:
        """Median seconds of a call; None where the row was not run."""
        return self.latency.median if self.latency else None

    @property
    def total_bytes(self) -> int | None:
        """Weights and peak together: what a device needs, beside the libraries' own."""
        return None if self.peak_bytes is None else self.weights_bytes + self.peak_bytes


@dataclass(frozen=True)
class Ratios:
    """A row beside the teacher of its model and size: how many times less it takes; None where unknown."""

    faster: float | None
    less_flop: float | None
    less_memory: float | None


@dataclass(frozen=True)
class BudgetRow:
    """Whether one model, row and size stays within the budget; `largest` marks the largest size that does."""

    model: str
    label: str
    size: Size
    total_bytes: int
    memory: How
    fits: bool
    largest: bool


@dataclass(frozen=True)
class Picture:
    """A picture of one image: input, maps of all rows, teacher; `rank` 1 is the worst of its model and size."""

    model: str
    size: Size
    image: str
    rank: int
    path: str

    @property
    def page(self) -> str:
        """The page to look at the features of its model and size with; older results have none."""
        return f"pictures/{self.model}_{human_size(self.size)}.html"


@dataclass(frozen=True)
class Results(Record):
    """A whole benchmark, as results.json has it.

    Attributes:
        settings: how.
        models: of which the rows speak.
        rows: by model, then size, in the order in which they are printed.
        budget: answers to --budget; empty where none was given.
        pictures: of the worst, the median and the best images; paths are relative to the folder of results.json.
        notes: to be read with the table.
        probes: by model, what probes under ./runs/probe found out about its student.
    """

    settings: Settings
    models: tuple[Model, ...]
    rows: tuple[Row, ...]
    budget: tuple[BudgetRow, ...] = ()
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()
    probes: dict[str, tuple[ProbeResult, ...]] = field(default_factory=dict)
    format: str = field(default=FORMAT)

    def model(self, name: str) -> Model:
        """The model that a row names."""
        return next(model for model in self.models if model.name == name)

    def sizes(self, model: Model) -> list[Size]:
        """The sizes at which a model was measured."""
        return list(dict.fromkeys(row.size for row in self.rows if row.model == model.name))

    def main_size(self, model: Model) -> Size:
        """The size that stands for a model: that of its training, or else the largest."""
        sizes = self.sizes(model)
        return model.trained_size if model.trained_size in sizes else max(sizes, key=math.prod)

    def rows_at(self, model: Model, size: Size) -> list[Row]:
        """The rows of a model at a size."""
        return [row for row in self.rows if (row.model, row.size) == (model.name, size)]

    def compared(self, model: Model, size: Size) -> list[tuple[Row, Fidelity]]:
        """Those of them that were compared with the teacher."""
        return [(row, row.fidelity) for row in self.rows_at(model, size) if row.fidelity]

    def curves(self, model: Model) -> list[list[Row]]:
        """The rows of a model that have several sizes, by label, the smallest size first."""
        groups: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: math.prod(row.size)):
            if row.model == model.name:
                groups.setdefault(row.label, []).append(row)
        return [rows for rows in groups.values() if len(rows) > 1]

    def ratios(self, row: Row) -> Ratios:
        """How many times less time, arithmetic and memory above weights a row takes than its teacher."""
        same = [other for other in self.rows if (other.model, other.size) == (row.model, row.size)]
        teacher = next((other for other in same if other.kind == "teacher"), None)
        if teacher is None:
            return Ratios(None, None, None)
        return Ratios(
            _over(teacher.seconds, row.seconds),
            _over(teacher.gflop, row.gflop),
            _over(teacher.peak_bytes, row.peak_bytes) if teacher.memory == row.memory else None,
        )

    def images_per_second(self, row: Row) -> float | None:
        """Throughput of a row."""
        return _over(self.settings.batch_size, row.seconds)

    def to_csv(self) -> str:
        """A line for each row, all columns of the table."""
        return csv_text(_COLUMNS, [self._cells(row) for row in self.rows])

    def _cells(self, row: Row) -> list[object]:
        ratios, latency, fidelity = self.ratios(row), row.latency, row.fidelity
        sizes = map(human_size, (row.size, row.input_size, row.grid))
        gaps = fidelity.recovered_gap if fidelity else {}
        return [
            row.model, row.label, *sizes, row.frozen_parameters, row.adapter_parameters, row.gflop, row.weights_bytes,
            row.peak_bytes, row.memory,
            *((latency.median, latency.low, latency.high, latency.rounds) if latency else [None] * 4),
            self.images_per_second(row), ratios.faster, ratios.less_flop, ratios.less_memory,
            *(getattr(fidelity, name) if fidelity else None for name in FIGURES),
            *(gaps.get(name) for name in FIDELITY), row.note,
        ]  # fmt: skip


_COLUMNS = (
    "model", "row", "size", "input", "grid", "frozen_parameters", "adapter_parameters", "gflop", "weights_bytes",
    "peak_bytes", "memory", "seconds", "seconds_q10", "seconds_q90", "rounds", "images_per_second", "times_faster",
    "times_less_flop", "times_less_memory", *FIGURES, *(f"recovered_gap_{name}" for name in FIDELITY), "note",
)  # fmt: skip


def _over(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def read_results(path: Path) -> Results:
    """Read results.json back, or the one in a folder.

    Raises:
        BrixelError: it is missing, or not of this format.
    """
    results = read_json(path, FILE_NAME, Results, "brixel benchmark")
    if results.format != FORMAT:
        raise BrixelError(f"{path} is of format {results.format}, not {FORMAT}: run brixel benchmark again.")
    return results


def read_json(path: Path, name: str, kind: type[Kept], command: str) -> Kept:
    """Read what a command has kept as JSON: a file, or the one called `name` in a folder.

    Raises:
        BrixelError: it is missing, or holds something else.
    """
    file = path / name if path.is_dir() else path
    try:
        return TypeAdapter(kind).validate_json(file.read_bytes())
    except OSError as error:
        raise BrixelError(f"No results of {command} at {file}: {error.strerror}.") from error
    except ValidationError as error:
        raise BrixelError(f"{file} holds no results of this version of {command}.") from error
