"""Figures of a source that are means over many items: pairs of images, or objects of sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from brixel_cli.engines.probing.results import Items, Value


@dataclass(frozen=True)
class Measured:
    """How a source did.

    Attributes:
        items: figures of each item; the same items for all sources.
        groups: for each group that figures are also listed by, the names of its items.
    """

    items: Items
    groups: Mapping[str, Sequence[str]]

    @property
    def metrics(self) -> list[str]:
        """Names of the figures."""
        return list(next(iter(self.items.values())))

    @property
    def figures(self) -> dict[str, Value]:
        """Means over all items; and, named `class_...`, over those of each group, nan for none."""
        found: dict[str, Value] = {name: fmean(item[name] for item in self.items.values()) for name in self.metrics}
        for name in self.metrics:
            found[f"class_{name}"] = [
                fmean(self.items[member][name] for member in members) if members else math.nan
                for members in self.groups.values()
            ]
        return found

    @property
    def errors(self) -> dict[str, float]:
        """Standard errors of the means over all items; nan for a single one."""
        count = len(self.items)
        return {
            name: stdev(item[name] for item in self.items.values()) / math.sqrt(count) if count > 1 else math.nan
            for name in self.metrics
        }
