"""Training of one head on stored maps: batches, losses and steps, all of them a function of the seed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from brixel_cli.config.probe import ProbeOptions, num_labelled
from brixel_cli.config.protocols import Protocol
from brixel_cli.core.heads import Head, HeadSpec, build_head, channel_sums
from brixel_cli.core.probe_losses import (
    at_points,
    cosine_loss,
    cross_entropy,
    gradient_term,
    labels_at_points,
    sample_points,
    scale_invariant_log,
    sig_loss,
)
from brixel_cli.data.feature_layout import Grid
from brixel_cli.data.views import seed_of
from brixel_cli.engines.probing.features import Maps, Targets
from brixel_cli.engines.runtime import keep_freed_memory
from brixel_cli.errors import BrixelError

SIG_WARMUP = 100
"""First steps in which SigLoss looks at the mean alone, as in DINOv2's depth probes."""
CURVE_POINTS = 200
_BATCHES, _POINTS, _WEIGHTS, _LABELS = 1, 2, 3, 4
"""What a seed is used for: its draws do not depend on one another."""


@dataclass(frozen=True)
class TrainedHead:
    """A head after its training.

    Attributes:
        head: in eval mode.
        curve: mean loss over stretches of steps, as {step, loss, lr}.
        seconds: that the steps took.
    """

    head: Head
    curve: list[dict[str, float]]
    seconds: float


def labelled_images(num_images: int, fraction: float, seed: int) -> list[int]:
    """The training images whose labels are used: a function of the seed, those of a smaller share among them."""
    order = np.random.default_rng(seed_of(seed, _LABELS)).permutation(num_images)
    return sorted(int(image) for image in order[: num_labelled(num_images, fraction)])


def fresh_head(spec: HeadSpec, seed: int) -> Head:
    """The head that a training begins with; the same whatever it stands on."""
    return build_head(spec, seed_of(seed, _WEIGHTS))


def head_spec(options: ProbeOptions, channels: int) -> HeadSpec:
    """The head that the protocol asks for, on maps of so many channels."""
    data, task = options.recipe.data, options.recipe.task
    assert task != "matching"
    assert task != "propagation"
    low, high = data.depth.range if data.depth else (0.001, 10.0)
    return HeadSpec(
        task=task,
        channels=channels,
        num_classes=options.recipe.num_classes,
        kind=options.training.head,
        batch_norm=options.training.batch_norm,
        bins=options.training.bins,
        depth_range=(low, high),
    )


def batches(
    positions: Sequence[Sequence[int]], grids: Sequence[Grid], batch_size: int, num_steps: int, seed: int
) -> Iterator[list[int]]:
    """Crops of each step: every image once an epoch, in one of its crops, in a new order; a function of the seed.

    Maps of a batch have one grid: where a set has several, an image waits for others of its grid.

    Args:
        positions: for each image, its crops.
        grids: of each crop's map.
        batch_size: images in a step.
        num_steps: batches to yield.
        seed: of the order and of the choice of crops.
    """
    waiting: dict[Grid, list[int]] = {}
    epoch = yielded = 0
    while True:
        rng = np.random.default_rng(seed_of(seed, _BATCHES, epoch))
        for image in rng.permutation(len(positions)):
            crops = positions[image]
            crop = crops[int(rng.integers(len(crops)))]
            group = waiting.setdefault(grids[crop], [])
            group.append(crop)
            if len(group) == batch_size:
                yield waiting.pop(grids[crop])
                yielded += 1
                if yielded == num_steps:
                    return
        epoch += 1


