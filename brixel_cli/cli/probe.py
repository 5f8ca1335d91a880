"""`brixel probe`: options to recipe and protocol, these to the engine, results to tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, get_args

from brixel_cli.cli.console import (
    Progress,
    print_files,
    print_json,
    print_notes,
    print_results,
    print_table,
    say,
    show_verified,
)
from brixel_cli.config.base import Device, Precision, did_you_mean, parse_size
from brixel_cli.config.files import load_recipe, shipped_recipes, with_overrides
from brixel_cli.config.labelled import LABEL_FREE, ProbeRecipe, Task
from brixel_cli.config.probe import OUTPUT, ApplyOptions, PredictionsConfig, ProbeOptions, num_labelled
from brixel_cli.config.protocols import PROTOCOLS, AnyProtocol, published
from brixel_cli.config.section import Side
from brixel_cli.config.supervised import SupervisedConfig
from brixel_cli.core.formatting import human_bytes, human_count, human_percent, human_seconds, human_size
from brixel_cli.core.metric_titles import figure_text, figure_title, gap_text
from brixel_cli.errors import BrixelError, UsageError

if TYPE_CHECKING:
    from brixel_cli.engines.probing.plan import ProbePlan
    from brixel_cli.engines.probing.probing import Probed
    from brixel_cli.engines.probing.results import PassCost, ProbeResults, SourceDescription, Summary

PREFIXES = PROTOCOL, PREDICTED, SUPERVISED = "protocol.", "predictions.", "supervised."
"""Of values of --set that do not belong to the recipe."""
TABLES = (
    ("miou", "boundary_iou"),
    ("pixel_accuracy",),
    ("rmse_m", "abs_rel"),
    ("silog", "delta1", "delta2", "delta3"),
    ("mean_angle_deg", "median_angle_deg"),
    ("within_11.25", "within_22.5", "within_30"),
    ("pck_1", "pck_2", "pck_5"),
    ("jf_mean", "j_mean", "f_mean"),
    ("j_recall", "f_recall", "j_decay", "f_decay"),
)
"""Metrics that stand in one table, the main ones of a task beside the cost of a pass: what fits into 80 columns."""
COST_COLUMNS = ("sees", "GFLOP", "time")
RECOVERED_TITLE = "recovered gap"
BY_GROUP = {
    "segmentation": ("class", {"class_iou": "IoU", "class_boundary_iou": "Boundary IoU"}),
    "matching": ("rotation of the camera", {"class_pck_1": "PCK at 1 %", "class_pck_2": "PCK at 2 %",
                                            "class_pck_5": "PCK at 5 %"}),
    "propagation": ("sequence", {"class_jf_mean": "J&F"}),
}  # fmt: skip
"""Of each task, what figures are also listed by, and the titles of these figures."""
ITEMS = {"matching": "pairs of images", "propagation": "objects of sequences"}
TASK_RECIPES = {"matching": "sevenscenes_matching", "propagation": "davis2016"}
"""The recipe of a task for which none is named."""


def probe_options(
    recipe: str | None,
    *,
    task: str | None = None,
    data: Path | None = None,
    protocol: str | None = None,
    quick: bool = False,
    size: str | None = None,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    features: Path | None = None,
    sources: Sequence[str] = (),
    predictions: Sequence[str] = (),
    checkpoints: Sequence[str] = (),
    backbone: str | None = None,
    backbone_weights: str | None = None,
    seeds: int = 3,
    device: Device = "auto",
    precision: Precision = "auto",
    overwrite: bool = False,
    baselines: Sequence[str] = (),
    label_fraction: float = 1.0,
    save_predictions: bool = False,
    transfer: bool = False,
) -> ProbeOptions:
    """A probe from what the user gave; see `app.probe` for what the options mean.

    Raises:
        UsageError: recipe, protocol or an option is wrong.
    """
    if quick and protocol not in (None, "quick"):
        raise UsageError(f"--quick is the protocol quick, and --protocol is {protocol}: give one of them.")
    if task is not None and task not in get_args(Task):
        raise UsageError(f"--task {task}: there is no such task. There are: {', '.join(get_args(Task))}.")
    recipe = recipe or TASK_RECIPES.get(task or "")
    if recipe is None:
        listed = ", ".join(shipped_recipes(ProbeRecipe))
        raise UsageError(f"--recipe is missing: a .yaml file, or one of {listed}. Or --apply HEAD --input DIR.")
    changes = [override for override in overrides if not override.strip().startswith(PREFIXES)]
    if data is not None:
        changes.append(f"data.root={json.dumps(str(data))}")
    if size is not None:
        changes.append(f"size={parse_size(size)}")
    if task is not None:
        changes.append(f"task={task}")
    loaded = load_recipe(recipe, changes, ProbeRecipe)
    named = loaded.task if loaded.task in LABEL_FREE else loaded.protocol  # which has one protocol, of its name
    rules = _protocol("quick" if quick else protocol or named, loaded.name, overrides)
    folder = output or OUTPUT / (loaded.name if label_fraction == 1 else f"{loaded.name}_labels_{label_fraction:g}")
    stored = features or (OUTPUT / "features" if output is None else output / "features")
    return ProbeOptions(
        recipe=loaded, protocol=rules, output=folder, features=stored, sources=tuple(sources),
        checkpoints=tuple(checkpoints), backbone=backbone, backbone_weights=backbone_weights, seeds=seeds,
        device=device, precision=precision, overwrite=overwrite, transfer=transfer,
        baselines=tuple(baselines),
        predictions=_named_folders(predictions),
        predicted=with_overrides(PredictionsConfig(), _of(PREDICTED, overrides), "predictions"),
        supervised=with_overrides(SupervisedConfig(), _of(SUPERVISED, overrides), "supervised"),
        label_fraction=label_fraction, save_predictions=save_predictions,
    )  # fmt: skip


def run_probe(options: ProbeOptions, per_class: bool, dry_run: bool, as_json: bool) -> None:
    """Carry out `brixel probe`."""
    # torch takes seconds to import: only now, when there is work for it.
    from brixel_cli.engines.probing.probing import plan_only, probe
    from brixel_cli.engines.probing.results import as_dict

    if dry_run:
        _show_plan(plan_only(options, Progress()), as_json)
        return
    done = probe(options, Progress())
    print_results(as_dict(done.results), done.files, as_json, lambda: _show_results(done, per_class))
    if any(file.parent.name == "heads" for file in done.files):
        say(f"use a head: brixel probe --apply {options.output}/heads/HEAD.safetensors --input IMAGES")


def verify_probe(folder: Path, as_json: bool) -> None:
    """Carry out `brixel probe --verify`: read every file of a probe again.

    Raises:
        BrixelError: the folder holds no probe, or some of its files are damaged.
    """
    from brixel_cli.engines.probing.folder import ProbeFolder

    advice = "Give the command that wrote it again: it makes those, and leaves the others as they are."
    show_verified(folder, ProbeFolder(folder).verify(), advice, as_json)


def check_apply(others: Mapping[str, object], checkpoints: Sequence[str]) -> None:
    """Refuse what does not go with `brixel probe --apply`.

    Args:
        others: options that train a head, with their values.
        checkpoints: of the student.

    Raises:
        UsageError: some of them are given, or several students.
    """
    if given := [name for name, value in others.items() if value]:
        raise UsageError(f"--apply takes all from the head; leave out {', '.join(given)}.")
    if len(checkpoints) > 1:
        raise UsageError("--apply takes one --checkpoint: the student that the head was trained on.")


def run_apply(options: ApplyOptions, as_json: bool) -> None:
    """Carry out `brixel probe --apply`.

    Raises:
        BrixelError: something the user can fix; also, at the end, that some images failed.
    """
    from brixel_cli.cli.tables import show_failures
    from brixel_cli.engines.probing.application import apply_head

    done = apply_head(options, Progress())
    if as_json:
        print_json(
            {
                "output": str(done.output),
                "images": done.num_images,
                "written": done.num_written,
                "failed": len(done.failures),
                "failures": done.failures,
                "seconds": round(done.seconds, 3),
            }
        )
    else:
        rows = [
            ["images", f"{done.num_images:,}"],
            ["  predicted", f"{done.num_written:,}"],
            ["  failed", f"{len(done.failures):,}"],
            ["seconds", f"{done.seconds:,.1f}"],
        ]
        print_table(f"{done.output}: {done.what}", ["", ""], rows, done.notes)
        show_failures(done.failures, "a prediction")
        print_files(done.files)
    if done.failures:
        raise BrixelError(
            f"{len(done.failures)} of {done.num_images} images failed; the predictions of the others are in "
            f"{done.output}."
        )


def _protocol(name: str, data: str, overrides: Sequence[str]) -> AnyProtocol:
    if name not in PROTOCOLS:
        raise UsageError(f"No protocol {name}.{did_you_mean(name, PROTOCOLS)} There are: {', '.join(PROTOCOLS)}.")
    changes = _of(PROTOCOL, overrides)
    if any(change.partition("=")[0].strip() in ("name", "side") for change in changes):
        raise UsageError("protocol.name and protocol.side say what was published: set the size with --res.")
    return with_overrides(published(name, data), changes, f"protocol {name}")


def _of(prefix: str, overrides: Sequence[str]) -> list[str]:
    """The overrides of a section that is not the recipe's, without its name."""
    return [item.strip().removeprefix(prefix) for item in overrides if item.strip().startswith(prefix)]


