"""What probes found out about a student, as far as a benchmark shows it: the main figures."""

from __future__ import annotations

from dataclasses import dataclass


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
        metric: `miou`, `rmse_m` or `mean_angle_deg`; shares are from 0 to 1.
        aligned: whether scale and shift of depth were fitted to the truth.
        seeds: number of heads that were trained on the student, or on the backbone where only that was probed.
        figures: by source, of `backbone`, `student` and `teacher` those that were probed.
        gap_closed: (student - backbone) / (teacher - backbone); None where it is not known, or there is no gap.
    """

    folder: str
    recipe: str
    protocol: str
    metric: str
    aligned: bool
    seeds: int
    figures: dict[str, Figure]
    gap_closed: float | None = None
