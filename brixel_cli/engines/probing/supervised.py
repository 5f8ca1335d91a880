"""Training of a network end to end, on images and labels of a probe: with early stop, and resumed to the last bit."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brixel_cli.config.base import scheduled_rate
from brixel_cli.config.protocols import Protocol
from brixel_cli.config.supervised import SupervisedConfig
from brixel_cli.core.formatting import to_json
from brixel_cli.core.networks import Network
from brixel_cli.core.probe_losses import sample_points
from brixel_cli.core.probe_metrics import HIGHER_IS_BETTER, LEADING, Meter
from brixel_cli.core.weights import load_tensors, save_tensors
from brixel_cli.data.row_store import Array
from brixel_cli.data.views import normalise_pixels, seed_of
from brixel_cli.engines.probing.evaluation import Predict, finish
from brixel_cli.engines.probing.features import Targets
from brixel_cli.engines.probing.plan import Size, SplitPlan
from brixel_cli.engines.probing.training import batches, outputs_loss
from brixel_cli.engines.runtime import keep_freed_memory
from brixel_cli.engines.streams import num_workers, read_ahead
from brixel_cli.errors import BrixelError, WeightsError

WORST = 1e9
"""Of a figure that no validation pixel counts for."""
FORMAT = "brixel-network-training-1"
_SPLIT, _FLIPS, _POINTS = 11, 12, 13
"""What a seed is used for, besides what training of heads uses it for."""


@dataclass(frozen=True)
class Pictures:
    """The images of a split as a network sees them.

    Attributes:
        split: the images and their crops.
        load: pixels (H, W, 3) uint8 of a crop, by its position.
        sizes: (height, width) of each crop in pixels.
        mean, std: by which they are normalised.
    """

    split: SplitPlan
    load: Callable[[int], Array]
    sizes: Sequence[Size]
    mean: Sequence[float]
    std: Sequence[float]

    def batch(self, pixels: Sequence[Array], device: torch.device) -> Tensor:
        """Normalised images (B, 3, H, W) of pixels of one size."""
        stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        return normalise_pixels(stacked.to(device), self.mean, self.std)


@dataclass(frozen=True)
class TrainedNetwork:
    """A network after its training.

    Attributes:
        network: in eval mode, with the weights that were best on the validation images.
        curve: of each validation: {step, loss, lr} and the figure, by its name.
        seconds: that the training took, validations included.
        best_step: after which the weights were best.
    """

    network: Network
    curve: list[dict[str, float]]
    seconds: float
    best_step: int


@dataclass
class _State:
    """Where a training is: all that changes, besides weights and the optimiser."""

    step: int = 0
    best: float = 0.0
    best_step: int = 0
    waited: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def set_aside(images: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """The images to train on and those to validate on, at least one of each; a function of the seed.

    Raises:
        BrixelError: there are not two images.
    """
    if len(images) < 2:
        raise BrixelError(
            "A network that is trained end to end needs two labelled images or more: one is set aside for validation."
        )
    order = np.random.default_rng(seed_of(seed, _SPLIT)).permutation(len(images))
    count = min(max(round(fraction * len(images)), 1), len(images) - 1)
    chosen = [images[place] for place in order]
    return sorted(chosen[count:]), sorted(chosen[:count])


def train_network(
    network: Network,
    pictures: Pictures,
    targets: Targets,
    images: Sequence[int],
    meters: Callable[[], dict[str, Meter]],
    protocol: Protocol,
    config: SupervisedConfig,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    state: tuple[Path, str],
    bar: Any,
) -> TrainedNetwork:
    """Train a network, or go on where an earlier call stopped, to the same bits.

    Args:
        network: with the weights that the training begins with.
        pictures: of the training split.
        targets: of the same.
        images: whose labels may be used, for training and validation.
        meters: makes what measures the validation images.
        protocol: crops, labels and loss.
        config: of the training.
        seed: of batches, mirroring, points and validation images.
        device: where it is trained.
        dtype: arithmetic of the forward pass.
        state: the file that holds where the training is, and what identifies the training.
        bar: hears of every step.

    Raises:
        BrixelError: the loss is no finite number, or there are too few images.
    """
    keep_freed_memory(device)
    training, validation = set_aside(images, config.val_fraction, seed)
    network.to(device)
    optimiser = torch.optim.AdamW(network.groups(config))
    at, best = _read_state(*state, network, optimiser)
    bar.update(at.step)
    positions = [pictures.split.positions[image] for image in training]
    steps = batches(positions, pictures.sizes, config.batch_size, config.steps, seed)
    recent: list[Tensor] = []
    metric = LEADING[next(iter(meters()))]
    begun = time.perf_counter() - at.seconds
    stopped = at.waited >= config.patience
    left = iter(()) if stopped else itertools.islice(steps, at.step, None)
    with torch.enable_grad():
        for batch, pixels in read_ahead(left, pictures.load, num_workers(), device.type == "cpu"):
            lr = scheduled_rate("cosine", 1.0, at.step, config.steps, config.steps // 10)
            for group in optimiser.param_groups:
                group["lr"] = lr * group["peak"]
            network.train()
            inputs = pictures.batch(pixels, device)
            mirrored = _mirrored(config, len(batch), seed, at.step, device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                outputs = network(torch.where(mirrored, inputs.flip(-1), inputs))
            turned = {name: _turned_back(name, output.float(), mirrored) for name, output in outputs.items()}
            generator = torch.Generator().manual_seed(seed_of(seed, _POINTS, at.step))
            points = sample_points(protocol.points, len(batch), generator) if protocol.points else None
            loss = outputs_loss(turned, protocol, targets, batch, points, at.step, device)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            recent.append(loss.detach())
            at.step += 1
            bar.update(1)
            if at.step % config.validate_every and at.step != config.steps:
                continue
            mean = float(torch.stack(recent).mean())
            recent.clear()
            if not np.isfinite(mean):
                raise BrixelError(
                    f"The loss is {mean} at step {at.step}, seed {seed}. Lower the rates: "
                    f"--set supervised.lr={config.lr / 10:g} --set supervised.scratch_lr={config.scratch_lr / 10:g}"
                )
            figures = _validate(network, pictures, targets, validation, meters(), device, dtype)
            value = float(figures.get(metric, math.nan))
            at.curve.append({"step": at.step, "loss": mean, "lr": lr * config.lr, metric: value})
            score = -WORST if math.isnan(value) else value if metric in HIGHER_IS_BETTER else -value
            at.waited += 1
            if not at.best_step or score > at.best:
                at.best, at.best_step, at.waited = score, at.step, 0
                best = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
            at.seconds = time.perf_counter() - begun
            _write_state(*state, network, optimiser, at, best)
            if at.waited >= config.patience:
                break
    network.load_state_dict(best)
    network.eval().requires_grad_(False)
    return TrainedNetwork(network, at.curve, at.seconds, at.best_step)


def network_predict(network: Network, pictures: Pictures, device: torch.device, dtype: torch.dtype) -> Predict:
    """Predictions of a network in eval mode on the images of an evaluated split."""

    def predict(image: int, size: Size) -> dict[str, Tensor]:
        positions = pictures.split.positions[image]
        outputs = [_outputs(network, pictures, at, device, dtype) for at in positions]
        return finish(outputs, [pictures.split.crops[at] for at in positions], size)

    return predict


@torch.inference_mode()
def _outputs(
    network: Network, pictures: Pictures, position: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    inputs = pictures.batch([pictures.load(position)], device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        outputs = network(inputs)
    return {name: values.float() for name, values in outputs.items()}


def _validate(
    network: Network,
    pictures: Pictures,
    targets: Targets,
    images: Sequence[int],
    measured: dict[str, Meter],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Figures on images that are set aside, of which the first crop is seen."""
    network.eval()
    for image in images:
        at = pictures.split.positions[image][0]
        truths = targets.read(at)
        outputs = _outputs(network, pictures, at, device, dtype)
        predictions = finish([outputs], [pictures.split.crops[at]], targets.sizes[at])
        for quantity, meter in measured.items():
            truth = truths[quantity]
            meter.add(predictions[quantity], truth[0].float() if quantity == "depth" else truth)
    figures: dict[str, Any] = {}
    for meter in measured.values():
        figures |= meter.compute()
    return figures


