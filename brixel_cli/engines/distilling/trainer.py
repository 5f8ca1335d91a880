"""What is trained and how: the adapter, its optimiser and average, one update at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from brixel_cli.config.base import scheduled_rate
from brixel_cli.config.distill import AdapterConfig, OptimConfig, Recipe
from brixel_cli.config.section import difference_lines, differences
from brixel_cli.core.adapter import Adapter
from brixel_cli.core.backbone import Backbone, same_model
from brixel_cli.core.losses import Basis, DistillationLoss
from brixel_cli.core.student import build_adapter, read_adapter
from brixel_cli.data.views import seed_of
from brixel_cli.engines.distilling.batches import Batch
from brixel_cli.engines.distilling.validation import HeldOut
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime, keep_freed_memory, without_sync
from brixel_cli.errors import UsageError

NOISE = 1
"""Tells the noise's seeds from the others of a step."""


def num_steps(optim: OptimConfig, num_views: int) -> int:
    """Updates in the whole run."""
    if optim.steps is not None:
        return optim.steps
    assert optim.epochs is not None
    return max(round(optim.epochs * num_views / optim.batch_size), 1)


def learning_rate(optim: OptimConfig, step: int, total: int, steps_per_epoch: float) -> float:
    """Learning rate of update number `step` (0-based) of `total`."""
    if optim.schedule == "two_step":
        return optim.first_epoch_lr if step < steps_per_epoch else optim.lr
    return scheduled_rate(optim.schedule, optim.lr, step, total, optim.warmup_steps)


def averaged(adapter: Adapter, decay: float) -> AveragedModel:
    """A moving average of an adapter's weights; the decay rises from 0.1 so that early steps do not linger."""

    def update(average: Any, current: Any, count: Any) -> None:
        torch._foreach_lerp_(average, current, 1 - min(decay, (1 + int(count)) / (10 + int(count))))

    return AveragedModel(adapter, multi_avg_fn=torch.no_grad()(update))


def with_noise(maps: Sequence[Tensor], share: float, seeds: Sequence[int]) -> list[Tensor]:
    """Maps (B, D, h, w) with Gaussian noise of `share` times each image's standard deviation, an own seed for each."""
    if not share:
        return list(maps)
    noisy = [map_.clone() for map_ in maps]
    generator = torch.Generator(maps[0].device)
    for image, seed in enumerate(seeds):
        generator.manual_seed(seed)
        for map_ in noisy:
            noise = torch.randn(map_.shape[1:], generator=generator, device=map_.device, dtype=map_.dtype)
            map_[image] += share * map_[image].std() * noise
    return noisy


