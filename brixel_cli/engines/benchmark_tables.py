"""The tables of a benchmark, as the terminal and the report show them alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from brixel_cli.core.metrics import FIDELITY
from brixel_cli.engines.ablation_results import Ablations, VariantResult
from brixel_cli.engines.benchmark_results import Model, Results, Row
from brixel_cli.formatting import human_bytes, human_count, human_seconds, human_size

COST_COLUMNS = (
    "row", "input", "grid", "parameters", "GFLOP", "peak memory", "median", "10-90 %", "images/s", "faster", "FLOP",
    "memory",
)  # fmt: skip
FIDELITY_COLUMNS = ("row", "L1", "cosine", "5 %", "worst", "edge", "spectral", "L1", "cosine", "edge", "spectral")
ABLATION_FIDELITY = (
    "variant", "L1", "cosine", "edge", "spectral", "L1 closed", "cosine closed", "edge closed", "image",
)  # fmt: skip
ABLATION_COST = ("variant", "parameters", "GFLOP", "image", "10-90 %", "update", "steps", "updates in all", "memory")
HIGHER_IS_BETTER = ("cosine", "L1 closed", "cosine closed", "edge closed")


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: above it; may be empty.
        columns: the first is text, the others are figures.
        rows: of cells.
        notes: below it.
        best: (row, column) of the cells that are the best of their columns.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    best: frozenset[tuple[int, int]] = frozenset()


def cost_table(results: Results, model: Model, size: tuple[int, int]) -> Table:
    """What each row of a model costs at a size (height, width)."""
    weights = "random weights: cost only" if model.weights == "random" else f"weights {model.weights}"
    title = f"{model.name} at {human_size(size)} px: {model.backbone} ({weights}), {model.adapter}"
    title += f" ({model.student or 'untrained'}); {results.environment.device}, {model.dtype} weights"
    return Table(title, COST_COLUMNS, [_cost_cells(results, row) for row in rows_of(results, model, size)])


def fidelity_table(results: Results, model: Model, size: tuple[int, int]) -> Table | None:
    """How close each row of a model comes to the teacher at a size (height, width); None where nothing was compared."""
    cells = [_fidelity_cells(row) for row in rows_of(results, model, size) if row.fidelity]
    title = f"{model.num_images} photographs of {model.images} against the teacher; right: gap closed"
    return Table(title, FIDELITY_COLUMNS, cells) if cells else None


def budget_table(results: Results) -> Table | None:
    """The answer to --budget; None where none was given."""
    if not results.budget:
        return None
    rows = [
        [
            f"{answer.model} {answer.label}{', largest' if answer.largest else ''}",
            human_size(answer.size),
            human_bytes(answer.total_bytes) + (" c" if answer.memory == "counted" else ""),
            "yes" if answer.fits else "no",
        ]
        for answer in results.budget
    ]
    return Table(
        f"Budget of {human_bytes(results.settings.budget_bytes or 0)}, weights and peak, without the libraries' own",
        ("row", "student input", "needed", "fits"),
        rows,
        ["Largest: the largest square student input that fits, by the count (c)."],
    )


def notes(results: Results) -> list[str]:
    """What is to be read with the tables of cost and fidelity."""
    environment, settings = results.environment, results.settings
    return [
        f"{environment.processor}, {environment.threads} threads, batch of {settings.batch_size}, "
        f"{environment.precision}{', compiled' if settings.compiled else ''}. Memory is above the weights; "
        "c: counted, not measured. Faster, FLOP, memory: times less than the teacher.",
        *results.notes,
    ]


def ablation_tables(ablations: Ablations, group: str) -> list[Table]:
    """The variants of a group: how faithful they came out, beside the bilinear backbone map, and what they cost."""
    variants = ablations.groups()[group]
    first = next((item for item in variants if item.bilinear), None)
    equal = f"{ablations.budget:,.0f} updates" if ablations.equal == "steps" else human_seconds(ablations.budget)
    images = f"{first.num_images} held-out photographs" if first else "nothing trained yet"
    faithful = [["bilinear", *_figures(first.bilinear), "-", "-", "-", "-"]] if first else []
    faithful += [_ablation_fidelity(item) for item in variants]
    return [
        Table(
            f"{group}: {ablations.recipe}, {equal} of {ablations.batch_size} images for each; {images}",
            ABLATION_FIDELITY,
            faithful,
            [f"{item.name}: {described(item)}" for item in variants],
            _best_cells(ABLATION_FIDELITY, faithful),
        ),
        Table(f"{group}: cost", ABLATION_COST, [_ablation_cost(item) for item in variants]),
    ]


def _best_cells(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> frozenset[tuple[int, int]]:
    """The best of each metric's column, all of them where several are written alike."""
    best = set()
    for column, name in enumerate(columns[1:-1], start=1):
        cells = {number: row[column].rstrip("%") for number, row in enumerate(rows)}
        figures = {number: float(cell) for number, cell in cells.items() if cell not in ("-", "failed")}
        if len(figures) > 1:
            wanted = max(figures.values()) if name in HIGHER_IS_BETTER else min(figures.values())
            best |= {(number, column) for number, figure in figures.items() if figure == wanted}
    return frozenset(best)


