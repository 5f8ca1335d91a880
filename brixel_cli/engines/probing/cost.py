"""What a whole pass of each source costs, timed side by side: the sources of a probe, on one image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from brixel_cli.core.backbone import Backbone
from brixel_cli.core.cost import count_cost
from brixel_cli.core.student import Student
from brixel_cli.engines.latency import interleaved
from brixel_cli.engines.probing.plan import ProbePlan
from brixel_cli.engines.probing.results import PassCost
from brixel_cli.engines.probing.sources import ModelSource
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime

SECONDS, ROUNDS = 0.3, 9
"""Of timing, for all sources together, and the rounds that are made in any case."""


@torch.inference_mode()
def measure_costs(plan: ProbePlan, runtime: Runtime, reporter: Reporter) -> dict[str, PassCost]:
    """Count and time a pass of every source over an image of the commonest size of the evaluation.

    Args:
        plan: of the probe.
        runtime: device and precision.
        reporter: hears of progress.

    Returns:
        By label; feature files have none.

    Raises:
        WeightsError: weights cannot be had any more.
    """
    items = [(item.source, item.evaluate.crops) for item in plan.sources if isinstance(item.source, ModelSource)]
    calls: dict[str, Callable[[], Tensor]] = {}
    seen: dict[str, tuple[int, int]] = {}
    loaded: dict[tuple[str, str], Backbone] = {}
    for source, crops in sorted(items, key=lambda item: item[0].kind != "student"):  # a student brings its backbone
        sizes = source.seen(Counter(crop.size for crop in crops).most_common(1)[0][0])
        call = runtime.in_precision(_model(source, loaded, runtime))
        images = [torch.randn(1, 3, *size, device=runtime.device) for size in sizes]
        calls[source.label], seen[source.label] = partial(call, *images), sizes[-1]
    reporter.say(f"cost: timing a pass of {len(calls)} sources, one image at a time")
    flop = {label: count_cost(call).flop for label, call in calls.items()}
    times = interleaved(calls, runtime.device, SECONDS, min_rounds=ROUNDS)
    return {
        source.label: PassCost(
            seen[source.label], flop[source.label] / 1e9, (time := times[source.label]).median, time.low, time.high
        )
        for source, _ in items
    }


def _model(source: ModelSource, loaded: dict[tuple[str, str], Backbone], runtime: Runtime) -> Callable[..., Tensor]:
    """A source's model, which shares the backbone's weights with others."""
    spec, key = source.spec, (source.spec.backbone, source.spec.weights)
    if source.kind == "student" or key not in loaded:
        model = spec.load(str(runtime.device))
        loaded.setdefault(key, model.backbone if isinstance(model, Student) else model)
        if isinstance(model, Student):
            return model
    backbone = loaded[key]
    return source.baseline.whole_pass(backbone, spec.factor) if source.baseline else backbone
