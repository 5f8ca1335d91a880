"""What an update costs: counted on hollow models, timed on random input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from brixel_cli.config.distill import Recipe, SpectralConfig
from brixel_cli.core.adapter import Adapter
from brixel_cli.core.backbone import Backbone, load_backbone
from brixel_cli.core.cost import Cost, count_cost, count_parameters, fake_tensors, hollow
from brixel_cli.core.losses import Basis, DistillationLoss, fit_basis
from brixel_cli.engines.distilling.batches import Batch
from brixel_cli.engines.distilling.setup import check_view_sizes, make_adapter
from brixel_cli.engines.distilling.trainer import Trainer
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime


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

    Where sizes take turns, FLOP are their mean, and bytes those of the largest.

    Raises:
        BrixelError: the recipe cannot be carried out: a size does not fit, `init` is missing.
    """
    meta = load_backbone(recipe.backbone.name, "random", recipe.backbone.dtype, device="meta")
    check_view_sizes(recipe, meta.patch_size)
    frozen_bytes = sum(parameter.numel() * parameter.element_size() for parameter in meta.parameters())
    adapter = make_adapter(recipe, meta, reporter).to("meta")
    num_live = count_parameters(adapter)
    with fake_tensors(), torch.autocast("cpu", dtype=runtime.dtype, enabled=runtime.dtype != torch.float32):
        hollow(meta)
        hollow(adapter)
        counted = [_count_size(recipe, meta, adapter, size) for size in recipe.views.teacher_sizes]
    teachers, trunks, passes, batches = zip(*counted, strict=True)
    return TrainingCounts(
        teacher=_together(teachers),
        backbone=_together(trunks),
        adapter=_together(passes),
        frozen_bytes=frozen_bytes,
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
    trained = count_cost(lambda: terms(adapter(images, maps).float(), targets).total.backward())
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
    trainer = Trainer(recipe, make_adapter(recipe, backbone), runtime)
    if recipe.loss.edge.weight and recipe.loss.edge.basis == "fixed":
        basis = fit_basis(batch.targets, recipe.loss.edge.components, recipe.seed)
        trainer.loss = DistillationLoss(recipe.loss, basis)
    return lambda: trainer.update(iter([batch] * recipe.optim.accumulate), lr=1e-6)
