"""Preservation: the head that was trained on the plain backbone's maps, applied unchanged to those of other sources.

Where it does as well there, a source's map lies in the backbone's space: heads that users have trained go on working.
Source of the test: Wimmer et al. 2025, https://arxiv.org/abs/2510.12764 (AnyUp).
"""

from __future__ import annotations

import math
import time

from brixel_cli.core.heads import load_head
from brixel_cli.engines.probing.evaluation import evaluate_head, evaluating
from brixel_cli.engines.probing.features import Targets, open_maps
from brixel_cli.engines.probing.folder import ProbeFolder
from brixel_cli.engines.probing.plan import ProbePlan, SourcePlan
from brixel_cli.engines.probing.results import Run, Versions
from brixel_cli.engines.probing.sources import ModelSource
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime

BACKBONE = "backbone"


def transfers(plan: ProbePlan) -> dict[str, SourcePlan]:
    """The rows of a probe in which the backbone's head is applied to another model's maps, by label."""
    if not plan.options.transfer:
        return {}
    others = [item for item in plan.sources if isinstance(item.source, ModelSource) and item.source.kind != BACKBONE]
    return {f"{item.source.label}, head of backbone": item for item in others}


def run_transfer(
    plan: ProbePlan,
    label: str,
    item: SourcePlan,
    seed: int,
    folder: ProbeFolder,
    runtime: Runtime,
    reporter: Reporter,
    versions: Versions,
) -> Run:
    """Measure the backbone's head of a seed, which is in the folder, on the maps of another source.

    Raises:
        BrixelError: the head cannot be read, or memory does not suffice.
    """
    began, split, align = time.perf_counter(), item.evaluate, plan.options.training.align
    head, _ = load_head(folder.head(BACKBONE, seed))
    targets = Targets(split, plan.options.recipe.task)
    with evaluating(label, f"{label}, seed {seed}", split, reporter) as bar:
        evaluated = evaluate_head(
            head.to(runtime.device), open_maps(item, split), targets, split, align, runtime.device, bar
        )
    folder.write_run(label, seed, [], split.labelled.names, evaluated.images)
    seconds = round(time.perf_counter() - began, 3)
    return Run(label, seed, evaluated.figures, math.nan, 0.0, seconds, math.nan, versions)
