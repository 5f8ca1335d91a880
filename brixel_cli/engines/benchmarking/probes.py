"""Probes on the disk, as far as a benchmark shows them: the main figures of each."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field

from brixel_cli.config.probe import OUTPUT
from brixel_cli.core.heads import QUANTITIES
from brixel_cli.core.probe_metrics import LEADING
from brixel_cli.engines.probing.folder import ProbeFolder
from brixel_cli.engines.probing.results import ModelDescription, ProbeResults
from brixel_cli.errors import BrixelError


@dataclass(frozen=True)
class Figure:
    """Mean and standard deviation over seeds; None where there is none, as of a single seed."""

    mean: float | None
    spread: float | None


@dataclass(frozen=True)
class ProbeResult:
    """The main figure of a probe, of one quantity of its task.

    Attributes:
        folder: of the probe.
        recipe: name of the probe's recipe.
        protocol: its name, with all that is not as published.
        metric: `miou`, `rmse_m` or `mean_angle_deg`; a share lies between 0 and 1.
        aligned: whether scale and shift of depth were fitted to the truth.
        seeds: number of heads that were trained on the student, or on the backbone where only that was probed.
        figures: by source, of `backbone`, `student` and `teacher` those that were probed.
        recovered_gap: (student - backbone) / (teacher - backbone); None where it is not known, or there is no gap.
        gap_spread: its standard deviation; None where it is not known, as of a single seed.
    """

    folder: str
    recipe: str
    protocol: str
    metric: str
    aligned: bool
    seeds: int
    figures: dict[str, Figure]
    recovered_gap: Annotated[float | None, Field(validation_alias=AliasChoices("recovered_gap", "gap_closed"))] = None
    gap_spread: float | None = None


def read_probe(folder: Path, student: str = "student") -> list[ProbeResult]:
    """The main figures of a probe, one for each quantity of its task.

    Args:
        folder: of the probe.
        student: label of the source that counts as the student.

    Raises:
        BrixelError: its results cannot be read.
    """
    return _main_figures(folder, ProbeFolder(folder).read(), student)


def probes_of(student_sha256: str) -> list[ProbeResult]:
    """The probes under ./runs/probe of the student with these weights, by folder; others are passed over."""
    found: list[ProbeResult] = []
    for file in sorted(OUTPUT.glob("*/results.json")):
        with suppress(BrixelError):  # of another version
            results = ProbeFolder(file.parent).read()
            for label in results.summary:
                source = results.sources[label]
                if (
                    isinstance(source, ModelDescription)
                    and source.kind == "student"
                    and source.student_sha256 == student_sha256
                ):
                    found += _main_figures(file.parent, results, label)
    return found


def _main_figures(folder: Path, results: ProbeResults, student: str) -> list[ProbeResult]:
    settings, summary = results.settings, results.summary
    kinds: dict[str, str] = {label: results.sources[label].kind for label in summary}
    labels = {kind: label for label, kind in kinds.items() if kind in ("backbone", "teacher") or label == student}
    gaps, spreads = results.recovered_gap.get(student, {}), results.gap_spread.get(student, {})
    found = []
    for quantity in QUANTITIES[settings.task] or (settings.task,):
        metric = LEADING[quantity]
        figures = {
            kind: Figure(known(summary[label].mean_of(metric)), known(summary[label].spread[metric]))
            for kind, label in labels.items()
        }
        found.append(
            ProbeResult(
                folder=str(folder),
                recipe=settings.recipe,
                protocol=settings.protocol,
                metric=metric,
                aligned=settings.protocol_settings.align,
                seeds=summary[labels.get("student") or labels["backbone"]].seeds,
                figures=figures,
                recovered_gap=known(gaps.get(metric, math.nan)),
                gap_spread=known(spreads.get(metric, math.nan)),
            )
        )
    return found


def known(figure: float) -> float | None:
    """The figure, or None for nan, as results on disk have it."""
    return None if math.isnan(figure) else figure
