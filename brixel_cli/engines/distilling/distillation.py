"""Distillation: the training loop, from a recipe and a folder of images to a student on disk."""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import dump_recipe
from brixel_cli.core.backbone import Backbone, load_backbone
from brixel_cli.core.extras import require
from brixel_cli.core.files import locked, save_picture, write_text
from brixel_cli.core.formatting import Stored
from brixel_cli.core.student import StudentCard, read_adapter, save_student
from brixel_cli.data.images import Skipped, describe_skipped
from brixel_cli.data.views import Views
from brixel_cli.engines.distilling.batches import Batches, OnlineBatches, batch_keys
from brixel_cli.engines.distilling.cache import CacheFile
from brixel_cli.engines.distilling.closed_form import fit_edge_basis, fit_linear_part
from brixel_cli.engines.distilling.run_folder import RunFolder, resolve_paths
from brixel_cli.engines.distilling.trainer import Trainer, learning_rate, make_adapter, num_steps
from brixel_cli.engines.distilling.training_images import TrainingImages, check_view_sizes, find_images, make_views
from brixel_cli.engines.distilling.validation import HeldOut, validate
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime, memory_errors
from brixel_cli.engines.streams import warn_of_workers
from brixel_cli.errors import BrixelError, UsageError, WeightsError

MOST_REFUSED = 3


@dataclass(frozen=True)
class Results(Stored):
    """How a run ended, as results.json has it.

    Attributes:
        steps: updates that were made.
        best: fidelity of the best student, which is the one to be used.
        num_skipped: images that were left out.
    """

    steps: int
    best: HeldOut
    num_skipped: int


