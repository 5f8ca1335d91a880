"""`--report` of brixel benchmark: what lies in an output folder, as HTML and Markdown."""

from __future__ import annotations

from pathlib import Path


def report_of(output: Path, report: Path) -> list[Path]:
    """Write a report of the results and the ablations that are in `output`; returns its files.

    Raises:
        BrixelError: they cannot be read, or the folder `report` cannot be made.
    """
    from brixel_cli.cli.report_pages import write_report
    from brixel_cli.engines.ablating import results as ablation_results
    from brixel_cli.engines.benchmarking import results as benchmark_results

    results = benchmark_results.read_results(output) if (output / benchmark_results.FILE_NAME).exists() else None
    ablations = ablation_results.read_ablations(output) if (output / ablation_results.FILE_NAME).exists() else None
    return write_report(results, ablations, output, report)
