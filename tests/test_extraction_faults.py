"""What brixel extract refuses, and what it lists and goes on."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import FIXTURES, Listener, every_row, make_photograph
from PIL import Image
from safetensors.torch import save_file
from test_inputs import odd_files
from typer.testing import CliRunner

import brixel_cli
from brixel_cli import load_student
from brixel_cli.app import app
from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.files import locked
from brixel_cli.core.student import read_adapter, save_student
from brixel_cli.data.checksums import CHECKSUM, CHECKSUMS
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.engines.models import FeatureExtractor
from brixel_cli.errors import BrixelError, UsageError, WeightsError


def test_another_model_size_or_folder_is_refused_by_name(
    extract_options, model, photographs: Path, tmp_path: Path, listener
):
    folder = tmp_path / "folder"
    shutil.copytree(photographs, folder)
    extract(extract_options(inputs=[str(folder)]), listener)

    def refused(**changes) -> str:
        with pytest.raises(UsageError) as caught:
            extract(extract_options(inputs=[str(folder)], **changes), listener)
        text = str(caught.value)
        assert "was begun with something else" in text
        assert "--overwrite to begin anew" in text
        return text

    text = refused(source="backbone")
    assert '--source: "student" -> "backbone"' in text
    assert re.search(r'--checkpoint, student.sha256: "[0-9a-f]+\.\.\. -> null', text)
    for option, value, line in (
        ("res", 96, "64 -> 96"),
        ("dtype", "float32", '"float16" -> "float32"'),
        ("fit", "stretch", '"short" -> "stretch"'),
    ):
        text = refused(**{option: value})
        assert f"--{option}: {line}" in text
        assert "changed" not in text
    other = Path(shutil.copytree(model[0], tmp_path / "other"))
    state = load_student(other).adapter.state_dict()
    state["out.1.bias"] += 1
    from brixel_cli.core.student import read_adapter

    save_student(other / "student.safetensors", state, read_adapter(str(other)).card)
    assert "--checkpoint, student.sha256: " in refused(checkpoint=str(other))
    os.utime(folder / "1.png", ns=(1, 1))  # another time, the same contents
    assert extract(extract_options(inputs=[str(folder)]), listener).num_before == 8
    edited = (folder / "2.png").read_bytes()
    times = (folder / "2.png").stat()
    (folder / "2.png").write_bytes(edited[:-1] + bytes([edited[-1] ^ 1]))  # another content, the same size and time
    os.utime(folder / "2.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "1 images have changed since: 2.png" in refused()
    make_photograph(folder / "new.png", 1)
    (folder / "0.png").unlink()
    text = refused()
    assert "1 images are new: new.png" in text
    assert "1 images are gone: 0.png" in text
    done = extract(extract_options(inputs=[str(folder)], overwrite=True), listener)
    assert "new.png" in every_row(done.output)


def test_overwrite_spares_what_is_not_ours(extract_options, tmp_path: Path, listener: Listener):
    (tmp_path / "out.h5").write_text("precious")
    with pytest.raises(UsageError, match="--overwrite replaces feature files only: name another --output, or delete"):
        extract(extract_options(overwrite=True), listener)
    assert (tmp_path / "out.h5").read_text() == "precious"
    with h5py.File(tmp_path / "out.h5", "w") as file:
        file["measurements"] = np.arange(9)
    with pytest.raises(UsageError, match="out.h5 is not a feature file of brixel.*\n--overwrite replaces"):
        extract(extract_options(overwrite=True), listener)
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["measurements"][8] == 8


def test_overwrite_leaves_no_map_of_an_image_that_has_gone(
    extract_options, mixed: Path, tmp_path: Path, listener: Listener
):
    output = tmp_path / "maps"
    extract(extract_options(inputs=[str(mixed)], output=output, storage="npy"), listener)
    (output / "mine.npy").write_text("precious")
    (mixed / "03.png").unlink()
    extract(extract_options(inputs=[str(mixed)], output=output, storage="safetensors", overwrite=True), listener)
    expected = {f"{number:02}.safetensors" for number in range(10) if number != 3} | {"mine.npy", "index.h5"}
    assert {path.name for path in output.iterdir()} == expected


def test_overwrite_keeps_what_is_there_until_the_model_is_loaded(extract_options, tmp_path: Path, listener: Listener):
    before = every_row(extract(extract_options(), listener).output)
    with pytest.raises(BrixelError, match="No backbone weights at"):
        extract(extract_options(overwrite=True, backbone_weights=str(tmp_path / "gone.safetensors")), listener)
    assert every_row(tmp_path / "out.h5") == before


def test_bad_images_are_listed_and_the_others_computed(
    extract_options, mixed: Path, tmp_path: Path, listener: Listener
):
    good = extract(extract_options(inputs=[str(mixed)], batch_size=4, output=tmp_path / "good.h5"), listener)
    reasons = odd_files(mixed)
    for number in range(30):
        data = (mixed / f"{number % 10:02}.png").read_bytes()
        (mixed / f"cut_{number:02}.png").write_bytes(data[: 40 + number * 50])
    done = extract(extract_options(inputs=[str(mixed)], batch_size=4), listener)
    assert set(done.failures) == set(reasons) | {f"cut_{number:02}.png" for number in range(30)}
    assert all(reasons[name] in done.failures[name] for name in reasons)
    features, expected = brixel_cli.FeatureFile(done.output), brixel_cli.FeatureFile(good.output)
    for name in expected.paths:
        np.testing.assert_allclose(features[name], expected[name], atol=2e-3)
    with pytest.raises(BrixelError, match=r"cut_00.png: .*\. Stopped before the first image .* because of --strict"):
        extract(extract_options(inputs=[str(mixed)], strict=True, output=tmp_path / "strict.h5"), listener)


def test_strict_stops_at_a_fault_found_late(extract_options, mixed: Path, listener: Listener):
    (mixed / "03.png").write_bytes((mixed / "03.png").read_bytes()[:-2000])
    with pytest.raises(
        BrixelError, match=r"03.png: .*truncated.* Stopped because of --strict; what was computed stays"
    ):
        extract(extract_options(inputs=[str(mixed)], strict=True), listener)


def test_nothing_usable_is_an_error(extract_options, tmp_path: Path, listener: Listener):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "text.jpg").write_text("text")
    with pytest.raises(BrixelError, match=r"None of the 1 images found can be used.\n  text.jpg: not an image"):
        extract(extract_options(inputs=[str(tmp_path / "bad")]), listener)


def test_memory_that_runs_out_halves_the_batch(extract_options, listener: Listener, tmp_path: Path, monkeypatch):
    expected = every_row(extract(extract_options(batch_size=8), listener).output)
    forward = FeatureExtractor._forward

    def tight(self, pixels):
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, pixels)

    monkeypatch.setattr(FeatureExtractor, "_forward", tight)
    done = extract(extract_options(batch_size=8, output=tmp_path / "tight.h5"), listener)
    assert "out of memory with 8 images at once; going on with 4" in listener.warned
    features = brixel_cli.FeatureFile(done.output)
    for name, row in expected.items():
        np.testing.assert_allclose(features[name].ravel(), np.frombuffer(row, np.float16).astype(np.float32), atol=4e-3)
    monkeypatch.setattr(FeatureExtractor, "_forward", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(BrixelError, match=r"Out of memory on cpu with a single image of 64x80 pixels. Lower --res"):
        extract(extract_options(output=tmp_path / "none.h5"), listener)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--input", "x", "--backbone", "test_vit"],
            "The student that comes with brixel is of vit_small_patch14_dinov2.lvd142m, not of test_vit. Name one",
        ),
        (
            ["--input", "x", "--checkpoint", str(FIXTURES / "official_layout_tiny.pth")],
            "does not say which backbone it belongs to (D = 64): give --backbone NAME",
        ),
        ([], "--input is missing: a folder, an image"),
        (["--input", "x", "--batch-size", "many"], "--batch-size must be auto or a number from 1 up, not many."),
        (
            ["--input", "x", "--batch-size", "1" * 5000],
            f"--batch-size must be auto or a number from 1 up, not {'1' * 40}.",
        ),
        (["--input", "x", "--res", "0"], "--res must be at least 1, not 0."),
        (["--input", "x", "--workers", "9" * 20], "--workers must be at most 1,000,000, not 1e+20."),
        (
            ["--input", "/", "--format", "npy", "--output", "/"],
            "--output / is the root of all folders: name a file or folder in it.",
        ),
        (
            ["--input", "x", "--res", "27", "--source", "backbone", "--backbone", "vit_small_patch14_dinov2"],
            "--res 27 is less than 2 patches of 14 pixels: give 28 or more.",
        ),
        (
            ["--input", "x", "--dtype", "int8", "--format", "npy"],
            "--dtype int8 stores a scale beside the map, which .npy",
        ),
        (
            ["--export", "x.onnx", "--dry-run"],
            "--export writes the model, not features: leave out --input, --shard and --dry-run",
        ),
        (["--export", "x.onnx", "--shard", "1/2"], "--export writes the model, not features: leave out"),
        (["--export", "x.onnx", "--input", "x"], "--export writes the model, not features: leave out --input"),
        (["--export", "x.txt", "--source", "backbone", "--backbone", "test_vit"], "the file must end in .onnx"),
        (
            ["--export", "x.onnx", "--source", "teacher", "--backbone", "test_vit"],
            "the teacher is the backbone at a larger",
        ),
    ],
)
def test_wrong_options_are_usage_errors(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # where there are no runs
    result = CliRunner().invoke(app, ["extract", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_plain_maps_come_from_the_weights_that_the_student_was_trained_on(
    extract_options, model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener: Listener
):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    save_file(load_backbone("test_vit", "random").vit.state_dict(), tmp_path / "other.safetensors")
    stored = read_adapter(model[0])
    card = dataclasses.replace(stored.card, backbone_weights=str(tmp_path / "other.safetensors"))
    (tmp_path / "runs" / "moved").mkdir(parents=True)
    save_student(tmp_path / "runs" / "moved" / "student.safetensors", stored.tensors, card)
    plain = {"source": "backbone", "checkpoint": "runs/moved", "backbone": None, "backbone_weights": None}
    with pytest.raises(WeightsError, match=r"other.safetensors\) are not those that runs/moved/.* was trained on"):
        extract(extract_options(**plain), listener)
    done = extract(extract_options(**plain | {"backbone_weights": model[1]}), listener)
    assert len(brixel_cli.FeatureFile(done.output)) > 0
    with pytest.raises(WeightsError, match="holds no student.safetensors"):
        extract(extract_options(checkpoint=""), listener)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_named_as_the_option(extract_options, listener: Listener):
    with pytest.raises(UsageError, match="--device is cuda, which this machine does not have; present: cpu"):
        extract(extract_options(device="cuda"), listener)


def old_format(path: Path) -> None:
    """Make a feature file into one that was written before there were digests and checksums in it."""
    with h5py.File(path, "r+") as file:
        del file["sha256"], file[CHECKSUM], file.attrs[CHECKSUMS]


def test_a_file_without_digests_is_continued_by_size_and_time(
    extract_options, photographs: Path, tmp_path: Path, listener: Listener
):
    folder = tmp_path / "folder"
    shutil.copytree(photographs, folder)
    done = extract(extract_options(inputs=[str(folder)]), listener)
    old_format(done.output)
    assert len(brixel_cli.FeatureFile(done.output).rows) == 8
    assert extract(extract_options(inputs=[str(folder)]), listener).num_before == 8
    os.utime(folder / "2.png", ns=(1, 1))
    with pytest.raises(UsageError, match="1 images have changed since: 2.png"):
        extract(extract_options(inputs=[str(folder)]), listener)


def test_a_dry_run_refuses_what_the_run_refuses(extract_options, listener: Listener, monkeypatch: pytest.MonkeyPatch):
    done = extract(extract_options(), listener)
    arguments = ["extract", "--input", *extract_options().inputs, "--checkpoint", extract_options().checkpoint,
                 "--output", str(done.output), "--precision", "float32", "--device", "cpu", "--dry-run", "--json"]  # fmt: skip
    same = CliRunner().invoke(app, [*arguments, "--res", "64"])
    assert (same.exit_code, json.loads(same.stdout)["images_left"]) == (0, 0)
    other = CliRunner().invoke(app, [*arguments, "--res", "96"])
    assert other.exit_code == 2
    assert "--res: 64 -> 96" in other.stderr
    assert json.loads(other.stdout)["images"] == 8  # the plan is shown all the same
    single = [*arguments[:-2], "--res", "64", "--format", "npy", "--output", str(done.output.with_suffix(""))]
    assert CliRunner().invoke(app, single).exit_code == 0
    with h5py.File(done.output.with_suffix("") / "index.h5", "r+") as file:
        file["status"][:4] = 0
    usage = shutil.disk_usage(done.output)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: usage._replace(free=64 * 16 * 20 * 2 * 4 - 1)
    )  # four maps, less 1
    for refused in (single, [*single, "--dry-run"]):
        result = CliRunner().invoke(app, refused)
        assert result.exit_code == 1
        assert "needs 160.0 KiB, but" in result.stderr


def test_two_extractions_do_not_write_one_output(extract_options, listener: Listener):
    with locked(extract_options().output), pytest.raises(BrixelError, match=r"out.h5 is being written by another"):
        extract(extract_options(), listener)
    assert not extract_options().output.exists()
    assert extract(extract_options(), listener).num_computed == 8
    assert not list(extract_options().output.parent.glob("*.lock"))


def test_outputs_of_the_wrong_kind_are_refused(extract_options, tmp_path: Path, listener: Listener):
    with pytest.raises(UsageError, match=r"is a folder; name a file, such as .*features.h5"):
        extract(extract_options(output=tmp_path), listener)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; --format npy writes a folder"):
        extract(extract_options(output=tmp_path / "file", storage="npy"), listener)


def test_a_full_disk_is_found_out_first(
    extract_options, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BrixelError, match=r"out.h5 needs .* has 1000 B free. Make room"):
        extract(extract_options(), listener)
    assert not (tmp_path / "out.h5").exists()
    chosen = extract_options()
    arguments = ["--input", *chosen.inputs, "--checkpoint", str(chosen.checkpoint), "--output", str(chosen.output)]
    planned = CliRunner().invoke(app, ["extract", *arguments, "--dry-run", "--json"])
    assert planned.exit_code == 1
    assert json.loads(planned.stdout)["bytes_free"] == 1000
    assert "has 1000 B free. Make room" in planned.stderr


def test_an_output_to_be_replaced_gives_up_its_room(
    extract_options, listener: Listener, monkeypatch: pytest.MonkeyPatch
):
    done = extract(extract_options(), listener)
    usage = shutil.disk_usage(done.output)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9 * (not done.output.exists())))
    assert extract(extract_options(), listener).num_before == 8
    assert extract(extract_options(overwrite=True), listener).num_computed == 8


@pytest.mark.parametrize(("storage", "preview"), [("npy", False), ("h5", True)])
def test_a_disk_that_fills_up_meanwhile_is_no_traceback(
    extract_options, listener, monkeypatch, storage: str, preview: bool
):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(BrixelError, match="cannot be written: No space left on device"):
        extract(extract_options(storage=storage, preview=preview), listener)