def _mirrored(config: SupervisedConfig, count: int, seed: int, step: int, device: torch.device) -> Tensor:
    """Which images of a step are mirrored: (B, 1, 1, 1), a function of seed and step."""
    drawn = np.random.default_rng(seed_of(seed, _FLIPS, step)).random(count) < 0.5
    return torch.from_numpy(drawn & config.flip).to(device)[:, None, None, None]


def _turned_back(quantity: str, output: Tensor, mirrored: Tensor) -> Tensor:
    """Outputs (B, K, h, w) of mirrored images as those of the images themselves: x of normals changes its sign."""
    back = output.flip(-1)
    if quantity == "normals":
        back = back * back.new_tensor([-1.0, 1.0, 1.0])[:, None, None]
    return torch.where(mirrored, back, output)


def _write_state(
    path: Path, key: str, network: Network, optimiser: torch.optim.Optimizer, at: _State, best: dict[str, Tensor]
) -> None:
    tensors = {f"model/{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in best.items()}
    for name, parameter in network.named_parameters():
        for part, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{part}/{name}"] = value
    save_tensors(path, tensors, {"format": FORMAT, "key": key, "state": to_json(asdict(at))})


def _read_state(
    path: Path, key: str, network: Network, optimiser: torch.optim.Optimizer
) -> tuple[_State, dict[str, Tensor]]:
    """Where an earlier call stopped, whose weights are then loaded; the beginning, where there is none or another."""
    with suppress(WeightsError, KeyError, ValueError, TypeError, RuntimeError):
        tensors, metadata = load_tensors(path)
        if (metadata["format"], metadata["key"]) == (FORMAT, key):
            parts: dict[str, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                part, _, of = name.partition("/")
                parts.setdefault(part, {})[of] = tensor
            at = _State(**json.loads(metadata["state"]))
            network.load_state_dict(parts["model"])
            for name, parameter in network.named_parameters():
                found = {part: values[name] for part, values in parts.items()
                         if part.startswith("optimiser.") and name in values}  # fmt: skip
                if found:
                    optimiser.state[parameter] = {
                        part.removeprefix("optimiser."): value if value.ndim == 0 else value.to(parameter.device)
                        for part, value in found.items()
                    }
            return at, parts["best"]
    return _State(), {}
