"""Several processes under torchrun, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import TWO_RANKS

from brixel_cli.core.weights import load_tensors


def distil_with(processes: int, recipe: Path, output: Path, *changes: str) -> dict[str, object]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    start = [sys.executable] if processes == 1 else [*launcher, "--standalone"]
    overrides = [part for change in changes for part in ("--set", change)]
    command = [
        *start,
        "-m",
        "brixel_cli",
        "distill",
        "--recipe",
        str(recipe),
        "--output",
        str(output),
        "--json",
        *overrides,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("changes", [
    ("run.precision=float32",),
    ("run.precision=float32", "views.kind=fixed", "views.per_image=2", "cache.enabled=true", "optim.accumulate=2"),
])  # fmt: skip
def test_two_processes_give_the_validation_of_one(
    tiny_recipe_file: Path, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    one = distil_with(1, tiny_recipe_file, tmp_path / "one", *changes)
    two = distil_with(2, tiny_recipe_file, tmp_path / "two", *changes)
    for name, value in one["best"]["student"].items():
        assert two["best"]["student"][name] == pytest.approx(value, abs=1e-4, rel=1e-4)
    assert one["best"]["backbone"] == pytest.approx(two["best"]["backbone"], rel=1e-6)
    assert two["best"]["student"] != two["best"]["backbone"]
    figures = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(figures[0]) == len(figures[1])
    for single, double in zip(*figures, strict=True):
        if single["kind"] == "train":
            assert double["loss"] == pytest.approx(single["loss"], abs=1e-4)
    left, right = (load_tensors(tmp_path / name / "last.safetensors")[0] for name in ("one", "two"))
    assert left.keys() == right.keys()


def test_a_fault_is_told_once(tiny_recipe_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, *TWO_RANKS, "-m", "brixel_cli",
               "distill", "--recipe", str(tiny_recipe_file), "--set", "optim.batch_size=3", "--output", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode != 0
    assert done.stderr.count("error: optim.batch_size 3 cannot be shared out over 2 processes") == 1


@pytest.mark.parametrize("killed", [0, 1])
def test_the_process_that_was_killed_is_named_with_the_way_to_go_on(
    killed: int, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = [sys.executable, *TWO_RANKS, "-m", "brixel_cli", "distill", "--recipe", str(tiny_recipe_file),
               "--set", "optim.steps=100000", "--set", "run.validate_every=100000", "--output", str(output)]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as launcher:
        try:
            while launcher.poll() is None and not (output / "state.safetensors").exists():
                time.sleep(0.05)
            ranks = {
                child.environ()["RANK"]: child
                for child in psutil.Process(launcher.pid).children()
                if "RANK" in child.environ()
            }
            ranks[str(killed)].kill()
            _, errors = launcher.communicate(timeout=120)
        finally:
            launcher.kill()
    assert launcher.returncode != 0
    expected = f"error: Process {killed} of the 2 of this run has gone: killed, or it failed. What was saved stays;"
    assert f"{'[process 1] ' if killed == 0 else ''}{expected}" in errors
    assert f"torchrun --standalone --nproc-per-node 2 -m brixel_cli distill --resume --output {output}" in errors
    assert "brixel_cli/" not in errors  # no traceback of ours
