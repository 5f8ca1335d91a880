"""Ablations: short distillations of one recipe's variants on the same photographs, and what each costs.

A variant's run is named by a digest of its recipe and photographs: one that is finished is never trained again, one
that was interrupted goes on, and two groups that have a variant in common share its run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from brixel_cli.engines.ablation_cost import Inference, UpdateTimes, measure_inference
from brixel_cli.engines.ablation_results import FILE_NAME, TABLE_NAME, Ablations, Point, VariantResult
from brixel_cli.engines.ablation_variants import Variant, find_groups
from brixel_cli.engines.distillation import distill
from brixel_cli.engines.environment import describe_environment
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.run_folder import RunFolder, write_text
from brixel_cli.engines.runtime import Runtime
from brixel_cli.engines.setup import Photographs, find_photographs, resolve_paths
from brixel_cli.engines.training_cost import TrainingCounts, count_training
from brixel_cli.errors import BrixelError, UsageError
from brixel_cli.recipe import Recipe
from brixel_cli.recipe_files import load_recipe

RUNS = "ablations"
STEPS = 300
POINTS = 4
"""Validations in a run, the last at its end."""


@dataclass(frozen=True)
class Budget:
    """What all variants have in common: a number of updates, or seconds of updates."""

    equal: Literal["steps", "time"] = "steps"
    amount: float = STEPS


@dataclass(frozen=True)
class Experiment:
    """A variant with its whole recipe and the folder of its run."""

    group: str
    variant: Variant
    recipe: Recipe
    folder: RunFolder


def ablate(
    groups: Sequence[str],
    reference: str,
    overrides: Sequence[str],
    folder: Path,
    reporter: Reporter,
    command: str,
    budget: Budget = Budget(),
) -> Ablations:
    """Train every variant of some groups, one after the other, and write ablations.json and ablations.csv.

    Args:
        groups: names of built-in groups, or YAML files of variants.
        reference: the base recipe.
        overrides: of the base recipe, as `--set` takes them.
        folder: of the results; the runs lie in its folder `ablations`. The same call again continues.
        reporter: hears of stages, warnings and progress.
        command: the line that the user gave.
        budget: of each variant. With equal time, updates are as many as fit, by the time of one measured before.

    Returns:
        What is also in the files, which are written anew after each variant.

    Raises:
        BrixelError: something the user can mend. A variant whose training fails does not end the others: its row
            says why.
    """
    variants, recipes = _variants(groups, reference, overrides, folder)
    runtime = Runtime(recipes[0].run)
    _check(recipes, budget, runtime)
    photographs = _find_photographs(recipes)
    counts = [count_training(recipe, runtime) for recipe in recipes]
    seconds = UpdateTimes(folder / RUNS / "update_seconds.json", runtime).measure(recipes, reporter)
    inference = measure_inference(recipes, runtime, reporter)

    recipes = [_with_steps(recipe, budget, update) for recipe, update in zip(recipes, seconds, strict=True)]
    runs = _run_folders(folder / RUNS, [variant for _, variant in variants], recipes, photographs)
    experiments = [Experiment(*variant, *rest) for variant, *rest in zip(variants, recipes, runs, strict=True)]
    rows = [_row(item, folder, *costs) for item, *costs in zip(experiments, counts, seconds, inference, strict=True)]
    base = recipes[0]
    results = Ablations(
        command=command,
        recipe=base.name,
        backbone=base.backbone.name,
        student_size=base.student_hw,
        teacher_size=base.views.teacher_hw,
        batch_size=base.optim.batch_size,
        equal=budget.equal,
        budget=budget.amount,
        environment=describe_environment(runtime),
        photographs=photographs[0].fingerprint,
        variants=tuple(rows),
    )
    for number, item in enumerate(experiments):
        failure = _train(item, f"{number + 1} of {len(experiments)}", reporter)
        rows[number] = _with_fidelity(rows[number], item.folder, failure)
        results = dataclasses.replace(results, variants=tuple(rows))
        write_text(folder / FILE_NAME, results.to_json())
        write_text(folder / TABLE_NAME, results.to_csv())
    return results


def _variants(
    groups: Sequence[str], reference: str, overrides: Sequence[str], folder: Path
) -> tuple[list[tuple[str, Variant]], list[Recipe]]:
    """Variants with their groups, and their recipes; of equal ones in a group the first."""
    variants: list[tuple[str, Variant]] = []
    recipes: list[Recipe] = []
    for group, found in find_groups(groups).items():
        seen: list[Recipe] = []
        for variant in found:
            recipe = _recipe(reference, overrides, variant, folder)
            if recipe not in seen:
                seen.append(recipe)
                variants.append((group, variant))
        recipes += seen
    return variants, recipes


def _recipe(reference: str, overrides: Sequence[str], variant: Variant, folder: Path) -> Recipe:
    """The variant's recipe, but for the number of steps; where it has a cache, all share one."""
    try:
        recipe = load_recipe(reference, [*overrides, "optim.epochs=null", f"optim.steps={STEPS}", *variant.overrides])
    except UsageError as error:
        raise UsageError(f"Variant {variant.name}: {error}") from error
    if recipe.cache.enabled and recipe.cache.directory is None:
        cache = recipe.cache.model_copy(update={"directory": str(folder / RUNS / "cache")})
        recipe = recipe.model_copy(update={"cache": cache})
    return resolve_paths(recipe)


