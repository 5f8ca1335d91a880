"""`brixel benchmark`: options to engine, result to table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from brixel_cli.cli.console import Progress, print_notes, print_results, say
from brixel_cli.config.benchmark import BenchmarkOptions
from brixel_cli.errors import UsageError

if TYPE_CHECKING:
    from brixel_cli.engines.benchmarking.results import Results


def run_benchmark(options: BenchmarkOptions, report: Path | None, dry_run: bool, as_json: bool) -> None:
    """Carry out `brixel benchmark` with options as the user gave them; see `app.benchmark` for what they mean."""
    # torch takes seconds to import: only now, when there is work for it.
    if options.curve:
        if dry_run or report:
            raise UsageError("--curve measures, and draws a figure of its own: leave out --dry-run and --report.")
        _run_curve(options, as_json)
        return
    from brixel_cli.cli.report import report_of
    from brixel_cli.core.extras import require
    from brixel_cli.engines.benchmarking.benchmarking import benchmark, count_only

    files: list[Path] = []
    if report:
        require("report", "--report")
    if dry_run:
        results = count_only(options, Progress())
    else:
        results, files = benchmark(options, Progress())
        files += report_of(options.output, report) if report else []
    print_results(asdict(results), files, as_json, lambda: _show(results))
    if dry_run:
        say("dry run: counted only; nothing was run or written")


def _run_curve(options: BenchmarkOptions, as_json: bool) -> None:
    from brixel_cli.cli.tables import curve_tables, show
    from brixel_cli.engines.benchmarking.curve import measure_curve

    curve, files = measure_curve(options, Progress())
    print_results(asdict(curve), files, as_json, lambda: show(curve_tables(curve)))


def _show(results: Results) -> None:
    from brixel_cli.cli.tables import budget_tables, cost_tables, fidelity_tables, probe_tables, show

    for model in results.models:
        for size in results.sizes(model):
            show([*cost_tables(results, model, size), *fidelity_tables(results, model, size)])
        show(probe_tables(results, model))
    show(budget_tables(results))
    print_notes(results.notes)
