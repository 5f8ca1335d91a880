"""Held-out fidelity: the student and the bilinear backbone against the teacher, and a picture of all three."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from brixel_cli.core.adapter import Adapter, resize
from brixel_cli.core.backbone import Backbone
from brixel_cli.core.metrics import FIDELITY, fidelity, fidelity_basis, gap_over_images
from brixel_cli.drawing.feature_maps import denormalise, panel, pca_colours
from brixel_cli.engines.distilling.batches import Batches, check_finite
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError

PICTURE_ROWS = 4
LARGEST_BATCH = 4


@dataclass(frozen=True)
class HeldOut:
    """Fidelity to the teacher after a step, the mean over the held-out images; what the metrics are: `core.metrics`.

    Attributes:
        step: updates made so far.
        num_images: that were measured; damaged ones are left out.
        backbone: of the backbone's bilinearly enlarged map, by metric.
        student: of the student's map, by metric.
        recovered_gap: (student - backbone) / (teacher - backbone), by metric; nan where there is no gap.
    """

    step: int
    num_images: int
    backbone: dict[str, float]
    student: dict[str, float]
    recovered_gap: dict[str, float]

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> HeldOut:
        """Read back from a line of metrics.jsonl, a state or results.json, where null stands for nan.

        Earlier versions called the recovered gap `gap_closed`.
        """
        stored = {"recovered_gap": stored.get("gap_closed"), **stored}
        groups = {
            name: {metric: math.nan if value is None else value for metric, value in stored[name].items()}
            for name in ("backbone", "student", "recovered_gap")
        }
        return HeldOut(stored["step"], stored["num_images"], **groups)

    def better_than(self, other: HeldOut | None) -> bool:
        """Whether its student surpasses another in cosine; one that is not a number never does."""
        if other is None:
            return True
        mine, former = self.student["cosine"], other.student["cosine"]
        return math.isfinite(mine) and (not math.isfinite(former) or mine > former)


@torch.no_grad()
def validate(
    adapter: Adapter, backbone: Backbone, batches: Batches, num_images: int, runtime: Runtime, at_once: int, step: int
) -> tuple[HeldOut, Image.Image]:
    """Measure an adapter, in eval mode, on the first `num_images` held-out views, shared out over the processes.

    Args:
        adapter: to be measured.
        backbone: whose normalisation the pictures undo.
        batches: of held-out views; damaged ones, for which others stand in, are left out.
        num_images: held-out views.
        runtime: device and processes.
        at_once: images in a pass, at most.
        step: updates that the adapter has behind it.

    Returns:
        The figures, and a picture of the first few images: input, backbone, student, teacher.

    Raises:
        BrixelError: none of them can be read, or a target is not finite.
    """
    mine = list(range(runtime.rank, num_images, runtime.world_size))
    size = min(at_once, LARGEST_BATCH)
    chunks = [[(0, number) for number in mine[at : at + size]] for at in range(0, len(mine), size)]
    measured: list[tuple[dict[str, float], dict[str, float]]] = []
    rows: list[list[Image.Image]] = []
    was_training = adapter.training
    adapter.eval()
    for batch in batches.iterate(chunks):
        check_finite(batch)
        with runtime.autocast():
            predictions = adapter(batch.images, batch.maps).float()
        bilinear = resize(batch.maps[-1], (predictions.shape[-2], predictions.shape[-1]))
        for place, target in enumerate(batch.targets):
            if batch.replaced[place]:
                continue
            basis = fidelity_basis(target)
            measured.append((fidelity(bilinear[place], target, basis), fidelity(predictions[place], target, basis)))
            if len(rows) < PICTURE_ROWS and runtime.is_first:
                image = denormalise(batch.images[place], backbone.mean, backbone.std)
                maps = [batch.maps[-1][place], predictions[place], target]
                rows.append([image, *pca_colours(maps, target, basis)])
    adapter.train(was_training)
    measured = runtime.gather(measured)
    if not measured:
        raise BrixelError(f"None of the {num_images} held-out images can be read: {batches.skipped[0].reason}.")
    backbone_mean, student_mean = (
        {name: sum(pair[which][name] for pair in measured) / len(measured) for name in FIDELITY} for which in (0, 1)
    )
    picture = panel(["student's input", "backbone", "student", "teacher"], rows or [[Image.new("RGB", (1, 1))] * 4])
    gaps = {
        name: gap_over_images([pair[0][name] for pair in measured], [pair[1][name] for pair in measured], name).value
        for name in FIDELITY
    }
    return HeldOut(step, len(measured), backbone_mean, student_mean, gaps), picture