def described(variant: VariantResult) -> str:
    """What a variant changes, or why it failed."""
    changes = ", ".join(f"{key}={json.dumps(value)}" for key, value in variant.changes.items())
    return (changes or "the recipe as it stands") + (f"; failed: {variant.failed}" if variant.failed else "")


def rows_of(results: Results, model: Model, size: tuple[int, int]) -> list[Row]:
    """The rows of a model at a size."""
    return [row for row in results.rows if (row.model, row.size) == (model.name, size)]


def sizes_of(results: Results, model: Model) -> list[tuple[int, int]]:
    """The sizes at which a model was looked at."""
    return list(dict.fromkeys(row.size for row in results.rows if row.model == model.name))


def _cost_cells(results: Results, row: Row) -> list[str]:
    ratios, latency = results.ratios(row), row.latency
    per_second = results.images_per_second(row)
    return [
        row.label,
        human_size(row.input_size),
        human_size(row.grid),
        f"{human_count(row.frozen_parameters)} + {human_count(row.adapter_parameters)}",
        "-" if row.gflop is None else f"{row.gflop:,.1f}",
        "-" if row.peak_bytes is None else human_bytes(row.peak_bytes) + (" c" if row.memory == "counted" else ""),
        human_seconds(row.seconds),
        f"{human_seconds(latency.low)} - {human_seconds(latency.high)}" if latency else "-",
        "-" if per_second is None else f"{per_second:,.2f}",
        *(f"{ratio:,.1f}x" if ratio else "-" for ratio in (ratios.faster, ratios.less_flop, ratios.less_memory)),
    ]


def _fidelity_cells(row: Row) -> list[str]:
    fidelity = row.fidelity
    assert fidelity is not None
    values = [getattr(fidelity, name) for name in ("l1", "cosine", "cosine_p5", "cosine_worst", "edge", "spectral")]
    return [row.label, *(f"{value:.4f}" for value in values), *_shares(fidelity.gap_closed, FIDELITY)]


def _ablation_fidelity(item: VariantResult) -> list[str]:
    empty = ["failed" if item.failed else "-", *["-"] * (len(FIDELITY) - 1)]
    return [
        item.name,
        *(_figures(item.fidelity) if item.fidelity else empty),
        *_shares(item.gap_closed, ("l1", "cosine", "edge")),
        human_seconds(item.latency.median),
    ]


def _ablation_cost(item: VariantResult) -> list[str]:
    return [
        item.name,
        human_count(item.num_parameters),
        f"{item.gflop:,.1f}",
        human_seconds(item.latency.median),
        f"{human_seconds(item.latency.low)} - {human_seconds(item.latency.high)}",
        human_seconds(item.update_seconds),
        f"{item.steps:,}",
        human_seconds(item.training_seconds),
        human_bytes(item.training_bytes),
    ]


def _figures(fidelity: Mapping[str, float | None]) -> list[str]:
    values = [fidelity.get(name) for name in FIDELITY]
    return ["-" if value is None else f"{value:.4f}" for value in values]


def _shares(shares: Mapping[str, float | None], names: Sequence[str]) -> list[str]:
    values = [shares.get(name) for name in names]
    return ["-" if value is None else f"{value:.1%}" for value in values]
