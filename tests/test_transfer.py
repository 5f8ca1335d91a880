"""The head of the plain backbone on the maps of other sources."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Listener
from probe_sets import FAST, make_options, results

from brixel_cli.core.heads import load_head
from brixel_cli.engines.probing.evaluation import evaluate_head
from brixel_cli.engines.probing.features import Targets, open_maps
from brixel_cli.engines.probing.folder import ProbeFolder
from brixel_cli.engines.probing.probing import plan_probe, probe
from brixel_cli.engines.runtime import Runtime


def test_the_backbones_head_is_applied_unchanged(
    root: Path, tmp_path: Path, model: tuple[str, str], listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At the student's own input, the backbone at equal cost is the backbone.
    monkeypatch.setattr("brixel_cli.engines.probing.sources.equal_cost_size", lambda student, size, runtime: size)
    given = {"sources": ["backbone", "equal-cost", "student"], "checkpoints": [model[0]], "overrides": FAST}
    before = probe(make_options(root, tmp_path / "out", **given), listener).results
    options = make_options(root, tmp_path / "out", **given, transfer=True)
    done = probe(options, listener).results
    labels = ["backbone", "backbone, equal cost", "student"]
    assert list(done.summary) == [*labels, "backbone, equal cost, head of backbone", "student, head of backbone"]
    figures = {run.source: run.figures for run in done.runs}
    assert [figures[name] for name in labels] == [run.figures for run in before.runs]  # nothing was trained again
    assert figures["backbone, equal cost, head of backbone"] == figures["backbone"]
    # That of the student, by hand: the stored head on the stored maps.
    head, _ = load_head(ProbeFolder(tmp_path / "out").head("backbone", 0))
    expected = figures["student, head of backbone"]
    assert expected != figures["student"]
    plan = plan_probe(options, Runtime("cpu", "float32"), listener)
    item = next(item for item in plan.sources if item.source.label == "student")
    with listener.bar("", 0) as bar:
        found = evaluate_head(
            head, open_maps(item, item.evaluate), Targets(item.evaluate, "segmentation"), item.evaluate, False,
            torch.device("cpu"), bar,
        )  # fmt: skip
    assert found.figures == expected
    assert not any(ProbeFolder(tmp_path / "out").verify().values())
    assert results(tmp_path / "out")["sources"]["student, head of backbone"]["kind"] == "transfer"
    listener.said.clear()
    assert probe(options, listener).results.runs == done.runs
    assert not any("features:" in said for said in listener.said)  # all of it is there
