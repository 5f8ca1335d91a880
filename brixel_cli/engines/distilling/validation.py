"""Held-out fidelity: the student and the bilinear backbone against the teacher, and a picture of all three."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import AliasChoices, Field, TypeAdapter

from brixel_cli.core.adapter import Adapter, resize
from brixel_cli.core.backbone import Backbone
from brixel_cli.core.metrics import FIDELITY, Gap, Number, fidelity, fidelity_basis, gap_over_images, gaps_by_domain
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
        gap_spread: standard errors of the recovered gaps.
        domains: recovered gap in cosine of each domain's images, and their mean; see `core.metrics.gaps_by_domain`.
    """

    step: int
    num_images: int
    backbone: dict[str, Number]
    student: dict[str, Number]
    recovered_gap: Annotated[dict[str, Number], Field(validation_alias=AliasChoices("recovered_gap", "gap_closed"))]
    gap_spread: dict[str, Number] = field(default_factory=dict)
    domains: dict[str, Gap] = field(default_factory=dict)

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> HeldOut:
        """Read back from a line of metrics.jsonl, a state or results.json, also of an earlier version."""
        return TypeAdapter(HeldOut).validate_python(stored)

    @property
    def main_gap(self) -> float:
        """The recovered gap in cosine: the mean over domains, or that of all images where there are none."""
        return self.domains["mean"].value if self.domains else self.recovered_gap["cosine"]

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
    measured: list[tuple[str, dict[str, float], dict[str, float]]] = []
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
            found = [fidelity(maps[place], target, basis) for maps in (bilinear, predictions)]
            measured.append((batch.names[place], found[0], found[1]))
            if len(rows) < PICTURE_ROWS and runtime.is_first:
                image = denormalise(batch.images[place], backbone.mean, backbone.std)
                maps = [batch.maps[-1][place], predictions[place], target]
                rows.append([image, *pca_colours(maps, target, basis)])
    adapter.train(was_training)
    measured = runtime.gather(measured)
    if not measured:
        raise BrixelError(f"None of the {num_images} held-out images can be read: {batches.skipped[0].reason}.")
    names, *pairs = zip(*measured, strict=True)
    values = [{metric: [image[metric] for image in images] for metric in FIDELITY} for images in pairs]
    means = [{metric: sum(found) / len(found) for metric, found in some.items()} for some in values]
    gaps = {metric: gap_over_images(values[0][metric], values[1][metric], metric) for metric in FIDELITY}
    picture = panel(["student's input", "backbone", "student", "teacher"], rows or [[Image.new("RGB", (1, 1))] * 4])
    held_out = HeldOut(
        step=step,
        num_images=len(measured),
        backbone=means[0],
        student=means[1],
        recovered_gap={metric: gap.value for metric, gap in gaps.items()},
        gap_spread={metric: gap.spread for metric, gap in gaps.items()},
        domains=gaps_by_domain(names, values[0]["cosine"], values[1]["cosine"]),
    )
    return held_out, picture
