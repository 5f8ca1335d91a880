"""Ablations: short distillations of one recipe's variants on the same images, and what each costs.

A variant's run is named by a digest of its recipe and images: one that is finished is never trained again, one
that was interrupted goes on, and two groups that have a variant in common share its run.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from brixel_cli.config.benchmark import ABLATION_STEPS, AblationOptions
from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import load_recipe
from brixel_cli.config.probe import ProbeOptions
from brixel_cli.core.files import locked, write_text
from brixel_cli.core.formatting import now
from brixel_cli.core.identity import json_digest
from brixel_cli.engines.ablating.cost import Inference, UpdateTime, UpdateTimes, measure_inference
from brixel_cli.engines.ablating.probing import VariantProbes
from brixel_cli.engines.ablating.results import (
    FILE_NAME,
    TABLE_NAME,
    Ablations,
    Point,
    VariantResult,
    read_ablations,
)
from brixel_cli.engines.ablating.variants import Planned, Variant, find_groups
from brixel_cli.engines.benchmarking.environment import describe_environment
from brixel_cli.engines.distilling.distillation import distill
from brixel_cli.engines.distilling.plan import count_training
from brixel_cli.engines.distilling.run_folder import RunFolder, resolve_paths
from brixel_cli.engines.distilling.training_images import TrainingImages, find_images
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime, keep_freed_memory
from brixel_cli.errors import BrixelError, UsageError

RUNS = "ablations"
POINTS = 4
"""Validations in a run, the last at its end."""


class _Images(NamedTuple):
    """The images of a recipe, and the digest of their contents."""

    images: TrainingImages
    sha256: str


def ablate(options: AblationOptions, reporter: Reporter, probe: ProbeOptions | None = None) -> Ablations:
    """Train every variant of some groups, one after the other, and write ablations.json and ablations.csv.

    The same call again continues where it was stopped.

    Args:
        options: which variants, of what, for how long.
        reporter: hears of stages, warnings and progress.
        probe: recipe, protocol and seeds of the probe that `options.probe` names; its sources and folders are set here.

    Returns:
        What is also in the files, which are written anew after each variant: these groups, and before them others
        that an earlier call with the same recipe, budget and images has left there.

    Raises:
        BrixelError: an error that the user can fix. A variant whose training or probe fails does not end the others:
            its row says why.
    """
    with locked(options.output):
        return _ablate(options, reporter, probe)


def _ablate(options: AblationOptions, reporter: Reporter, probe: ProbeOptions | None) -> Ablations:
    folder = options.output
    probes = VariantProbes(probe, folder / RUNS, reporter) if probe else None
    planned = plan_ablation(options)
    recipes = [item.recipe for item in planned]
    runtime = Runtime(recipes[0].run.device, recipes[0].run.precision, training=True)
    keep_freed_memory(runtime.device)  # trainings do, and images are timed alike whether one came before or not
    images = _find_images(recipes)
    times = UpdateTimes(folder / RUNS / "update_seconds.json", runtime).measure(recipes, reporter)
    inference = measure_inference(recipes, runtime, reporter)
    recipes = [_with_steps(recipe, options, time.first) for recipe, time in zip(recipes, times, strict=True)]
    runs = _run_folders(folder / RUNS, [item.variant for item in planned], recipes, images)
    rows = [_row(*facts, folder) for facts in zip(planned, recipes, runs, times, inference, strict=True)]
    base = recipes[0]
    results = Ablations(
        commands=(options.command,),
        created=now(),
        recipe=base.name,
        digest=_short(_recipe(options, Variant("base")).model_dump()),
        backbone=base.backbone.name,
        student_size=base.student_hw,
        teacher_size=base.views.teacher_hw,
        batch_size=base.optim.batch_size,
        equal=options.equal,
        budget=options.budget,
        environment=describe_environment(runtime),
        photographs=f"{images[0].images.counted} ({images[0].sha256[:12]})",
        variants=tuple(rows),
    )
    earlier = _earlier(folder)
    for number, (recipe, run) in enumerate(zip(recipes, runs, strict=True)):
        reporter.say(f"ablation {number + 1} of {len(rows)}: {rows[number].group}, {rows[number].name}")
        rows[number] = _with_fidelity(rows[number], run, _train(recipe, run, reporter))
        if probes and not rows[number].failed:
            rows[number] = _with_probe(rows[number], probes, recipe, run)
        results = dataclasses.replace(results, variants=tuple(rows))
        whole = results.joined(earlier) if earlier else results
        write_text(folder / FILE_NAME, whole.to_json())
        write_text(folder / TABLE_NAME, whole.to_csv())
    return whole


def plan_ablation(options: AblationOptions) -> list[Planned]:
    """Every variant with its recipe and what that costs; of equal ones in a group the first. Nothing is run.

    Raises:
        BrixelError: a variant is no valid recipe, or cannot be built.
    """
    found: list[tuple[str, Variant, Recipe]] = []
    for group, variants in find_groups(options.names).items():
        seen: list[Recipe] = []
        for variant in variants:
            recipe = _recipe(options, variant)
            if recipe not in seen:
                seen.append(recipe)
                found.append((group, variant, recipe))
    if options.equal == "time" and not all(recipe.cache.enabled for _, _, recipe in found):
        raise UsageError(
            "Equal training time is counted in updates from a cache, and the recipe has none: "
            "--set cache.enabled=true with views.kind centre or fixed, or give --steps."
        )
    first = found[0][2].run
    runtime = Runtime(first.device, first.precision, training=True)
    if runtime.world_size > 1:
        raise UsageError("An ablation takes one process: leave torchrun out.")
    return [Planned(*item, count_training(item[2], runtime)) for item in found]


def _earlier(folder: Path) -> Ablations | None:
    """What is in the folder already, of this version."""
    with suppress(BrixelError):
        return read_ablations(folder)
    return None


def _recipe(options: AblationOptions, variant: Variant) -> Recipe:
    """The variant's recipe, but for the number of steps; where it has a cache, all share one."""
    length = ["optim.epochs=null", f"optim.steps={ABLATION_STEPS}"]
    try:
        recipe = load_recipe(options.recipe, [*options.overrides, *length, *variant.overrides])
    except UsageError as error:
        raise UsageError(f"Variant {variant.name}: {error}") from error
    if recipe.cache.enabled and recipe.cache.directory is None:
        cache = recipe.cache.model_copy(update={"directory": str(options.output / RUNS / "cache")})
        recipe = recipe.model_copy(update={"cache": cache})
    return resolve_paths(recipe)


