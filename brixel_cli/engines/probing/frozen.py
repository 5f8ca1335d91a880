"""The tasks that train nothing: which measure is taken of a source's frozen features, and what of it is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cached_property

from brixel_cli.config.labelled import ProbeRecipe
from brixel_cli.config.protocols import AnyProtocol, MatchingProtocol, PropagationProtocol
from brixel_cli.data.labelled import LabelledSet
from brixel_cli.engines.probing.features import open_maps
from brixel_cli.engines.probing.folder import ProbeFolder
from brixel_cli.engines.probing.items import Measured
from brixel_cli.engines.probing.matching import Pair, find_pairs, measure_matching
from brixel_cli.engines.probing.plan import ProbePlan, SourcePlan
from brixel_cli.engines.probing.propagation import measure_propagation, num_measured, sequences_of
from brixel_cli.engines.probing.results import Items, Run, Versions
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime, memory_errors


def groups_of(recipe: ProbeRecipe, protocol: AnyProtocol, labelled: LabelledSet) -> list[str] | None:
    """Names of what figures are also listed by: classes, viewpoint changes or sequences; None for nothing."""
    if isinstance(protocol, MatchingProtocol):
        return protocol.bins
    if isinstance(protocol, PropagationProtocol):
        return list(sequences_of(labelled))
    return recipe.data.labels.classes if recipe.data.labels and recipe.task == "segmentation" else None


class FrozenTask:
    """Measures sources one after another; what all of them share is found once.

    Args:
        plan: of the probe.
        folder: where the figures of pairs or objects are kept.
        runtime: where features are compared.
        reporter: hears of progress.
        versions: tells the versions of the libraries.
    """

    def __init__(
        self,
        plan: ProbePlan,
        folder: ProbeFolder,
        runtime: Runtime,
        reporter: Reporter,
        versions: Callable[[], Versions],
    ):
        self.plan, self.folder, self.runtime, self.reporter, self.versions = plan, folder, runtime, reporter, versions

    @cached_property
    def pairs(self) -> list[Pair]:
        """Of matching, the pairs of images; of every source the same."""
        rules = self.plan.options.protocol
        assert isinstance(rules, MatchingProtocol)
        return find_pairs(self.plan.sources[0].evaluate.labelled, rules, self.reporter)

    def run(self, item: SourcePlan) -> Run:
        """The row of a source; its figures by pair or object are kept in the folder.

        Raises:
            BrixelError: a file of the set cannot be used, or memory does not suffice.
        """
        label, began = item.source.label, time.perf_counter()
        with memory_errors(f"comparing features of {label}", "Take a smaller protocol.grid, or another --device."):
            measured = self._measured(item)
        self._keep(label, measured.items)
        return Run(
            source=label,
            seed=0,
            figures=measured.figures,
            final_loss=math.nan,
            train_seconds=0.0,
            evaluate_seconds=round(time.perf_counter() - began, 3),
            steps_per_second=math.nan,
            versions=self.versions(),
            errors=measured.errors,
            items=len(measured.items),
        )

    def _measured(self, item: SourcePlan) -> Measured:
        rules, maps, device = self.plan.options.protocol, open_maps(item, item.evaluate), self.runtime.device
        label = item.source.label
        if isinstance(rules, MatchingProtocol):
            with self.reporter.bar(label, len(self.pairs), unit="pair") as bar:
                return measure_matching(maps, item.evaluate, self.pairs, rules, device, bar)
        assert isinstance(rules, PropagationProtocol)
        total = sum(map(num_measured, sequences_of(item.evaluate.labelled).values()))
        with self.reporter.bar(label, total, unit="frame") as bar:
            return measure_propagation(
                maps,
                item.evaluate,
                rules,
                self.folder.read_items(label),
                lambda done: self._keep(label, done),
                device,
                bar,
            )

    def _keep(self, label: str, items: Items) -> None:
        self.folder.write_run(label, 0, [], list(items), list(items.values()))
