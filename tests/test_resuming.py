"""Runs that are stopped, killed, resumed or begun anew."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Listener, with_changes
from distilled_runs import assert_same_run, recipe_of, tensors_of

from brixel_cli.config.distill import Recipe
from brixel_cli.data.row_store import Store
from brixel_cli.engines.distilling.distillation import distill
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.engines.distilling.trainer import (
    Trainer,
)
from brixel_cli.errors import BrixelError, UsageError


@pytest.mark.parametrize("changes", [(), ("adapter.kind=deformable",), ("views.kind=fixed", "views.per_image=2", "cache.enabled=true"),
                                     ("views.kind=random", "optim.accumulate=2")])  # fmt: skip
def test_two_steps_a_stop_and_two_more_equal_four(
    tiny_recipe_file: Path,
    tmp_path: Path,
    changes: tuple[str, ...],
    listener: Listener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = with_changes(tiny_recipe_file, *changes)
    distill(recipe, RunFolder(tmp_path / "whole"), listener)

    class Stop(Exception):
        pass

    def stop_after_two(self: Trainer, *arguments: object, **named: object) -> object:
        if self.step == 2:
            raise Stop
        return original(self, *arguments, **named)

    original = Trainer.update
    monkeypatch.setattr(Trainer, "update", stop_after_two)
    with pytest.raises(Stop):
        distill(recipe, RunFolder(tmp_path / "parts"), listener)
    monkeypatch.setattr(Trainer, "update", original)
    distill(recipe, RunFolder(tmp_path / "parts"), listener, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(
    tiny_recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_recipe_file.write_text(tiny_recipe_file.read_text().replace("steps: 4", "steps: 12"))
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "brixel_cli", "distill", "--recipe", str(tiny_recipe_file), "--quiet", "--output"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    command.append(str(folder))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.03)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "state.safetensors").exists()
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert_same_run(tmp_path / "whole", folder)


def test_resuming_a_finished_run_changes_nothing(tiny_recipe: Recipe, tmp_path: Path, listener: Listener) -> None:
    first = distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = distill(tiny_recipe, RunFolder(tmp_path / "run"), listener, resume=True)
    assert again.results == first.results
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_files_of_earlier_versions_call_the_recovered_gap_otherwise(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = with_changes(tiny_recipe_file, "optim.steps=3"), RunFolder(tmp_path / "run")
    first = distill(recipe, folder, listener)
    tensors, facts = folder.load_state() or ({}, {})
    facts["best"]["gap_closed"] = facts["best"].pop("recovered_gap")
    folder.save_state(tensors, facts)
    assert distill(recipe, folder, listener, resume=True).results == first.results
    assert "gap_closed" not in folder.results.read_text()


def test_a_run_is_neither_overwritten_nor_mixed_by_accident(
    tiny_recipe: Recipe, tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UsageError, match=r"holds no run to resume: recipe.yaml is missing"):
        distill(tiny_recipe, folder, listener, resume=True)
    distill(tiny_recipe, folder, listener)
    with pytest.raises(
        UsageError, match=r"holds a run already. Continue it with --resume, begin anew with --overwrite"
    ):
        distill(tiny_recipe, folder, listener)
    other = with_changes(tiny_recipe_file, "optim.lr=2e-3", "run.log_every=5")
    with pytest.raises(UsageError, match=r"was begun with another recipe:\n  optim.lr: 0.001 -> 0.002\n"):
        distill(other, folder, listener, resume=True)
    text = folder.recipe.read_text()
    folder.recipe.write_text("".join(line for line in text.splitlines(True) if "map_noise" not in line))
    with pytest.raises(
        UsageError, match=r"another version of brixel, which had no optim.map_noise: say in .*recipe.yaml"
    ):
        distill(tiny_recipe, folder, listener, resume=True)
    assert distill(other, folder, listener, overwrite=True).results.steps == 4


def test_a_run_interrupted_while_its_cache_is_filled_can_be_resumed(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("views.kind=fixed", "views.per_image=2", "cache.enabled=true")
    recipe, folder = with_changes(tiny_recipe_file, *changes), RunFolder(tmp_path / "run")
    written: list[int] = []
    original = Store.write

    def write(self: Store, row: int, values: object) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(row)
        original(self, row, values)

    monkeypatch.setattr(Store, "write", write)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, folder, listener)
    assert listener.said[-1] == f"continue this run with: brixel distill --resume --output {tmp_path / 'run'}"
    monkeypatch.setattr(Store, "write", original)
    assert distill(recipe_of(tmp_path / "run"), folder, listener, resume=True).results.steps == 4


def test_a_cache_that_does_not_fit_on_the_disk_leaves_the_run_that_was_there(
    tiny_recipe: Recipe, tiny_recipe_file: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    before = tensors_of(tmp_path / "run", "student.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 10))
    cached = with_changes(tiny_recipe_file, "cache.enabled=true", "views.kind=fixed")
    with pytest.raises(BrixelError, match="has 10 B free"):
        distill(cached, RunFolder(tmp_path / "run"), listener, overwrite=True)
    assert recipe_of(tmp_path / "run") == tiny_recipe
    assert tensors_of(tmp_path / "run", "student.safetensors").keys() == before.keys()


def test_a_run_cannot_be_made_longer_and_says_how_to_train_on(
    tiny_recipe: Recipe, tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    longer = with_changes(tiny_recipe_file, "optim.steps=8")
    with pytest.raises(
        UsageError, match=r"length of the run in .*run cannot be changed \(optim.steps: 4 -> 8\).*--init .*run "
    ):
        distill(longer, RunFolder(tmp_path / "run"), listener, resume=True)