def _find_images(recipes: Sequence[Recipe]) -> list[_Images]:
    """The images of each recipe; a folder is looked through, and its files are read, once."""
    found: dict[str, _Images] = {}
    keys = [recipe.data.model_dump_json() + recipe.views.model_dump_json() for recipe in recipes]
    for key, recipe in zip(keys, recipes, strict=True):
        if key not in found:
            images = find_images(recipe)
            found[key] = _Images(images, images.sha256())
    return [found[key] for key in keys]


def _with_steps(recipe: Recipe, options: AblationOptions, update_seconds: float) -> Recipe:
    """The recipe with the updates that it has by the budget."""
    steps = max(round(options.budget if options.equal == "steps" else options.budget / update_seconds), 1)
    every = math.ceil(steps / POINTS)
    run = {"validate_every": every, "checkpoint_every": every, "tensorboard": False}
    return recipe.model_copy(
        update={
            "optim": recipe.optim.model_copy(update={"steps": steps}),
            "run": recipe.run.model_copy(update=run),
        }
    )


def _run_folders(
    runs: Path, variants: Sequence[Variant], recipes: Sequence[Recipe], images: Sequence[_Images]
) -> list[RunFolder]:
    """For each variant the folder of the run of its digest, under whatever name that was begun, or a new one."""
    found: dict[str, RunFolder] = {}
    digests = []
    for variant, recipe, its_images in zip(variants, recipes, images, strict=True):
        digest = _digest(recipe, its_images.sha256)
        # Older runs are named by a digest of the images' names and sizes.
        former = _digest(recipe, its_images.images.names_and_sizes)
        present = sorted(runs.glob(f"*-{digest}")) or sorted(runs.glob(f"*-{former}"))
        found.setdefault(digest, RunFolder(present[0] if present else runs / f"{variant.name}-{digest}"))
        digests.append(digest)
    return [found[digest] for digest in digests]


def _digest(recipe: Recipe, images: str) -> str:
    """Of all that the result of a run depends on."""
    facts = recipe.model_dump(exclude={"run": True, "cache": {"directory"}})
    return _short([facts, recipe.run.precision, recipe.run.device, images])


def _short(facts: Any) -> str:
    return json_digest(facts)[:10]


def _train(recipe: Recipe, run: RunFolder, reporter: Reporter) -> str:
    """Train a variant, or what is missing of it; returns why that failed, or nothing."""
    if run.results.exists():
        return ""
    try:
        distill(recipe, run, reporter, resume=run.recipe.exists())
    except UsageError:
        raise
    except BrixelError as error:
        reporter.warn(f"{run.path.name}: {error}")
        return str(error).splitlines()[0]
    return ""


def _row(
    planned: Planned, recipe: Recipe, run: RunFolder, time: UpdateTime, inference: Inference, results: Path
) -> VariantResult:
    """What is known of a variant before its training."""
    assert recipe.optim.steps is not None
    return VariantResult(
        group=planned.group,
        name=planned.variant.name,
        changes=dict(planned.variant.changes),
        folder=run.path.relative_to(results).as_posix(),
        num_parameters=planned.counts.num_live,
        gflop=inference.gflop,
        latency=inference.latency,
        steps=recipe.optim.steps,
        update_seconds=time.latest,
        training_bytes=planned.counts.training_bytes,
    )


def _with_fidelity(row: VariantResult, folder: RunFolder, failure: str) -> VariantResult:
    """The row with the validations of its run."""
    lines = folder.metrics.read_text(encoding="utf-8").splitlines() if folder.metrics.exists() else []
    validations = [entry for entry in map(json.loads, lines) if entry["kind"] == "validation"]
    if failure or not validations:
        return dataclasses.replace(row, failed=failure or "no validation took place")
    last = validations[-1]
    return dataclasses.replace(
        row,
        curve=tuple(Point(entry["step"], entry["student"]) for entry in validations),
        bilinear=last["backbone"],
        recovered_gap=last["recovered_gap" if "recovered_gap" in last else "gap_closed"],
        num_images=last["num_images"],
    )


def _with_probe(row: VariantResult, probes: VariantProbes, recipe: Recipe, run: RunFolder) -> VariantResult:
    """The row with the probe of its student, or why that failed."""
    try:
        return dataclasses.replace(row, probe=probes.measure(recipe, run))
    except BrixelError as error:
        probes.reporter.warn(f"{run.path.name}: {error}")
        return dataclasses.replace(row, failed=f"probe {probes.options.recipe.name}: {str(error).splitlines()[0]}")
