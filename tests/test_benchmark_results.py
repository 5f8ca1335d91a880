"""What a benchmark found out: ratios by hand, curves, and the way to disk and back."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from brixel_cli.engines.benchmarking.environment import Environment
from brixel_cli.engines.benchmarking.results import (
    Fidelity,
    ImageFidelity,
    Kind,
    Model,
    Results,
    Row,
    Settings,
    read_results,
)
from brixel_cli.engines.latency import Latency
from brixel_cli.errors import BrixelError

IMAGES = (
    ImageFidelity("good.png", l1=0.1, cosine=0.9, cosine_p5=0.8, edge=0.2, spectral=0.3),
    ImageFidelity("bad.png", l1=0.5, cosine=0.4, cosine_p5=0.1, edge=0.6, spectral=0.7),
)
FIDELITY = Fidelity(0.3, 0.65, 0.2, 0.4, 0.4, 0.5, {"l1": 0.5, "cosine": None}, IMAGES)


def row(kind: Kind, side: int, seconds: float | None, gflop: float, peak: int, fidelity: Fidelity | None = None) -> Row:
    latency = Latency(seconds, seconds, 2 * seconds, 5) if seconds else None
    return Row(
        "tiny", kind, kind, (side, side), (side, side), (2, 2), 100, 10, gflop, ("aten.fft",), 400, peak,
        "measured", None, latency, fidelity,
    )  # fmt: skip


@pytest.fixture
def results() -> Results:
    return Results(
        command="brixel benchmark",
        created="2026-01-01T00:00:00+00:00",
        environment=Environment("cpu", "a processor", 2, 10**9, "float32", "Linux", {"torch": "2"}),
        settings=Settings(True, 2, False, 20.0, 64, (), None),
        models=(Model("tiny", "test_vit", "w", None, "", "fusion", "float32", 64, 16, 4, None, None, 0),),
        rows=(
            row("student", 32, 0.5, 2.0, 100, FIDELITY),
            row("teacher", 32, 4.0, 32.0, 900),
            row("student", 16, 0.1, 1.0, 50),
        ),
    )


def test_ratios_to_the_teacher_of_the_same_size(results: Results) -> None:
    student, teacher, small = results.rows
    ratios = results.ratios(student)
    assert (ratios.faster, ratios.less_flop, ratios.less_memory) == (4.0 / 0.5, 32.0 / 2.0, 900 / 100)
    assert results.ratios(teacher).faster == 1.0
    assert results.ratios(small).faster is None
    assert results.images_per_second(student) == 2 / 0.5


def test_measured_and_counted_memory_are_not_compared(results: Results) -> None:
    student, teacher, _ = results.rows
    mixed = replace(results, rows=(replace(student, memory="counted"), teacher))
    assert mixed.ratios(mixed.rows[0]).less_memory is None


def test_a_row_that_was_not_run_has_no_ratio(results: Results) -> None:
    student, teacher, _ = results.rows
    partly = replace(results, rows=(student, replace(teacher, latency=None)))
    assert partly.ratios(student).faster is None
    assert partly.ratios(student).less_flop == 16.0


def test_curves_run_over_sizes(results: Results) -> None:
    (rows,) = results.curves(results.models[0])
    assert [(row.label, row.size, row.seconds) for row in rows] == [
        ("student", (16, 16), 0.1), ("student", (32, 32), 0.5),
    ]  # fmt: skip


def test_worst_photographs_come_first() -> None:
    assert [image.name for image in FIDELITY.worst_images] == ["bad.png", "good.png"]


def test_results_come_back_from_disk_as_they_were(results: Results, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(results.to_json())
    assert read_results(tmp_path) == results


def test_results_of_earlier_versions_are_read(results: Results, tmp_path: Path) -> None:
    old = json.loads(results.to_json())
    for entry in old["rows"]:
        entry |= {"formula_gflop": 2.0, "counted_vit_gflop": 2.0}
        if entry["fidelity"]:
            entry["fidelity"]["gap_closed"] = entry["fidelity"].pop("recovered_gap")
    del old["environment"]["tf32"]
    (tmp_path / "results.json").write_text(json.dumps(old))
    assert read_results(tmp_path) == results


def test_the_csv_has_a_line_for_each_row(results: Results) -> None:
    lines = list(csv.DictReader(io.StringIO(results.to_csv())))
    assert [(line["row"], line["size"]) for line in lines] == [
        ("student", "32x32"), ("teacher", "32x32"), ("student", "16x16"),
    ]  # fmt: skip
    assert lines[0]["times_faster"] == "8.0"
    assert lines[0]["seconds_q90"] == "1.0"
    assert (lines[0]["recovered_gap_l1"], lines[0]["recovered_gap_cosine"]) == ("0.5", "")


def test_what_is_no_benchmark_is_refused(results: Results, tmp_path: Path) -> None:
    with pytest.raises(BrixelError, match="No results of brixel benchmark at .*results.json: No such file"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(BrixelError, match="holds no results of this version of brixel benchmark"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(json.loads(results.to_json()) | {"format": "brixel-benchmark-0"}))
    with pytest.raises(BrixelError, match="is of format brixel-benchmark-0, not brixel-benchmark-1"):
        read_results(tmp_path)
