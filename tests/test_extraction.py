"""brixel extract from end to end: what is written, and what survives kills."""

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
from conftest import TWO_RANKS, Listener, every_row, make_photograph
from PIL import Image
from printed_json import checked
from test_inputs import make_video
from torchvision.transforms.v2 import functional as tvf
from typer.testing import CliRunner

import brixel_cli
from brixel_cli import load_student
from brixel_cli.app import app
from brixel_cli.data.views import normalise_pixels
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.engines.models import FeatureExtractor
from brixel_cli.errors import UsageError


def differing(expected: dict[str, bytes], found: dict[str, bytes]) -> dict[str, float]:
    """Rows of float16 that differ, and by how much."""
    pairs = {name: [np.frombuffer(rows[name], np.float16) for rows in (expected, found)] for name in found}
    return {name: float(np.abs(a - b).max()) for name, (a, b) in pairs.items() if a.tobytes() != b.tobytes()}


@pytest.mark.parametrize("source", ["student", "backbone", "teacher"])
def test_rows_are_what_the_model_says(extract_options, model, photographs: Path, listener: Listener, source: str):
    done = extract(extract_options(source=source, dtype="float32", fit="centre", batch_size=3), listener)
    features = brixel_cli.FeatureFile(done.output)
    side = 256 if source == "teacher" else 64
    image = Image.open(photographs / "3.png").convert("RGB")
    from brixel_cli.data.views import centre_view

    student = load_student(model[0])
    pixels = normalise_pixels(
        tvf.pil_to_tensor(centre_view(image, (side, side))), student.backbone.mean, student.backbone.std
    )[None]
    expected = (student if source == "student" else student.backbone)(pixels)[0].detach().numpy()
    assert features["3.png"].shape == expected.shape == (64, *([4, 4] if source == "backbone" else [16, 16]))
    np.testing.assert_allclose(features["3.png"], expected, atol=1e-4)
    assert done.num_computed == 8
    assert features.model_size[0].tolist() == [side, side]


def test_the_file_says_what_its_numbers_are(extract_options, mixed: Path, listener: Listener):
    done = extract(extract_options(inputs=[str(mixed)]), listener)
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
    assert description["tf32"] is False
    assert any("10 images, 0 of them unusable; grids 16x16 (4)" in said for said in listener.said)
    assert any("needed" in said and "free" in said for said in listener.said)
    # 96x128 becomes 64x85.3, then 64x80
    rounded = "6 sizes were rounded to multiples of the patch, 16 pixels, by 5.3 pixels at most"
    assert any(rounded in said for said in listener.said)


def test_a_row_does_not_depend_on_its_company(extract_options, mixed: Path, tmp_path: Path, listener: Listener):
    whole = extract(extract_options(inputs=[str(mixed)], batch_size=4), listener)
    (mixed / "03.png").write_bytes((mixed / "03.png").read_bytes()[:-2000])  # the header stays, the pixels do not
    again = extract(extract_options(inputs=[str(mixed)], batch_size=4, output=tmp_path / "b.h5"), listener)
    first, second = every_row(whole.output), every_row(again.output)
    assert set(first) - set(second) == {"03.png"}
    assert all(first[name] == row for name, row in second.items())
    assert "truncated" in again.failures["03.png"]


def test_resuming_computes_only_what_is_missing(extract_options, listener: Listener, monkeypatch: pytest.MonkeyPatch):
    done = extract(extract_options(batch_size=3), listener)
    before = every_row(done.output)
    with h5py.File(done.output, "r+") as file:
        for row in (1, 6):
            file["status"][row] = 0
            file["features"][row] = 0
    seen = []
    maps = FeatureExtractor.maps
    monkeypatch.setattr(FeatureExtractor, "maps", lambda self, pixels: seen.append(len(pixels)) or maps(self, pixels))
    again = extract(extract_options(), listener)  # the batch size is the file's
    assert (again.num_computed, again.num_before, seen) == (2, 6, [3, 2])
    assert every_row(done.output) == before


@pytest.mark.parametrize(("storage", "dtype"), [("npy", "float16"), ("safetensors", "int8"), ("h5", "int8")])
def test_every_format_holds_the_same_features(extract_options, mixed: Path, tmp_path: Path, listener, storage, dtype):
    plain = brixel_cli.FeatureFile(extract(extract_options(inputs=[str(mixed)], dtype="float32"), listener).output)
    output = tmp_path / f"other_{storage}"
    done = extract(extract_options(inputs=[str(mixed)], storage=storage, dtype=dtype, output=output), listener)
    features = brixel_cli.FeatureFile(done.output)
    for name in plain.paths:
        np.testing.assert_allclose(features[name], plain[name], atol=0.05 if dtype == "int8" else 0.01)
    if storage != "h5":
        assert sorted(p.name for p in output.iterdir())[:2] == [f"00.{storage}", f"01.{storage}"]
        assert (
            extract(
                extract_options(inputs=[str(mixed)], storage=storage, dtype=dtype, output=output), listener
            ).num_before
            == 10
        )


def test_pca_stores_scores_and_their_basis(extract_options, tmp_path: Path, listener: Listener):
    full = brixel_cli.FeatureFile(extract(extract_options(dtype="float32"), listener).output)
    scores = brixel_cli.FeatureFile(
        extract(extract_options(pca=64, dtype="float32", output=tmp_path / "p.h5"), listener).output
    )
    components, mean = scores.pca
    assert components.shape == (64, 64)
    back = np.einsum("khw,dk->dhw", scores[2], components) + mean[:, None, None]
    np.testing.assert_allclose(back, full[2], atol=1e-3)  # with all components nothing is lost
    assert (
        brixel_cli.FeatureFile(extract(extract_options(pca=3, output=tmp_path / "q.h5"), listener).output)[0].shape[0]
        == 3
    )
    with pytest.raises(UsageError, match="--pca 65: the maps of test_vit have only 64 channels"):
        extract(extract_options(pca=65, output=tmp_path / "r.h5"), listener)


