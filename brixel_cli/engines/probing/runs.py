"""One row of a probe: a head, a network or predictions as files, trained if need be, and evaluated on a split."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from brixel_cli.config.labelled import IGNORE, Split
from brixel_cli.core.formatting import human_size
from brixel_cli.core.heads import load_head, save_head
from brixel_cli.core.identity import library_versions
from brixel_cli.engines.probing import networks
from brixel_cli.engines.probing.evaluation import Predict, evaluate, evaluate_head, evaluating, meters, predict
from brixel_cli.engines.probing.features import Targets, open_maps
from brixel_cli.engines.probing.folder import ProbeFolder
from brixel_cli.engines.probing.network_results import NetworkDescription
from brixel_cli.engines.probing.plan import ProbePlan, SourcePlan
from brixel_cli.engines.probing.predictions import reader
from brixel_cli.engines.probing.results import (
    CropsUsed,
    FileDescription,
    HeadDescription,
    ModelDescription,
    PredictionsDescription,
    Run,
    Settings,
    SourceDescription,
    Versions,
    as_dict,
)
from brixel_cli.engines.probing.sources import ModelSource, NetworkSource, PredictionSource
from brixel_cli.engines.probing.training import head_spec, labelled_images, train_head
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime, memory_errors
from brixel_cli.errors import BrixelError


def run_source(
    plan: ProbePlan,
    item: SourcePlan,
    seeds: Sequence[int],
    settings: Settings,
    folder: ProbeFolder,
    runtime: Runtime,
    reporter: Reporter,
) -> Iterator[Run]:
    """Train, if there is anything to train, and evaluate the missing seeds of a source; a row of results for each."""
    targets = {split.split: Targets(split, plan.options.recipe.task) for split in item.splits}
    for split in item.splits:
        if not targets[split.split].count_anywhere(plan.options.recipe.num_classes):
            what = "training" if split.split == "train" else "evaluation"
            raise BrixelError(
                f"None of the {len(split.labelled)} images of the {what} has a pixel that counts: their targets are "
                f"void everywhere (label {IGNORE}, or no valid depth or normal). See the recipe's data.{split.split} "
                "and the values that it ignores."
            )
    for seed in seeds:
        if isinstance(item.source, PredictionSource):
            yield _run_predictions(plan, item, item.source, seed, targets["evaluate"], folder, reporter)
        elif isinstance(item.source, NetworkSource):
            described = settings, describe(item), versions()
            yield networks.run_network(plan, item, item.source, seed, targets, folder, described, runtime, reporter)
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
    measured = meters(options.recipe.task, options.recipe.num_classes, options.training.align)
    with reporter.bar(f"{source.label}, seed {seed}, evaluation", len(split.labelled), unit="image") as bar:
        evaluated = evaluate(reader(options.recipe, source, seed, split, targets), measured, targets, split, bar)
    folder.write_run(source.label, seed, [], split.labelled.names, evaluated.images)
    seconds = round(time.perf_counter() - began, 3)
    return Run(source.label, seed, evaluated.figures, math.nan, 0.0, seconds, math.nan, versions())


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
    spec = head_spec(plan.options, maps["train"].channels)
    images = labelled_images(len(item.train.labelled), plan.options.label_fraction, seed)
    positions = [item.train.positions[image] for image in images]
    smaller = f"--set protocol.batch_size={max(protocol.batch_size // 2, 1)}, a smaller --res, or another --device"
    with (
        memory_errors(f"training on {label} with {protocol.batch_size} images a step", f"Take {smaller}."),
        reporter.bar(f"{label}, seed {seed}", plan.num_steps, unit="step") as bar,
    ):
        trained = train_head(spec, protocol, maps["train"], targets["train"], positions, seed, runtime.device, bar)
    began = time.perf_counter()
    with evaluating(label, f"{label}, seed {seed}, evaluation", item.evaluate, reporter) as bar:
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
        versions=versions(),
    )


def predictor(folder: ProbeFolder, plan: ProbePlan, item: SourcePlan, seed: int, runtime: Runtime) -> Predict:
    """The predictions of a finished row, from what the probe has stored of it."""
    source, device = item.source, runtime.device
    if isinstance(source, PredictionSource):
        return reader(plan.options.recipe, source, seed, item.evaluate)
    if isinstance(source, NetworkSource):
        return networks.predictor(item, source, networks.load_network(plan, source, seed, folder), runtime)
    head, _ = load_head(folder.head(source.label, seed))
    return partial(predict, head.to(device), open_maps(item, item.evaluate), item.evaluate, device=device)


def describe(item: SourcePlan) -> SourceDescription:
    """What a source is, and what it sees of the evaluated images."""
    source, crops = item.source, item.evaluate.crops
    if isinstance(source, ModelSource):
        inputs = Counter(human_size(source.seen(crop.size)[-1]) for crop in crops)
        grids = Counter("x".join(map(str, source.grid(crop.size))) for crop in crops)
        identity = source.identity() | {"baseline": source.described_baseline}
        return ModelDescription(kind=source.kind, input=dict(inputs), grid=dict(grids), **identity)
    if isinstance(source, NetworkSource):
        inputs = Counter(human_size(source.input_size(crop.size)) for crop in crops)
        grids = Counter("x".join(map(str, source.grid(crop.size))) for crop in crops)
        return NetworkDescription(kind=source.kind, input=dict(inputs), grid=dict(grids), **source.identity())
    if isinstance(source, PredictionSource):
        return PredictionsDescription(kind="predictions", **source.identity())
    grids = Counter("x".join(map(str, grid)) for grid in open_maps(item, item.evaluate).grids)
    return FileDescription(kind="file", grid=dict(grids), **source.identity())


def _head_description(plan: ProbePlan, item: SourcePlan, seed: int) -> dict[str, Any]:
    options, rules = plan.options, plan.options.training.evaluate
    source = describe(item)
    assert rules.kind != "random"  # the protocol has refused it
    assert isinstance(source, ModelDescription | FileDescription)  # heads are trained for no others
    description = HeadDescription(
        recipe=options.recipe,
        protocol=options.protocol_name,
        evaluate=CropsUsed(rules.kind, options.training.stride(options.size), (rules.scale[0], rules.scale[1])),
        size=options.size,
        seed=seed,
        label=item.source.label,
        source=source,
        versions=versions(),
        backbone_signature=item.source.backbone_signature if isinstance(item.source, ModelSource) else [],
    )
    return as_dict(description)


def versions() -> Versions:
    """Of the libraries that figures depend on."""
    return {
        **library_versions(),
        **{name: version(name) for name in ("torchmetrics", "numpy", "h5py")},
        "threads": torch.get_num_threads(),
    }
