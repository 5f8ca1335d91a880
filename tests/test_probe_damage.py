"""What a probe does with damaged files of its own, and with masks that are void."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import Listener
from PIL import Image
from printed_json import checked
from probe_sets import make_options, make_set, noise, one_hot, results, write_features
from typer.testing import CliRunner

from brixel_cli.app import app
from brixel_cli.data.checksums import CHECKSUM
from brixel_cli.engines.probing.probing import plan_only, probe
from brixel_cli.errors import BrixelError

FAST = ["protocol.steps=4", "protocol.points=64"]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("damage") / "set")


def figures_of(folder: Path) -> list[object]:
    return [(run["source"], run["seed"], run["figures"], run["final_loss"]) for run in results(folder)["runs"]]


def test_what_is_damaged_of_a_probe_is_named_and_made_again(
    root: Path, tmp_path: Path, model, listener: Listener
) -> None:
    out = tmp_path / "out"
    options = make_options(root, out, checkpoints=[model[0]], overrides=FAST, seeds=2)
    probe(options, listener)
    before = {path: path.read_bytes() for folder in ("heads", "curves", "images") for path in (out / folder).iterdir()}
    files = [path for path in out.rglob("*") if path.is_file() and "features" not in path.parts]

    def verified() -> tuple[int, dict[str, str], str]:
        result = CliRunner().invoke(app, ["probe", "--verify", str(out), "--json"])
        return result.exit_code, checked("distill-verify", result.stdout)["damaged"], result.stderr

    assert verified() == (0, {}, "")
    figures_before = figures_of(out)
    heads = sorted((out / "heads").iterdir())
    heads[0].write_bytes(before[heads[0]][:-1])
    flipped = bytearray(before[heads[1]])
    flipped[-1] ^= 1
    heads[1].write_bytes(flipped)
    heads[2].unlink()
    curve = out / "curves" / "student_seed1.jsonl"
    curve.write_bytes(b"\xff" + before[curve])
    images = out / "images" / "teacher_seed0.csv"
    images.write_text("nothing")
    (out / "pictures" / "segmentation_best.png").write_bytes(b"")
    (out / "curves.png").unlink()
    page = (out / "features.html").read_bytes()
    (out / "features.html").write_bytes(page[:-9])
    (out / "results.csv").write_text("source,seed\n")
    code, damaged, errors = verified()
    assert code == 1
    assert f"error: 9 of {len(files)} files in {out} are damaged. Give the command that wrote it again" in errors
    assert set(damaged) == {
        *(f"heads/{path.name}" for path in heads[:3]), "curves/student_seed1.jsonl", "images/teacher_seed0.csv",
        "pictures/segmentation_best.png", "curves.png", "results.csv", "features.html",
    }  # fmt: skip
    probe(options, listener)
    assert verified() == (0, {}, "")
    assert {path: path.read_bytes() for path in before} == before
    assert figures_of(out) == figures_before
    assert sum("is missing or damaged; it is made again" in line for line in listener.warned) == 5


def test_results_without_their_keys_are_named(root: Path, tmp_path: Path, listener: Listener) -> None:
    answers = write_features(tmp_path / "answers.h5", root, one_hot(root, "labels", 3))
    options = make_options(root, tmp_path / "out", sources=[str(answers)], overrides=FAST)
    probe(options, listener)
    whole = results(tmp_path / "out")
    optional = {"recovered_gap", "share_of_gap_closed", "gap_spread", "costs"}  # earlier versions lack some
    for key in set(whole) - optional:
        (tmp_path / "out" / "results.json").write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        with pytest.raises(BrixelError, match=r"results.json cannot be read: .* Give --overwrite to begin anew"):
            probe(options, listener)
    (tmp_path / "out" / "results.json").write_text("[" * 99_999)
    result = CliRunner().invoke(app, ["probe", "--verify", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "results.json cannot be read" in result.stderr


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_without_a_pixel_that_counts_are_an_error(
    root: Path, tmp_path: Path, listener: Listener, split: str
) -> None:
    void = Path(shutil.copytree(root, tmp_path / "set"))
    for path in (void / "labels" / split).iterdir():
        Image.fromarray(np.full((48, 64), 255, np.uint8)).save(path)
    features = write_features(tmp_path / "void.h5", void, noise(3))
    what = "training" if split == "train" else "evaluation"
    with pytest.raises(BrixelError, match=rf"None of the \d images of the {what} has a pixel that counts: .*255"):
        probe(make_options(void, tmp_path / "out", sources=[str(features)], overrides=FAST), listener)


def test_stored_rows_that_have_changed_are_made_again(root: Path, tmp_path: Path, model, listener: Listener) -> None:
    options = make_options(root, tmp_path / "out", checkpoints=[model[0]], sources=["student"], overrides=FAST)
    probe(options, listener)
    figures_before = figures_of(tmp_path / "out")
    item = plan_only(options, listener).sources[0]
    paths = [item.train.targets.path, item.evaluate.maps.path]
    wholes = [path.read_bytes() for path in paths]
    for path, name in zip(paths, ("segmentation", "features"), strict=True):
        with h5py.File(path, "r+") as file:
            stored = file[name] if isinstance(file[name], h5py.Dataset) else next(iter(file[name].values()))
            stored[1] = np.roll(stored[1], 1)
    probe(dataclasses.replace(options, overwrite=True), listener)
    assert [path.read_bytes() for path in paths] == wholes
    assert figures_of(tmp_path / "out") == figures_before
    for path in paths:
        assert f"{path}: 1 rows have changed since they were written; they are computed again" in listener.warned
    curve = tmp_path / "out" / "curves" / "student_seed0.jsonl"
    before = curve.read_bytes()
    curve.write_bytes(before.replace(b'"step": ', b'"step": true, "at": ', 1))
    assert curve.read_bytes() != before
    probe(options, listener)
    assert curve.read_bytes() == before


@pytest.mark.parametrize("split", ["train", "evaluate"])
def test_a_stored_label_beyond_the_classes_is_an_error_that_names_the_file(
    root: Path, tmp_path: Path, answers: str, listener: Listener, split: str
) -> None:
    options = make_options(root, tmp_path / "out", sources=[answers], overrides=FAST)
    probe(options, listener)
    item = plan_only(options, listener).sources[0]
    path = getattr(item, split).targets.path
    whole = path.read_bytes()
    with h5py.File(path, "r+") as file:
        labels = next(iter(file["segmentation"].values()))
        labels[1, 5, 5] = 77
        del file[CHECKSUM]  # as an older version wrote it: else the row would be made again
    with pytest.raises(BrixelError) as caught:
        probe(dataclasses.replace(options, overwrite=True), listener)
    assert f"{path} is damaged: its row 1 has labels beyond the 3 classes. Delete the file" in str(caught.value)
    path.unlink()
    probe(dataclasses.replace(options, overwrite=True), listener)
    assert path.read_bytes() == whole