def test_previews_share_their_colours(extract_options, mixed: Path, tmp_path: Path, listener: Listener):
    done = extract(extract_options(inputs=[str(mixed)], preview=True), listener)
    folder = tmp_path / "out_preview"
    assert done.pictures == [folder / "contact_sheet.png", folder]
    assert Image.open(folder / "01.png").size == (160, 64)
    assert len(list(folder.iterdir())) == 11
    shutil.copy(mixed / "01.png", mixed / "zz.png")
    again = extract(extract_options(inputs=[str(mixed)], preview=True, overwrite=True), listener)
    pictures = [np.asarray(Image.open(folder / name)) for name in ("01.png", "zz.png")]
    assert not again.failures
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 2


def test_the_preview_of_a_video_is_a_video_of_its_speed(extract_options, tmp_path: Path, listener: Listener):
    clip = make_video(tmp_path / "clip.mp4")  # ten frames, ten a second
    done = extract(extract_options(inputs=[str(clip)], every=4, preview=True), listener)
    folder = tmp_path / "out_preview"
    assert done.pictures == [folder / "contact_sheet.png", folder, folder / "clip.mp4"]
    av = pytest.importorskip("av")
    with av.open(str(folder / "clip.mp4")) as container:
        frames = list(container.decode(video=0))
    assert [round(float(frame.time), 3) for frame in frames] == [0, 0.4, 0.8]
    for number, frame in zip((0, 4, 8), frames, strict=True):
        expected = np.asarray(Image.open(folder / f"clip.mp4#{number:02}.png").convert("RGB")).astype(int)
        found = np.asarray(frame.to_image()).astype(int)
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < 8  # the codec loses some


def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def test_kills_cost_nothing_but_time(extract_options, model, tmp_path: Path, listener: Listener):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(60):
        make_photograph(folder / f"{number:02}.png", number, *[(96, 96), (128, 96)][number % 2])
    expected = every_row(extract(extract_options(inputs=[str(folder)], batch_size=4), listener).output)
    output = tmp_path / "killed.h5"
    script = (
        "import os, sys, time, torch; torch.set_num_threads(int(os.environ['THREADS']))\n"
        "from brixel_cli.engines.models import FeatureExtractor as M\n"
        "maps = M.maps\n"
        "M.maps = lambda self, pixels: (time.sleep(0.05), maps(self, pixels))[1]\n"
        "from brixel_cli.app import app; app()"
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


def test_two_processes_fill_one_file(extract_options, mixed: Path, model, tmp_path: Path, listener: Listener):
    expected = every_row(extract(extract_options(inputs=[str(mixed)], batch_size=2), listener).output)
    output = tmp_path / "shared.h5"
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()}); from brixel_cli.app import app; app()"
    (tmp_path / "start.py").write_text(threads)
    process = run(
        *TWO_RANKS, str(tmp_path / "start.py"), "extract",
        "--input", str(mixed), "--res", "64", "--checkpoint", model[0], "--batch-size", "2", "--device", "cpu",
        "--precision", "float32", "--output", str(output), "--json",
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert checked("extract", out)["computed"] == 10
    assert every_row(output) == expected


def test_an_error_of_the_first_process_ends_all_and_is_reported_once(extract_options, model, listener: Listener):
    done = extract(extract_options(), listener)
    process = run(
        *TWO_RANKS, "-m", "brixel_cli", "extract",
        "--input", *extract_options().inputs, "--res", "96", "--checkpoint", model[0], "--device", "cpu",
        "--precision", "float32", "--output", str(done.output),
    )  # fmt: skip
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("was begun with something else") == 1
    assert "--res: 64 -> 96" in err
    assert "in extract" not in err  # no traceback of the other process


def test_the_command_says_what_it_did(model, mixed: Path, tmp_path: Path):
    arguments = ["extract", "--input", str(mixed), "--res", "64", "--checkpoint", model[0], "--device", "cpu"]
    planned = CliRunner().invoke(app, [*arguments, "--dry-run", "--json", "--quiet"])
    assert planned.exit_code == 0, planned.output
    plan = checked("extract-dry-run", planned.stdout)
    assert plan["grids"] == {"16x16": 4, "16x20": 3, "28x16": 3}
    assert plan["output"] == str(tmp_path / "mixed.h5")
    assert plan["images_left"] == 10
    assert 0 < plan["seconds"] < 60
    assert plan["how_timed"] == "one batch of 4 images of 64x64 pixels was computed, other sizes by their area"
    assert plan["bytes_free"] > plan["bytes_needed"] > 64 * 2 * (4 * 256 + 3 * 320 + 3 * 448)
    assert not (tmp_path / "mixed.h5").exists()
    shown = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert shown.exit_code == 0
    assert "time for them, about" in shown.stdout
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert f"wrote {tmp_path / 'mixed.h5'}" in done.stdout
    (mixed / "bad.png").write_bytes(b"")
    failed = CliRunner().invoke(app, [*arguments, "--overwrite"])
    assert failed.exit_code == 1
    assert "empty: 0 bytes" in failed.stdout
    (mixed / "bad.png").unlink()
    (mixed / "the_last_of_a_long_journey.gif").write_bytes(b"GIF89a")
    Image.new("RGB", (9, 9)).save(mixed / "moving.gif", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")])
    listed = CliRunner(env={"COLUMNS": "60"}).invoke(app, [*arguments, "--dry-run"]).stdout
    assert "the_last_of_a_long_journey" in listed  # however long the reasons of the others
    assert "1 of 11 images failed" in failed.stderr