def _named_folders(given: Sequence[str]) -> list[tuple[str, Path]]:
    """Names and folders of predictions.

    Raises:
        UsageError: a name or a folder is missing.
    """
    parts = [text.partition("=") for text in given]
    for text, (name, _, folder) in zip(given, parts, strict=True):
        if not name.strip() or not folder:
            raise UsageError(f"--predictions {text}: give a name and a folder, such as --predictions mask2former=DIR.")
    return [(name.strip(), Path(folder).expanduser()) for name, _, folder in parts]


def _show_plan(plan: ProbePlan, as_json: bool) -> None:
    options, training = plan.options, plan.sources[0].training
    num_training = len(training.labelled) if training else 0
    if as_json:
        print_json(
            {
                "recipe": options.recipe.name,
                "protocol": options.protocol_name,
                "sources": [item.source.label for item in plan.sources],
                "train_images": num_training,
                "evaluate_images": len(plan.sources[0].evaluate.labelled),
                "seeds": options.seeds,
                "steps": plan.num_steps if plan.trains else 0,
                "bytes_needed": plan.bytes_needed,
                "bytes_free": plan.bytes_free,
                "notes": plan.notes,
            }
        )
    else:
        rows = []
        for item in plan.sources:
            parts = [split.maps for split in item.splits if split.maps is not None]
            crops = " + ".join(f"{len(split.crops):,}" for split in item.splits)
            needed = human_bytes(sum(part.bytes_needed for part in parts)) if parts else "stored already"
            rows.append([item.source.label, crops, needed])
        notes = [
            f"{num_training:,} images to train on, {len(plan.sources[0].evaluate.labelled):,} to evaluate.",
            *([f"{options.seeds} seeds of {plan.num_steps:,} steps for each source."] if plan.trains else []),
            f"Disk: {human_bytes(plan.bytes_needed)} needed with targets, {human_bytes(plan.bytes_free)} free, "
            f"in {options.features}.",
            "All images and labels were read: none has an error.",
            *plan.notes,
        ]
        print_table(_title(options.recipe.name, options.recipe.task, options.protocol_name, options.size),
                    ["source", "crops", "disk"], rows, notes)  # fmt: skip
    say("dry run: nothing was written")


