"""`brixel benchmark --ablate`: options to engine, result to tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from brixel_cli.cli.console import Progress, print_json, print_results, say
from brixel_cli.cli.probe import probe_options
from brixel_cli.config.benchmark import PROBE_SEEDS, AblationOptions
from brixel_cli.config.probe import ProbeOptions
from brixel_cli.errors import BrixelError


def run_ablation(options: AblationOptions, report: Path | None, dry_run: bool, as_json: bool) -> None:
    """Carry out `brixel benchmark --ablate` with options as the user gave them; see `app.benchmark`.

    Raises:
        BrixelError: an error that the user can fix; also, at the end, that some variants failed.
    """
    # torch takes seconds to import: only now, when there is work for it.
    from brixel_cli.cli.report import report_of
    from brixel_cli.cli.tables import ablation_tables, show
    from brixel_cli.core.extras import require
    from brixel_cli.engines.ablating.ablation import ablate
    from brixel_cli.engines.ablating.results import FILE_NAME, TABLE_NAME

    if report:
        require("report", "--report")
    probe = _probe(options)
    if dry_run:
        _show_plan(options, probe, as_json)
        return
    results = ablate(options, Progress(), probe)
    files = [options.output / FILE_NAME, options.output / TABLE_NAME]
    files += report_of(options.output, report) if report else []
    tables = (table for group in results.groups() for table in ablation_tables(results, group))
    print_results(asdict(results), files, as_json, lambda: show(tables))
    failed = [f"{item.name}: {item.failed}" for item in results.variants if item.failed]
    if failed:
        raise BrixelError("Variants that did not reach their end:\n  " + "\n  ".join(failed))


def _probe(options: AblationOptions) -> ProbeOptions | None:
    """The probe of the variants, under the recipe's own protocol; where it runs and on what is each variant's."""
    if options.probe is None:
        return None
    return probe_options(options.probe, data=options.probe_data, output=options.output, seeds=PROBE_SEEDS)


def _show_plan(options: AblationOptions, probe: ProbeOptions | None, as_json: bool) -> None:
    from brixel_cli.cli.tables import plan_table, show
    from brixel_cli.engines.ablating.ablation import plan_ablation
    from brixel_cli.engines.ablating.probing import check_set

    if probe:
        check_set(probe)
    planned = plan_ablation(options)
    if as_json:
        variants = [
            {"group": item.group, "name": item.variant.name, "changes": item.variant.changes,
             "parameters": item.counts.num_live, "training_bytes": item.counts.training_bytes}
            for item in planned
        ]  # fmt: skip
        print_json({"variants": variants})
    else:
        for group in dict.fromkeys(item.group for item in planned):
            show([plan_table(group, [item for item in planned if item.group == group])])
    say("dry run: nothing was trained or written")
