"""Ablations with probes: each student is probed once, on shared features, and its figure stands in the table."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY, Listener
from probe_sets import make_options, recipe_file, results
from test_ablation import remembered
from typer.testing import CliRunner

from brixel_cli.app import app
from brixel_cli.cli.tables import ablation_tables
from brixel_cli.config.benchmark import AblationOptions
from brixel_cli.config.probe import ProbeOptions
from brixel_cli.config.protocols import PROTOCOLS
from brixel_cli.engines.ablating import ablation
from brixel_cli.engines.ablating import cost as ablation_cost
from brixel_cli.engines.ablating import probing as ablation_probe
from brixel_cli.engines.ablating.ablation import ablate
from brixel_cli.engines.ablating.results import Ablations, read_ablations
from brixel_cli.engines.benchmarking.probes import Figure, ProbeResult
from brixel_cli.errors import BrixelError, UsageError

CACHED = ("cache.enabled=true", "views.kind=fixed")
FAST = ["protocol.steps=3", "protocol.points=64"]
MINE = "base: {}\nfast: {optim.lr: 0.05}\n"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation_cost, "INFERENCE_SECONDS", 0.02)
    for module, name in ((ablation, "count_training"), (ablation_cost, "_gflop")):
        monkeypatch.setattr(module, name, remembered(getattr(module, name)))


@pytest.fixture
def given(tmp_path: Path, photographs: Path, model: tuple[str, str], root: Path) -> AblationOptions:
    """Two variants on a backbone whose weights are on disk."""
    (tmp_path / "tiny.yaml").write_text(
        TINY.replace("PHOTOS", str(photographs)).replace("weights: random", f"weights: {model[1]}")
    )
    (tmp_path / "mine.yaml").write_text(MINE)
    return AblationOptions(
        str(tmp_path / "mine.yaml"), str(tmp_path / "tiny.yaml"), CACHED, steps=2, output=tmp_path / "out",
        probe=str(recipe_file(root)),
    )  # fmt: skip


@pytest.fixture
def quick(root: Path, tmp_path: Path) -> ProbeOptions:
    return make_options(root, tmp_path / "unused", overrides=FAST, seeds=2)


def test_each_student_is_probed_once_on_shared_features(
    given: AblationOptions, quick: ProbeOptions, listener: Listener, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    done = ablate(given, listener, quick)
    out, runs = given.output, given.output / "ablations"
    base, fast = (item.probe for item in done.variants)
    assert base is not None
    assert fast is not None
    for item, found in zip(done.variants, (base, fast), strict=True):
        own = results(out / item.folder / "probe" / "mine")
        assert list(own["summary"]) == ["student"]
        assert Path(own["sources"]["student"]["checkpoint"]) == out / item.folder / "last.safetensors"
        # By hand: mean and standard deviation (n - 1) of the two seeds, from the rows of the runs.
        first, second = (run["figures"]["miou"] for run in own["runs"])
        assert found.figures["student"].mean == pytest.approx((first + second) / 2)
        assert found.figures["student"].spread == pytest.approx(abs(first - second) / 2**0.5)
        assert (found.recipe, found.metric, found.seeds) == ("mine", "miou", 2)
        assert found.protocol == "quick (changed: points=64, steps=3)"
        assert found.recovered_gap is None
    assert base.figures["student"] != fast.figures["student"]
    assert base.figures["backbone"] == fast.figures["backbone"]
    (plain,) = (runs / "probe").iterdir()
    assert base.figures["backbone"].mean == results(plain)["summary"]["backbone"]["mean"]["miou"]
    # Targets and backbone maps once, maps of two students: each for both splits.
    assert len(list((runs / "features").glob("*.h5"))) == 2 + 2 + 2 * 2
    assert not (given.output.parent / "unused").exists()
    assert read_ablations(out) == done
    lines = list(csv.DictReader((out / "ablations.csv").read_text().splitlines()))
    assert [float(line["probe_mean"]) for line in lines] == [item.figures["student"].mean for item in (base, fast)]
    assert lines[0]["probe_metric"] == "miou"
    assert float(lines[1]["probe_backbone_mean"]) == base.figures["backbone"].mean

    # The same call again: no head is trained.
    heads = {path: path.stat().st_mtime_ns for path in runs.rglob("heads/*.safetensors")}
    assert len(heads) == 3 * 2
    assert [item.probe for item in ablate(given, listener, quick).variants] == [base, fast]
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("heads/*.safetensors")} == heads

    # A probe that fails is its variant's fault alone.
    real = ablation_probe.probe

    def failing(options: ProbeOptions, reporter: Listener):
        if "base-" in str(options.output):
            raise BrixelError("The disk is full.\nMake room.")
        return real(options, reporter)

    monkeypatch.setattr(ablation_probe, "probe", failing)
    base_row, fast_row = ablate(given, listener, quick).variants
    assert (base_row.failed, base_row.probe) == ("probe mine: The disk is full.", None)
    assert "The disk is full.\nMake room." in listener.warned[-1]
    assert base_row.fidelity == done.variants[0].fidelity
    assert (fast_row.failed, fast_row.probe) == ("", fast)


def test_the_command_probes_prints_and_reports(
    given: AblationOptions, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROTOCOLS, "quick", PROTOCOLS["quick"].model_copy(update={"steps": 2, "points": 64}))
    (tmp_path / "mine.yaml").write_text("base: {}\n")
    line = ["benchmark", "--ablate", given.groups, "--recipe", given.recipe, "--output", str(given.output)]
    line += ["--set", CACHED[0], "--set", CACHED[1], "--steps", "1", "--probe", str(given.probe), "--quiet"]
    absent = CliRunner().invoke(app, [*line, "--probe-data", str(tmp_path / "absent"), "--dry-run"])
    assert absent.exit_code == 1
    assert "--probe-data DIR of brixel benchmark" in absent.output
    line += ["--probe-data", str(root)]
    done = CliRunner().invoke(app, [*line, "--report", str(tmp_path / "report")])
    assert done.exit_code == 0, done.output
    assert max(len(line) for line in done.stdout.splitlines() if "│" in line) <= 80
    found = read_ablations(given.output)
    probe = found.variants[0].probe
    assert probe is not None
    student = probe.figures["student"]
    assert student.mean is not None
    assert student.spread is not None
    cell = f"{student.mean * 100:.2f} +- {student.spread * 100:.2f}"
    note = "mIoU (%): probe mine, protocol quick, mean and standard deviation over 3 seeds"
    for text in (done.stdout, (tmp_path / "report" / "report.md").read_text(), (tmp_path / "report" / "report.html").read_text()):  # fmt: skip
        assert cell in text
        assert note in " ".join(text.split())
    assert f"--probe {given.probe} --probe-data {root}" in found.commands[0]


def with_probes(ablations: Ablations, metric: str, means: list[float]) -> Ablations:
    def probed(mean: float) -> ProbeResult:
        figures = {"backbone": Figure(0.5, 0.01), "student": Figure(mean, 0.02)}
        return ProbeResult("f", "mine", "quick", metric, False, 3, figures)

    rows = [replace(item, probe=probed(mean)) for item, mean in zip(ablations.variants, means, strict=True)]
    return replace(ablations, variants=tuple(rows))


@pytest.mark.parametrize(
    ("metric", "cells", "best"),
    [
        ("miou", ["mIoU (%)", "50.00 +- 1.00", "61.25 +- 2.00", "40.00 +- 2.00"], 1),
        ("rmse_m", ["RMSE (m)", "0.5000 +- 0.0100", "0.6125 +- 0.0200", "0.4000 +- 0.0200"], 2),
    ],
)
def test_the_column_has_the_unit_and_the_best_by_its_direction(metric: str, cells: list[str], best: int) -> None:
    from test_benchmark_report import make_ablations

    made = make_ablations()
    plain = ablation_tables(made, "losses")[0]
    assert plain.columns[-1] == "image"
    two = replace(made, variants=made.variants[:2])
    table = ablation_tables(with_probes(two, metric, [0.6125, 0.4]), "losses")[0]
    assert [table.columns[-1], *(row[-1] for row in table.rows)] == cells
    assert [row[0] for row in table.rows] == ["bilinear", "l1", "all"]
    assert {row for row, column in table.best if column == 5} == {best}


def test_options_of_the_probe_that_do_not_go_together_are_refused() -> None:
    done = CliRunner().invoke(app, ["benchmark", "--probe", "camvid", "--probe-data", "x"])
    assert done.exit_code == 2
    assert "--probe and --probe-data: only with --ablate." in done.output
    message = "--probe-data is the labelled set of a probe: name its recipe with --probe."
    with pytest.raises(UsageError, match=message):
        AblationOptions("losses", probe_data=Path("x"))
    done = CliRunner().invoke(app, ["benchmark", "--ablate", "losses", "--probe", "camvit", "--dry-run"])
    assert done.exit_code == 2
    assert "Did you mean camvid?" in done.output