def _show_results(done: Probed, per_class: bool) -> None:
    from brixel_cli.core.probe_metrics import LEADING  # with torch, which is loaded by now

    results, settings, summary = done.results, done.results.settings, done.results.summary
    align = settings.protocol_settings.align
    present = set().union(*(entry.mean for entry in summary.values()))
    groups = [[name for name in group if name in present] for group in TABLES]
    seeds = ", ".join(map(str, results.seeds))
    evaluated = settings.data["evaluate"].images
    if "train" in settings.data:
        notes = [
            f"Trained on {settings.data['train'].images:,} images, evaluated on {evaluated:,}. "
            f"Mean and standard deviation over seeds {seeds}."
        ]
        if settings.label_fraction < 1:
            count = num_labelled(settings.data["train"].images, settings.label_fraction)
            notes.append(f"Labels of {count:,} training images were used: others for each seed, the same for all rows.")
    else:
        count = max(run.items for run in results.runs)
        notes = [
            f"Evaluated on {evaluated:,} images; nothing was trained. "
            f"Mean and standard error over {count:,} {ITEMS[settings.task]}."
        ]
    if align:
        notes.append("Depth metrics are after fitting scale and shift of each image to the truth.")
    if results.recovered_gap:
        notes.append(
            "Recovered gap: (source - backbone) / (teacher - backbone), of the means; "
            "+-: standard deviation, propagated. -: the teacher is not better than the backbone by two of them."
            if "train" in settings.data
            else "+-: standard error. -: the teacher is not better than the backbone by two of them."
        )
    if results.costs:
        notes.append(
            "Sees: the largest image that the source is given. GFLOP and time are of its whole pass over one image, "
            f"median of interleaved rounds ({settings.device}, {settings.precision})."
        )
    if "train" in settings.data and len(results.seeds) < 3:
        notes.append("Fewer than three seeds: the spread says little.")
    title = _title(settings.recipe, settings.task, settings.protocol, settings.size)
    for names in filter(None, groups):
        leading = not set(names).isdisjoint(LEADING.values())
        columns = ["source", *(COST_COLUMNS if leading else ["grid"]), *(figure_title(name, align) for name in names)]
        rows = [[label, *(_cost(results.costs.get(label)) if leading else [_grid(results.sources[label])]),
                 *(figure_text(name, entry.mean_of(name), entry.spread.get(name)) for name in names)]
                for label, entry in summary.items()]  # fmt: skip
        for label, shares in results.recovered_gap.items():
            spreads = results.gap_spread.get(label, {})
            only = len(results.recovered_gap) == 1
            rows.append([RECOVERED_TITLE if only else f"{RECOVERED_TITLE}, {label}", *([""] * (3 if leading else 1)),
                         *(gap_text(shares.get(name), spreads.get(name)) for name in names)])  # fmt: skip
        print_table(title, columns, rows)
    _show_efforts(results)
    print_notes(notes)
    if (per_class or settings.task == "matching") and settings.classes:
        _show_classes(settings.task, settings.classes, summary)


