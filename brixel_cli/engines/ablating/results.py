"""What ablations found out, and their form on disk: ablations.json for programs, ablations.csv for spreadsheets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from brixel_cli.core.formatting import Stored, csv_text
from brixel_cli.core.metrics import FIDELITY
from brixel_cli.engines.benchmarking.environment import Environment
from brixel_cli.engines.benchmarking.probes import ProbeResult
from brixel_cli.engines.benchmarking.results import RecoveredGaps, read_json
from brixel_cli.engines.latency import Latency

FORMAT: Literal["brixel-ablations-1"] = "brixel-ablations-1"
FILE_NAME = "ablations.json"
TABLE_NAME = "ablations.csv"


@dataclass(frozen=True)
class Point:
    """Held-out fidelity of a variant after so many updates."""

    step: int
    fidelity: dict[str, float | None]


@dataclass(frozen=True)
class VariantResult:
    """One variant of a group: what it costs, and how faithful it came out.

    Attributes:
        group, name: of the variant.
        changes: values that differ from the base recipe, by key path.
        folder: its run, relative to the folder of the results; `last.safetensors` in it is what was measured.
        num_parameters: of the adapter.
        gflop: backbone and adapter on one image; a multiply-add is 2, attention counted.
        latency: of backbone and adapter on one image.
        steps: updates of the whole training.
        update_seconds: of one update on a batch in memory; median over interleaved rounds.
        training_bytes: counted: batch, weights, gradients, moments, average, and the largest working set of a pass.
        curve: fidelity at each validation; the last is the one of the table. Empty until the variant is trained.
        bilinear: fidelity of the bilinearly enlarged backbone map on the same images.
        recovered_gap: (student - bilinear) / (teacher - bilinear), by metric.
        num_images: held-out images.
        probe: of the student, beside that of the plain backbone; None where none was asked for, or it failed.
        failed: why the training, or the probe, did not reach its end; empty where it did.
    """

    group: str
    name: str
    changes: dict[str, Any]
    folder: str
    num_parameters: int
    gflop: float
    latency: Latency
    steps: int
    update_seconds: float
    training_bytes: int
    curve: tuple[Point, ...] = ()
    bilinear: dict[str, float | None] = field(default_factory=dict)
    recovered_gap: RecoveredGaps = field(default_factory=dict)
    num_images: int = 0
    probe: ProbeResult | None = None
    failed: str = ""

    @property
    def fidelity(self) -> dict[str, float | None]:
        """At the end of the training; empty where there was none yet."""
        return self.curve[-1].fidelity if self.curve else {}

    @property
    def training_seconds(self) -> float:
        """Updates of the whole training, without reading the cache and validating."""
        return self.steps * self.update_seconds


@dataclass(frozen=True)
class Ablations(Stored):
    """All groups of one base recipe, as ablations.json has them.

    Attributes:
        commands: the lines that make them again.
        created: date and time, ISO 8601, UTC.
        recipe, digest, backbone: name of the base recipe, a digest of its contents, timm name.
        student_size, teacher_size: inputs (height, width) in pixels.
        batch_size: images in an update.
        equal: what all variants have in common: `steps` or `time`.
        budget: number of updates, or seconds of updates.
        environment: where it was measured.
        photographs: how many are trained on and held out, with a digest.
        variants: by group, in the order in which they are printed.
    """

    commands: tuple[str, ...]
    created: str
    recipe: str
    digest: str
    backbone: str
    student_size: tuple[int, int]
    teacher_size: tuple[int, int]
    batch_size: int
    equal: Literal["steps", "time"]
    budget: float
    environment: Environment
    photographs: str
    variants: tuple[VariantResult, ...]
    format: Literal["brixel-ablations-1"] = FORMAT

    def groups(self) -> dict[str, list[VariantResult]]:
        """Variants by group."""
        found: dict[str, list[VariantResult]] = {}
        for variant in self.variants:
            found.setdefault(variant.group, []).append(variant)
        return found

    def joined(self, earlier: Ablations) -> Ablations:
        """With the groups of earlier ones that are not among these, if all else was the same; else these alone."""
        facts = [dataclasses.replace(item, commands=(), created="", variants=()) for item in (self, earlier)]
        if facts[0] != facts[1]:
            return self
        kept = tuple(item for item in earlier.variants if item.group not in self.groups())
        commands = tuple(dict.fromkeys((*earlier.commands, *self.commands)))
        return dataclasses.replace(self, commands=commands if kept else self.commands, variants=kept + self.variants)

    def to_csv(self) -> str:
        """A line for each variant."""
        rows = []
        for item in self.variants:
            metrics = (item.fidelity, item.bilinear, item.recovered_gap)
            rows.append([
                item.group, item.name, " ".join(f"{key}={value}" for key, value in item.changes.items()), item.folder,
                item.num_parameters, item.gflop, item.latency.median, item.latency.low, item.latency.high,
                item.steps, item.update_seconds, item.training_seconds, item.training_bytes, item.num_images,
                *(values.get(name) for values in metrics for name in FIDELITY),
                *_probe_cells(item.probe), item.failed,
            ])  # fmt: skip
        return csv_text(_COLUMNS, rows)


_COLUMNS = (
    "group", "variant", "changes", "folder", "parameters", "gflop", "seconds", "seconds_q10", "seconds_q90",
    "steps", "update_seconds", "training_seconds", "training_bytes", "num_images", *FIDELITY,
    *(f"bilinear_{name}" for name in FIDELITY), *(f"recovered_gap_{name}" for name in FIDELITY),
    "probe", "probe_protocol", "probe_metric", "probe_seeds", "probe_mean", "probe_spread", "probe_backbone_mean",
    "probe_backbone_spread", "failed",
)  # fmt: skip


def _probe_cells(probe: ProbeResult | None) -> list[object]:
    if probe is None:
        return [None] * 8
    figures = [probe.figures["student"], probe.figures["backbone"]]
    spreads = [value for figure in figures for value in (figure.mean, figure.spread)]
    return [probe.recipe, probe.protocol, probe.metric, probe.seeds, *spreads]


def read_ablations(path: Path) -> Ablations:
    """Read ablations.json back, or the one in a folder.

    Raises:
        BrixelError: it is missing, or not of this format.
    """
    return read_json(path, FILE_NAME, Ablations, "brixel benchmark --ablate")
