"""The benchmark as a whole, with a tiny model: rows, fidelity, what is kept, what is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, Listener
from PIL import Image
from typer.testing import CliRunner

from brixel_cli.app import app
from brixel_cli.cli.tables import fidelity_tables
from brixel_cli.config.benchmark import BenchmarkOptions
from brixel_cli.config.files import load_recipe
from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.weights import save_tensors
from brixel_cli.engines.benchmarking import benchmarking
from brixel_cli.engines.benchmarking import cost as benchmark_cost
from brixel_cli.engines.benchmarking.benchmarking import benchmark, count_only
from brixel_cli.engines.benchmarking.cost import (
    PeakMemory,
    can_measure,
    count_rows,
    largest_sizes,
    peak_in_fresh_process,
)
from brixel_cli.engines.benchmarking.models import find_candidates
from brixel_cli.engines.benchmarking.results import Results, Row, read_results
from brixel_cli.engines.distilling.distillation import distill
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.errors import BrixelError, SizeError, UsageError

BASELINE = """
import torch.nn.functional as F

def nearest(images, feature_map, output_size):
    return F.interpolate(feature_map, output_size, mode="nearest")
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process for each row takes seconds: only the test of just that starts one."""
    monkeypatch.setattr(benchmarking, "peak_in_fresh_process", lambda *_: PeakMemory(1000, 10))
    monkeypatch.setattr(benchmark_cost, "LARGEST_SIDE", 512)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """A student that was trained, in float32, on a backbone whose weights are on disk."""
    folder = tmp_path_factory.mktemp("benchmarked")
    torch.manual_seed(3)
    save_tensors(folder / "vit.safetensors", load_backbone("test_vit", "random").vit.state_dict(), {})
    (folder / "tiny.yaml").write_text(TINY.replace("PHOTOS", str(photographs)))
    changes = [f"backbone.weights={folder / 'vit.safetensors'}", "run.precision=float32", "optim.lr=0.01"]
    distill(load_recipe(str(folder / "tiny.yaml"), changes), RunFolder(folder / "run"), Listener())
    return folder / "run"


def options(output: Path, **changes: Any) -> BenchmarkOptions:
    return BenchmarkOptions(**{"highres": True, "device": "cpu", "seconds": 0.3, "output": output, **changes})


def row(results: Results, label: str, side: int = 32) -> Row:
    return next(row for row in results.rows if row.label == label and row.size == (side, side))


# Rows


def test_rows_of_a_trained_student(run: Path, tmp_path: Path, listener: Listener) -> None:
    results, files = benchmark(options(tmp_path / "out", checkpoint=str(run)), listener)
    assert [row.label for row in results.rows] == ["backbone", "bilinear", "student", "teacher"]
    # test_vit: patch 16; 32 px against 128 px.
    assert [row.grid for row in results.rows] == [(2, 2), (8, 8), (8, 8), (8, 8)]
    assert [row.input_size for row in results.rows] == [(32, 32)] * 3 + [(128, 128)]
    student, teacher = row(results, "student"), row(results, "teacher")
    assert student.adapter_parameters > 0 == teacher.adapter_parameters
    assert student.weights_bytes == 4 * (student.frozen_parameters + student.adapter_parameters)
    assert row(results, "backbone").gflop < student.gflop < teacher.gflop
    assert all(row.latency.low <= row.latency.median <= row.latency.high for row in results.rows)
    assert all(row.memory == "measured" for row in results.rows)
    assert read_results(tmp_path / "out") == results
    assert all(file.is_file() for file in files)
    assert len(results.pictures) == 2  # two photographs are held out
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
    assert student.recovered_gap == pytest.approx(best["gap_closed"], rel=1e-3, abs=1e-4)
    assert row(results, "backbone").fidelity is row(results, "teacher").fidelity is None


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
    assert [row.label for row in results.rows] == ["backbone", "bilinear", "nearest", "student", "teacher"]
    nearest, bilinear = row(results, "nearest"), row(results, "bilinear")
    assert nearest.gflop == bilinear.gflop  # the backbone's pass is part of the row
    assert nearest.fidelity is not None
    assert bilinear.fidelity is not None
    assert nearest.fidelity.l1 != bilinear.fidelity.l1


def test_a_baseline_must_not_be_called_as_another_row(run: Path, tmp_path: Path, listener: Listener) -> None:
    (tmp_path / "mine.py").write_text(BASELINE.replace("nearest", "student"))
    with pytest.raises(UsageError, match="--baseline: two rows of one name among backbone, bilinear, student, teacher"):
        benchmark(options(tmp_path / "out", checkpoint=str(run), baselines=("mine.py:student",)), listener)


# Which models


def test_a_recipe_is_measured_for_cost_and_says_so(tmp_path: Path, photographs: Path, listener: Listener) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("PHOTOS", str(photographs)))
    results, _ = benchmark(options(tmp_path / "out", models="tiny.yaml"), listener)
    assert (results.models[0].weights, results.models[0].student) == ("random", None)
    assert all(row.latency and not row.fidelity for row in results.rows)
    assert "Random weights, on purpose, as only cost is measured: tiny." in results.notes


def test_weights_that_cannot_be_had_leave_the_cost(run: Path, tmp_path: Path, listener: Listener) -> None:
    other = tmp_path / "runs" / "copy"
    other.mkdir(parents=True)
    for name in ("student.safetensors", "recipe.yaml"):
        (other / name).write_bytes((run / name).read_bytes())
    recipe = (other / "recipe.yaml").read_text()
    stored = (other / "student.safetensors").read_bytes()
    weights = str(run.parent / "vit.safetensors")
    gone = weights[:-1] + "X"  # of the same length: the file's header stays sound
    (other / "recipe.yaml").write_text(recipe.replace(weights, gone))
    (other / "student.safetensors").write_bytes(stored.replace(weights.encode(), gone.encode()))
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(other)), listener)
    (warning,) = listener.warned
    assert warning.startswith("copy: cost only, with random weights.")
    assert "Give --backbone-weights PATH" in warning
    assert results.models[0].weights == "random"
    assert all(row.latency and not row.fidelity for row in results.rows)


def test_weights_that_were_named_must_do(run: Path, tmp_path: Path, listener: Listener) -> None:
    with pytest.raises(BrixelError, match="No backbone weights at absent.pth"):
        benchmark(options(tmp_path / "out", checkpoint=str(run), backbone_weights="absent.pth"), listener)


def test_two_models_of_one_name_are_refused(run: Path, tmp_path: Path, listener: Listener) -> None:
    with pytest.raises(UsageError, match="--models: two models are called run"):
        benchmark(options(tmp_path / "out", models=f"{run},{run}"), listener)


def test_models_that_name_none_are_refused(tmp_path: Path, listener: Listener) -> None:
    with pytest.raises(UsageError, match="--models names no recipe and no run folder: ' ,'"):
        benchmark(options(tmp_path / "out", models=" ,"), listener)


def test_a_run_is_called_by_its_folder_from_within_too(
    run: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(run)
    (candidate,) = find_candidates(options(tmp_path, checkpoint="."), listener)
    assert candidate.name == run.name


def test_a_size_that_does_not_fit_names_those_that_do(run: Path, tmp_path: Path, listener: Listener) -> None:
    with pytest.raises(SizeError, match="Nearest that fit: height 32 or 48"):
        benchmark(options(tmp_path / "out", checkpoint=str(run), sizes="40"), listener)
    assert not (tmp_path / "out").exists()


# What is kept, and what is not run


def test_a_damaged_photograph_is_not_among_those_compared(run: Path, tmp_path: Path, listener: Listener) -> None:
    (tmp_path / "photos").mkdir()
    for name, colour in (("one", "red"), ("two", "blue")):
        Image.new("RGB", (128, 128), colour).save(tmp_path / "photos" / f"{name}.png")
    damaged = tmp_path / "photos" / "two.png"
    damaged.write_bytes(damaged.read_bytes()[:60])  # the header is sound
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), images=Path("photos")), listener)
    (model,) = results.models
    figures, _ = fidelity_tables(results, model, (32, 32))
    assert figures.title.endswith(": 1 images of photos")


def test_what_was_measured_is_taken_up_again(run: Path, tmp_path: Path, listener: Listener) -> None:
    first, _ = benchmark(options(tmp_path / "out", checkpoint=str(run)), listener)
    second, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), sizes="32,48"), listener)
    assert [row for row in second.rows if row.size == (32, 32)] == list(first.rows)
    assert len(second.rows) == 8
    assert "run at 32x32 px: measured before; --overwrite measures anew" in listener.said
    third, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), overwrite=True), listener)
    assert third.rows != first.rows  # no two measurements of time are equal


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"precision": "bfloat16"}])
def test_other_settings_are_measured_anew(
    run: Path, tmp_path: Path, listener: Listener, change: dict[str, Any]
) -> None:
    first, _ = benchmark(options(tmp_path / "out", checkpoint=str(run)), listener)
    second, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), **change), listener)
    assert any("of another machine or other settings: everything is measured anew" in text for text in listener.said)
    assert row(first, "teacher").latency != row(second, "teacher").latency


@pytest.mark.parametrize("changed", ["photograph", "weights", "baseline"])
def test_what_changed_on_disk_is_measured_anew(tmp_path: Path, run: Path, listener: Listener, changed: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "tiny.yaml").write_text(TINY.replace("PHOTOS", "photos"))
    (tmp_path / "mine.py").write_text(BASELINE)
    (tmp_path / "vit.safetensors").write_bytes((run.parent / "vit.safetensors").read_bytes())
    Image.new("RGB", (128, 128), "red").save(tmp_path / "photos" / "one.png")
    wanted = options(
        tmp_path / "out", models="tiny.yaml", backbone_weights="vit.safetensors", images=Path("photos"),
        baselines=("mine.py:nearest",), highres=False,
    )  # fmt: skip
    first, _ = benchmark(wanted, listener)
    assert benchmark(wanted, listener)[0].rows == first.rows
    if changed == "photograph":
        Image.new("RGB", (128, 128), "blue").save(tmp_path / "photos" / "one.png")
    elif changed == "weights":
        save_tensors(tmp_path / "vit.safetensors", load_backbone("test_vit", "random").vit.state_dict(), {})
    else:
        (tmp_path / "mine.py").write_text(BASELINE.replace('mode="nearest"', 'mode="bicubic"'))
    second, _ = benchmark(wanted, listener)
    assert row(second, "nearest").latency != row(first, "nearest").latency
    assert row(second, "nearest").fidelity != row(first, "nearest").fidelity


def test_precision_is_of_the_arithmetic_and_the_recipe_says_how_weights_are_held(
    run: Path, tmp_path: Path, listener: Listener
) -> None:
    wide, _ = benchmark(options(tmp_path / "wide", checkpoint=str(run)), listener)
    half, _ = benchmark(options(tmp_path / "half", checkpoint=str(run), precision="bfloat16"), listener)
    assert (wide.environment.precision, half.environment.precision) == ("float32", "bfloat16")
    assert row(wide, "student").weights_bytes == row(half, "student").weights_bytes
    exact, rounded = row(wide, "student").fidelity, row(half, "student").fidelity
    assert exact is not None
    assert rounded is not None
    assert exact.cosine == pytest.approx(rounded.cosine, abs=0.02)
    assert exact.cosine != rounded.cosine
    (tmp_path / "copy").mkdir()
    for name in ("student.safetensors", "recipe.yaml"):
        (tmp_path / "copy" / name).write_bytes((run / name).read_bytes())
    recipe = (run / "recipe.yaml").read_text().replace("dtype: float32", "dtype: bfloat16")
    (tmp_path / "copy" / "recipe.yaml").write_text(recipe)
    held = count_only(options(tmp_path / "out", checkpoint=str(tmp_path / "copy")), listener)
    assert 2 * row(held, "student").weights_bytes == row(wide, "student").weights_bytes


def test_what_does_not_fit_into_memory_is_counted(
    run: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 10_000

    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory)
    monkeypatch.setattr(Memory, "total", 10_000, raising=False)
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(run)), listener)
    for found in results.rows:
        assert found.latency is found.fidelity is None
        assert found.memory == "counted"
        assert found.note.startswith("not run: its weights need ")
        assert found.gflop is not None


def test_what_did_not_fit_is_run_once_there_is_memory(
    run: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SimpleNamespace(available=10_000, total=10**12)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    wanted = options(tmp_path / "out", checkpoint=str(run), max_images=1)
    benchmark(wanted, listener)
    assert benchmark(wanted, listener)[0].rows[0].latency is None
    assert "run at 32x32 px: measured before; --overwrite measures anew" in listener.said
    memory.available = 10**12
    assert all(found.latency for found in benchmark(wanted, listener)[0].rows)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine that takes a second for each 32x32 px: the teacher 16 s. The batches' numbers of pixels are kept."""
    seen: list[int] = []

    def seconds(call: Any, _: object) -> float:
        images = call.args[-1]
        seen.append(images.numel() // 3)
        return images.numel() / (3 * 32 * 32)

    monkeypatch.setattr(benchmarking, "call_seconds", seconds)
    return seen


TOO_SLOW = "not run: about 16 s a call, measured; --seconds 19 runs it"


@pytest.mark.parametrize("highres", [True, False])
def test_without_time_for_the_teacher_there_is_no_fidelity_and_a_note(
    run: Path, tmp_path: Path, listener: Listener, slow: list[int], highres: bool
) -> None:
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), seconds=5.0, highres=highres), listener)
    student = row(results, "student")
    assert student.latency is not None
    assert all(found.fidelity is None for found in results.rows)
    assert student.note == f"no fidelity: teacher {TOO_SLOW}"
    if highres:
        teacher = row(results, "teacher")
        assert (teacher.note, teacher.latency) == (TOO_SLOW, None)
        assert f"run teacher 32x32: {TOO_SLOW}" in results.notes


