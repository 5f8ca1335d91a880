"""The curve: the backbone at many inputs and students at theirs, towards one teacher."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from benchmarks import options
from conftest import Listener
from printed_json import checked
from typer.testing import CliRunner

from brixel_cli.app import app
from brixel_cli.cli.tables import curve_tables
from brixel_cli.config.benchmark import BenchmarkOptions
from brixel_cli.data.images import scan_folder, share_out
from brixel_cli.engines.benchmarking.curve import BACKBONE, Curve, measure_curve
from brixel_cli.engines.latency import Latency
from brixel_cli.errors import UsageError


@pytest.fixture
def domains(photographs: Path, tmp_path: Path) -> Path:
    """Three images of street, two of rooms."""
    for number in range(5):
        folder = tmp_path / "sets" / ("street" if number < 3 else "rooms")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photographs / f"{number}.png", folder)
    return tmp_path / "sets"


@pytest.fixture
def curve(run: Path, domains: Path, tmp_path: Path, listener: Listener) -> Curve:
    found, files = measure_curve(
        options(tmp_path / "out", highres=False, curve=True, checkpoint=str(run), sizes="32,48", images=domains),
        listener,
    )
    assert [path.name for path in files] == ["curve.json", "curve.svg"]
    return found


def test_backbone_and_students_go_towards_one_teacher(curve: Curve, tmp_path: Path) -> None:
    assert curve.teacher_size == (192, 192)  # four times 48 px
    inputs = [row.input_size[0] for row in curve.lines[BACKBONE]]
    # From 0.75 * 32 px to 192 px in nine equal ratios, rounded to the patch of 16 px, and the student's own 32 px.
    assert inputs == [32, 48, 64, 96, 112, 144, 192]
    assert [row.input_size for row in curve.lines["run"]] == [(32, 32), (48, 48)]
    assert {row.grid for row in curve.rows} == {(12, 12)}
    backbone = curve.lines[BACKBONE]
    assert backbone[-1].fidelity.cosine == pytest.approx(1, abs=1e-4)  # the teacher itself
    assert backbone[0].fidelity.recovered_gap["cosine"] == 0.0  # where the gap begins
    assert all(row.latency.median > 0 and row.gflop > 0 for row in curve.rows)
    assert backbone[0].gflop < curve.lines["run"][0].gflop < curve.lines["run"][1].gflop
    stored = json.loads((tmp_path / "out" / "curve.json").read_text())
    checked("benchmark-curve", json.dumps(stored | {"files": []}))
    assert len(stored["rows"]) == len(curve.rows)
    assert stored["num_images"] == 5
    assert (tmp_path / "out" / "curve.svg").read_text().count("cosine") == 2  # a panel for time, one for arithmetic


def test_domains_count_alike(curve: Curve) -> None:
    fidelity = curve.lines["run"][0].fidelity
    assert list(fidelity.domains) == ["rooms", "street", "mean"]
    of = {name: [i.cosine for i in fidelity.images if i.name.startswith(name)] for name in ("rooms", "street")}
    assert [len(values) for values in of.values()] == [2, 3]
    expected = (sum(of["rooms"]) / 2 + sum(of["street"]) / 3) / 2
    assert fidelity.mean_over_domains("cosine") == pytest.approx(expected)
    tables = curve_tables(curve)
    assert tables[2].columns == ("row", "input", "rooms", "street", "mean")
    assert len(tables[0].rows) == len(tables[2].rows) == len(curve.rows)
    assert [row[:2] for row in tables[1].rows] == [["run", "32x32"], ["run", "48x48"]]


def test_what_a_student_is_worth_by_hand(curve: Curve) -> None:
    def row(cosine: float, seconds: float, label: str):
        fidelity = dataclasses.replace(
            curve.rows[0].fidelity, images=(dataclasses.replace(curve.rows[0].fidelity.images[0], cosine=cosine),)
        )
        latency = Latency(seconds, seconds, seconds, 3)
        side = round(seconds * 100)
        return dataclasses.replace(
            curve.rows[0], label=label, latency=latency, fidelity=fidelity, input_size=(side, side)
        )

    student = row(0.75, 1.5, "student")
    rows = (
        row(0.5, 1.0, BACKBONE),
        row(0.7, 2.0, BACKBONE),
        row(0.8, 8.0, BACKBONE),
        student,
        row(0.4, 1.5, "student"),
    )
    made = dataclasses.replace(curve, rows=rows)
    # Half way from 0.7 to 0.8 the backbone takes 4 s, the geometric mean of 2 s and 8 s; the student 1.5 s.
    assert made.worth(student, lambda row: row.seconds) == pytest.approx(4 / 1.5)
    assert made.worth(rows[-1], lambda row: row.seconds) is None
    assert made.worth(student, lambda row: None if row is student else 1.0) is None


def test_few_images_are_shared_out_over_domains(domains: Path) -> None:
    images = scan_folder(domains, 1)[0]
    assert [image.name for image in share_out(images, 3)] == ["rooms/3.png", "rooms/4.png", "street/0.png"]
    assert [image.name for image in share_out(images, 4)] == [
        "rooms/3.png", "rooms/4.png", "street/0.png", "street/1.png",
    ]  # fmt: skip
    assert len(share_out(images, 9)) == 5
    alone = scan_folder(domains / "street", 1)[0]
    assert share_out(alone, 2) == alone[:2]


def test_the_command_draws_the_curve_and_refuses_what_it_does_not_do(
    run: Path, photographs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"--curve does without --compare-highres, --budget\."):
        BenchmarkOptions(curve=True, highres=True, budget="4GB")
    base = ["benchmark", "--curve", "--checkpoint", str(run), "--output", str(tmp_path / "out"), "--seconds", "0.1"]
    refused = CliRunner().invoke(app, [*base, "--dry-run"])
    assert refused.exit_code == 2
    assert "--curve measures, and draws a figure of its own: leave out --dry-run and --report." in refused.stderr
    done = CliRunner().invoke(app, [*base, "--images", str(photographs)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.stderr
    assert "in FLOP" in done.stdout
    assert "by folder of images" not in done.stdout
    untrained = CliRunner().invoke(app, ["benchmark", "--curve", "--models", "vits", "--images", str(photographs)])
    assert untrained.exit_code == 2
    assert "--curve needs a trained student and images: --checkpoint STUDENT --images DIR." in untrained.stderr
