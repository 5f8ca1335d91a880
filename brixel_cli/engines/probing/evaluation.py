"""Evaluation of predictions, image by image, at the labels' own resolution: of a head on stored maps, or any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from brixel_cli.core.heads import QUANTITIES, Head, enlarge
from brixel_cli.core.probe_metrics import DepthMeter, Meter, NormalsMeter, SegmentationMeter
from brixel_cli.data.crops import Crop, stitch
from brixel_cli.engines.probing.features import Maps, Targets
from brixel_cli.engines.probing.plan import Size, SplitPlan
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import memory_errors

Predict = Callable[[int, Size], dict[str, Tensor]]
"""Predictions of an image of a split, by its number, at the (height, width) asked for; see `predict`."""


@dataclass(frozen=True)
class Evaluated:
    """How a source did.

    Attributes:
        figures: of the whole set, by metric; lists are by class.
        images: of each image, by metric; nan where nothing of it counts.
    """

    figures: dict[str, Any]
    images: list[dict[str, float]]


def meters(task: str, num_classes: int, align: bool) -> dict[str, Meter]:
    """What measures each quantity of a task."""
    made: dict[str, Meter] = {}
    for quantity in QUANTITIES[task]:
        if quantity == "segmentation":
            made[quantity] = SegmentationMeter(num_classes)
        else:
            made[quantity] = DepthMeter(align) if quantity == "depth" else NormalsMeter()
    return made


@contextmanager
def evaluating(label: str, title: str, split: SplitPlan, reporter: Reporter) -> Iterator[Any]:
    """A progress bar over the images of a split; too little memory becomes an error that says what to do.

    Args:
        label: of the row, for the error.
        title: of the bar.
        split: the images.
        reporter: shows the bar.
    """
    with (
        memory_errors(f"evaluating {label}, image by image", "Take a smaller --res, or another --device."),
        reporter.bar(title, len(split.labelled), unit="image") as bar,
    ):
        yield bar


def evaluate(
    predict: Predict, measured: Mapping[str, Meter], targets: Targets, split: SplitPlan, bar: Any
) -> Evaluated:
    """Measure predictions on a split.

    Args:
        predict: makes them.
        measured: fresh meters, by quantity.
        targets: of the split.
        split: the images and their crops.
        bar: hears of every image.
    """
    images = []
    for image in range(len(split.labelled)):
        row = split.target_row(image)
        truths = targets.read(row)
        predictions = predict(image, targets.sizes[row])
        own: dict[str, float] = {}
        for quantity, meter in measured.items():
            truth = truths[quantity]
            own |= meter.add(predictions[quantity], truth[0] if quantity == "depth" else truth)
        images.append(own)
        bar.update(1)
    figures: dict[str, Any] = {}
    for meter in measured.values():
        figures |= meter.compute()
    return Evaluated(figures, images)


@torch.inference_mode()
def evaluate_head(
    head: Head, maps: Maps, targets: Targets, split: SplitPlan, align: bool, device: torch.device, bar: Any
) -> Evaluated:
    """Measure a head on a split.

    Args:
        head: in eval mode.
        maps: of the split.
        targets: of the split.
        split: the images and their crops.
        align: whether each image's depth is first brought to the truth by scale and shift.
        device: where the head is.
        bar: hears of every image.
    """
    measured = meters(head.spec.task, head.spec.num_classes, align)
    return evaluate(partial(predict, head, maps, split, device=device), measured, targets, split, bar)


@torch.inference_mode()
def predict(
    head: Head, maps: Maps, split: SplitPlan, image: int, size: Size, *, device: torch.device
) -> dict[str, Tensor]:
    """What a head says of an image of a split, (height, width) as asked for, on the CPU.

    Returns:
        `segmentation`: classes (H, W). `depth`: metres (H, W). `normals`: unit vectors (3, H, W).
    """
    positions = split.positions[image]
    crops = [split.crops[at] for at in positions]
    outputs = [head(maps.read([at]).to(device)) for at in positions]
    return finish(outputs, crops, size)


def finish(outputs: Sequence[dict[str, Tensor]], crops: Sequence[Crop], size: Size) -> dict[str, Tensor]:
    """Outputs of a head on the crops of one image as predictions of a size: several windows are put together first."""
    finished: dict[str, Tensor] = {}
    for quantity in outputs[0]:
        if len(outputs) == 1:
            output = outputs[0][quantity]
        else:
            windows = [
                enlarge(quantity, some[quantity], crop.size)[0] for some, crop in zip(outputs, crops, strict=True)
            ]
            output = stitch(windows, crops)[None]
        enlarged = enlarge(quantity, output, size)[0]
        if quantity == "segmentation":
            enlarged = enlarged.max(dim=0).indices  # argmax over the first axis takes ten times as long on the CPU
        finished[quantity] = (enlarged[0] if quantity == "depth" else enlarged).cpu()
    return finished
