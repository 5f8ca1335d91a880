"""What the tasks that train nothing have in common: a row of figures for a source, from the figures of many items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from brixel_cli.core.metrics import Gap, gap_over_items
from brixel_cli.core.probe_metrics import HIGHER_IS_BETTER
from brixel_cli.engines.probing.results import Value

Items = dict[str, dict[str, float]]
"""By name, the figures of what is measured: pairs of images, or objects of sequences."""


@dataclass(frozen=True)
class Measured:
    """How a source did.

    Attributes:
        items: figures of each item; the same items for all sources.
        groups: for each group of items that figures are also listed by, the names of its items.
    """

    items: Items
    groups: Mapping[str, Sequence[str]]

    @property
    def figures(self) -> dict[str, Value]:
        """Means over all items; and, named `class_...`, over those of each group, nan for none."""
        names = list(next(iter(self.items.values())))
        found: dict[str, Value] = {name: fmean(item[name] for item in self.items.values()) for name in names}
        for name in names:
            found[f"class_{name}"] = [
                fmean(self.items[member][name] for member in members) if members else math.nan
                for members in self.groups.values()
            ]
        return found

    @property
    def errors(self) -> dict[str, float]:
        """Standard errors of the means over all items; nan for a single one."""
        return standard_errors(self.items.values())


def standard_errors(items: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Standard error of the mean of each figure over items; nan for a single one."""
    rows = list(items)
    return {
        name: stdev(row[name] for row in rows) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan for name in rows[0]
    }


def item_gaps(
    backbone: Sequence[Mapping[str, float]],
    source: Sequence[Mapping[str, float]],
    teacher: Sequence[Mapping[str, float]],
) -> dict[str, Gap]:
    """The recovered gap of the mean over the same items of each figure, with its standard error over items."""
    names = [name for name in backbone[0] if name in source[0] and name in teacher[0]]
    return {
        name: gap_over_items(
            [item[name] for item in backbone],
            [item[name] for item in source],
            [item[name] for item in teacher],
            higher_is_better=name in HIGHER_IS_BETTER,
        )
        for name in names
    }
