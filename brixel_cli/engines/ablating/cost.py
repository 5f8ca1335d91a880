"""What the variants of an ablation cost: an update in training, an image in use; interleaved over all variants."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from brixel_cli.config.distill import Recipe
from brixel_cli.core.backbone import Backbone, load_backbone
from brixel_cli.core.cost import count_cost, fake_tensors, hollow
from brixel_cli.core.files import write_text
from brixel_cli.core.formatting import to_json
from brixel_cli.core.identity import json_digest
from brixel_cli.core.student import Student
from brixel_cli.engines.benchmarking.environment import processor_name
from brixel_cli.engines.distilling.batches import Batch
from brixel_cli.engines.distilling.plan import random_batch, random_update
from brixel_cli.engines.distilling.trainer import make_adapter
from brixel_cli.engines.latency import Latency, interleaved
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime

UPDATES = 5
"""Updates of each variant that are timed."""
INFERENCE_SECONDS = 20.0
"""Time for timing the inference of all variants together."""


@dataclass(frozen=True)
class Inference:
    """Backbone and adapter on one image of the student's size."""

    gflop: float
    latency: Latency


@dataclass(frozen=True)
class UpdateTime:
    """Seconds of an update.

    Attributes:
        first: as measured first, and kept: it decides how many updates equal time means.
        latest: as measured last, together with all others of that session.
        session: number of the measurement of `latest`.
    """

    first: float
    latest: float
    session: int


class UpdateTimes:
    """Seconds of an update by recipe, kept in a file.

    Args:
        path: of the file; times of another processor, or another torch, do not count.
        runtime: where it is measured.
    """

    def __init__(self, path: Path, runtime: Runtime):
        self.path, self.runtime = path, runtime
        threads = torch.get_num_threads() if runtime.device.type == "cpu" else 0
        self.where = [processor_name(runtime.device), runtime.precision, threads, torch.__version__]
        self.times: dict[str, UpdateTime] = {}
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["where"] == self.where:
                self.times = {key: UpdateTime(**time) for key, time in stored["times"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            return  # measured anew

    def measure(self, recipes: Sequence[Recipe], reporter: Reporter) -> list[UpdateTime]:
        """Median time of an update of each recipe on a batch in memory, measured unless it was for all together."""
        keys = [json_digest(_training_facts(recipe))[:16] for recipe in recipes]
        sessions = {self.times[key].session if key in self.times else -1 for key in keys}
        if len(sessions) > 1 or -1 in sessions:
            session = max((time.session for time in self.times.values()), default=-1) + 1
            for key, latest in self._measure(dict(zip(keys, recipes, strict=True)), reporter).items():
                first = self.times[key].first if key in self.times else latest
                self.times[key] = UpdateTime(first, latest, session)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            times = {key: asdict(time) for key, time in self.times.items()}
            write_text(self.path, to_json({"where": self.where, "times": times}, indent=2) + "\n")
        return [self.times[key] for key in keys]

    def _measure(self, recipes: Mapping[str, Recipe], reporter: Reporter) -> dict[str, float]:
        """Median of interleaved updates of all recipes."""
        batches: dict[str, tuple[Backbone, Batch]] = {}
        updates: dict[str, Callable[[], object]] = {}
        for key, recipe in recipes.items():
            shape = json_digest([recipe.backbone.name, recipe.student_hw, recipe.optim.images_per_pass()])[:16]
            if shape not in batches:
                backbone = _random_backbone(recipe, self.runtime)
                batches[shape] = backbone, random_batch(recipe, backbone, self.runtime)
            backbone, batch = batches[shape]
            updates[key] = random_update(recipe, backbone, self.runtime, batch)
        reporter.say(f"timing updates of {len(updates)} variants")
        latencies = interleaved(updates, self.runtime.device, seconds=0.0, min_rounds=UPDATES)
        return {key: latency.median for key, latency in latencies.items()}


def measure_inference(recipes: Sequence[Recipe], runtime: Runtime, reporter: Reporter) -> list[Inference]:
    """Arithmetic and time of one image through each recipe's student; equal architectures are measured once."""
    keys = [json_digest(_student_facts(recipe))[:16] for recipe in recipes]
    distinct = dict(zip(keys, recipes, strict=True))
    backbones: dict[str, Backbone] = {}
    calls: dict[str, Callable[[], object]] = {}
    for key, recipe in distinct.items():
        if recipe.backbone.name not in backbones:
            backbones[recipe.backbone.name] = _random_backbone(recipe, runtime)
        backbone = backbones[recipe.backbone.name]
        student = Student(backbone, make_adapter(recipe, backbone).to(runtime.device)).eval()
        image = torch.randn(1, 3, *recipe.student_hw, device=runtime.device)
        calls[key] = partial(runtime.in_precision(student), image)
    reporter.say(f"timing an image through {len(calls)} students, with random weights")
    with torch.inference_mode():
        latencies = interleaved(calls, runtime.device, INFERENCE_SECONDS)
    found = {key: Inference(_gflop(recipe), latencies[key]) for key, recipe in distinct.items()}
    return [found[key] for key in keys]


def _gflop(recipe: Recipe) -> float:
    meta = load_backbone(recipe.backbone.name, "random", recipe.backbone.dtype, device="meta")
    student = Student(meta, make_adapter(recipe, meta).to("meta")).eval()
    with fake_tensors():
        hollow(student)
        image = torch.empty(1, 3, *recipe.student_hw)
        return count_cost(lambda: student(image)).flop / 1e9


def _random_backbone(recipe: Recipe, runtime: Runtime) -> Backbone:
    return load_backbone(recipe.backbone.name, "random", recipe.backbone.dtype, str(runtime.device))


def _student_facts(recipe: Recipe) -> list[Any]:
    return [recipe.backbone.model_dump(), recipe.adapter.model_dump(), recipe.student_hw, recipe.views.factor]


def _training_facts(recipe: Recipe) -> list[Any]:
    optim = recipe.optim.model_dump(include={"batch_size", "accumulate", "average", "clip", "map_noise"})
    return [*_student_facts(recipe), recipe.loss.model_dump(), optim]
