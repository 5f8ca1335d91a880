"""The benchmark as a whole, with a tiny model: rows, fidelity, the command."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from benchmarks import BASELINE, options, row
from conftest import Listener
from printed_json import checked
from test_feature_page import page_data
from typer.testing import CliRunner

import brixel_cli
from brixel_cli.app import app
from brixel_cli.engines import equal_cost
from brixel_cli.engines.benchmarking import benchmarking
from brixel_cli.engines.benchmarking.benchmarking import benchmark
from brixel_cli.engines.benchmarking.results import read_results
from brixel_cli.engines.equal_cost import EQUAL_COST, choose_rival, enlarged_map, equal_cost_size, find_rivals
from brixel_cli.engines.latency import Latency
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import UsageError

pytestmark = pytest.mark.usefixtures("quick_benchmark")


# Rows


def test_rows_of_a_trained_student(run: Path, tmp_path: Path, listener: Listener) -> None:
    results, files = benchmark(options(tmp_path / "out", checkpoint=str(run)), listener)
    assert [row.label for row in results.rows] == ["backbone", "bilinear", EQUAL_COST, "student", "teacher"]
    # test_vit: patch 16; 32 px against 128 px.
    assert [row.grid for row in results.rows] == [(2, 2), (8, 8), (8, 8), (8, 8), (8, 8)]
    assert [row.input_size for row in results.rows if row.kind != "equal_cost"] == [(32, 32)] * 3 + [(128, 128)]
    student, teacher = row(results, "student"), row(results, "teacher")
    assert student.adapter_parameters > 0 == teacher.adapter_parameters
    assert student.weights_bytes == 4 * (student.frozen_parameters + student.adapter_parameters)
    assert row(results, "backbone").gflop < student.gflop < teacher.gflop
    assert all(row.latency.low <= row.latency.median <= row.latency.high for row in results.rows)
    assert all(row.memory == "measured" for row in results.rows)
    assert read_results(tmp_path / "out") == results
    assert all(file.is_file() for file in files)
    assert len(results.pictures) == 2  # two photographs are held out
    page = page_data((tmp_path / "out" / results.pictures[0].page).read_text())
    assert page["sources"] == ["backbone", EQUAL_COST, "student", "teacher"]
    assert [image["name"].split(",")[0] for image in page["images"]] == [picture.image for picture in results.pictures]
    assert results.models[0].num_images == 2


def test_fidelity_is_that_of_the_run_itself(run: Path, tmp_path: Path, listener: Listener) -> None:
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(run)), listener)
    best = json.loads((run / "results.json").read_text())["best"]
    for label, of_run in (("bilinear", "backbone"), ("student", "student")):
        fidelity = row(results, label).fidelity
        assert fidelity is not None
        for name, value in best[of_run].items():
            assert getattr(fidelity, name) == pytest.approx(value, rel=1e-4), (label, name)
        assert fidelity.cosine_worst == min(image.cosine for image in fidelity.images) <= fidelity.cosine
        assert fidelity.cosine_p5 <= fidelity.cosine
    student = row(results, "student").fidelity
    assert student is not None
    assert student.recovered_gap == pytest.approx(best["recovered_gap"], rel=1e-3, abs=1e-4)
    assert row(results, "backbone").fidelity is row(results, "teacher").fidelity is None


def test_the_rival_at_equal_cost_sees_a_larger_input_and_takes_no_longer(
    run: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {(32, 32): 1.0, (48, 48): 2.0, (64, 64): 3.0, (80, 80): 9.0}

    def timed(calls, *rest, **options):
        found = {label: seconds.get(tuple(call.args[0].shape[-2:]), 50.0) for label, call in calls.items()}
        return {label: Latency.of([2.9 if label == "student" else value] * 3) for label, value in found.items()}

    monkeypatch.setattr(benchmarking, "interleaved", timed)
    monkeypatch.setattr(benchmarking, "find_rivals", lambda *_: list(seconds))
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(run)), listener)
    rival, bilinear, student = (row(results, label) for label in (EQUAL_COST, "bilinear", "student"))
    assert (rival.input_size, rival.grid, rival.kind) == ((48, 48), (8, 8), "equal_cost")
    assert rival.latency.median <= student.latency.median
    assert bilinear.gflop < rival.gflop
    assert rival.memory == "measured"
    assert rival.fidelity.cosine != bilinear.fidelity.cosine
    again, _ = benchmark(options(tmp_path / "out", checkpoint=str(run)), listener)
    assert "measured before" in listener.said[-1]
    assert again.rows == results.rows
    # Results of a version without that row are measured anew.
    kept = dataclasses.replace(results, rows=tuple(row for row in results.rows if row.kind != "equal_cost"))
    (tmp_path / "out" / "results.json").write_text(kept.to_json())
    assert row(benchmark(options(tmp_path / "out", checkpoint=str(run)), listener)[0], EQUAL_COST).kind == "equal_cost"


def test_rivals_keep_the_proportions_and_end_at_the_teachers_input(
    model: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = brixel_cli.load_student(model[0])
    runtime = Runtime("cpu", "float32")
    assert equal_cost_size(student, (32, 32), runtime, seconds=0.01)[0] in range(32, 129, 16)
    monkeypatch.setattr(equal_cost, "call_seconds", lambda *_: 1.0)
    rivals = find_rivals(student, (32, 64), runtime)
    assert rivals == [(16 * n, 32 * n) for n in range(2, 9)]
    assert enlarged_map(student, (32, 64))(torch.randn(1, 3, 80, 160)).shape == (1, 64, 8, 16)
    times = {size: Latency.of([float(number)] * 3) for number, size in enumerate(rivals, start=1)}
    assert choose_rival(rivals, times, 3.5) == (64, 128)
    assert choose_rival(rivals, times, 0.5) == (32, 64)  # nothing is as fast: the student's own input
    seconds = iter([1.0] * 6 + [1.2] * 3 + [1.3] * 3)  # student, then 48, 64 and 80 px
    monkeypatch.setattr(equal_cost, "call_seconds", lambda *_: next(seconds))
    assert find_rivals(student, (32, 32), runtime) == [(32, 32), (48, 48), (64, 64)]


def test_without_the_teacher_there_is_no_row_of_it_but_fidelity(run: Path, tmp_path: Path, listener: Listener) -> None:
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), highres=False), listener)
    assert [row.label for row in results.rows] == ["backbone", "bilinear", "student"]
    assert row(results, "student").fidelity is not None
    assert results.ratios(row(results, "student")).faster is None


def test_sizes_give_curves_on_the_same_photographs(run: Path, tmp_path: Path, listener: Listener) -> None:
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), sizes="32,48x64"), listener)
    curves = {rows[0].label: rows for rows in results.curves(results.models[0])}
    assert [row.size for row in curves["student"]] == [(32, 32), (48, 64)]
    names = [[image.name for image in row.fidelity.images] for row in curves["student"] if row.fidelity]
    assert names[0] == names[1]
    assert curves["teacher"][1].input_size == (192, 256)


def test_a_function_from_elsewhere_is_a_row(run: Path, tmp_path: Path, listener: Listener) -> None:
    (tmp_path / "mine.py").write_text(BASELINE)
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), baselines=("mine.py:nearest",)), listener)
    assert [row.label for row in results.rows] == ["backbone", "bilinear", "nearest", EQUAL_COST, "student", "teacher"]
    nearest, bilinear = row(results, "nearest"), row(results, "bilinear")
    assert nearest.gflop == bilinear.gflop  # the backbone's pass is part of the row
    assert nearest.fidelity is not None
    assert bilinear.fidelity is not None
    assert nearest.fidelity.l1 != bilinear.fidelity.l1


def test_a_baseline_must_not_be_called_as_another_row(run: Path, tmp_path: Path, listener: Listener) -> None:
    (tmp_path / "mine.py").write_text(BASELINE.replace("nearest", "student"))
    with pytest.raises(UsageError, match="--baseline: two rows of one name among backbone, bilinear, student, teacher"):
        benchmark(options(tmp_path / "out", checkpoint=str(run), baselines=("mine.py:student",)), listener)


# The command


def invoke(arguments: Sequence[str]) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["benchmark", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_the_table_and_names_its_files(run: Path, tmp_path: Path) -> None:
    code, out, err = invoke(["--compare-highres", "--checkpoint", str(run), "--seconds", "0.3", "--output", "out"])
    assert code == 0, err
    for text in (
        "images/s",
        "teacher",
        "2 images of",
        "recovered gap",
        "a multiply-add is 2",
    ):
        assert text in out
    named = [Path(line.removeprefix("wrote ")) for line in out.splitlines() if line.startswith("wrote ")]
    assert [path.name for path in named[:2]] == ["results.json", "results.csv"]
    assert all(path.is_file() for path in named)


def test_the_command_as_json_is_one_line(run: Path, tmp_path: Path) -> None:
    code, out, _ = invoke(["--checkpoint", str(run), "--dry-run", "--json", "--quiet"])
    assert code == 0
    assert [row["label"] for row in checked("benchmark", out)["rows"]] == ["backbone", "bilinear", "student"]


def test_wrong_options_are_exit_code_2() -> None:
    code, _, err = invoke(["--sizes", "wide"])
    assert code == 2
    assert re.match(r"error: --res takes a side", err)
