"""Runs that are stopped, killed, resumed or begun anew."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest
from conftest import Listener, stopped_writing, with_changes
from distilled_runs import assert_stop_changes_nothing, recipe_of, tensors_of
from printed_json import checked
from typer.testing import CliRunner

from brixel_cli.app import app
from brixel_cli.config.distill import Recipe
from brixel_cli.data.checksums import CHECKSUM
from brixel_cli.data.row_store import Store
from brixel_cli.engines.distilling.distillation import distill
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.engines.distilling.validation import HeldOut
from brixel_cli.errors import BrixelError, UsageError, WeightsError


@pytest.mark.parametrize("changes", [(), ("adapter.kind=deformable",), ("views.kind=fixed", "views.per_image=2", "cache.enabled=true"),
                                     ("views.kind=random", "optim.accumulate=2")])  # fmt: skip
def test_two_steps_a_stop_and_two_more_equal_four(
    tiny_recipe_file: Path,
    tmp_path: Path,
    changes: tuple[str, ...],
    listener: Listener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stop(Exception):
        pass

    assert_stop_changes_nothing(with_changes(tiny_recipe_file, *changes), tmp_path, listener, monkeypatch, Stop)


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


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_are_not_a_runs_are_neither_replaced_nor_deleted(
    tiny_recipe: Recipe, tmp_path: Path, listener: Listener, overwrite: bool
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "results.json").write_text('{"format": "brixel-probe-1"}')
    with pytest.raises(UsageError, match=r"holds results.json, but no recipe.yaml of a run: brixel does not replace"):
        distill(tiny_recipe, RunFolder(mine), listener, overwrite=overwrite)
    assert [path.name for path in mine.iterdir()] == ["results.json"]


def test_a_run_interrupted_while_its_cache_is_filled_can_be_resumed(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("views.kind=fixed", "views.per_image=2", "cache.enabled=true")
    recipe, folder = with_changes(tiny_recipe_file, *changes), RunFolder(tmp_path / "run")
    with stopped_writing(monkeypatch, Store, 7), pytest.raises(KeyboardInterrupt):
        distill(recipe, folder, listener)
    assert listener.said[-1] == f"continue this run with: brixel distill --resume --output {tmp_path / 'run'}"
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


# Damaged files


def flip(path: Path, at: int = -1) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_of_the_state_is_not_resumed_from(
    tiny_recipe: Recipe, tmp_path: Path, listener: Listener
) -> None:
    distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    flip(tmp_path / "run" / "state.safetensors")
    with pytest.raises(
        WeightsError, match=r"state.safetensors is damaged.*cannot be resumed.*--overwrite, or train its last .*--init"
    ):
        distill(tiny_recipe, RunFolder(tmp_path / "run"), listener, resume=True)


@pytest.mark.parametrize("damage", ["cut", "flipped", "deleted"])
def test_damaged_students_of_a_finished_run_are_written_again(
    tiny_recipe: Recipe, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(HeldOut, "better_than", lambda *_: True)  # the last one is the best
    folder = RunFolder(tmp_path / "run")
    distill(tiny_recipe, folder, listener)
    before = {path: path.read_bytes() for path in (folder.student, folder.last)}
    for path, content in before.items():
        if damage == "cut":
            path.write_bytes(content[:-1])
        elif damage == "flipped":
            flip(path)
        else:
            path.unlink()
    distill(tiny_recipe, folder, listener, resume=True)
    assert {path: path.read_bytes() for path in before} == before
    assert [line.rpartition("/")[2] for line in listener.warned] == [
        f"{name}.safetensors was missing or damaged, and was written again" for name in ("last", "student")
    ]


def test_a_damaged_student_that_the_state_has_no_more_is_named(
    tiny_recipe: Recipe, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeldOut, "better_than", lambda _, other: other is None)  # the first one is the best
    folder = RunFolder(tmp_path / "run")
    distill(tiny_recipe, folder, listener)
    folder.student.unlink()
    with pytest.raises(
        WeightsError,
        match=r"best student of the run, of step 2, cannot be read: .* Put a copy back to .*of step 4, .*last",
    ):
        distill(tiny_recipe, folder, listener, resume=True)


def test_damaged_lines_of_the_metrics_do_not_end_a_run(tiny_recipe: Recipe, tmp_path: Path, listener: Listener) -> None:
    folder = RunFolder(tmp_path / "run")
    distill(tiny_recipe, folder, listener)
    lines = folder.metrics.read_bytes().splitlines(keepends=True)
    odd = [b"\xff" + lines[1], b'["step"]\n', b'{"step": null}\n', b"[" * 99_999 + b"\n", b"7\n"]
    folder.metrics.write_bytes(b"".join([lines[0], *odd, *lines[2:], b'{"step": 5}\n', b'{"cut off']))
    distill(tiny_recipe, folder, listener, resume=True)
    assert folder.metrics.read_bytes().splitlines(keepends=True) == [lines[0], *lines[2:]]
    assert listener.warned == [f"{folder.metrics}: 5 damaged lines were left out"]


def verified(folder: Path) -> tuple[int, dict[str, Any], str]:
    result = CliRunner().invoke(app, ["distill", "--verify", str(folder), "--json"])
    return result.exit_code, checked("distill-verify", result.stdout), result.stderr


def test_verify_names_every_damaged_file_of_a_run(tiny_recipe_file: Path, tmp_path: Path, listener: Listener) -> None:
    recipe = with_changes(tiny_recipe_file, "views.kind=fixed", "views.per_image=1", "cache.enabled=true")
    folder = tmp_path / "run"
    distill(recipe, RunFolder(folder), listener)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert verified(folder) == (0, {"path": str(folder), "files": len(files), "damaged": {}}, "")
    for path in files:
        whole = path.read_bytes()
        flip(path, 0 if path.suffix in (".yaml", ".h5", ".jsonl") else len(whole) // 2)
        code, found, errors = verified(folder)
        assert code == 1
        assert list(found["damaged"]) == [str(path.relative_to(folder))]
        assert f"error: 1 of {len(files)} files in {folder} are damaged. brixel distill --resume" in errors
        path.write_bytes(whole)
    (folder / "last.safetensors").unlink()
    assert verified(folder)[1]["damaged"] == {"last.safetensors": "it is missing"}
    (folder / "recipe.yaml").unlink()
    result = CliRunner().invoke(app, ["distill", "--verify", str(folder)])
    assert result.exit_code == 2
    assert "holds no run: recipe.yaml is missing" in result.stderr


@pytest.mark.parametrize(
    ("dataset", "byte"),
    [("images/128x128", 0), ("maps/128x128", 7), ("targets/128x128", 0), ("photograph", 0), ("photograph", 3)],
)
def test_a_flipped_bit_of_the_cache_is_noticed_and_that_view_computed_again(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener, dataset: str, byte: int
) -> None:
    recipe = with_changes(tiny_recipe_file, "views.kind=centre", "cache.enabled=true")
    distill(recipe, RunFolder(tmp_path / "whole"), listener)
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(tmp_path / "whole" / "cache", tmp_path / "run" / "cache")
    (cache,) = (tmp_path / "run" / "cache").glob("*.h5")
    before = cache.read_bytes()
    with h5py.File(cache) as file:
        at = file[dataset].id.get_offset() + byte
    flip(cache, at)
    with pytest.raises(BrixelError, match=r"the cached view 0 has changed since it was written.*Go on with --resume"):
        distill(recipe, folder, listener)
    distill(recipe, folder, listener, resume=True)
    assert cache.read_bytes() == before
    assert folder.student.read_bytes() == (tmp_path / "whole" / "student.safetensors").read_bytes()


def test_a_cache_of_earlier_versions_has_no_checksums(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    recipe = with_changes(tiny_recipe_file, "views.kind=centre", "cache.enabled=true")
    distill(recipe, RunFolder(tmp_path / "whole"), listener)
    shutil.copytree(tmp_path / "whole" / "cache", tmp_path / "run" / "cache")
    (cache,) = (tmp_path / "run" / "cache").glob("*.h5")
    with h5py.File(cache, "r+") as file:
        del file[CHECKSUM]
    before = cache.read_bytes()
    distill(recipe, RunFolder(tmp_path / "run"), listener)
    assert cache.read_bytes() == before
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == (
        tmp_path / "whole" / "student.safetensors"
    ).read_bytes()