def train_head(
    spec: HeadSpec,
    protocol: Protocol,
    maps: Maps,
    targets: Targets,
    positions: Sequence[Sequence[int]],
    seed: int,
    device: torch.device,
    bar: Any,
) -> TrainedHead:
    """Train a head as the protocol says.

    Args:
        spec: of the head.
        protocol: rules of training.
        maps: of the training crops.
        targets: of the same.
        positions: for each image, its crops.
        seed: of weights, batches and points.
        device: where the head is trained.
        bar: hears of every step.

    Raises:
        BrixelError: the loss is no finite number.
    """
    keep_freed_memory(device)
    head = fresh_head(spec, seed).to(device).train()
    optimiser = torch.optim.AdamW(head.parameters(), lr=protocol.lr, weight_decay=protocol.weight_decay, fused=True)
    total = protocol.num_steps(len(positions))
    points = torch.Generator().manual_seed(seed_of(seed, _POINTS))
    stretch = max(total // CURVE_POINTS, 1)
    curve: list[dict[str, float]] = []
    recent: list[Tensor] = []
    sums: dict[int, Tensor] = {}
    began = time.perf_counter()
    for step, batch in enumerate(batches(positions, maps.grids, protocol.batch_size, total, seed)):
        lr = protocol.learning_rate(step, total)
        for group in optimiser.param_groups:
            group["lr"] = lr
        loss = batch_loss(head, protocol, maps, targets, batch, points, step, device, sums)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        recent.append(loss.detach())
        if len(recent) == stretch or step + 1 == total:
            mean = float(torch.stack(recent).mean())
            if not np.isfinite(mean):
                raise BrixelError(
                    f"The loss is {mean} at step {step + 1}, seed {seed}. Lower the rate: --set protocol.lr={lr / 10:g}"
                )
            curve.append({"step": step + 1, "loss": mean, "lr": lr})
            recent.clear()
        bar.update(1)
    return TrainedHead(head.eval().requires_grad_(False), curve, time.perf_counter() - began)


def batch_loss(
    head: Head,
    protocol: Protocol,
    maps: Maps,
    targets: Targets,
    batch: Sequence[int],
    generator: torch.Generator,
    step: int,
    device: torch.device,
    sums: dict[int, Tensor],
) -> Tensor:
    """Loss of a head on some crops: the sum over its quantities.

    Labels keep their resolution: outputs are enlarged to it, at all pixels or at as many random ones of each image as
    the protocol says. Labels of several sizes are pooled pixel by pixel. `sums` has what BatchNorm is to know of the
    maps of earlier batches; those of this one are added.
    """
    read = maps.read(batch).to(device)
    if head.needs_sums and not all(at in sums for at in batch):
        sums.update(zip(batch, channel_sums(read), strict=True))
    outputs = head(read, torch.stack([sums[at] for at in batch]) if head.needs_sums else None)
    points = sample_points(protocol.points, len(batch), generator) if protocol.points else None
    return outputs_loss(outputs, protocol, targets, batch, points, step, device)


def outputs_loss(
    outputs: Mapping[str, Tensor],
    protocol: Protocol,
    targets: Targets,
    batch: Sequence[int],
    points: Tensor | None,
    step: int,
    device: torch.device,
) -> Tensor:
    """Loss of the outputs of a head on some crops; `points`: of `sample_points`, None for all pixels."""
    total = torch.zeros((), device=device)
    for quantity, output in outputs.items():
        sizes = [targets.sizes[at] for at in batch]
        predictions, truths, weights = [], [], []
        for size in dict.fromkeys(sizes):
            places = [place for place, other in enumerate(sizes) if other == size]
            stored = [targets.view(quantity, batch[place]) for place in places]
            chosen = output if len(places) == len(batch) else output[places]
            if points is None:
                predictions.append(F.interpolate(chosen, size=size, mode="bilinear", align_corners=False))
                truth = torch.from_numpy(np.stack(stored))
            else:
                predictions.append(at_points(chosen, points[places], size))
                truth = labels_at_points(stored, points[places])
            truths.append(truth.to(device))
            weights.append(len(places) / len(batch))
        total = total + _quantity_loss(quantity, protocol, predictions, truths, weights, step)
    return total


def _quantity_loss(
    quantity: str,
    protocol: Protocol,
    predictions: Sequence[Tensor],
    truths: Sequence[Tensor],
    weights: Sequence[float],
    step: int,
) -> Tensor:
    if quantity == "segmentation":
        return cross_entropy(_pooled(predictions), _pooled([truth[:, None] for truth in truths])[:, 0])
    prediction, truth = _pooled(predictions), _pooled(truths).float()
    if quantity == "normals":
        return cosine_loss(prediction, truth, (truth.square().sum(dim=1, keepdim=True) > 0))
    valid = truth > 0
    if protocol.depth_loss == "sig":
        loss = sig_loss(prediction, truth, valid, warming_up=step < SIG_WARMUP)
    else:
        loss = scale_invariant_log(prediction, truth, valid)
    if protocol.gradient_weight:
        for guess, target, weight in zip(predictions, truths, weights, strict=True):
            term = gradient_term(guess, target.float(), target > 0)
            loss = loss + protocol.gradient_weight * weight * term
    return loss


def _pooled(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors (b, K, ...) of several sizes as one (1, K, N); a single one as it is."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([tensor.transpose(0, 1).flatten(1) for tensor in tensors], dim=1)[None]
