"""Probing: from a labelled set and several sources of features to figures, heads, curves and pictures."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from brixel_cli.config.labelled import IGNORE, Split
from brixel_cli.config.probe import ProbeOptions
from brixel_cli.core.extras import require
from brixel_cli.core.files import locked
from brixel_cli.core.formatting import human_size
from brixel_cli.core.heads import HeadSpec, save_head
from brixel_cli.data.labelled import LabelledSet, all_errors
from brixel_cli.engines.probing.cost import measure_costs
from brixel_cli.engines.probing.evaluation import evaluate, evaluate_head, meters
from brixel_cli.engines.probing.features import Maps, Targets, open_maps, prepare
from brixel_cli.engines.probing.folder import ProbeFolder
from brixel_cli.engines.probing.frozen import FrozenTask, groups_of
from brixel_cli.engines.probing.plan import ProbePlan, SourcePlan, make_plan
from brixel_cli.engines.probing.predictions import check_predictions, reader
from brixel_cli.engines.probing.report import write_curves, write_pictures
from brixel_cli.engines.probing.results import (
    CropsUsed,
    FileDescription,
    HeadDescription,
    ModelDescription,
    PredictionsDescription,
    ProbeResults,
    Run,
    Settings,
    SourceDescription,
    SplitUsed,
    Versions,
    as_dict,
    stored_gaps,
    summarise,
)
from brixel_cli.engines.probing.sources import ModelSource, PredictionSource, resolve_sources
from brixel_cli.engines.probing.training import train_head
from brixel_cli.engines.probing.transfer import run_transfer, transfers
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime, library_versions, memory_errors
from brixel_cli.errors import BrixelError, UsageError


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
    settings, described = _settings(plan, runtime), {item.source.label: _describe(item) for item in plan.sources}
    for label, item in transfers(plan).items():
        described[label] = replace(described[item.source.label], kind="transfer")  # type: ignore[arg-type]
    runs = folder.begin(settings, described, options.overwrite)
    done = {(run.source, run.seed) for run in runs}
    earlier = folder.read() if folder.results.exists() else None
    if earlier is not None:
        described = earlier.sources | described
        for run in earlier.runs:
            if (run.source, run.seed) not in done:
                reporter.warn(f"{run.source}, seed {run.seed}: a file of it is missing or damaged; it is made again")
    if not options.trains:
        folder.write(_results(options, settings, described, runs, folder))  # what is kept by sequence belongs to it
    missing = [(item, seed) for item in plan.sources for seed in range(item.seeds or options.seeds)
               if (item.source.label, seed) not in done]  # fmt: skip
    applied = [(label, item, seed) for label, item in transfers(plan).items() for seed in range(options.seeds)
               if (label, seed) not in done]  # fmt: skip
    redraw = bool(missing) or folder.damaged_pictures()
    if redraw or applied:
        prepare(plan, runtime, reporter)
    frozen = FrozenTask(plan, folder, runtime, reporter, _versions)
    for item in plan.sources:
        seeds = [seed for other, seed in missing if other is item]
        if seeds:
            trained = (
                _run_source(plan, item, seeds, folder, runtime, reporter) if options.trains else [frozen.run(item)]
            )
            for run in trained:
                runs.append(run)
                folder.write(_results(options, settings, described, runs, folder))
    for label, item, seed in applied:
        runs.append(run_transfer(plan, label, item, seed, folder, runtime, reporter, _versions()))
        folder.write(_results(options, settings, described, runs, folder))
    costs = earlier.costs if earlier else {}
    if any(isinstance(item.source, ModelSource) and item.source.label not in costs for item in plan.sources):
        costs = costs | measure_costs(plan, runtime, reporter)
    order = {label: place for place, label in enumerate(described)}
    runs.sort(key=lambda run: (order[run.source], run.seed))
    results = replace(_results(options, settings, described, runs, folder), costs=costs)
    folder.write(results)
    return Probed(results, _files(folder, plan, results, redraw, runtime))


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


def _run_source(
    plan: ProbePlan, item: SourcePlan, seeds: Sequence[int], folder: ProbeFolder, runtime: Runtime, reporter: Reporter
) -> Iterator[Run]:
    """Train, if there is anything to train, and evaluate the missing seeds of a source; a row of results for each."""
    targets = {split.split: Targets(split, plan.options.recipe.task) for split in item.splits}
    for split in item.splits:
        if not targets[split.split].count_anywhere(num_classes(plan.options)):
            what = "training" if split.split == "train" else "evaluation"
            raise BrixelError(
                f"None of the {len(split.labelled)} images of the {what} has a pixel that counts: their targets are "
                f"void everywhere (label {IGNORE}, or no valid depth or normal). See the recipe's data.{split.split} "
                "and the values that it ignores."
            )
    for seed in seeds:
        if isinstance(item.source, PredictionSource):
            yield _run_predictions(plan, item, item.source, seed, targets["evaluate"], folder, reporter)
        else:
            yield _run_head(plan, item, seed, targets, folder, runtime, reporter)


def _run_predictions(
    plan: ProbePlan,
    item: SourcePlan,
    source: PredictionSource,
    seed: int,
    targets: Targets,
    folder: ProbeFolder,
    reporter: Reporter,
) -> Run:
    options, split, began = plan.options, item.evaluate, time.perf_counter()
    measured = meters(options.recipe.task, num_classes(options), options.protocol.align)
    with reporter.bar(f"{source.label}, seed {seed}, evaluation", len(split.labelled), unit="image") as bar:
        evaluated = evaluate(reader(options.recipe, source, seed, split, targets), measured, targets, split, bar)
    folder.write_run(source.label, seed, [], split.labelled.names, evaluated.images)
    seconds = round(time.perf_counter() - began, 3)
    return Run(source.label, seed, evaluated.figures, math.nan, 0.0, seconds, math.nan, _versions())


def _run_head(
    plan: ProbePlan,
    item: SourcePlan,
    seed: int,
    targets: Mapping[Split, Targets],
    folder: ProbeFolder,
    runtime: Runtime,
    reporter: Reporter,
) -> Run:
    protocol, label = plan.options.training, item.source.label
    maps = {"train": open_maps(item, item.train), "evaluate": open_maps(item, item.evaluate)}
    spec = head_spec(plan.options, maps["train"])
    smaller = f"--set protocol.batch_size={max(protocol.batch_size // 2, 1)}, a smaller --res, or another --device"
    with (
        memory_errors(f"training on {label} with {protocol.batch_size} images a step", f"Take {smaller}."),
        reporter.bar(f"{label}, seed {seed}", plan.num_steps, unit="step") as bar,
    ):
        trained = train_head(
            spec, protocol, maps["train"], targets["train"], item.train.positions, seed, runtime.device, bar
        )
    began = time.perf_counter()
    with (
        memory_errors(f"evaluating {label}, image by image", "Take a smaller --res, or another --device."),
        reporter.bar(f"{label}, seed {seed}, evaluation", len(item.evaluate.labelled), unit="image") as bar,
    ):
        evaluated = evaluate_head(
            trained.head, maps["evaluate"], targets["evaluate"], item.evaluate, protocol.align, runtime.device, bar
        )
    folder.write_run(label, seed, trained.curve, item.evaluate.labelled.names, evaluated.images)
    save_head(folder.head(label, seed), trained.head, _head_description(plan, item, seed))
    return Run(
        source=label,
        seed=seed,
        figures=evaluated.figures,
        final_loss=trained.curve[-1]["loss"],
        train_seconds=round(trained.seconds, 3),
        evaluate_seconds=round(time.perf_counter() - began, 3),
        steps_per_second=round(plan.num_steps / trained.seconds, 2),
        versions=_versions(),
    )


def head_spec(options: ProbeOptions, maps: Maps) -> HeadSpec:
    """The head that the protocol asks for, on maps of a source."""
    data, task = options.recipe.data, options.recipe.task
    assert task != "matching"
    assert task != "propagation"
    low, high = data.depth.range if data.depth else (0.001, 10.0)
    return HeadSpec(
        task=task,
        channels=maps.channels,
        num_classes=num_classes(options),
        kind=options.training.head,
        batch_norm=options.training.batch_norm,
        bins=options.training.bins,
        depth_range=(low, high),
    )


def num_classes(options: ProbeOptions) -> int:
    """Classes of a segmentation; 0 otherwise."""
    labels = options.recipe.data.labels
    return len(labels.classes) if options.recipe.task == "segmentation" and labels else 0


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
    )


def _describe(item: SourcePlan) -> SourceDescription:
    source, crops = item.source, item.evaluate.crops
    if isinstance(source, ModelSource):
        inputs = Counter(human_size(source.seen(crop.size)[-1]) for crop in crops)
        grids = Counter("x".join(map(str, source.grid(crop.size))) for crop in crops)
        identity = source.identity() | {"baseline": source.described_baseline}
        return ModelDescription(kind=source.kind, input=dict(inputs), grid=dict(grids), **identity)
    if isinstance(source, PredictionSource):
        return PredictionsDescription(kind="predictions", **source.identity())
    grids = Counter("x".join(map(str, grid)) for grid in open_maps(item, item.evaluate).grids)
    return FileDescription(kind="file", grid=dict(grids), **source.identity())


def _head_description(plan: ProbePlan, item: SourcePlan, seed: int) -> dict[str, Any]:
    options, rules = plan.options, plan.options.protocol.evaluate
    source = _describe(item)
    assert rules.kind != "random"  # the protocol has refused it
    assert not isinstance(source, PredictionsDescription)  # for which no head is trained
    description = HeadDescription(
        recipe=options.recipe,
        protocol=options.protocol_name,
        evaluate=CropsUsed(rules.kind, options.protocol.stride(options.size), (rules.scale[0], rules.scale[1])),
        size=options.size,
        seed=seed,
        label=item.source.label,
        source=source,
        versions=_versions(),
        backbone_signature=item.source.backbone_signature if isinstance(item.source, ModelSource) else [],
    )
    return as_dict(description)


def _versions() -> Versions:
    return {
        **library_versions(),
        **{name: version(name) for name in ("torchmetrics", "numpy", "h5py")},
        "threads": torch.get_num_threads(),
    }


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
        versions=_versions(),
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