def test_a_teacher_that_is_faster_than_its_flop_let_expect_is_run(
    run: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The backbone takes a second, for a fraction of the teacher's FLOP; the teacher takes no longer.
    monkeypatch.setattr(benchmarking, "call_seconds", lambda *_: 1.0)
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), seconds=5.0), listener)
    teacher, backbone = row(results, "teacher"), row(results, "backbone")
    assert teacher.gflop is not None
    assert backbone.gflop is not None
    assert teacher.gflop / backbone.gflop > 5
    assert (teacher.note, row(results, "student").note) == ("", "")
    assert teacher.latency is not None
    assert row(results, "student").fidelity is not None


def test_what_is_hopeless_is_not_even_tried(run: Path, tmp_path: Path, listener: Listener, slow: list[int]) -> None:
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), seconds=1.1), listener)
    assert re.match(r"not run: about 1\d s a call, by its FLOP; --seconds ", row(results, "teacher").note)
    assert max(slow) == 32 * 32


def test_a_slow_batch_of_the_teacher_leaves_the_fidelity(
    run: Path, tmp_path: Path, listener: Listener, slow: list[int]
) -> None:
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), seconds=50.0, batch_size=16), listener)
    assert row(results, "teacher").note.startswith("not run: about 256 s a call, measured; ")
    assert row(results, "student").fidelity is not None  # its photographs come one by one


