"""What a distillation would cost: counted on hollow models, timed on random input; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from brixel_cli.config.distill import Recipe, SpectralConfig
from brixel_cli.core.adapter import Adapter
from brixel_cli.core.backbone import Backbone, load_backbone
from brixel_cli.core.cost import Cost, count_bytes, count_cost, count_parameters, fake_tensors, hollow
from brixel_cli.core.formatting import human_bytes
from brixel_cli.core.linear_fit import LinearFit
from brixel_cli.core.losses import Basis, DistillationLoss, fit_basis
from brixel_cli.data.columns import bytes_needed
from brixel_cli.engines.distilling.batches import Batch, ViewLoader, batch_keys, num_workers
from brixel_cli.engines.distilling.cache import CACHE_BATCH, CacheLayout
from brixel_cli.engines.distilling.run_folder import resolve_paths
from brixel_cli.engines.distilling.trainer import Trainer, make_adapter, num_steps
from brixel_cli.engines.distilling.training_images import TrainingImages, check_view_sizes, find_images, make_views
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime, call_seconds, free_memory
from brixel_cli.engines.streams import warn_of_workers
from brixel_cli.errors import BrixelError, UsageError

LONGEST_MEASUREMENT = 45.0
"""Seconds; what would take longer on one image is estimated from its FLOP."""
READING_SECONDS = 3.0
LONGEST_RUN = 10**9


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
        step_seconds: time of one update on the device, or None where the model does not fit here.
        cached_view_seconds: time of caching one view on the device; 0 without a cache.
        reading_seconds: time in which the workers read, crop and change one view; None without images.
        num_workers: processes that read; 0: the training itself, one after the other.
        limit: which of the two is slower where views are read, `reading` or `device`; None where not both are known.
        how_timed: how the times were obtained.
        num_steps: updates in the run, or None where they depend on images that are not there.
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
    reading_seconds: float | None
    num_workers: int
    limit: Literal["reading", "device"] | None
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
    images: TrainingImages | None = None
    try:
        images = find_images(recipe)
    except BrixelError as error:
        notes.append(f"images: {str(error).splitlines()[0]}")
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

    warn_of_workers(recipe.run.workers, "run.workers", reporter)
    workers = num_workers(recipe.run.workers, runtime)
    reading = _reading_seconds(recipe, images, runtime, reporter) if images else None
    times, how = _time(recipe, runtime, counts, memory_bytes, device_bytes, reporter)
    sizes = recipe.views.teacher_sizes
    layout = CacheLayout(tuple(sizes), recipe.views.factor, counts.patch_size, counts.embed_dim)
    cache_bytes = bytes_needed(len(sizes), layout.columns) // len(sizes) if cached else 0
    num_views = len(images.training) * recipe.views.per_image if images else None
    num_cached = num_views + len(images.held_out) if cached and images and num_views else 0
    steps = recipe.optim.steps or (num_steps(recipe.optim, num_views) if num_views else None)
    total = None
    if times and steps:
        num_fitted = min(recipe.optim.linear_views, num_views or 0) if recipe.fits_linear_part and not cached else 0
        per_update = 0 if cached else recipe.optim.batch_size
        total = steps * _together_seconds(times[0], reading, per_update, workers)
        total += (num_cached + num_fitted) * _together_seconds(times[1], reading, 1, workers)
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
        reading_seconds=reading,
        num_workers=workers,
        limit=_limit(times, reading, 0 if cached else recipe.optim.batch_size),
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


def _reading_seconds(recipe: Recipe, images: TrainingImages, runtime: Runtime, reporter: Reporter) -> float | None:
    """Time for each view of what the workers do, once all of them are at work; None where no image can be read."""
    reporter.say("timing how images are read")
    views, _ = make_views(recipe, images)
    source = ViewLoader(views, runtime, recipe.run.workers)
    per_pass = recipe.optim.images_per_pass(runtime.world_size)
    keys = batch_keys(views, range(LONGEST_RUN), recipe.optim.batch_size, recipe.optim.accumulate)
    try:
        batches = iter(source.load(keys))
        for _ in range(max(source.count, 1)):  # they start together, and their first batches come at once
            next(batches)
        began, read = time.perf_counter(), 0
        while time.perf_counter() - began < READING_SECONDS or read < max(source.count, 1):
            next(batches)
            read += 1
    except BrixelError:
        return None
    return (time.perf_counter() - began) / (read * per_pass)


def _together_seconds(device: float, reading: float | None, num_views: int, workers: int) -> float:
    """Seconds of some work on the device, for which workers read views meanwhile; without workers, before it."""
    read = (reading or 0.0) * num_views
    return max(device, read) if workers else device + read


def _limit(
    times: tuple[float, float] | None, reading: float | None, per_update: int
) -> Literal["reading", "device"] | None:
    """Which is slower, reading views or computing with them; with a cache, while it is filled."""
    if times is None or reading is None:
        return None
    device, read = (times[0], reading * per_update) if per_update else (times[1], reading)
    return "reading" if read > device else "device"


def _seconds(call: Callable[[], object], runtime: Runtime) -> float:
    """Time of the faster of two calls after a first one, or of the first one where that was long."""
    times = []
    for _ in range(3):
        times.append(call_seconds(call, runtime.device))
        if times[0] > LONGEST_MEASUREMENT / 3:
            return times[0]
    return min(times[1:])


@dataclass(frozen=True)
class TrainingCounts:
    """One image through teacher and backbone, one pass of the adapter with its gradients; bytes on each process.

    Attributes:
        teacher, backbone: of one image.
        adapter: of one pass: forward, losses, backward.
        frozen_bytes: the backbone's weights.
        state_bytes: the adapter's weights, gradients, moments and average.
        batch_bytes: images, maps and targets of one pass.
        num_frozen, num_live: parameters of backbone and adapter.
        embed_dim, patch_size: of the backbone.
    """

    teacher: Cost
    backbone: Cost
    adapter: Cost
    frozen_bytes: int
    state_bytes: int
    batch_bytes: int
    num_frozen: int
    num_live: int
    embed_dim: int
    patch_size: int

    @property
    def training_bytes(self) -> int:
        """The training's own memory: without the frozen weights and the teacher's working set."""
        return self.state_bytes + self.batch_bytes + self.adapter.peak_bytes


def count_training(recipe: Recipe, runtime: Runtime, reporter: Reporter | None = None) -> TrainingCounts:
    """Count the recipe's models and one pass of its training, without computing.

    Where sizes are interleaved, FLOP are their mean, and bytes those of the largest.

    Raises:
        BrixelError: the recipe cannot be carried out: a size does not fit, `init` is missing.
    """
    meta = load_backbone(recipe.backbone.name, "random", recipe.backbone.dtype, device="meta")
    check_view_sizes(recipe, meta.patch_size)
    adapter = make_adapter(recipe, meta, reporter).to("meta")
    num_live = count_parameters(adapter)
    with fake_tensors(), runtime.autocast("cpu"):
        hollow(meta)
        hollow(adapter)
        counted = [_count_size(recipe, meta, adapter, size) for size in recipe.views.teacher_sizes]
    teachers, trunks, passes, batches = zip(*counted, strict=True)
    return TrainingCounts(
        teacher=_together(teachers),
        backbone=_together(trunks),
        adapter=_together(passes),
        frozen_bytes=count_bytes(meta),
        state_bytes=num_live * 4 * (5 if recipe.optim.average else 4),  # weights, gradients, two moments, average
        batch_bytes=max(batches),
        num_frozen=count_parameters(meta),
        num_live=num_live,
        embed_dim=meta.embed_dim,
        patch_size=meta.patch_size,
    )


def _count_size(
    recipe: Recipe, backbone: Backbone, adapter: Adapter, size: tuple[int, int]
) -> tuple[Cost, Cost, Cost, int]:
    """Teacher and backbone on one image, a pass of the adapter, and the bytes of its batch, for one teacher input."""
    factor, per_pass = recipe.views.factor, recipe.optim.images_per_pass()
    height, width = size[0] // factor, size[1] // factor
    # The spectral term's bins depend on values, which fake tensors lack; its memory is that of the edge term's kind.
    loss = recipe.loss.model_copy(update={"spectral": SpectralConfig(weight=0.0)})
    big, small = torch.empty(1, 3, *size), torch.empty(1, 3, height, width)
    teacher = count_cost(lambda: backbone.last_map(big))
    trunk = count_cost(lambda: backbone.intermediate_maps(small))
    h, w = height // backbone.patch_size, width // backbone.patch_size
    images = torch.empty(per_pass, 3, height, width)
    maps = [torch.empty(per_pass, backbone.embed_dim, h, w) for _ in range(4)]
    targets = torch.empty(per_pass, backbone.embed_dim, factor * h, factor * w)
    batch_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (images, *maps, targets))
    basis = Basis(torch.empty(backbone.embed_dim, loss.edge.components), torch.empty(backbone.embed_dim))
    terms = DistillationLoss(loss, basis)

    def train() -> None:
        prediction = adapter(images, adapter.from_backbone(backbone, images, maps))
        terms(prediction.float(), targets).total.backward()

    trained = count_cost(train)
    return teacher, trunk, trained, batch_bytes


def _together(costs: Sequence[Cost]) -> Cost:
    uncounted = {name for cost in costs for name in cost.uncounted}
    flop = sum(cost.flop for cost in costs) // len(costs)
    return Cost(flop, max(cost.peak_bytes for cost in costs), tuple(sorted(uncounted)))


@torch.no_grad()
def random_batch(recipe: Recipe, backbone: Backbone, runtime: Runtime) -> Batch:
    """A batch of the size of the recipe's passes, of random numbers in the place of images and targets."""
    per_pass = recipe.optim.images_per_pass()
    image = torch.randn(1, 3, *recipe.student_hw, device=runtime.device)
    with runtime.autocast():
        maps = [map_.repeat(per_pass, 1, 1, 1) for map_ in backbone.intermediate_maps(image)]
    grid = [recipe.views.factor * side for side in maps[-1].shape[-2:]]
    targets = torch.randn(per_pass, backbone.embed_dim, *grid, device=runtime.device)
    return Batch(image.repeat(per_pass, 1, 1, 1), maps, targets, ["random input"] * per_pass, [False] * per_pass)


def random_update(recipe: Recipe, backbone: Backbone, runtime: Runtime, batch: Batch) -> Callable[[], object]:
    """A call that makes one update of a fresh adapter as the recipe says, on a batch that stays the same."""
    trainer = Trainer(recipe, make_adapter(recipe, backbone), backbone, runtime)
    if recipe.loss.edge.weight and recipe.loss.edge.basis == "fixed":
        basis = fit_basis(batch.targets, recipe.loss.edge.components, recipe.seed)
        trainer.loss = DistillationLoss(recipe.loss, basis)
    return lambda: trainer.update(iter([batch] * recipe.optim.accumulate), lr=1e-6)
