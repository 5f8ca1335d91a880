"""Distillation: the training loop, from a recipe and a folder of photographs to a student on disk."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import dump_recipe
from brixel_cli.core.backbone import Backbone, load_backbone
from brixel_cli.core.files import save_picture, write_text
from brixel_cli.core.formatting import to_json
from brixel_cli.core.student import StudentCard, save_student
from brixel_cli.data.images import Skipped, describe_skipped
from brixel_cli.engines.distilling.batches import Batches, OnlineBatches, batch_keys
from brixel_cli.engines.distilling.cache import open_cache
from brixel_cli.engines.distilling.initial_fits import fit_edge_basis, fit_linear_part
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.engines.distilling.setup import (
    check_view_sizes,
    find_photographs,
    make_adapter,
    make_views,
    resolve_paths,
)
from brixel_cli.engines.distilling.trainer import Trainer, learning_rate, num_steps
from brixel_cli.engines.distilling.validation import Validation, validate
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError, UsageError

MOST_REFUSED = 3


@dataclass(frozen=True)
class Distilled:
    """How a run ended."""

    results: dict[str, Any]
    files: list[Path]


def distill(
    recipe: Recipe, folder: RunFolder, reporter: Reporter, resume: bool = False, overwrite: bool = False
) -> Distilled:
    """Train an adapter as the recipe says, and write the run into a folder.

    Args:
        recipe: the whole run.
        folder: where it is written.
        reporter: hears of stages, warnings and progress.
        resume: continue the run in the folder from its last checkpoint, to the same result.
        overwrite: begin anew over a run that is there.

    Returns:
        The final table, as in results.json, and the files that were written.

    Raises:
        BrixelError: something the user can mend; what was computed before stays in the folder.
    """
    recipe = resolve_paths(recipe)
    if resume or not overwrite:
        folder.check(recipe, resume)
    runtime = Runtime(recipe.run.device, recipe.run.precision, training=True, device_option="run.device")
    share = recipe.optim.accumulate * runtime.world_size
    if recipe.optim.batch_size % share:
        raise UsageError(
            f"optim.batch_size {recipe.optim.batch_size} cannot be shared out over {runtime.world_size} processes "
            f"with {recipe.optim.accumulate} passes each: give a multiple of {share}."
        )

    # Photographs, backbone and adapter.
    photographs = find_photographs(recipe)
    torch.manual_seed(recipe.seed)
    backbone = load_backbone(recipe.backbone.name, recipe.backbone.weights, recipe.backbone.dtype, str(runtime.device))
    check_view_sizes(recipe, backbone.patch_size)
    trainer = Trainer(recipe, make_adapter(recipe, backbone, reporter), runtime)
    reporter.say(
        f"{len(photographs.training)} training and {len(photographs.held_out)} held-out photographs, "
        f"{len(photographs.skipped)} skipped; {runtime.device.type}, {runtime.precision}, "
        f"{runtime.world_size} process(es)"
    )
    if photographs.skipped:
        reporter.warn(f"skipped {len(photographs.skipped)} photographs:\n{describe_skipped(photographs.skipped)}")

    # The state of an interrupted run.
    stored = folder.load_state() if resume else None
    if stored:
        if stored[1]["photographs"] != photographs.fingerprint:
            raise UsageError(
                f"The photographs are not those that {folder.path} was begun with: {stored[1]['photographs']} then, "
                f"{photographs.fingerprint} now. Put them back as they were, or begin a run in another folder."
            )
        trainer.restore(*stored)
        reporter.say(f"resuming {folder.path} after step {trainer.step}")

    # Where batches come from. The disk may not suffice: an old run in this folder is cleared away only after that.
    training_views, held_out_views = make_views(recipe, photographs, backbone)
    sources: list[Batches]
    if recipe.cache.enabled:
        sources = list(open_cache(recipe, folder.path, backbone, [training_views, held_out_views], runtime, reporter))
    else:
        sources = [OnlineBatches(v, backbone, runtime, recipe.run.workers) for v in (training_views, held_out_views)]
    training, held_out = sources
    if runtime.is_first:
        if resume:
            write_text(folder.recipe, dump_recipe(recipe))  # what stands under `run` may have changed
        else:
            folder.begin(recipe)
        folder.write_skipped(photographs.skipped)
        folder.rewind_metrics(trainer.step)
    runtime.wait()

    fit_edge_basis(trainer, training, training_views)
    if recipe.fits_linear_part and not stored:
        fit_linear_part(trainer, training, training_views, reporter)
    total = num_steps(recipe.optim, len(training_views))
    writer = _tensorboard(recipe, folder, runtime, trainer.step)

    def check_up() -> None:
        """Validate, keep the best student, write the checkpoint."""
        if trainer.step % recipe.run.validate_every == 0 or trainer.step == total:
            at_once = recipe.optim.images_per_pass(runtime.world_size)
            validation = validate(trainer.deployed, backbone, held_out, len(held_out_views), runtime, at_once)
            improved = _is_better(validation, trainer.best)
            if improved:
                trainer.best = _summary(validation, trainer.step)
            if runtime.is_first:
                _record_validation(validation, trainer.step, folder, writer)
                if improved:
                    save_student(folder.student, trainer.deployed.state_dict(), _card(recipe, backbone, trainer.step))
        damaged = runtime.gather([(item.name, item.reason) for item in training.skipped + held_out.skipped])
        if not set(damaged) <= set(trainer.damaged.items()):
            trainer.damaged |= dict(sorted(damaged))
            listed = describe_skipped(_skipped(trainer.damaged))
            reporter.warn(f"{len(trainer.damaged)} damaged photographs were replaced by others:\n{listed}")
        if runtime.is_first:
            save_student(folder.last, trainer.deployed.state_dict(), _card(recipe, backbone, trainer.step))
            tensors, facts = trainer.state()
            folder.save_state(tensors, {**facts, "photographs": photographs.fingerprint})

    # The loop.
    optim = recipe.optim
    steps = range(trainer.step, total)
    keys = batch_keys(training_views, steps, optim.batch_size, optim.accumulate, runtime.rank, runtime.world_size)
    passes = training.iterate(keys)
    steps_per_epoch = len(training_views) / recipe.optim.batch_size
    with reporter.bar("distil", total, trainer.step, "step") as bar:
        while trainer.step < total:
            began = time.perf_counter()
            lr = learning_rate(recipe.optim, trainer.step, total, steps_per_epoch)
            values, names = trainer.update(passes, lr)
            speed = recipe.optim.batch_size / (time.perf_counter() - began)
            terms = " ".join(f"{name} {value:.3f}" for name, value in values.items() if name != "grad_norm")
            bar.set_postfix_str(f"{terms} lr {lr:.1e} {speed:.0f} img/s", refresh=False)
            bar.update(1)
            if trainer.refused_in_a_row:
                _report_refusal(trainer, values, runtime.gather(names), folder, reporter)
            if runtime.is_first and (trainer.step % recipe.run.log_every == 0 or trainer.step == total):
                folder.log(
                    {"kind": "train", "step": trainer.step, "lr": lr, "images_per_second": round(speed, 2), **values}
                )
                _write_scalars(writer, "train", {"lr": lr, "images_per_second": speed, **values}, trainer.step)
            due = trainer.step % recipe.run.checkpoint_every == 0 or trainer.step % recipe.run.validate_every == 0
            if due or trainer.step == total:
                check_up()
    if writer:
        writer.close()
    return _finish(trainer, folder, photographs.skipped + _skipped(trainer.damaged))


def _skipped(damaged: dict[str, str]) -> list[Skipped]:
    return [Skipped(name, reason) for name, reason in damaged.items()]


def _is_better(validation: Validation, best: dict[str, Any] | None) -> bool:
    """Whether an adapter surpasses the best so far in held-out cosine; one that is not a number never does."""
    cosine = validation.student["cosine"]
    if best is None:
        return True
    former = best["student"]["cosine"]
    return math.isfinite(cosine) and (former is None or not math.isfinite(former) or cosine > former)


def _card(recipe: Recipe, backbone: Backbone, step: int) -> StudentCard:
    return StudentCard(
        backbone=backbone.name,
        backbone_weights=backbone.weights,
        backbone_sha256=backbone.sha256,
        embed_dim=backbone.embed_dim,
        factor=recipe.views.factor,
        adapter=recipe.adapter,
        step=step,
        student_size=recipe.student_hw,
        backbone_signature=backbone.signature(),
    )


def _summary(validation: Validation, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "num_images": validation.num_images,
        "backbone": validation.backbone,
        "student": validation.student,
        "gap_closed": validation.gap_closed,
    }


def _record_validation(validation: Validation, step: int, folder: RunFolder, writer: Any) -> None:
    folder.log({"kind": "validation", **_summary(validation, step)})
    for row in ("backbone", "student", "gap_closed"):
        _write_scalars(writer, f"held_out/{row}", getattr(validation, row), step)
    save_picture(validation.picture, folder.picture(step))


def _report_refusal(
    trainer: Trainer, values: dict[str, float], names: list[str], folder: RunFolder, reporter: Reporter
) -> None:
    listed = ", ".join(sorted(set(names)))
    what = f"loss {values['loss']:g}, gradient norm {values['grad_norm']:g}"
    if trainer.runtime.is_first:
        folder.log({"kind": "refused", "step": trainer.step, "names": sorted(set(names))})
    if trainer.refused_in_a_row >= MOST_REFUSED:
        raise BrixelError(
            f"{MOST_REFUSED} updates in a row were refused ({what}), the last at step {trainer.step} on: {listed}. "
            "Look at these photographs, lower optim.lr, or set run.precision=float32. "
            f"{folder.path} keeps its last checkpoint."
        )
    reporter.warn(f"update {trainer.step} refused ({what}) on: {listed}")


def _tensorboard(recipe: Recipe, folder: RunFolder, runtime: Runtime, step: int) -> Any:
    if not (recipe.run.tensorboard and runtime.is_first):
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder.tensorboard), purge_step=step + 1 if step else None)


def _write_scalars(writer: Any, group: str, values: dict[str, float], step: int) -> None:
    if writer:
        for name, value in values.items():
            writer.add_scalar(f"{group}/{name}", value, step)


def _finish(trainer: Trainer, folder: RunFolder, skipped: list[Skipped]) -> Distilled:
    """The closing table, of the best student, and the list of files."""
    assert trainer.best is not None
    results = {"steps": trainer.step, "best": trainer.best, "num_skipped": len(skipped)}
    if trainer.runtime.is_first:
        folder.write_skipped(skipped)
        write_text(folder.results, to_json(results, indent=2) + "\n")
    trainer.runtime.wait()
    pictures = dict.fromkeys(folder.picture(step) for step in (trainer.best["step"], trainer.step))
    written = [folder.student, folder.last, folder.results, folder.metrics, folder.skipped, *pictures]
    return Distilled(results, [path for path in written if path.exists()])
