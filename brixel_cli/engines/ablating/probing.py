"""Probes of the variants of an ablation: of each its student, of their backbone one for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from brixel_cli.config.distill import Recipe
from brixel_cli.config.labelled import Split
from brixel_cli.config.probe import ProbeOptions
from brixel_cli.core.extras import require
from brixel_cli.core.identity import text_digest
from brixel_cli.data.labelled import LabelledSet
from brixel_cli.engines.benchmarking.probes import Figure, ProbeResult, read_probe
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.engines.probing.probing import probe
from brixel_cli.engines.reporting import Reporter

SPLITS: Sequence[Split] = ("train", "evaluate")


class VariantProbes:
    """Probes the student of one variant after the other; stored features and targets are shared.

    Args:
        options: recipe, protocol and seeds of all probes.
        runs: folder of the variants' runs.
        reporter: hears of stages and progress.

    Raises:
        BrixelError: the labelled set is not there, or not whole.
    """

    def __init__(self, options: ProbeOptions, runs: Path, reporter: Reporter):
        self.options, self.runs, self.reporter = options, runs, reporter
        self.backbones: dict[Path, Figure] = {}
        check_set(options)

    def measure(self, recipe: Recipe, run: RunFolder) -> ProbeResult:
        """The main figure of the student that a run ended with, beside that of its plain backbone.

        What an earlier call has trained is not trained again.

        Raises:
            BrixelError: the probe failed.
        """
        name = self.options.recipe.name
        found = self._probe("student", run.path / "probe" / name, recipe, run)
        digest = text_digest(recipe.backbone.model_dump_json())[:10]
        folder = self.runs / "probe" / f"{name}-{digest}"
        if folder not in self.backbones:
            self.backbones[folder] = self._probe("backbone", folder, recipe, run).figures["backbone"]
        return replace(found, figures={"backbone": self.backbones[folder], **found.figures})

    def _probe(
        self, source: Literal["student", "backbone"], folder: Path, recipe: Recipe, run: RunFolder
    ) -> ProbeResult:
        options = replace(
            self.options,
            output=folder,
            features=self.runs / "features",
            sources=(source,),
            checkpoints=(str(run.last),),
            device=recipe.run.device,
            precision=recipe.run.precision,
        )
        probe(options, self.reporter)
        return read_probe(folder)[0]


def check_set(options: ProbeOptions) -> None:
    """Look for the files of a probe's labelled set.

    Raises:
        BrixelError: some are missing.
    """
    require("probe", "--probe")
    for split in SPLITS:
        LabelledSet(options.recipe, split)
