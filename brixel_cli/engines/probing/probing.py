"""Probing: from a labelled set and several sources of features to figures, heads, curves and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from brixel_cli.config.probe import ProbeOptions
from brixel_cli.core.extras import require
from brixel_cli.core.files import locked
from brixel_cli.core.heads import QUANTITIES
from brixel_cli.data.labelled import LabelledSet, all_errors
from brixel_cli.data.predictions import prediction_file
from brixel_cli.engines.probing.cost import measure_costs
from brixel_cli.engines.probing.features import prepare
from brixel_cli.engines.probing.folder import ProbeFolder
from brixel_cli.engines.probing.frozen import FrozenTask, groups_of
from brixel_cli.engines.probing.plan import ProbePlan, SourcePlan, make_plan
from brixel_cli.engines.probing.predictions import check_predictions, write_predictions
from brixel_cli.engines.probing.report import write_curves, write_pictures
from brixel_cli.engines.probing.results import (
    ProbeResults,
    Run,
    Settings,
    SourceDescription,
    SplitUsed,
    stored_gaps,
    summarise,
)
from brixel_cli.engines.probing.runs import describe, predictor, run_source, versions
from brixel_cli.engines.probing.sources import ModelSource, PredictionSource, resolve_sources
from brixel_cli.engines.probing.transfer import run_transfer, transfers
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import UsageError


@dataclass(frozen=True)
class Probed:
    """How a probe ended: what results.json holds, and the files that were written."""

    results: ProbeResults
    files: list[Path]


def plan_only(options: ProbeOptions, reporter: Reporter) -> ProbePlan:
    """The plan, without carrying it out; every image and label is read, but no weights of a backbone.

    Raises:
        BrixelError: as `probe`, and with all images that cannot be used.
    """
    return plan_probe(options, Runtime(options.device, options.precision), reporter, dry_run=True)


def probe(options: ProbeOptions, reporter: Reporter) -> Probed:
    """Train and evaluate a head for every source and seed that has none in the output folder yet.

    Features are computed once for each source, stored, and used for all seeds. On a CPU the same seed gives the same
    bits, with the same number of threads; which seeds and sources were done before does not matter.

    Raises:
        BrixelError: something the user can fix; what was computed before stays.
    """
    runtime = Runtime(options.device, options.precision)
    if runtime.world_size > 1:
        raise UsageError("brixel probe runs in one process: start it without torchrun.")
    plan = plan_probe(options, runtime, reporter)
    with locked(options.output):
        return _probe(plan, runtime, reporter)


def _probe(plan: ProbePlan, runtime: Runtime, reporter: Reporter) -> Probed:
    options = plan.options
    folder = ProbeFolder(options.output)
    settings, described = _settings(plan, runtime), {item.source.label: describe(item) for item in plan.sources}
    for label, item in transfers(plan).items():
        described[label] = replace(described[item.source.label], kind="transfer")  # type: ignore[arg-type]
    runs = folder.begin(settings, described, options.overwrite)
    done = {(run.source, run.seed) for run in runs}
    earlier = folder.earlier()
    if earlier is not None:
        described = earlier.sources | described
        for run in earlier.runs:
            if (run.source, run.seed) not in done:
                reporter.warn(f"{run.source}, seed {run.seed}: a file of it is missing or damaged; it is made again")
    if earlier is None or not options.trains:
        folder.write(_results(options, settings, described, runs, folder))  # what is kept from now on belongs to it
    wanted = [(item, seed) for item in plan.sources for seed in range(item.seeds or options.seeds)]
    missing = [(item, seed) for item, seed in wanted if (item.source.label, seed) not in done]
    again = wanted if options.save_predictions else []
    unsaved = [pair for pair in again if pair in missing or not _saved(folder, plan, *pair)]
    applied = [(label, item, seed) for label, item in transfers(plan).items() for seed in range(options.seeds)
               if (label, seed) not in done]  # fmt: skip
    redraw = bool(missing) or folder.damaged_pictures()
    if redraw or applied or unsaved:
        prepare(plan, runtime, reporter)
    frozen = FrozenTask(plan, folder, runtime, reporter, versions)
    for item in plan.sources:
        seeds = [seed for other, seed in missing if other is item]
        if seeds:
            trained = (
                run_source(plan, item, seeds, settings, folder, runtime, reporter)
                if options.trains
                else [frozen.run(item)]
            )
            for run in trained:
                runs.append(run)
                folder.write(_results(options, settings, described, runs, folder))
    for label, item, seed in applied:
        runs.append(run_transfer(plan, label, item, seed, folder, runtime, reporter, versions()))
        folder.write(_results(options, settings, described, runs, folder))
    for item, seed in unsaved:
        label, split = item.source.label, item.evaluate
        with reporter.bar(f"{label}, seed {seed}, predictions", len(split.labelled), unit="image") as bar:
            write_predictions(predictor(folder, plan, item, seed, runtime), folder.predictions(label, seed), split, bar)
    costs = earlier.costs if earlier else {}
    if any(isinstance(item.source, ModelSource) and item.source.label not in costs for item in plan.sources):
        costs = costs | measure_costs(plan, runtime, reporter)
    order = {label: place for place, label in enumerate(described)}
    runs.sort(key=lambda run: (order[run.source], run.seed))
    results = replace(_results(options, settings, described, runs, folder), costs=costs)
    folder.write(results)
    return Probed(results, _files(folder, plan, results, redraw, runtime))


def _saved(folder: ProbeFolder, plan: ProbePlan, item: SourcePlan, seed: int) -> bool:
    """Whether the predictions of a row are there, each of them."""
    names, quantities = item.evaluate.labelled.names, QUANTITIES[plan.options.recipe.task]
    output = folder.predictions(item.source.label, seed)
    return all(prediction_file(output, quantity, name).is_file() for quantity in quantities for name in names)


def plan_probe(options: ProbeOptions, runtime: Runtime, reporter: Reporter, dry_run: bool = False) -> ProbePlan:
    """What `probe` will carry out.

    Args:
        options: of the probe.
        runtime: where it will be carried out.
        reporter: hears of progress.
        dry_run: whether every image and label is read, and the backbone's weights are not.

    Raises:
        BrixelError: the set, a source or the protocol cannot be used.
    """
    require("probe", "brixel probe")
    train = LabelledSet(options.recipe, "train") if options.trains else None
    evaluate = LabelledSet(options.recipe, "evaluate")
    splits = [labelled for labelled in (train, evaluate) if labelled is not None]
    groups_of(options.recipe, options.protocol, evaluate)  # whose errors come before any work
    if dry_run:
        total = sum(map(len, splits))
        with reporter.bar("check images and labels", total, unit="image") as bar:
            errors = [error for labelled in splits for error in labelled.errors(bar.update)]
        if errors:
            raise all_errors(errors, total)
    with reporter.bar("check files", sum(len(labelled.files()) for labelled in splits), unit="file") as bar:
        for labelled in splits:
            labelled.read_contents(bar.update)
    sources = resolve_sources(options, runtime, reporter, evaluate.names, read_weights=not dry_run)
    plan = make_plan(options, sources, train, evaluate, runtime.precision)
    for item in plan.sources:
        if isinstance(item.source, PredictionSource):
            total = len(evaluate) * len(item.source.folders)
            with reporter.bar(f"check {item.source.label}", total, unit="image") as bar:
                check_predictions(options.recipe, item.source, item.evaluate, bar)
    return plan


def _settings(plan: ProbePlan, runtime: Runtime) -> Settings:
    """All that every figure depends on."""
    options = plan.options
    first = plan.sources[0]
    splits = {split.split: split for split in (first.training, first.evaluate) if split is not None}
    return Settings(
        recipe=options.recipe.name,
        task=options.recipe.task,
        protocol=options.protocol_name,
        protocol_settings=options.protocol,
        size=options.size,
        data={
            name: SplitUsed(getattr(options.recipe.data, name), len(split.labelled), split.labelled.fingerprint())
            for name, split in splits.items()
        },
        classes=groups_of(options.recipe, options.protocol, first.evaluate.labelled),
        precision=runtime.precision,
        device=runtime.device.type,
        label_fraction=options.label_fraction,
    )


def _results(
    options: ProbeOptions,
    settings: Settings,
    sources: dict[str, SourceDescription],
    runs: Sequence[Run],
    folder: ProbeFolder,
) -> ProbeResults:
    summary = summarise(list(sources), runs)
    gaps, spreads = stored_gaps(
        sources, summary, {run.source: folder.read_items(run.source) for run in runs if run.items}
    )
    return ProbeResults(
        settings=settings,
        recipe=options.recipe,
        sources=sources,
        seeds=sorted({run.seed for run in runs}),
        versions=versions(),
        summary=summary,
        recovered_gap=gaps,
        runs=list(runs),
        gap_spread=spreads,
    )


def _files(folder: ProbeFolder, plan: ProbePlan, results: ProbeResults, changed: bool, runtime: Runtime) -> list[Path]:
    """Draw what is for the eye, where the figures have changed; all files that there are."""
    if changed:
        write_curves(folder, list(results.summary), results.seeds)
        write_pictures(folder, plan, runtime)
    pictures = sorted(folder.pictures.glob("*.png"))
    heads = [path for run in results.runs if (path := folder.head(run.source, run.seed)).is_file()]
    curves = [folder.curves] if folder.curves.is_file() else []
    page = [folder.page] if folder.page.is_file() else []
    return [folder.results, folder.table, *curves, *pictures, *page, *heads]
