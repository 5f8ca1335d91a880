"""What a distillation would cost: counted on hollow models, timed on real ones; nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from brixel_cli.config.distill import Recipe
from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.formatting import human_bytes
from brixel_cli.core.linear_fit import LinearFit
from brixel_cli.data.row_store import bytes_needed
from brixel_cli.engines.distilling.cache import CACHE_BATCH, CacheLayout
from brixel_cli.engines.distilling.setup import Photographs, find_photographs, resolve_paths
from brixel_cli.engines.distilling.trainer import num_steps
from brixel_cli.engines.distilling.training_cost import TrainingCounts, count_training, random_batch, random_update
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime, call_seconds, free_memory
from brixel_cli.errors import BrixelError, UsageError

LONGEST_MEASUREMENT = 45.0
"""Seconds; what would take longer on one image is estimated from its FLOP."""


@dataclass(frozen=True)
class Plan:
    """Cost of a run. FLOP count a multiply-add as 2; bytes are of tensors, without the libraries' own.

    Attributes:
        num_live_parameters: trained, in the adapter.
        num_frozen_parameters: in the backbone.
        gflop_per_step: by part of the work; parts that the cache does once are in `gflop_per_cached_view`.
        gflop_per_cached_view: teacher and backbone on one view, where a cache is used, else 0.
        uncounted: operators with arithmetic that the count does not see.
        memory_bytes: frozen weights, training state and the largest working set of a pass, on each process.
        device_bytes: memory that this machine has for it.
        step_seconds: time of one update, or None where the model does not fit here.
        cached_view_seconds: time of caching one view; 0 without a cache.
        how_timed: how the times were obtained.
        num_steps: updates in the run, or None where they depend on photographs that are not there.
        num_views: training views in an epoch, or None.
        total_seconds: of the whole run with caching and the linear fit, without validations; None where unknown.
        disk_bytes: of checkpoints, and of the cache where the number of views is known.
        cache_bytes_per_view: of the cache, the mean over the sizes; 0 without one.
    """

    num_live_parameters: int
    num_frozen_parameters: int
    gflop_per_step: dict[str, float]
    gflop_per_cached_view: float
    uncounted: tuple[str, ...]
    memory_bytes: int
    device_bytes: int
    step_seconds: float | None
    cached_view_seconds: float
    how_timed: str
    num_steps: int | None
    num_views: int | None
    total_seconds: float | None
    disk_bytes: int
    cache_bytes_per_view: int
    notes: tuple[str, ...]


def plan(recipe: Recipe, reporter: Reporter) -> Plan:
    """Build everything that `recipe` asks for, with random weights in place of pretrained ones, and cost one step.

    Raises:
        BrixelError: the recipe cannot be carried out: a size does not fit, `init` or a weights file is missing.
    """
    recipe = resolve_paths(recipe)
    runtime = Runtime(recipe.run.device, recipe.run.precision, training=True, device_option="run.device")
    if runtime.world_size > 1:
        raise UsageError("A dry run takes one process: leave torchrun out.")
    notes = []
    photographs: Photographs | None = None
    try:
        photographs = find_photographs(recipe)
    except BrixelError as error:
        notes.append(f"photographs: {str(error).splitlines()[0]}")
    weights = recipe.backbone.weights
    if weights not in ("pretrained", "random") and not Path(weights).expanduser().is_file():
        notes.append(f"backbone: no weights at {weights}")

    passes = recipe.optim.accumulate
    per_pass = recipe.optim.images_per_pass()
    counts = count_training(recipe, runtime, reporter)
    cached = recipe.cache.enabled
    device_bytes = free_memory(runtime.device)
    teacher_at_once = min(CACHE_BATCH, per_pass) if cached else per_pass
    fit_bytes = LinearFit.num_bytes(counts.embed_dim) if recipe.fits_linear_part else 0
    working = max(counts.adapter.peak_bytes, counts.teacher.peak_bytes * teacher_at_once + fit_bytes)
    memory_bytes = counts.frozen_bytes + counts.state_bytes + counts.batch_bytes + working

    times, how = _time(recipe, runtime, counts, memory_bytes, device_bytes, reporter)
    sizes = recipe.views.teacher_sizes
    layout = CacheLayout(tuple(sizes), recipe.views.factor, counts.patch_size, counts.embed_dim)
    cache_bytes = bytes_needed(len(sizes), layout.columns) // len(sizes) if cached else 0
    num_views = len(photographs.training) * recipe.views.per_image if photographs else None
    num_cached = num_views + len(photographs.held_out) if cached and photographs and num_views else 0
    steps = recipe.optim.steps or (num_steps(recipe.optim, num_views) if num_views else None)
    total = None
    if times and steps:
        num_fitted = min(recipe.optim.linear_views, num_views or 0) if recipe.fits_linear_part and not cached else 0
        total = times[0] * steps + times[1] * (num_cached + num_fitted)
    per_view = (counts.teacher.flop + counts.backbone.flop) / 1e9
    per_step = {"adapter, forward and backward": counts.adapter.flop * passes / 1e9}
    if not cached:
        per_step["teacher"] = counts.teacher.flop * recipe.optim.batch_size / 1e9
        per_step["backbone"] = counts.backbone.flop * recipe.optim.batch_size / 1e9
    return Plan(
        num_live_parameters=counts.num_live,
        num_frozen_parameters=counts.num_frozen,
        gflop_per_step=per_step,
        gflop_per_cached_view=per_view if cached else 0.0,
        uncounted=counts.adapter.uncounted,
        memory_bytes=memory_bytes,
        device_bytes=device_bytes,
        step_seconds=times[0] if times else None,
        cached_view_seconds=times[1] if times and cached else 0.0,
        how_timed=how,
        num_steps=steps,
        num_views=num_views,
        total_seconds=total,
        disk_bytes=counts.num_live * 4 * 6 + num_cached * cache_bytes,
        cache_bytes_per_view=cache_bytes,
        notes=tuple(notes),
    )


def _time(
    recipe: Recipe, runtime: Runtime, counts: TrainingCounts, needed: int, there: int, reporter: Reporter
) -> tuple[tuple[float, float] | None, str]:
    """Seconds of an update and of computing one view's maps, and how that was found out."""
    if needed * 1.2 > there:
        return None, f"not timed: needs {human_bytes(needed)}, this machine has {human_bytes(there)} to spare"
    reporter.say("timing one step, with random weights")
    backbone = load_backbone(recipe.backbone.name, "random", recipe.backbone.dtype, str(runtime.device))
    batch = random_batch(recipe, backbone, runtime)
    big = torch.randn(1, 3, *recipe.views.teacher_hw, device=runtime.device)
    small = batch.images[:1]
    how = "measured on random input"
    with runtime.autocast():
        trunk_seconds = _seconds(lambda: backbone.intermediate_maps(small), runtime)
        teacher_seconds = trunk_seconds * counts.teacher.flop / counts.backbone.flop
        if teacher_seconds < LONGEST_MEASUREMENT:
            teacher_seconds = _seconds(lambda: backbone.last_map(big), runtime)
        else:
            how = "adapter and backbone measured on random input, teacher estimated from its FLOP"
    update_seconds = _seconds(random_update(recipe, backbone, runtime, batch), runtime)
    view_seconds = teacher_seconds + trunk_seconds
    if len(recipe.views.teacher_sizes) > 1:
        areas = [height * width for height, width in recipe.views.teacher_sizes]
        share = sum(areas) / len(areas) / areas[0]
        update_seconds, view_seconds = share * update_seconds, share * view_seconds
        how += "; other sizes estimated from their area"
    if not recipe.cache.enabled:
        update_seconds += view_seconds * recipe.optim.batch_size
    return (update_seconds, view_seconds), how


def _seconds(call: Callable[[], object], runtime: Runtime) -> float:
    """Time of the faster of two calls after a first one, or of the first one where that was long."""
    times = []
    for _ in range(3):
        times.append(call_seconds(call, runtime.device))
        if times[0] > LONGEST_MEASUREMENT / 3:
            return times[0]
    return min(times[1:])