@dataclass(frozen=True)
class Distilled:
    """What a run returns: its results, and the files that were written."""

    results: Results
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

    Raises:
        BrixelError: something the user can fix; what was computed before stays in the folder.
    """
    recipe = resolve_paths(recipe)
    if recipe.run.tensorboard:
        require("train", "run.tensorboard", ", or do without: --set run.tensorboard=false")
    runtime = Runtime(recipe.run.device, recipe.run.precision, training=True, device_option="run.device")
    warn_of_workers(recipe.run.workers, "run.workers", reporter, runtime.world_size)
    share = recipe.optim.accumulate * runtime.world_size
    if recipe.optim.batch_size % share:
        raise UsageError(
            f"optim.batch_size {recipe.optim.batch_size} cannot be shared out over {runtime.world_size} processes "
            f"with {recipe.optim.accumulate} passes each: give a multiple of {share}."
        )
    per_pass = recipe.optim.images_per_pass(runtime.world_size)
    height, width = recipe.views.teacher_hw
    out_of_memory = memory_errors(
        f"with {per_pass} images in a pass and a teacher input of {height}x{width} pixels",
        "Split each update into more passes (--set optim.accumulate=N), recompute activations "
        "(--set adapter.checkpointing=true), hold the backbone in bfloat16 (--set backbone.dtype=bfloat16), or lower "
        "optim.batch_size.",
    )
    resuming = f"-m brixel_cli distill --resume --output {folder.path}"
    gone = runtime.losing_others(
        "What was saved stays; continue with: "
        f"torchrun --standalone --nproc-per-node {runtime.world_size} {resuming}, or alone: python {resuming}"
    )
    with ExitStack() as stack, out_of_memory, gone:
        runtime.first_only(lambda: stack.enter_context(locked(folder.path)))
        runtime.first_only(lambda: folder.check(recipe, resume, overwrite))
        return _distill(recipe, folder, reporter, runtime, resume)


def _distill(recipe: Recipe, folder: RunFolder, reporter: Reporter, runtime: Runtime, resume: bool) -> Distilled:
    # Images, backbone and adapter.
    images = find_images(recipe)
    torch.manual_seed(recipe.seed)
    backbone = load_backbone(recipe.backbone.name, recipe.backbone.weights, recipe.backbone.dtype, str(runtime.device))
    check_view_sizes(recipe, backbone.patch_size)
    trainer = Trainer(recipe, make_adapter(recipe, backbone, reporter), backbone, runtime)
    reporter.say(
        f"{images.counted} images, {len(images.skipped)} skipped; {runtime.device.type}, {runtime.precision}, "
        f"{runtime.world_size} process(es)"
    )
    if images.skipped:
        reporter.warn(f"skipped {len(images.skipped)} images:\n{describe_skipped(images.skipped)}")
    with reporter.bar("check images", len(images.training) + len(images.held_out), unit="image") as bar:
        facts = {"photographs": images.names_and_sizes, "images_sha256": images.sha256(bar.update)}

    # The state of an interrupted run.
    stored = folder.load_state() if resume else None
    if stored:
        folder.check_images(stored[1], facts)
        trainer.restore(*stored)
        reporter.say(f"resuming {folder.path} after step {trainer.step}")

    # The disk may not suffice for a cache: an old run in this folder is cleared away only after that.
    parts = make_views(recipe, images)
    cache = CacheFile(recipe, folder.path, backbone, parts, runtime, reporter) if recipe.cache.enabled else None
    if runtime.is_first:
        if resume:
            write_text(folder.recipe, dump_recipe(recipe))  # what stands under `run` may have changed
        else:
            folder.begin(recipe)
        folder.write_skipped(images.skipped)
        if damaged := folder.rewind_metrics(trainer.step):
            reporter.warn(f"{folder.metrics}: {damaged} damaged lines were left out")
    runtime.wait()
    try:
        sources: list[Batches]
        if cache:
            sources = list(cache.fill())
        else:
            sources = [OnlineBatches(views, backbone, runtime, recipe.run.workers) for views in parts]
        fit_edge_basis(trainer, sources[0], parts[0])
        if recipe.fits_linear_part and not stored:
            fit_linear_part(trainer, sources[0], parts[0], reporter)
        return _Run(recipe, folder, reporter, runtime, images, facts, backbone, trainer, parts, sources).train()
    except KeyboardInterrupt:
        reporter.say(f"continue this run with: brixel distill --resume --output {folder.path}")
        raise


@dataclass(frozen=True)
class _Run:
    """All that the training loop works with."""

    recipe: Recipe
    folder: RunFolder
    reporter: Reporter
    runtime: Runtime
    images: TrainingImages
    facts: dict[str, str]
    backbone: Backbone
    trainer: Trainer
    views: tuple[Views, Views]
    batches: list[Batches]

    def train(self) -> Distilled:
        """The loop, from the trainer's step to the end."""
        recipe, runtime, trainer, folder = self.recipe, self.runtime, self.trainer, self.folder
        optim, views = recipe.optim, self.views[0]
        if trainer.step:
            runtime.first_only(self.restore_students)
        total = num_steps(optim, len(views))
        writer = _tensorboard(recipe, folder, runtime, trainer.step)
        steps = range(trainer.step, total)
        keys = batch_keys(views, steps, optim.batch_size, optim.accumulate, runtime.rank, runtime.world_size)
        passes = self.batches[0].iterate(keys)
        steps_per_epoch = len(views) / optim.batch_size
        with self.reporter.bar("distil", total, trainer.step, "step") as bar:
            while trainer.step < total:
                began = time.perf_counter()
                lr = learning_rate(optim, trainer.step, total, steps_per_epoch)
                values, names = trainer.update(passes, lr)
                speed = optim.batch_size / (time.perf_counter() - began)
                terms = " ".join(f"{name} {value:.3f}" for name, value in values.items() if name != "grad_norm")
                bar.set_postfix_str(f"{terms} lr {lr:.1e} {speed:.0f} img/s", refresh=False)
                bar.update(1)
                if trainer.refused_in_a_row:
                    self.report_refusal(values, runtime.gather(names))
                if runtime.is_first and (trainer.step % recipe.run.log_every == 0 or trainer.step == total):
                    figures = {"lr": lr, "images_per_second": round(speed, 2), **values}
                    folder.log({"kind": "train", "step": trainer.step, **figures})
                    _write_scalars(writer, "train", figures, trainer.step)
                last = trainer.step == total
                validates = last or trainer.step % recipe.run.validate_every == 0
                if validates:
                    self.validate(writer)
                if validates or trainer.step % recipe.run.checkpoint_every == 0:
                    self.checkpoint()
        if writer:
            writer.close()
        return self.finish()

    def restore_students(self) -> None:
        """Write students that are missing or damaged again, where the state from which the run goes on has them.

        Raises:
            WeightsError: the best student cannot be read, and is of an earlier step.
        """
        trainer, folder = self.trainer, self.folder
        steps = {folder.last: trainer.step} | ({folder.student: trainer.best.step} if trainer.best else {})
        for path, step in steps.items():
            try:
                read_adapter(str(path))
            except WeightsError as error:
                if step != trainer.step:
                    raise WeightsError(
                        f"The best student of the run, of step {step}, cannot be read: {error} Put a copy back to "
                        f"{path}, take the one of step {trainer.step}, {folder.last}, or begin the run anew with "
                        "--overwrite."
                    ) from error
                save_student(path, trainer.deployed.state_dict(), self.card())
                self.reporter.warn(f"{path} was missing or damaged, and was written again")

    def validate(self, writer: Any) -> None:
        """Measure the student, and keep it where it is the best so far."""
        trainer, runtime = self.trainer, self.runtime
        at_once = self.recipe.optim.images_per_pass(runtime.world_size)
        held_out, picture = validate(
            trainer.deployed, self.backbone, self.batches[1], len(self.views[1]), runtime, at_once, trainer.step
        )
        improved = held_out.better_than(trainer.best)
        if improved:
            trainer.best = held_out
        if runtime.is_first:
            _record_validation(held_out, picture, self.folder, writer)
            if improved:
                save_student(self.folder.student, trainer.deployed.state_dict(), self.card())

    def checkpoint(self) -> None:
        """Write all that resuming needs, and report damaged images that were found since the last time."""
        trainer, runtime, folder = self.trainer, self.runtime, self.folder
        skipped = [item for source in self.batches for item in source.skipped]
        damaged = runtime.gather([(item.name, item.reason) for item in skipped])
        if not set(damaged) <= set(trainer.damaged.items()):
            trainer.damaged |= dict(sorted(damaged))
            listed = describe_skipped(_skipped(trainer.damaged))
            self.reporter.warn(f"{len(trainer.damaged)} damaged images were replaced by others:\n{listed}")
        if runtime.is_first:
            save_student(folder.last, trainer.deployed.state_dict(), self.card())
            tensors, facts = trainer.state()
            folder.save_state(tensors, {**facts, **self.facts})

    def report_refusal(self, values: dict[str, float], names: list[str]) -> None:
        """Name the images of an update that was refused; raises a BrixelError after too many in a row."""
        trainer, folder = self.trainer, self.folder
        listed = ", ".join(sorted(set(names)))
        what = f"loss {values['loss']:g}, gradient norm {values['grad_norm']:g}"
        if self.runtime.is_first:
            folder.log({"kind": "refused", "step": trainer.step, "names": sorted(set(names))})
        if trainer.refused_in_a_row >= MOST_REFUSED:
            raise BrixelError(
                f"{MOST_REFUSED} updates in a row were refused ({what}), the last at step {trainer.step} on: {listed}. "
                "Look at these images, lower optim.lr, or set run.precision=float32. "
                f"{folder.path} keeps its last checkpoint."
            )
        self.reporter.warn(f"update {trainer.step} refused ({what}) on: {listed}")

    def finish(self) -> Distilled:
        """The results, of the best student, and the list of files."""
        trainer, folder, best = self.trainer, self.folder, self.trainer.best
        assert best is not None
        skipped = self.images.skipped + _skipped(trainer.damaged)
        results = Results(trainer.step, best, len(skipped))
        if self.runtime.is_first:
            folder.write_skipped(skipped)
            write_text(folder.results, results.to_json())
        self.runtime.wait()
        pictures = dict.fromkeys(folder.picture(step) for step in (best.step, trainer.step))
        written = [folder.student, folder.last, folder.results, folder.metrics, folder.skipped, *pictures]
        return Distilled(results, [path for path in written if path.exists()])

    def card(self) -> StudentCard:
        """What the student's file says of itself."""
        recipe, backbone, best = self.recipe, self.backbone, self.trainer.best
        gap = best.main_gap if best and best.step == self.trainer.step else math.nan
        return StudentCard(
            backbone=backbone.name,
            backbone_weights=backbone.weights,
            backbone_sha256=backbone.sha256,
            embed_dim=backbone.embed_dim,
            factor=recipe.views.factor,
            adapter=recipe.adapter,
            step=self.trainer.step,
            student_size=recipe.student_hw,
            backbone_signature=backbone.signature(),
            trained_sides=recipe.trained_sides,
            recovered_gap={str(min(recipe.student_hw)): round(gap, 4)} if math.isfinite(gap) else {},
        )


def _skipped(damaged: dict[str, str]) -> list[Skipped]:
    return [Skipped(name, reason) for name, reason in damaged.items()]


def _record_validation(held_out: HeldOut, picture: Image.Image, folder: RunFolder, writer: Any) -> None:
    figures = dataclasses.asdict(held_out)
    folder.log({"kind": "validation", **figures})
    for row in ("backbone", "student", "recovered_gap"):
        _write_scalars(writer, f"held_out/{row}", figures[row], held_out.step)
    domains = {domain: gap.value for domain, gap in held_out.domains.items()}
    _write_scalars(writer, "held_out/domains", domains, held_out.step)
    save_picture(picture, folder.picture(held_out.step))


def _tensorboard(recipe: Recipe, folder: RunFolder, runtime: Runtime, step: int) -> Any:
    if not (recipe.run.tensorboard and runtime.is_first):
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder.tensorboard), purge_step=step + 1 if step else None)


def _write_scalars(writer: Any, group: str, values: dict[str, float], step: int) -> None:
    if writer:
        for name, value in values.items():
            writer.add_scalar(f"{group}/{name}", value, step)
