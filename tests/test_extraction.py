"""brixel extract from end to end: what is written, what is refused, and what survives kills and damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import Listener, make_photograph
from PIL import Image
from test_inputs import odd_files
from typer.testing import CliRunner

import brixel_cli
from brixel_cli.app import app
from brixel_cli.core.student import load_student, save_student
from brixel_cli.data.views import normalise
from brixel_cli.engines.extraction import extract
from brixel_cli.engines.extraction_model import ExtractionModel
from brixel_cli.errors import BrixelError, UsageError
from brixel_cli.extract_options import ExtractOptions


@pytest.fixture
def options(model: tuple[str, str], photographs: Path, tmp_path: Path):
    def make(**changes) -> ExtractOptions:
        values = {
            "inputs": [str(photographs)],
            "res": 64,
            "checkpoint": model[0],
            "device": "cpu",
            "precision": "float32",
            "output": tmp_path / "out.h5",
        }
        return ExtractOptions(**values | changes)

    return make


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Ten photographs of three shapes."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(10):
        make_photograph(folder / f"{number:02}.png", number, *[(96, 96), (128, 96), (96, 160)][number % 3])
    return folder


def every_row(path: Path) -> dict[str, bytes]:
    features = brixel_cli.FeatureFile(path)
    return {
        features.paths[row]: b"".join(array.tobytes() for array in features.stored(row).values())
        for row in features.rows
    }


def differing(expected: dict[str, bytes], found: dict[str, bytes]) -> dict[str, float]:
    """Rows of float16 that differ, and by how much."""
    pairs = {name: [np.frombuffer(rows[name], np.float16) for rows in (expected, found)] for name in found}
    return {name: float(np.abs(a - b).max()) for name, (a, b) in pairs.items() if a.tobytes() != b.tobytes()}


@pytest.mark.parametrize("source", ["student", "backbone", "teacher"])
def test_rows_are_what_the_model_says(options, model, photographs: Path, listener: Listener, source: str):
    done = extract(options(source=source, dtype="float32", fit="centre", batch_size=3), listener)
    features = brixel_cli.FeatureFile(done.output)
    side = 256 if source == "teacher" else 64
    image = Image.open(photographs / "3.png").convert("RGB")
    from brixel_cli.data.views import centre_view

    student = load_student(model[0])
    pixels = normalise(centre_view(image, (side, side)), student.backbone.mean, student.backbone.std)[None]
    expected = (student if source == "student" else student.backbone)(pixels)[0].detach().numpy()
    assert features["3.png"].shape == expected.shape == (64, *([4, 4] if source == "backbone" else [16, 16]))
    np.testing.assert_allclose(features["3.png"], expected, atol=1e-4)
    assert done.num_computed == 8
    assert features.model_size[0].tolist() == [side, side]


def test_the_file_says_what_its_numbers_are(options, mixed: Path, listener: Listener):
    done = extract(options(inputs=[str(mixed)]), listener)
    with h5py.File(done.output) as file:
        description = json.loads(file.attrs["description"])
        assert file.attrs["format"] == "brixel-features-1"
        assert sorted(file["features"]) == ["16x16", "16x20", "28x16"]
        assert file["original_size"][1].tolist() == [96, 128]
        assert file["model_size"][1].tolist() == [64, 80]
        assert file["grid_size"][1].tolist() == [16, 20]
    assert description["backbone"] == "test_vit"
    assert len(description["backbone_sha256"]) == len(description["student"]["sha256"]) == 64
    assert description["student"]["step"] == 7
    assert description["student"]["adapter"]["kind"] == "fusion"
    assert {"brixel", "torch", "timm"} <= set(description["versions"])
    assert len(description["mean"]) == 3
    assert any("10 images, 0 of them unusable; grids 16x16 (4)" in said for said in listener.said)
    assert any("needed" in said and "free" in said for said in listener.said)
    assert any("sizes were rounded to multiples of the patch, 16 pixels" in said for said in listener.said)


def test_a_row_does_not_depend_on_its_company(options, mixed: Path, tmp_path: Path, listener: Listener):
    whole = extract(options(inputs=[str(mixed)], batch_size=4), listener)
    (mixed / "03.png").write_bytes((mixed / "03.png").read_bytes()[:-2000])  # the header stays, the pixels do not
    again = extract(options(inputs=[str(mixed)], batch_size=4, output=tmp_path / "b.h5"), listener)
    first, second = every_row(whole.output), every_row(again.output)
    assert set(first) - set(second) == {"03.png"}
    assert all(first[name] == row for name, row in second.items())
    assert "truncated" in again.failures["03.png"]


def test_resuming_computes_only_what_is_missing(options, listener: Listener, monkeypatch: pytest.MonkeyPatch):
    done = extract(options(batch_size=3), listener)
    before = every_row(done.output)
    with h5py.File(done.output, "r+") as file:
        for row in (1, 6):
            file["status"][row] = 0
            file["features"][row] = 0
    seen = []
    maps = ExtractionModel.maps
    monkeypatch.setattr(ExtractionModel, "maps", lambda self, pixels: seen.append(len(pixels)) or maps(self, pixels))
    again = extract(options(), listener)  # the batch size is the file's
    assert (again.num_computed, again.num_before, seen) == (2, 6, [3, 2])
    assert every_row(done.output) == before


def test_another_model_size_or_folder_is_refused_by_name(options, model, photographs: Path, tmp_path: Path, listener):
    folder = tmp_path / "folder"
    shutil.copytree(photographs, folder)
    extract(options(inputs=[str(folder)]), listener)

    def refused(**changes) -> str:
        with pytest.raises(UsageError) as caught:
            extract(options(inputs=[str(folder)], **changes), listener)
        text = str(caught.value)
        assert "was begun with something else" in text
        assert "--overwrite to begin anew" in text
        return text

    assert "source: file student, now backbone" in refused(source="backbone")
    assert "res: file 64, now 96" in refused(res=96)
    assert "dtype: file float16, now float32" in refused(dtype="float32")
    assert "fit: file short, now stretch" in refused(fit="stretch")
    other = Path(shutil.copytree(model[0], tmp_path / "other"))
    state = load_student(other).adapter.state_dict()
    state["out.bias"] += 1
    from brixel_cli.core.student import read_adapter

    save_student(other / "student.safetensors", state, read_adapter(str(other)).card)
    assert "student.sha256: file " in refused(checkpoint=str(other))
    os.utime(folder / "2.png", ns=(1, 1))
    assert "1 images have changed since: 2.png" in refused()
    make_photograph(folder / "new.png", 1)
    (folder / "0.png").unlink()
    text = refused()
    assert "1 images are new: new.png" in text
    assert "1 images are gone: 0.png" in text
    done = extract(options(inputs=[str(folder)], overwrite=True), listener)
    assert "new.png" in every_row(done.output)


def test_overwrite_spares_what_is_not_ours(options, tmp_path: Path, listener: Listener):
    (tmp_path / "out.h5").write_text("precious")
    with pytest.raises(UsageError, match="is no HDF5 file; --overwrite replaces feature files only"):
        extract(options(overwrite=True), listener)
    assert (tmp_path / "out.h5").read_text() == "precious"


def test_bad_images_are_listed_and_the_others_computed(options, mixed: Path, tmp_path: Path, listener: Listener):
    good = extract(options(inputs=[str(mixed)], batch_size=4, output=tmp_path / "good.h5"), listener)
    reasons = odd_files(mixed)
    for number in range(30):
        data = (mixed / f"{number % 10:02}.png").read_bytes()
        (mixed / f"cut_{number:02}.png").write_bytes(data[: 40 + number * 50])
    done = extract(options(inputs=[str(mixed)], batch_size=4), listener)
    assert set(done.failures) == set(reasons) | {f"cut_{number:02}.png" for number in range(30)}
    assert all(reasons[name] in done.failures[name] for name in reasons)
    features, expected = brixel_cli.FeatureFile(done.output), brixel_cli.FeatureFile(good.output)
    for name in expected.paths:
        np.testing.assert_allclose(features[name], expected[name], atol=2e-3)
    with pytest.raises(BrixelError, match=r"cut_00.png: .*\. Stopped before the first image .* because of --strict"):
        extract(options(inputs=[str(mixed)], strict=True, output=tmp_path / "strict.h5"), listener)


def test_strict_stops_at_a_fault_found_late(options, mixed: Path, listener: Listener):
    (mixed / "03.png").write_bytes((mixed / "03.png").read_bytes()[:-2000])
    with pytest.raises(
        BrixelError, match=r"03.png: .*truncated.* Stopped because of --strict; what was computed stays"
    ):
        extract(options(inputs=[str(mixed)], strict=True), listener)


def test_nothing_usable_is_an_error(options, tmp_path: Path, listener: Listener):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "text.jpg").write_text("text")
    with pytest.raises(BrixelError, match=r"None of the 1 images found can be used.\n  text.jpg: not an image"):
        extract(options(inputs=[str(tmp_path / "bad")]), listener)


def test_memory_that_runs_out_halves_the_batch(options, listener: Listener, tmp_path: Path, monkeypatch):
    expected = every_row(extract(options(batch_size=8), listener).output)
    forward = ExtractionModel._forward

    def tight(self, pixels):
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, pixels)

    monkeypatch.setattr(ExtractionModel, "_forward", tight)
    done = extract(options(batch_size=8, output=tmp_path / "tight.h5"), listener)
    assert "out of memory with 8 images at once; going on with 4" in listener.warned
    features = brixel_cli.FeatureFile(done.output)
    for name, row in expected.items():
        np.testing.assert_allclose(features[name].ravel(), np.frombuffer(row, np.float16).astype(np.float32), atol=4e-3)
    monkeypatch.setattr(ExtractionModel, "_forward", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(BrixelError, match=r"Out of memory on cpu with a single image of 64x80 pixels. Lower --res"):
        extract(options(output=tmp_path / "none.h5"), listener)


@pytest.mark.parametrize(("storage", "dtype"), [("npy", "float16"), ("safetensors", "int8"), ("h5", "int8")])
def test_every_format_holds_the_same_features(options, mixed: Path, tmp_path: Path, listener, storage, dtype):
    plain = brixel_cli.FeatureFile(extract(options(inputs=[str(mixed)], dtype="float32"), listener).output)
    output = tmp_path / f"other_{storage}"
    done = extract(options(inputs=[str(mixed)], storage=storage, dtype=dtype, output=output), listener)
    features = brixel_cli.FeatureFile(done.output)
    for name in plain.paths:
        np.testing.assert_allclose(features[name], plain[name], atol=0.05 if dtype == "int8" else 0.01)
    if storage != "h5":
        assert sorted(p.name for p in output.iterdir())[:2] == [f"00.{storage}", f"01.{storage}"]
        assert (
            extract(options(inputs=[str(mixed)], storage=storage, dtype=dtype, output=output), listener).num_before
            == 10
        )


def test_pca_stores_scores_and_their_basis(options, tmp_path: Path, listener: Listener):
    full = brixel_cli.FeatureFile(extract(options(dtype="float32"), listener).output)
    scores = brixel_cli.FeatureFile(
        extract(options(pca=64, dtype="float32", output=tmp_path / "p.h5"), listener).output
    )
    components, mean = scores.pca
    assert components.shape == (64, 64)
    back = np.einsum("khw,dk->dhw", scores[2], components) + mean[:, None, None]
    np.testing.assert_allclose(back, full[2], atol=1e-3)  # with all components nothing is lost
    assert brixel_cli.FeatureFile(extract(options(pca=3, output=tmp_path / "q.h5"), listener).output)[0].shape[0] == 3
    with pytest.raises(UsageError, match="--pca 65: the maps of test_vit have only 64 channels"):
        extract(options(pca=65, output=tmp_path / "r.h5"), listener)


def test_previews_share_their_colours(options, mixed: Path, tmp_path: Path, listener: Listener):
    done = extract(options(inputs=[str(mixed)], preview=True), listener)
    folder = tmp_path / "out_preview"
    assert done.pictures == [folder / "contact_sheet.png", folder]
    assert Image.open(folder / "01.png").size == (160, 64)
    assert len(list(folder.iterdir())) == 11
    shutil.copy(mixed / "01.png", mixed / "zz.png")
    again = extract(options(inputs=[str(mixed)], preview=True, overwrite=True), listener)
    pictures = [np.asarray(Image.open(folder / name)) for name in ("01.png", "zz.png")]
    assert not again.failures
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 2


def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def test_kills_cost_nothing_but_time(options, model, tmp_path: Path, listener: Listener):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(60):
        make_photograph(folder / f"{number:02}.png", number, *[(96, 96), (128, 96)][number % 2])
    expected = every_row(extract(options(inputs=[str(folder)], batch_size=4), listener).output)
    output = tmp_path / "killed.h5"
    script = (
        "import os, sys, time, torch; torch.set_num_threads(int(os.environ['THREADS']))\n"
        "from brixel_cli.engines.extraction_model import ExtractionModel as M\n"
        "maps = M.maps\n"
        "M.maps = lambda self, pixels: (time.sleep(0.05), maps(self, pixels))[1]\n"
        "from brixel_cli.app import main; main()"
    )
    arguments = ["-c", script, "extract", "--input", str(folder), "--res", "64", "--checkpoint", model[0]]
    arguments += ["--batch-size", "4", "--precision", "float32", "--device", "cpu", "--output", str(output)]
    counts = []
    for kill in range(2):
        # The first run's number of threads is the file's; whatever a later one has, it computes with that.
        process = run(*arguments, THREADS=str(torch.get_num_threads() + kill))
        while process.poll() is None:
            if output.exists():
                with h5py.File(output) as file:
                    if np.sum(file["status"][:] == 1) > 20 * kill + 3:
                        break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        counts.append(len(every_row(output)))
        assert differing(expected, every_row(output)) == {}
    assert counts == sorted(counts)
    assert counts[-1] < 60
    process = run(*arguments, THREADS="3")
    assert process.wait() == 0, process.stderr.read()
    assert every_row(output) == expected


def test_two_processes_fill_one_file(options, mixed: Path, model, tmp_path: Path, listener: Listener):
    expected = every_row(extract(options(inputs=[str(mixed)], batch_size=2), listener).output)
    output = tmp_path / "shared.h5"
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()}); from brixel_cli.app import main; main()"
    (tmp_path / "start.py").write_text(threads)
    process = run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "start.py"), "extract",
        "--input", str(mixed), "--res", "64", "--checkpoint", model[0], "--batch-size", "2", "--device", "cpu",
        "--precision", "float32", "--output", str(output), "--json",
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["computed"] == 10
    assert every_row(output) == expected


def test_the_command_says_what_it_did(model, mixed: Path, tmp_path: Path):
    arguments = ["extract", "--input", str(mixed), "--res", "64", "--checkpoint", model[0], "--device", "cpu"]
    planned = CliRunner().invoke(app, [*arguments, "--dry-run", "--json", "--quiet"])
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert plan["grids"] == {"16x16": 4, "16x20": 3, "28x16": 3}
    assert plan["output"] == str(tmp_path / "mixed.h5")
    assert plan["bytes_free"] > plan["bytes_needed"] > 64 * 2 * (4 * 256 + 3 * 320 + 3 * 448)
    assert not (tmp_path / "mixed.h5").exists()
    assert CliRunner().invoke(app, [*arguments, "--dry-run"]).exit_code == 0
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert f"wrote {tmp_path / 'mixed.h5'}" in done.stdout
    (mixed / "bad.png").write_bytes(b"")
    failed = CliRunner().invoke(app, [*arguments, "--overwrite"])
    assert failed.exit_code == 1
    assert "empty: 0 bytes" in failed.stdout
    assert "1 of 11 images failed" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "x"], "No student to extract with, and none under ./runs: train one with brixel distill"),
        ([], "--input is missing: a folder, an image"),
        (["--input", "x", "--source", "backbone"], "--source backbone: give --backbone NAME"),
        (["--input", "x", "--batch-size", "many"], "--batch-size must be auto or a number from 1 up, not many."),
        (["--input", "x", "--res", "0"], "--res must be at least 1, not 0."),
        (
            ["--input", "x", "--dtype", "int8", "--format", "npy"],
            "--dtype int8 stores a scale beside the map, which .npy",
        ),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_named_as_the_option(options, listener: Listener):
    with pytest.raises(UsageError, match="--device is cuda, which this machine does not have; present: cpu"):
        extract(options(device="cuda"), listener)


def test_outputs_of_the_wrong_kind_are_refused(options, tmp_path: Path, listener: Listener):
    with pytest.raises(UsageError, match=r"is a folder; name a file, such as .*features.h5"):
        extract(options(output=tmp_path), listener)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; --format npy writes a folder"):
        extract(options(output=tmp_path / "file", storage="npy"), listener)


def test_a_full_disk_is_found_out_first(options, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BrixelError, match=r"out.h5 needs .* has 1000 B free. Make room"):
        extract(options(), listener)
    assert not (tmp_path / "out.h5").exists()


def test_a_graph_for_onnx_agrees(model, tmp_path: Path, options, listener: Listener):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from brixel_cli.engines.exporting import export

    done = export(options(inputs=[]), tmp_path / "student.onnx", listener)
    assert done.path.stat().st_size > 1000
    assert done.dynamic == "batch, height, width"
    assert (2, 64, 96) in done.checked
    assert done.largest_error < 1e-3


def test_missing_packages_of_the_export_are_named(options, tmp_path: Path, listener: Listener, monkeypatch):
    from brixel_cli.engines import exporting

    monkeypatch.setattr(exporting, "PACKAGES", ("onnx_of_another_world",))
    with pytest.raises(UsageError, match=r"--export needs onnx_of_another_world: pip install 'brixel\[onnx\]'"):
        exporting.export(options(inputs=[]), tmp_path / "x.onnx", listener)
