"""What a probe leaves for the eye: loss curves, and pictures of the best, the median and the worst image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from brixel_cli.core.curves import draw_curves
from brixel_cli.core.probe_metrics import HIGHER_IS_BETTER
from brixel_cli.engines.probe_folder import ProbeFolder
from brixel_cli.engines.probe_plan import ProbePlan, SourcePlan
from brixel_cli.engines.probe_sources import kind_of


def write_curves(folder: ProbeFolder, labels: Sequence[str], seeds: Sequence[int]) -> Path:
    """Draw the loss curves of all sources and seeds that there are."""
    curves = {label: [folder.read_curve(label, seed) for seed in seeds] for label in labels}
    draw_curves(folder.curves, {label: [curve for curve in some if curve] for label, some in curves.items()})
    return folder.curves


def ranked_images(images: Sequence[dict[str, float]], metric: str) -> dict[str, int]:
    """The `best`, `median` and `worst` image by a metric, by their numbers; images where it is nan are left out."""
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    order = sorted(
        (number for number, image in enumerate(images) if not math.isnan(image[metric])),
        key=lambda number: sign * images[number][metric],
    )
    if not order:
        return {}
    return {"best": order[0], "median": order[(len(order) - 1) // 2], "worst": order[-1]}


def reference_source(plan: ProbePlan) -> SourcePlan:
    """The source whose figures rank the images: the teacher, else the first student, else the first source."""
    for kind in ("teacher", "student"):
        for item in plan.sources:
            if kind_of(item.source) == kind:
                return item
    return plan.sources[0]
