"""`brixel benchmark`: options to engine, result to table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from brixel_cli.benchmark_options import BenchmarkOptions
from brixel_cli.console import Progress, print_files, print_json, print_table, say
from brixel_cli.formatting import human_bytes

if TYPE_CHECKING:
    from brixel_cli.engines.benchmark_results import Results, Row

COST_COLUMNS = (
    "row", "input", "grid", "parameters", "GFLOP", "peak memory", "median", "10-90 %", "images/s", "faster", "FLOP",
    "memory",
)  # fmt: skip
FIDELITY_COLUMNS = ("row", "L1", "cosine", "5 %", "worst", "edge", "spectral", "L1", "cosine", "edge", "spectral")


def run_benchmark(options: BenchmarkOptions, report: Path | None, dry_run: bool, as_json: bool) -> None:
    """Carry out `brixel benchmark` with options as the user gave them; see `app.benchmark` for what they mean.

    Raises:
        BrixelError: something the user can mend.
    """
    # torch takes seconds to import: only now, when there is work for it.
    from brixel_cli.engines.benchmarking import benchmark, count_only

    if dry_run:
        results, files = count_only(options, Progress()), []
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
            weights = "random weights: cost only" if model.weights == "random" else f"weights {model.weights}"
            title = f"{model.name} at {size[0]}x{size[1]} px: {model.backbone} ({weights}), {model.adapter}"
            title += f" ({model.student or 'untrained'}); {results.environment.device}, {model.dtype} weights"
            print_table(title, COST_COLUMNS, [_cost_cells(results, row) for row in rows])
            if any(row.fidelity for row in rows):
                of = f"{model.num_images} photographs of {model.images} against the teacher; right: gap closed"
                print_table(of, FIDELITY_COLUMNS, [_fidelity_cells(row) for row in rows if row.fidelity])
    if results.budget:
        _show_budget(results)
    environment, settings = results.environment, results.settings
    notes = [
        f"{environment.processor}, {environment.threads} threads, batch of {settings.batch_size}, "
        f"{environment.precision}{', compiled' if settings.compiled else ''}. Memory is above the weights; "
        "c: counted, not measured. Faster, FLOP, memory: times less than the teacher.",
        *results.notes,
    ]
    print_table("", [], [], notes)


def _cost_cells(results: Results, row: Row) -> list[str]:
    ratios, latency = results.ratios(row), row.latency
    per_second = results.images_per_second(row)
    return [
        row.label,
        _size(row.input_size),
        _size(row.grid),
        f"{_millions(row.frozen_parameters)} + {_millions(row.adapter_parameters)}",
        "-" if row.gflop is None else f"{row.gflop:,.1f}",
        "-" if row.peak_bytes is None else human_bytes(row.peak_bytes) + (" c" if row.memory == "counted" else ""),
        _seconds(latency and latency.median),
        f"{_seconds(latency.low)} - {_seconds(latency.high)}" if latency else "-",
        "-" if per_second is None else f"{per_second:,.2f}",
        *(f"{ratio:,.1f}x" if ratio else "-" for ratio in (ratios.faster, ratios.less_flop, ratios.less_memory)),
    ]


def _fidelity_cells(row: Row) -> list[str]:
    fidelity = row.fidelity
    assert fidelity is not None
    values = [getattr(fidelity, name) for name in ("l1", "cosine", "cosine_p5", "cosine_worst", "edge", "spectral")]
    shares = [fidelity.gap_closed.get(name) for name in ("l1", "cosine", "edge", "spectral")]
    return [
        row.label,
        *(f"{value:.4f}" for value in values),
        *("-" if share is None else f"{share:.1%}" for share in shares),
    ]


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


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"