def _check(recipes: Sequence[Recipe], budget: Budget, runtime: Runtime) -> None:
    if runtime.world_size > 1:
        raise UsageError("An ablation takes one process: leave torchrun out.")
    if budget.equal == "time" and not all(recipe.cache.enabled for recipe in recipes):
        raise UsageError(
            "Equal training time is counted in updates from a cache, and the recipe has none: "
            "--set cache.enabled=true with views.kind centre or fixed, or give --steps."
        )


def _find_photographs(recipes: Sequence[Recipe]) -> list[Photographs]:
    """The photographs of each recipe; a folder is looked through once."""
    found: dict[str, Photographs] = {}
    for recipe in recipes:
        key = recipe.data.model_dump_json() + recipe.views.model_dump_json()
        if key not in found:
            found[key] = find_photographs(recipe)
    return [found[recipe.data.model_dump_json() + recipe.views.model_dump_json()] for recipe in recipes]


def _with_steps(recipe: Recipe, budget: Budget, update_seconds: float) -> Recipe:
    """The recipe with the updates that it has by the budget."""
    steps = max(round(budget.amount if budget.equal == "steps" else budget.amount / update_seconds), 1)
    every = math.ceil(steps / POINTS)
    run = {"validate_every": every, "checkpoint_every": every, "tensorboard": False}
    return recipe.model_copy(
        update={
            "optim": recipe.optim.model_copy(update={"steps": steps}),
            "run": recipe.run.model_copy(update=run),
        }
    )


def _run_folders(
    runs: Path, variants: Sequence[Variant], recipes: Sequence[Recipe], photographs: Sequence[Photographs]
) -> list[RunFolder]:
    """For each variant the folder of the run of its digest, under whatever name that was begun, or a new one."""
    found: dict[str, RunFolder] = {}
    digests = [_digest(*facts) for facts in zip(recipes, photographs, strict=True)]
    for variant, digest in zip(variants, digests, strict=True):
        present = sorted(runs.glob(f"*-{digest}"))
        found.setdefault(digest, RunFolder(present[0] if present else runs / f"{variant.name}-{digest}"))
    return [found[digest] for digest in digests]


def _digest(recipe: Recipe, photographs: Photographs) -> str:
    """Of all that the result of a run depends on."""
    facts = recipe.model_dump(exclude={"run": True, "cache": {"directory"}})
    text = json.dumps([facts, recipe.run.precision, recipe.run.device, photographs.fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _train(item: Experiment, place: str, reporter: Reporter) -> str:
    """Train a variant, or what is missing of it; returns why that failed, or nothing."""
    if item.folder.results.exists():
        return ""
    reporter.say(f"ablation {place}: {item.group}, {item.variant.name}, in {item.folder.path}")
    try:
        distill(item.recipe, item.folder, reporter, resume=item.folder.recipe.exists())
    except UsageError:
        raise
    except BrixelError as error:
        reporter.warn(f"{item.variant.name}: {error}")
        return str(error).splitlines()[0]
    return ""


def _row(
    item: Experiment, results: Path, counts: TrainingCounts, update_seconds: float, inference: Inference
) -> VariantResult:
    """What is known of a variant before its training."""
    assert item.recipe.optim.steps is not None
    return VariantResult(
        group=item.group,
        name=item.variant.name,
        changes=dict(item.variant.changes),
        folder=item.folder.path.relative_to(results).as_posix(),
        num_parameters=counts.num_live,
        gflop=inference.gflop,
        latency=inference.latency,
        steps=item.recipe.optim.steps,
        update_seconds=update_seconds,
        training_bytes=counts.state_bytes + counts.batch_bytes + counts.adapter.peak_bytes,
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
        gap_closed=last["gap_closed"],
        num_images=last["num_images"],
    )
