"""What a benchmark counts, what it does not run for want of memory or time, and budgets."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks import options, row
from conftest import Listener

from brixel_cli.engines.benchmarking import benchmarking
from brixel_cli.engines.benchmarking.benchmarking import benchmark, count_only
from brixel_cli.engines.benchmarking.cost import (
    can_measure,
    count_rows,
    largest_sizes,
    peak_in_fresh_process,
)
from brixel_cli.engines.benchmarking.models import find_candidates

pytestmark = pytest.mark.usefixtures("quick_benchmark")


# What is kept, and what is not run


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
    (counted,) = (row for row in count_rows(candidate, (64, 64), True, 8) if row.label == "teacher")
    found = peak_in_fresh_process(candidate, counted, options(tmp_path, batch_size=8))
    assert found is not None
    assert counted.peak_bytes is not None
    assert 0.8 * counted.peak_bytes < found.peak_bytes < 6 * counted.peak_bytes
