"""`brixel distill`: options to recipe, recipe to engine, result to table."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from brixel_cli.cli.console import (
    Progress,
    is_first_process,
    print_json,
    print_results,
    print_table,
    say,
    show_verified,
)
from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import load_recipe
from brixel_cli.core.formatting import human_bytes, human_seconds
from brixel_cli.core.metric_titles import FIDELITY_TITLES, gap_text
from brixel_cli.errors import UsageError

if TYPE_CHECKING:
    from brixel_cli.engines.distilling.distillation import Results
    from brixel_cli.engines.distilling.plan import Plan


def run_distill(
    recipe_name: str | None,
    output: Path | None,
    overrides: list[str],
    resume: bool,
    overwrite: bool,
    verify: Path | None,
    dry_run: bool,
    as_json: bool,
    push_to_hub: str | None = None,
) -> None:
    """Carry out `brixel distill` with options as the user gave them; see `app.distill` for what they mean."""
    if verify is not None:
        from brixel_cli.engines.distilling.run_folder import RunFolder

        advice = f"brixel distill --resume --output {verify} writes those again that follow from its state."
        show_verified(verify, RunFolder(verify).verify(), advice, as_json)
        return
    if resume and overwrite:
        raise UsageError("--resume continues a run and --overwrite begins it anew: give one of them.")
    recipe, folder = _recipe_and_folder(recipe_name, output, overrides, resume)
    if push_to_hub is not None:
        from brixel_cli.engines.distilling.publishing import check_target

        check_target(push_to_hub, recipe)
    if dry_run:
        from brixel_cli.engines.distilling.plan import plan

        _show_plan(plan(recipe, Progress()), recipe, as_json)
        return

    # torch takes seconds to import: only now, when there is work for it.
    from brixel_cli.engines.distilling.distillation import distill
    from brixel_cli.engines.distilling.publishing import push_student
    from brixel_cli.engines.distilling.run_folder import RunFolder

    done = distill(recipe, RunFolder(folder), Progress(), resume=resume, overwrite=overwrite)
    print_results(dataclasses.asdict(done.results), done.files, as_json, lambda: _show_results(done.results, recipe))
    if recipe.backbone.weights != "random":  # those are gone with this process
        say(f'load it: brixel_cli.load_student("{folder}")')
    if push_to_hub is not None and is_first_process():
        say(f"sent to {push_student(folder, recipe, done.results.best, push_to_hub)}")


def _recipe_and_folder(
    name: str | None, output: Path | None, overrides: list[str], resume: bool
) -> tuple[Recipe, Path]:
    if resume and name is None:
        if output is None:
            raise UsageError("--resume needs to know the run: give --output DIR, or --recipe.")
        if not (output / "recipe.yaml").is_file():
            raise UsageError(f"{output} holds no run to resume: recipe.yaml is missing.")
        return load_recipe(str(output / "recipe.yaml"), overrides), output
    recipe = load_recipe(name or "dinov2_vits", overrides)
    return recipe, output or Path("runs") / recipe.name


def _show_results(results: Results, recipe: Recipe) -> None:
    best = results.best
    (height, width), (big_height, big_width) = recipe.student_hw, recipe.views.teacher_hw
    rows = [
        ["backbone, bilinear", *(f"{best.backbone[name]:.4f}" for name in FIDELITY_TITLES)],
        ["student", *(f"{best.student[name]:.4f}" for name in FIDELITY_TITLES)],
        ["recovered gap", *(gap_text(best.recovered_gap[name], best.gap_spread.get(name)) for name in FIDELITY_TITLES)],
    ]
    print_table(
        f"{best.num_images} held-out images, {height}x{width} px against the teacher at {big_height}x{big_width} px",
        ["", *FIDELITY_TITLES.values()],
        rows,
        [f"Best student: step {best.step} of {results.steps}. The teacher: L1, edge, spectral 0; cosine 1."],
    )
    if best.domains:
        gaps = [[domain, gap_text(gap.value, gap.spread)] for domain, gap in best.domains.items()]
        print_table("Recovered gap in cosine, by domain", ["domain", "recovered gap"], gaps)


def _show_plan(plan: Plan, recipe: Recipe, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(plan))
        return
    rows = [
        ["live parameters (adapter)", f"{plan.num_live_parameters:,}"],
        ["frozen parameters (backbone)", f"{plan.num_frozen_parameters:,}"],
        ["GFLOP per step", f"{sum(plan.gflop_per_step.values()):,.1f}"],
        *([f"  {part}", f"{gflop:,.1f}"] for part, gflop in plan.gflop_per_step.items()),
    ]
    if recipe.cache.enabled:
        rows.append(["GFLOP per view, once, for the cache", f"{plan.gflop_per_cached_view:,.1f}"])
    rows += [
        ["memory, counted", human_bytes(plan.memory_bytes)],
        ["memory to spare here", human_bytes(plan.device_bytes)],
        ["one step", human_seconds(plan.step_seconds)],
    ]
    if recipe.cache.enabled:
        rows.append(["caching one view", human_seconds(plan.cached_view_seconds or None)])
    readers = f"{plan.num_workers} worker processes" if plan.num_workers else "no worker process"
    rows.append([f"reading one view, {readers}", human_seconds(plan.reading_seconds)])
    rows += [
        ["views in an epoch", "-" if plan.num_views is None else f"{plan.num_views:,}"],
        ["steps", "-" if plan.num_steps is None else f"{plan.num_steps:,}"],
        ["whole run, without validations", human_seconds(plan.total_seconds)],
        ["disk", human_bytes(plan.disk_bytes)],
    ]
    if recipe.cache.enabled:
        rows.append(["disk for each cached view", human_bytes(plan.cache_bytes_per_view)])
    notes = [f"Times: {plan.how_timed}."]
    if plan.limit:
        work = "Filling the cache" if recipe.cache.enabled else "Training"
        slower = "reading images; more --set run.workers=N may help" if plan.limit == "reading" else "the networks"
        notes.append(f"{work} is limited by {slower}.")
    if plan.uncounted:
        notes.append(f"Not in the FLOP: {', '.join(plan.uncounted)}.")
    notes += [f"Note: {note}" for note in plan.notes]
    print_table(f"{recipe.name}: {recipe.backbone.name}, {recipe.adapter.kind}", ["", ""], rows, notes)
    say("dry run: nothing was written")
