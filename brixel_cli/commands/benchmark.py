"""`brixel benchmark`: options to engine, result to table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from brixel_cli.benchmark_options import BenchmarkOptions
from brixel_cli.console import Progress, print_files, print_json, print_notes, print_table, say
from brixel_cli.formatting import human_bytes

if TYPE_CHECKING:
    from brixel_cli.engines.benchmark_results import Model, Results, Row

COST_COLUMNS = ("row", "input", "grid", "frozen", "adapter", "GFLOP", "memory", "less FLOP", "less mem.")
TIME_COLUMNS = ("row", "median", "10 %", "90 %", "images/s", "faster")
FIDELITY_COLUMNS = ("row", "L1", "cosine", "5 %", "worst", "edge", "spectral")
GAP_COLUMNS = ("gap to the teacher closed", "L1", "cosine", "edge", "spectral")


def run_benchmark(options: BenchmarkOptions, report: Path | None, dry_run: bool, as_json: bool) -> None:
    """Carry out `brixel benchmark` with options as the user gave them; see `app.benchmark` for what they mean.

    Raises:
        BrixelError: something the user can mend.
    """
    # torch takes seconds to import: only now, when there is work for it.
    from brixel_cli.engines.benchmarking import benchmark, count_only

    files: list[Path] = []
    if dry_run:
        results = count_only(options, Progress())
    else:
        results, files = benchmark(options, Progress())
    if as_json:
        print_json({**json.loads(results.to_json()), "files": [str(file) for file in files]})
    else:
        _show(results)
        print_files([str(file) for file in files])
    if dry_run:
        say("dry run: counted only; nothing was run or written")


def _show(results: Results) -> None:
    for model in results.models:
        for size in dict.fromkeys(row.size for row in results.rows if row.model == model.name):
            rows = [row for row in results.rows if (row.model, row.size) == (model.name, size)]
            _show_rows(results, model, rows)
    if results.budget:
        _show_budget(results)
    print_notes(results.notes)


def _show_rows(results: Results, model: Model, rows: Sequence[Row]) -> None:
    """The tables of one model at one size."""
    weights = "random weights, on purpose: cost only" if model.weights == "random" else f"weights {model.weights}"
    title = f"{model.name} at {_size(rows[0].size)} px: {model.backbone}, {weights}; adapter {model.adapter}, "
    title += model.student or "untrained"
    print_table(title, COST_COLUMNS, [_cost_cells(results, row) for row in rows])
    timed = [row for row in rows if row.latency]
    if timed:
        environment, batch = results.environment, results.settings.batch_size
        compiled = ", compiled" if results.settings.compiled else ""
        title = (
            f"Time of a batch of {batch} on {environment.processor} ({environment.device}, {environment.threads} "
            f"threads), {environment.precision}{compiled}"
        )
        print_table(title, TIME_COLUMNS, [_time_cells(results, row) for row in timed])
    compared = [row for row in rows if row.fidelity]
    if compared:
        title = f"Fidelity to the teacher: {model.num_images} photographs of {model.images}"
        print_table(title, FIDELITY_COLUMNS, [_fidelity_cells(row) for row in compared])
        closed = [row for row in compared if row.kind != "bilinear"]
        print_table("", GAP_COLUMNS, [_gap_cells(row) for row in closed])


def _cost_cells(results: Results, row: Row) -> list[str]:
    ratios = results.ratios(row)
    memory = "-" if row.peak_bytes is None else human_bytes(row.peak_bytes)
    return [
        row.label,
        _size(row.input_size),
        _size(row.grid),
        _millions(row.frozen_parameters),
        _millions(row.adapter_parameters),
        "-" if row.gflop is None else f"{row.gflop:,.1f}",
        f"{memory} c" if row.memory == "counted" else memory,
        *(_times(ratio) for ratio in (ratios.less_flop, ratios.less_memory)),
    ]


def _time_cells(results: Results, row: Row) -> list[str]:
    latency, per_second = row.latency, results.images_per_second(row)
    assert latency is not None
    label = row.label
    if latency.compile_seconds is not None:
        label += f" (compiled in {latency.compile_seconds:.1f} s)"
    return [
        label,
        *(_seconds(value) for value in (latency.median, latency.low, latency.high)),
        "-" if per_second is None else f"{per_second:,.2f}",
        _times(results.ratios(row).faster),
    ]


def _fidelity_cells(row: Row) -> list[str]:
    names = ("l1", "cosine", "cosine_p5", "cosine_worst", "edge", "spectral")
    return [row.label, *(f"{getattr(row.fidelity, name):.4f}" for name in names)]


def _gap_cells(row: Row) -> list[str]:
    shares = row.fidelity.gap_closed if row.fidelity else {}
    found = [shares.get(name) for name in ("l1", "cosine", "edge", "spectral")]
    return [row.label, *("-" if share is None else f"{share:.1%}" for share in found)]


def _show_budget(results: Results) -> None:
    rows = [
        [
            f"{answer.model} {answer.label}{', largest' if answer.largest else ''}",
            _size(answer.size),
            human_bytes(answer.total_bytes) + (" c" if answer.memory == "counted" else ""),
            "yes" if answer.fits else "no",
        ]
        for answer in results.budget
    ]
    budget = human_bytes(results.settings.budget_bytes or 0)
    print_table(
        f"Budget of {budget}, weights and peak, without the libraries' own",
        ["row", "student input", "needed", "fits"],
        rows,
        ["Largest: the largest square student input that fits, by the count (c)."],
    )


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count else "0"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:,.1f}x"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"
