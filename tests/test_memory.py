"""What a process can take of memory, and what is refused or bounded because it would take more."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Listener, with_changes
from typer.testing import CliRunner

from brixel_cli.app import app
from brixel_cli.core import memory
from brixel_cli.core.memory import main_memory
from brixel_cli.engines import memory as memory_of_batches
from brixel_cli.engines.distilling import batches, distillation
from brixel_cli.engines.distilling import plan as plan_of_distilling
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.engines.extracting.extraction import extract, rehearse
from brixel_cli.engines.extracting.plan import make_plan
from brixel_cli.engines.memory import check_batch
from brixel_cli.engines.models import FeatureExtractor, model_spec
from brixel_cli.engines.runtime import Runtime
from brixel_cli.engines.streams import num_workers
from brixel_cli.errors import BrixelError


def test_the_least_of_machine_container_and_ulimit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    assert main_memory() == 1000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert main_memory() == 1000
    (tmp_path / "memory.max").write_text("800\n")
    assert main_memory() == 250  # 800 - 700 + 150
    before = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (10**6, before[1]))
    assert main_memory() == 0  # more is mapped already


@pytest.mark.parametrize("name", ["student", "backbone", "teacher"])
def test_the_largest_batch_is_counted_and_refused(
    name: str, model: tuple[str, str], listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = model_spec(name, checkpoint=model[0])  # type: ignore[arg-type]
    extractor = FeatureExtractor(spec, Runtime("cpu", "float32"), listener)
    check_batch(extractor, {(64, 64): 9}, None)
    assert listener.said == []  # little
    check_batch(extractor, {(64, 64): 9, (640, 1024): 9}, 2)
    assert listener.said[0].startswith("A batch of 2 images of 640x1024 pixels: ")
    monkeypatch.setattr(memory_of_batches, "free_memory", lambda device: 10**6)
    with pytest.raises(BrixelError) as caught:
        check_batch(extractor, {(64, 64): 9, (640, 1024): 9}, 2)
    assert "A batch of 2 images of 640x1024 pixels needs about" in str(caught.value)
    assert " and 976.6 KiB are free. Lower --batch-size or --res, or take a machine with more." in str(caught.value)
    with pytest.raises(
        BrixelError, match=r"A batch of 1 image of 20000x20000 pixels needs .* free. Lower --res, or take"
    ):
        check_batch(extractor, {(20000, 20000): 9}, None)


def test_what_is_counted_is_what_is_taken(
    model: tuple[str, str], listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = FeatureExtractor(model_spec("student", checkpoint=model[0]), Runtime("cpu", "float32"), listener)
    needed: list[int] = []
    monkeypatch.setattr(memory_of_batches, "check_memory", lambda number, *_: needed.append(number))
    check_batch(extractor, {(1024, 1024): 9}, 1)
    with torch.profiler.profile(profile_memory=True) as profile:
        maps = extractor.maps(torch.zeros(1, 3, 1024, 1024, dtype=torch.uint8))
    alive = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    on_the_way = memory_of_batches.MAPS_ON_THE_WAY * maps.numel() * 4
    assert 0.8 * peak < needed[0] - on_the_way < 1.6 * peak


@pytest.mark.parametrize("dry", [False, True])
def test_extract_refuses_what_cannot_fit_before_it_starts(
    dry: bool, extract_options: Callable, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_of_batches, "CPU_BATCH_PIXELS", 0)
    monkeypatch.setattr(memory_of_batches, "free_memory", lambda device: 1000)
    options = extract_options()
    with pytest.raises(BrixelError, match="A batch of 8 images of 64x80 pixels needs about .* Lower --res"):
        rehearse(make_plan(options, listener), listener) if dry else extract(options, listener)
    assert not (tmp_path / "out.h5").exists()
    if not dry:
        assert listener.said[0].startswith("8 images, 0 of them unusable; grids 16x20 (8)")
        assert listener.said[-1].startswith("A batch of ")


def test_the_command_prints_the_figures_and_then_the_reason(
    model: tuple[str, str], photographs: Path, tmp_path: Path
) -> None:
    arguments = ["extract", "--input", str(photographs / "0.png"), "--checkpoint", model[0], "--res", "20000",
                 "--device", "cpu", "--output", str(tmp_path / "out.h5"), "--dry-run", "--json"]  # fmt: skip
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 1
    assert json.loads(found.stdout)["grids"] == {"5000x6252": 1}
    assert "error: " in found.stderr
    assert not (tmp_path / "out.h5").exists()


def test_workers_are_bounded_by_the_cores(
    extract_options: Callable, tiny_recipe_file: Path, tmp_path: Path, listener: Listener, monkeypatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    assert num_workers(1000) == 12
    assert num_workers(12) == 12
    runtime = Runtime("cpu")
    assert batches.num_workers(1000, runtime) == 12
    runtime.world_size = 4
    assert batches.num_workers(1000, runtime) == 3
    extract(extract_options(workers=13), listener)
    assert listener.warned == ["--workers 13 is too many for 3 cores: 12 are started"]
    many = with_changes(tiny_recipe_file, "run.workers=1000", "optim.steps=1")
    warning = "run.workers 1000 is too many for 3 cores: 12 are started"
    plan_of_distilling.plan(many, listener)
    assert warning in listener.warned
    listener.warned.clear()
    monkeypatch.setattr(batches, "num_workers", lambda asked, runtime: 0)
    distillation.distill(many, RunFolder(tmp_path / "run"), listener)
    assert warning in listener.warned
