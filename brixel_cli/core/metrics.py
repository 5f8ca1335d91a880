"""How close a feature map is to the teacher's: L1, cosine, edge and spectral error of each image; the recovered gap.

The recovered gap has a spread: over seeds, or over images. There is none where the gap is under two spreads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator
from torch import Tensor

from brixel_cli.core.losses import Basis, cosine_error, edge_parts, fit_basis, spectral_error

FIDELITY = ("l1", "cosine", "edge", "spectral")
PERFECT = {"l1": 0.0, "cosine": 1.0, "edge": 0.0, "spectral": 0.0}
"""The teacher's own fidelity."""
LEAST_SPREADS = 2.0
"""A gap of fewer of its standard deviations is none."""
MOST_DOMAINS = 20
"""Images in more folders are no domains."""
COMPONENTS = 8
"""Principal components of the target in which edges are compared."""
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""As it is read back: JSON has no nan, and there it is null."""


@torch.no_grad()
def fidelity_basis(target: Tensor) -> Basis:
    """The principal components of a target (D, H, W) in which `fidelity` compares edges."""
    return fit_basis(target[None], COMPONENTS, seed=0, share=1.0)


@torch.no_grad()
def fidelity(prediction: Tensor, target: Tensor, basis: Basis | None = None) -> dict[str, float]:
    """Fidelity of one image's map to its target, both (D, H, W).

    Args:
        prediction: the map.
        target: the teacher's map.
        basis: `fidelity_basis(target)`, where several maps are compared with one target; None: fitted here.

    Returns:
        `l1`: mean absolute difference, in feature units, best 0. `cosine`: mean cosine similarity over locations,
        best 1. `edge`: squared error of the Sobel gradients in the target's first 8 principal components over the
        target's own gradient energy, best 0. `spectral`: mean squared log ratio of the high-frequency radial
        amplitudes, best 0.
    """
    prediction, target = prediction.float()[None], target.float()[None]
    edge, energy = edge_parts(prediction, target, basis or fidelity_basis(target[0]))
    return {
        "l1": F.l1_loss(prediction, target).item(),
        "cosine": 1 - cosine_error(prediction, target).item(),
        "edge": (edge / energy.clamp(min=1e-12)).item(),
        "spectral": spectral_error(prediction, target).item(),
    }


def recovered_gap(backbone: float, student: float, teacher: float, higher_is_better: bool = True) -> float:
    """(student - backbone) / (teacher - backbone) of a metric: 1 is the teacher, 0 the backbone.

    It is nan where the teacher is no better than the backbone: there is no gap to recover.
    """
    gap = teacher - backbone
    return (student - backbone) / gap if (gap > 0 if higher_is_better else gap < 0) else math.nan


@dataclass(frozen=True)
class Gap:
    """A recovered gap: 1 is the teacher, 0 the backbone.

    Attributes:
        value: nan where there is no gap to recover, or none that is larger than chance.
        spread: its standard deviation; nan where it is not known.
    """

    value: Number = math.nan
    spread: Number = math.nan


Figure = tuple[float, float]
"""Mean and standard deviation; nan where it is not known, as of a single seed."""


def gap_over_seeds(backbone: Figure, student: Figure, teacher: Figure, higher_is_better: bool = True) -> Gap:
    """The recovered gap of means over seeds, with their standard deviations propagated as independent ones."""
    gap, share = teacher[0] - backbone[0], recovered_gap(backbone[0], student[0], teacher[0], higher_is_better)
    if math.isnan(share) or abs(gap) < LEAST_SPREADS * math.hypot(backbone[1], teacher[1]):
        return Gap()
    return Gap(share, math.hypot(student[1], (share - 1) * backbone[1], share * teacher[1]) / abs(gap))


def gap_over_images(backbone: Sequence[float], student: Sequence[float], metric: str) -> Gap:
    """The recovered gap of means over images, of a fidelity metric, with its standard error.

    Args:
        backbone: of each image, of the backbone's bilinearly enlarged map.
        student: of the same images, of the student's map.
        metric: one of `FIDELITY`.
    """
    best = [PERFECT[metric]] * len(backbone)
    return gap_over_items(backbone, student, best, higher_is_better=metric == "cosine")


def gap_over_items(
    backbone: Sequence[float], student: Sequence[float], teacher: Sequence[float], higher_is_better: bool = True
) -> Gap:
    """The recovered gap of means over the same items, such as images, with its standard error over them."""
    gaps = [best - plain for plain, best in zip(backbone, teacher, strict=True)]
    share = recovered_gap(fmean(backbone), fmean(student), fmean(teacher), higher_is_better)
    if math.isnan(share) or len(gaps) < 2:
        return Gap(share)
    if abs(fmean(gaps)) < LEAST_SPREADS * stdev(gaps) / math.sqrt(len(gaps)):
        return Gap()
    # Of a ratio of means: what each item's recovery differs from the share of its gap.
    errors = [gain - plain - share * gap for gain, plain, gap in zip(student, backbone, gaps, strict=True)]
    return Gap(share, stdev(errors) / math.sqrt(len(gaps)) / abs(fmean(gaps)))


def mean_gap(gaps: Iterable[Gap]) -> Gap:
    """The mean of those that are known, with their spreads propagated as independent ones."""
    known = [gap for gap in gaps if not math.isnan(gap.value)]
    if not known:
        return Gap()
    return Gap(fmean(gap.value for gap in known), math.hypot(*(gap.spread for gap in known)) / len(known))


def gaps_by_domain(
    names: Sequence[str], backbone: Sequence[float], student: Sequence[float], metric: str = "cosine"
) -> dict[str, Gap]:
    """The recovered gap of each domain's images, and their mean as `mean`; empty where there are fewer than two.

    Args:
        names: of the images; the first folder of a name is its domain.
        backbone: as for `gap_over_images`.
        student: as for `gap_over_images`.
        metric: one of `FIDELITY`.
    """
    rows = rows_by_domain(names)
    if not rows:
        return {}
    found = {
        domain: gap_over_images([backbone[row] for row in own], [student[row] for row in own], metric)
        for domain, own in rows.items()
    }
    return found | {"mean": mean_gap(found.values())}


def rows_by_domain(names: Iterable[str]) -> dict[str, list[int]]:
    """Which of the images lie in each domain, by their places; empty where there is one, or too many to be domains."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(domain_of(name), []).append(row)
    return rows if 2 <= len(rows) <= MOST_DOMAINS else {}


def domain_of(name: str) -> str:
    """The first folder of an image's name; empty where it lies in none."""
    first, _, rest = name.replace("\\", "/").partition("/")
    return first if rest else ""
