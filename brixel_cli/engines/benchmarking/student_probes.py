"""Probes on the disk, read for a benchmark."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

from brixel_cli.config.probe import OUTPUT
from brixel_cli.core.heads import QUANTITIES
from brixel_cli.core.probe_metrics import LEADING
from brixel_cli.engines.benchmarking.probe_results import Figure, ProbeResult
from brixel_cli.engines.probing.folder import ProbeFolder
from brixel_cli.engines.probing.results import ModelDescription, ProbeResults
from brixel_cli.errors import BrixelError


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
                if isinstance(source, ModelDescription) and source.student_sha256 == student_sha256:
                    found += _main_figures(file.parent, results, label)
    return found


def _main_figures(folder: Path, results: ProbeResults, student: str) -> list[ProbeResult]:
    settings, summary = results.settings, results.summary
    kinds: dict[str, str] = {label: results.sources[label].kind for label in summary}
    labels = {kind: label for label, kind in kinds.items() if kind in ("backbone", "teacher") or label == student}
    gaps = results.recovered_gap.get(student, {})
    found = []
    for quantity in QUANTITIES[settings.task]:
        metric = LEADING[quantity]
        figures = {
            kind: Figure(_known(summary[label].mean_of(metric)), _known(summary[label].spread[metric]))
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
                gap_closed=_known(gaps.get(metric, math.nan)),
            )
        )
    return found


def _known(figure: float) -> float | None:
    return None if math.isnan(figure) else figure