def decay_groups(adapter: Adapter, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: weights of layers decay; norms, biases, layer scales and the closed-form linear part do not."""
    named = list(adapter.named_parameters())
    decays = {name for name, tensor in named if name.endswith("weight") and tensor.ndim > 1}
    decays -= {name for name in decays if name.startswith("linear.")}
    return [
        {"params": [tensor for name, tensor in named if name in decays], "weight_decay": weight_decay},
        {"params": [tensor for name, tensor in named if name not in decays], "weight_decay": 0.0},
    ]


class Trainer:
    """Adapter, optimiser and average of a run, and all that a checkpoint holds of them."""

    def __init__(self, recipe: Recipe, adapter: Adapter, runtime: Runtime):
        keep_freed_memory(runtime.device)
        self.recipe, self.runtime, self.adapter = recipe, runtime, adapter.to(runtime.device)
        if runtime.world_size > 1 and runtime.device.type == "cuda":
            self.adapter = nn.SyncBatchNorm.convert_sync_batchnorm(self.adapter)
        self.model: nn.Module = runtime.parallel(self.adapter)
        groups = decay_groups(self.adapter, recipe.optim.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.optim.lr, fused=True)
        self.average = averaged(self.adapter, recipe.optim.average) if recipe.optim.average else None
        self.loss = DistillationLoss(recipe.loss, mean_over_processes=runtime.mean)
        self.step = 0
        self.refused_in_a_row = 0
        self.best: HeldOut | None = None
        self.damaged: dict[str, str] = {}

    @property
    def deployed(self) -> Adapter:
        """The adapter that is validated and saved: the average, where there is one."""
        module: Adapter = self.average.module if self.average else self.adapter  # type: ignore[assignment]
        return module

    def update(self, passes: Iterator[Batch], lr: float) -> tuple[dict[str, float], list[str]]:
        """One update; refused where its loss or gradient is not finite.

        Returns:
            The loss, its terms and the gradient's norm, averaged over passes and processes, and the images' names.
        """
        accumulate = self.recipe.optim.accumulate
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        sums: dict[str, Tensor] = {}
        names: list[str] = []
        for part in range(accumulate):
            batch = next(passes)
            names += batch.names
            seed = seed_of(self.recipe.seed, self.step, part, self.runtime.rank)
            torch.manual_seed(seed)
            # By an image's place in the global batch, so that it does not matter which process has it.
            first = (part * self.runtime.world_size + self.runtime.rank) * len(batch.images)
            seeds = [
                seed_of(self.recipe.seed, self.step, first + place, 0, NOISE) for place in range(len(batch.images))
            ]
            maps = with_noise(batch.maps, self.recipe.optim.map_noise, seeds)
            # Gradients travel between processes once, with the last pass.
            with without_sync(self.model) if part < accumulate - 1 else nullcontext():
                with self.runtime.autocast():
                    prediction = self.model(batch.images, maps)
                parts = self.loss(prediction, batch.targets, seed)
                (parts.total / accumulate).backward()
            for name, value in {"loss": parts.total.detach(), **parts.terms}.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / accumulate
        stacked = self.runtime.mean(torch.stack(list(sums.values())))
        norm = nn.utils.clip_grad_norm_(self.adapter.parameters(), self.recipe.optim.clip or math.inf)
        values = dict(zip(sums, stacked.tolist(), strict=True)) | {"grad_norm": float(norm)}
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            self.optimizer.step()
            if self.average:
                self.average.update_parameters(self.adapter)
            self.refused_in_a_row = 0
        else:
            self.refused_in_a_row += 1
        self.step += 1
        return values, names

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and facts from which `restore` continues to the same result."""
        tensors = {f"adapter.{key}": value for key, value in self.adapter.state_dict().items()}
        if self.average:
            tensors |= {f"average.{key}": value for key, value in self.average.state_dict().items()}
        for name, parameter in self.adapter.named_parameters():
            tensors |= {
                f"optimizer.{name}.{key}": value for key, value in self.optimizer.state.get(parameter, {}).items()
            }
        if self.loss.basis:
            tensors |= {"basis.components": self.loss.basis.components, "basis.mean": self.loss.basis.mean}
        facts = {
            "step": self.step,
            "refused_in_a_row": self.refused_in_a_row,
            "best": dataclasses.asdict(self.best) if self.best else None,
        }
        return tensors, {**facts, "damaged": self.damaged}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Continue from a stored state."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

        self.adapter.load_state_dict(under("adapter."))
        if self.average:
            self.average.load_state_dict(under("average."))
        for name, parameter in self.adapter.named_parameters():
            stored = under(f"optimizer.{name}.")
            if stored:
                # The fused update walks memory in the parameter's own layout, channels_last included.
                self.optimizer.state[parameter] = {
                    key: value.to(parameter.device)
                    if key == "step"
                    else torch.empty_like(parameter, requires_grad=False).copy_(value)
                    for key, value in stored.items()
                }
        if "basis.mean" in tensors:
            device = self.runtime.device
            self.loss.basis = Basis(tensors["basis.components"].to(device), tensors["basis.mean"].to(device))
        self.step, self.refused_in_a_row = facts["step"], facts["refused_in_a_row"]
        self.best = HeldOut.from_json(facts["best"]) if facts["best"] else None
        self.damaged = facts["damaged"]


def make_adapter(recipe: Recipe, backbone: Backbone, reporter: Reporter | None = None) -> Adapter:
    """A fresh adapter, seeded by the recipe, or the one that `init` names; a reporter hears what was skipped of it.

    Raises:
        WeightsError: `init` cannot be read.
        UsageError: `init` is of another kind, width or factor than the recipe.
    """
    torch.manual_seed(recipe.seed)
    if recipe.init is None:
        return build_adapter(backbone.embed_dim, recipe.views.factor, recipe.adapter)
    stored = read_adapter(recipe.init)
    card = stored.card
    wanted = _architecture(backbone.embed_dim, recipe.views.factor, recipe.adapter)
    found = _architecture(card.embed_dim, card.factor, card.adapter)
    if different := difference_lines(differences(found, wanted)):
        listed = "\n  ".join(different)
        raise UsageError(f"init: {stored.path} does not fit the recipe (in the file -> in the recipe):\n  {listed}")
    if reporter and stored.released:
        reporter.say(f"init: {stored.path}: {stored.released.summary}")
    if reporter and card.backbone and not same_model(card.backbone, backbone.name):
        reporter.warn(f"init: {stored.path} belongs to {card.backbone}, not to {backbone.name}")
    return stored.build(recipe.adapter)


def _architecture(embed_dim: int, factor: int, config: AdapterConfig) -> dict[str, object]:
    """What two adapters must have in common for one to take the other's weights."""
    options = getattr(config, config.kind).model_dump()
    options.pop("drop_path", None)
    fixed = {"embed_dim": embed_dim, "views.factor": factor, "adapter.kind": config.kind}
    chosen = {f"adapter.{config.kind}.{key}": value for key, value in options.items()}
    return {**fixed, "adapter.residual": config.residual, **chosen}
