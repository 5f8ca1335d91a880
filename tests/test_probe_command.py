"""`brixel probe` as users meet it: tables, JSON, dry run, and what is said of errory commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from printed_json import checked
from probe_sets import one_hot, recipe_file, write_features
from test_feature_page import page_data
from typer.testing import CliRunner

from brixel_cli.app import app

FAST = ("--set", "protocol.steps=3", "--set", "protocol.points=64", "--device", "cpu")
THREE = ("--source", "backbone", "--source", "student", "--source", "teacher")
runner = CliRunner()


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = runner.invoke(app, ["probe", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def command(root: Path, model: tuple[str, str], tmp_path: Path) -> list[str]:
    options = ["--recipe", str(recipe_file(root)), "--checkpoint", model[0], "--output", str(tmp_path / "out")]
    return [*options, *FAST, *THREE]


def test_help_shows_examples() -> None:
    code, out, _ = invoke("--help")
    assert code == 0
    assert "brixel probe --recipe camvid --data data/camvid --checkpoint runs/vits --quick" in out


def test_the_table_has_a_row_for_each_source_and_the_recovered_gap(command: list[str], tmp_path: Path) -> None:
    code, out, err = invoke(*command, "--seeds", "2", "--per-class")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == ("mine: segmentation, protocol quick (changed: points=64, steps=3), student's input 32 px")
    for row in ("backbone", "student", "teacher", "recovered gap"):
        assert any(row in line for line in lines), row
    titles = [title.strip() for title in lines[2].strip("┃").split("┃")]
    assert titles == ["source", "sees", "GFLOP", "time", "mIoU (%)", "boundary IoU (%)"]
    teacher = next(line for line in lines if "teacher" in line and "128x192" in line)
    assert teacher.count("+-") == 2
    assert any("teacher" in line and "8x12" in line and line.count("+-") == 1 for line in lines)  # pixel accuracy
    assert (
        "Sees: the largest image that the source is given. GFLOP and time are of its whole pass over one image" in out
    )
    assert "Trained on 6 images, evaluated on 4. Mean and standard deviation over seeds 0, 1." in out
    assert (
        "Recovered gap: (source - backbone) / (teacher - backbone), of the means; +-: standard deviation, propagated."
        in out
    )
    assert "Fewer than three seeds: the spread says little." in out
    assert "\nIoU by class, mean over seeds" in out
    assert "\nBoundary IoU by class, mean over seeds" in out
    assert all(name in out for name in ("sky", "sea", "land"))
    named = [Path(line.removeprefix("wrote ")) for line in lines if line.startswith("wrote ")]
    assert [path.name for path in named[:7]] == [
        "results.json", "results.csv", "curves.png",
        "segmentation_best.png", "segmentation_median.png", "segmentation_worst.png",
        "features.html",
    ]  # fmt: skip
    assert len(named) == 7 + 6
    assert all(path.is_file() for path in named)
    data = page_data(named[6].read_text())
    assert data["sources"] == ["backbone", "student", "teacher"]
    assert [image["name"].split(":")[0] for image in data["images"]] == ["best", "median", "worst"]
    layers = [layer["title"] for layer in data["images"][2]["layers"]]
    assert layers == ["truth", "predicted: backbone", "predicted: student", "predicted: teacher"]
    assert f"use a head: brixel probe --apply {tmp_path / 'out'}/heads/HEAD.safetensors" in err


def test_json_is_one_line_on_stdout(command: list[str]) -> None:
    code, out, err = invoke(*command, "--seeds", "1", "--json", "--quiet")
    assert (code, err, out.count("\n")) == (0, "", 1)
    result = checked("probe", out)
    assert set(result["summary"]) == {"backbone", "student", "teacher"}
    assert set(result["recovered_gap"]["student"]) == {"miou", "pixel_accuracy", "boundary_iou"}
    assert any(file.endswith("results.json") for file in result["files"])


def test_alignment_is_said_beside_the_number(root: Path, tmp_path: Path, model: tuple[str, str]) -> None:
    code, out, err = invoke(
        "--recipe", str(recipe_file(root, "depth")), "--checkpoint", model[0], "--output", str(tmp_path / "out"),
        "--protocol", "brixel-nyu", "--seeds", "1", "--size", "32x48", "--device", "cpu",
        "--set", "protocol.epochs=1", "--source", "backbone",
    )  # fmt: skip
    assert code == 0, err
    assert "RMSE, aligned (m)" in out
    assert "Depth metrics are after fitting scale and shift of each image to the truth." in out
    assert "size=[32, 48]" in out


def test_a_dry_run_writes_nothing(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, out, err = invoke(*command, "--dry-run")
    assert code == 0, err
    assert "6 images to train on, 4 to evaluate." in out
    assert "3 seeds of 3 steps for each source." in out
    assert "needed with targets" in out
    assert "dry run: nothing was written" in err
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "empty").iterdir()) == []
    code, out, _ = invoke(*command, "--dry-run", "--json")
    plan = checked("probe-dry-run", out)
    assert (plan["train_images"], plan["evaluate_images"], plan["seeds"], plan["steps"]) == (6, 4, 3, 3)
    # Maps of 64 channels in float16: 2x3 of the backbone, 8x12 of student and teacher, for 10 views, and a byte each
    # for the status; labels of 48x64 bytes.
    assert plan["bytes_needed"] == 10 * 64 * 2 * (6 + 96 + 96) + 3 * 10 + 10 * 48 * 64 + 10


def test_a_dry_run_needs_no_weights(command: list[str], tmp_path: Path) -> None:
    absent = tmp_path / "absent.safetensors"
    code, out, err = invoke(*command, "--dry-run", "--backbone-weights", str(absent))
    assert code == 0, err
    assert f"The run needs the backbone's weights, and {absent} is not there." in out
    assert "The backbone's weights were not read: stored features count as missing here." in out
    assert "All images and labels were read: none has an error." in out
    notes = checked("probe-dry-run", invoke(*command, "--dry-run", "--json")[1])["notes"]
    assert notes == []  # the student's file says which weights these are


def test_a_dry_run_reports_all_that_is_wrong_with_the_labels(
    root: Path, model: tuple[str, str], tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(root, tmp_path / "set"))
    for split, name in (("train", "3"), ("train", "4"), ("val", "1")):
        Image.new("L", (64, 48), 77).save(broken / f"labels/{split}/{name}.png")
    Image.new("L", (32, 48)).save(broken / "labels/val/2.png")
    (broken / "images/train/0.png").write_bytes(b"")
    given = ["--recipe", str(recipe_file(broken)), "--checkpoint", model[0], "--output", str(tmp_path / "out"), *FAST]
    code, _, err = invoke(*given, "--dry-run")
    assert code == 1
    text = err[err.index("error: ") :]
    assert text.startswith("error: 5 of 10 labelled images cannot be used:\n")
    assert "  3x: " in text
    assert "labels/train/3.png: the value 77" in text
    assert "labels/val/2.png" in text
    assert "images/train/0.png" in text
    assert "labels/val/1.png" not in text  # as labels/train/3.png
    assert not (tmp_path / "out").exists()


def test_a_second_call_goes_on(command: list[str]) -> None:
    first = invoke(*command, "--seeds", "1", "--json")[1]
    again = invoke(*command, "--seeds", "1", "--json")[1]
    assert first == again


def test_the_default_folders(
    root: Path, model: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model[0], tmp_path / "runs" / "tiny")
    code, _, err = invoke("--recipe", str(recipe_file(root)), "--checkpoint", "runs/tiny", "--seeds", "1", *FAST)
    assert code == 0, err
    assert (tmp_path / "runs/probe/mine/results.json").is_file()
    assert list((tmp_path / "runs/probe/features").glob("*.h5"))


def test_a_feature_file_is_a_source(root: Path, command: list[str], tmp_path: Path) -> None:
    file = write_features(tmp_path / "answers.h5", root, one_hot(root, "labels", 3))
    changes = ["--source", str(file), "--set", "protocol.steps=60", "--set", "protocol.lr=0.1", "--seeds", "1"]
    code, out, err = invoke(*command, *changes)
    assert code == 0, err
    assert "file answers.h5" in out
    assert "100.00" in out


def test_apply_writes_masks(command: list[str], root: Path, tmp_path: Path) -> None:
    assert invoke(*command, "--seeds", "1")[0] == 0
    head = str(tmp_path / "out/heads/student_seed0.safetensors")
    code, out, err = invoke("--apply", head, "--input", str(root / "images/val"), "--output", str(tmp_path / "masks"))
    assert code == 0, err
    assert "segmentation by student, trained on mine" in out
    assert "segmentation: class numbers in 8-bit palette PNGs." in out
    assert f"wrote {tmp_path / 'masks' / 'segmentation'}" in out
    assert len(list((tmp_path / "masks/segmentation").glob("*.png"))) == 4
    (tmp_path / "bad").mkdir()
    shutil.copy(root / "images/val/0.png", tmp_path / "bad/good.png")
    (tmp_path / "bad/text.jpg").write_text("text")
    code, out, err = invoke("--apply", head, "--input", str(tmp_path / "bad"), "--json")
    assert code == 1
    assert checked("probe-apply", out)["failed"] == 1
    assert "1 of 2 images failed; the predictions of the others are in" in err


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "--recipe is missing: a .yaml file, or one of "),
    (["--recipe", "camvit"], "No recipe at camvit, and brixel ships none of that name. Did you mean camvid?"),
    (["--recipe", "RECIPE", "--protocol", "jafr"], "No protocol jafr. Did you mean jafar? There are: jafar, "),
    (["--recipe", "RECIPE", "--protocol", "dinov3-nyu"], "The protocol dinov3-nyu is for depth, not for segmentation"),
    (["--recipe", "RECIPE", "--quick", "--protocol", "jafar"], "--quick is the protocol quick, and --protocol is jafar"),
    (["--recipe", "RECIPE", "--size", "big"], "--res takes a side in pixels, such as 112, or HEIGHTxWIDTH"),
    (["--recipe", "RECIPE", "--set", "protocol.lrr=1"], "protocol quick has 1 error:\n    lrr: unknown key; did you mean lr?"),
    (["--recipe", "RECIPE", "--set", "protocol.side=9"], "protocol.name and protocol.side say what was published"),
    (["--recipe", "RECIPE", "--set", "data.rot=9"], "data.rot: unknown key; did you mean root?"),
    (["--recipe", "RECIPE", "--input", "x"], "--input goes with --apply; the images of a probe are those of the recipe"),
    (["--recipe", "RECIPE", "--seeds", "0"], "--seeds must be at least 1, not 0."),
    (["--apply", "h"], "--apply needs --input: a folder, an image, a quoted glob, or a .txt list of paths."),
    (["--apply", "h", "--input", "x", "--recipe", "c", "--quick"], "--apply takes all from the head; leave out --recipe, --quick."),
    (["--apply", "h", "--input", "x", "--label-fraction", "0.5", "--save-predictions", "--per-class", "--seeds", "2",
      "--features", "f"], "leave out --label-fraction, --save-predictions, --per-class, --features, --seeds."),
    (["--apply", "h", "--input", "x", "--checkpoint", "a", "--checkpoint", "b"], "--apply takes one --checkpoint"),
])  # fmt: skip
def test_a_wrong_command_exits_with_2_and_says_why(root: Path, arguments: list[str], message: str) -> None:
    file = str(recipe_file(root))
    code, out, err = invoke(*(file if argument == "RECIPE" else argument for argument in arguments))
    assert message in err
    assert (code, out) == (2, "")


def test_a_missing_head_exits_with_1(tmp_path: Path) -> None:
    code, _, err = invoke("--apply", str(tmp_path / "absent.safetensors"), "--input", str(tmp_path))
    assert code == 1
    assert "absent.safetensors cannot be read as safetensors" in err