def test_a_row_that_runs_out_of_memory_says_what_to_change(
    run: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(call: Any, _: object) -> float:
        if call.args[-1].shape[-1] == 128:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return 0.01

    monkeypatch.setattr(benchmarking, "call_seconds", seconds)
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(run)), listener)
    note = "not run: out of memory. Give a smaller --res or --batch-size, or --precision bfloat16"
    assert (row(results, "teacher").note, row(results, "teacher").latency) == (note, None)
    assert row(results, "student").latency is not None
    assert row(results, "student").note == f"no fidelity: teacher {note}"


def test_each_size_is_compiled_afresh(
    run: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def compiled(call: Any, **_: Any) -> Any:
        done.append("compile")
        return call

    monkeypatch.setattr("torch.compile", compiled)
    monkeypatch.setattr("torch.compiler.reset", lambda: done.append("reset"))
    changes = {"highres": False, "sizes": "32,48", "compiled": True, "max_images": 1}
    benchmark(options(tmp_path / "out", checkpoint=str(run), **changes), listener)
    assert done == ["reset", *["compile"] * 3] * 2


# Counts and budgets


def test_a_dry_run_counts_and_writes_nothing(run: Path, tmp_path: Path, listener: Listener) -> None:
    results = count_only(options(tmp_path / "out", checkpoint=str(run), budget="1MB"), listener)
    assert [row.memory for row in results.rows] == ["counted"] * 4
    assert not (tmp_path / "out").exists()
    assert results.budget


def test_peak_memory_counts_the_batch_and_flop_one_image(run: Path, tmp_path: Path, listener: Listener) -> None:
    (candidate,) = find_candidates(options(tmp_path, checkpoint=str(run)), listener)
    one, four = (count_rows(candidate, (32, 32), True, batch_size=size) for size in (1, 4))
    assert [row.gflop for row in one] == [row.gflop for row in four]
    assert all(few.peak_bytes < many.peak_bytes for few, many in zip(one, four, strict=True))  # type: ignore[operator]


def test_the_largest_size_fits_and_the_next_does_not(run: Path, tmp_path: Path, listener: Listener) -> None:
    (candidate,) = find_candidates(options(tmp_path, checkpoint=str(run)), listener)
    budget = 8_000_000
    student, teacher = largest_sizes(candidate, ["student", "teacher"], budget, batch_size=1)
    for found in (student, teacher):
        assert found.fits
        assert found.largest
        side = found.size[0]
        rows = [count_rows(candidate, (s, s), True, 1) for s in (side, side + 16)]
        fitting, next_one = (next(row for row in of if row.label == found.label) for of in rows)
        assert found.total_bytes == fitting.total_bytes <= budget < (next_one.total_bytes or 0)
    assert student.size > teacher.size
    assert largest_sizes(candidate, ["student"], 1000, batch_size=1) == []


def test_a_budget_is_answered_row_by_row(run: Path, tmp_path: Path, listener: Listener) -> None:
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), budget="8MB"), listener)
    listed = {answer.label: answer for answer in results.budget if not answer.largest}
    assert listed["student"].total_bytes == row(results, "student").total_bytes
    assert listed["student"].memory == "measured"
    assert [answer.label for answer in results.budget if answer.largest] == ["student", "teacher"]


@pytest.mark.skipif(not can_measure(torch.device("cpu")), reason="the system tells no peak of a process's memory")
def test_peak_memory_of_a_fresh_process(run: Path, tmp_path: Path, listener: Listener) -> None:
    (candidate,) = find_candidates(options(tmp_path, checkpoint=str(run)), listener)
    # 8 images of 256x256 px at the teacher's size are 24 MiB, of which the teacher makes patches, tokens and so on.
    found = peak_in_fresh_process(candidate, (64, 64), "teacher", options(tmp_path, batch_size=8))
    assert found is not None
    (counted,) = (row for row in count_rows(candidate, (64, 64), True, 8) if row.label == "teacher")
    assert counted.peak_bytes is not None
    assert 0.8 * counted.peak_bytes < found.peak_bytes < 6 * counted.peak_bytes


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
    (line,) = out.splitlines()
    assert [row["label"] for row in json.loads(line)["rows"]] == ["backbone", "bilinear", "student"]


def test_wrong_options_are_exit_code_2() -> None:
    code, _, err = invoke(["--sizes", "wide"])
    assert code == 2
    assert re.match(r"error: --res takes a side", err)
