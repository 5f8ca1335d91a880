"""Probes that a benchmarked student went through: found by its weights, shown beside the benchmark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Listener
from probe_sets import description, make_options, make_set
from probe_sets import make_results as make_probe_results
from test_benchmark_report import make_results
from typer.testing import CliRunner

from brixel_cli.app import app
from brixel_cli.cli.report import write_report
from brixel_cli.cli.tables import probe_tables
from brixel_cli.core.identity import tensors_sha256
from brixel_cli.core.student import read_adapter
from brixel_cli.engines.benchmarking import benchmarking
from brixel_cli.engines.benchmarking.cost import PeakMemory
from brixel_cli.engines.benchmarking.probes import Figure, ProbeResult, probes_of
from brixel_cli.engines.benchmarking.results import Results, read_results
from brixel_cli.engines.probing.folder import ProbeFolder
from brixel_cli.engines.probing.probing import probe
from brixel_cli.engines.probing.results import Summary

PROBED = ProbeResult(
    "runs/probe/mine", "mine", "quick", "miou", False, 3,
    {"backbone": Figure(0.5, 0.01), "student": Figure(0.625, 0.02), "teacher": Figure(0.75, None)}, 0.5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def write_probe(
    tmp: Path, name: str, task: str, sources: dict[str, tuple[str, str | None]], metrics: tuple[str, ...]
) -> None:
    """results.json of a probe: sources by label, each with kind and SHA-256; figures 0.1, 0.2, ... in their order."""
    options = make_options(tmp / "set", tmp / "out", task)
    described = {label: description(kind, student_sha256=sha) for label, (kind, sha) in sources.items()}
    made = make_probe_results(options, described, [])
    means = {label: dict.fromkeys(metrics, (number + 1) / 10) for number, label in enumerate(sources)}
    found = replace(
        made,
        settings=replace(made.settings, recipe="set", protocol="p"),
        summary={label: Summary(2, dict(mean), dict.fromkeys(metrics, 0.01)) for label, mean in means.items()},
        recovered_gap={label: dict.fromkeys(metrics, 0.4) for label, (kind, _) in sources.items() if kind == "student"},
    )
    folder = ProbeFolder(Path("runs/probe") / name)
    folder.path.mkdir(parents=True)
    folder.write(found)


def test_only_probes_of_the_same_weights_are_found(tmp_path: Path) -> None:
    assert probes_of("aa") == []
    several = {"student x": ("student", "bb"), "backbone": ("backbone", None), "student y": ("student", "aa")}
    write_probe(tmp_path, "several", "segmentation", several, ("miou",))
    write_probe(tmp_path, "another", "segmentation", {"student": ("student", "bb")}, ("miou",))
    write_probe(tmp_path, "depth", "depth_normals", {"student": ("student", "aa")}, ("rmse_m", "mean_angle_deg"))
    write_probe(tmp_path, "features", "segmentation", {"file": ("file", None)}, ("miou",))
    Path("runs/probe/broken").mkdir()
    Path("runs/probe/broken/results.json").write_text("{")
    depth, normals, several_found = probes_of("aa")
    assert several_found == ProbeResult(
        "runs/probe/several", "set", "p", "miou", False, 2,
        {"backbone": Figure(0.2, 0.01), "student": Figure(0.3, 0.01)}, 0.4,
    )  # fmt: skip
    assert (depth.metric, normals.metric) == ("rmse_m", "mean_angle_deg")
    assert depth.figures == {"student": Figure(0.1, 0.01)}


def test_a_benchmark_carries_the_probes_of_its_student(
    model: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener: Listener
) -> None:
    monkeypatch.setattr(benchmarking, "peak_in_fresh_process", lambda *_: PeakMemory(1000, 10))
    root = make_set(tmp_path / "data" / "set")
    changes: dict[str, Any] = {"checkpoints": [model[0]], "overrides": ["protocol.steps=2", "protocol.points=64"]}
    figures = probe(make_options(root, Path("runs/probe/mine"), **changes), listener).results
    line = ["benchmark", "--checkpoint", model[0], "--sizes", "32", "--seconds", "0.1", "--device", "cpu", "--quiet"]
    done = CliRunner().invoke(app, [*line, "--report", "report"])
    assert done.exit_code == 0, done.output
    results = read_results(Path("runs/benchmark"))
    (found,) = results.probes[results.models[0].name]
    assert found.folder == "runs/probe/mine"
    assert found.protocol == "quick (changed: points=64, steps=2)"
    for source in ("backbone", "student", "teacher"):
        mean = figures.summary[source].mean_of("miou")
        assert found.figures[source] == Figure(mean, None)  # one seed has no spread
        assert f"{mean * 100:.2f}" in done.stdout
    title = f"Probes of {results.models[0].name}, mean over seeds"
    assert title in done.stdout
    assert title in Path("report/report.md").read_text()
    assert tensors_sha256(read_adapter(model[0]).tensors) == results.models[0].student_sha256
    # Without probes nothing is said of any.
    (tmp_path / "runs" / "probe").rename(tmp_path / "moved")
    done = CliRunner().invoke(app, line)
    assert "Probes" not in done.stdout
    assert read_results(Path("runs/benchmark")).probes == {}


@pytest.fixture
def probed(tmp_path: Path) -> Results:
    return replace(make_results(tmp_path, sides=(112,)), probes={"vits": (PROBED,)})


def test_the_table_of_probes(probed: Results) -> None:
    (table,) = probe_tables(probed, probed.models[0])
    assert table.rows == [["mine", "mIoU (%)", "50.00", "62.50", "75.00", "50.0%"]]
    assert table.notes == ["runs/probe/mine: recipe mine, protocol quick, 3 seeds."]
    assert probe_tables(replace(probed, probes={}), probed.models[0]) == []
    alone = replace(PROBED, figures={"student": PROBED.figures["student"]}, recovered_gap=None, seeds=1)
    (table,) = probe_tables(replace(probed, probes={"vits": (alone,)}), probed.models[0])
    assert table.rows == [["mine", "mIoU (%)", "-", "62.50", "-", "-"]]
    assert table.notes == ["runs/probe/mine: recipe mine, protocol quick, 1 seed."]


def test_the_report_has_them(probed: Results, tmp_path: Path) -> None:
    write_report(probed, None, tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## Probes" in text
    assert "| mine | mIoU (%) | 50.00 | 62.50 | 75.00 | 50.0% |" in text