def _show_efforts(results: ProbeResults) -> None:
    """What the networks cost that were trained end to end, mean over seeds."""
    rows = []
    for label in results.summary:
        runs = [run for run in results.runs if run.source == label and run.effort]
        efforts = [run.effort for run in runs if run.effort]
        if efforts:
            rows.append([
                label, f"{efforts[0].labels:,}", human_count(efforts[0].parameters),
                *(f"{mean(counts):,.0f}" for counts in zip(*((e.steps, e.best_step) for e in efforts), strict=True)),
                human_seconds(mean(run.train_seconds for run in runs)), f"{efforts[0].gflop:,.1f}",
                human_seconds(median(effort.forward_seconds for effort in efforts)),
            ])  # fmt: skip
    if rows:
        columns = ["source", "labels", "trained", "steps", "best at", "training", "GFLOP", "pass"]
        print_table("Networks trained end to end", columns, rows)


def _show_classes(task: str, classes: Sequence[str], summary: Mapping[str, Summary]) -> None:
    group, titles = BY_GROUP[task]
    note = "-: absent from the split."
    for kind, title in titles.items():
        by_source = [entry.by_class(kind) for entry in summary.values()]
        rows = [[name, *(human_percent(values[number]) for values in by_source)] for number, name in enumerate(classes)]
        over = ", mean over seeds" if task == "segmentation" else ""
        print_table(f"{title} by {group}{over}", [group, *summary], rows, [note])


def _title(recipe: str, task: str, protocol: str, size: Side) -> str:
    side = size if isinstance(size, int) else "x".join(map(str, size))
    return f"{recipe}: {task.replace('_', ' and ')}, protocol {protocol}, student's input {side} px"


def _cost(cost: PassCost | None) -> list[str]:
    return [human_size(cost.input), f"{cost.gflop:,.1f}", human_seconds(cost.seconds)] if cost else ["-"] * 3


def _grid(source: SourceDescription) -> str:
    grids = sorted(source.grid, key=lambda grid: -source.grid[grid])
    if not grids:
        return "-"
    return grids[0] + (f" and {len(grids) - 1} more" if len(grids) > 1 else "")
