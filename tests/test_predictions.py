"""Predictions of other models as rows of a probe: known answers, what the values mean, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from conftest import Listener
from PIL import Image
from printed_json import checked
from probe_sets import FAST, HEIGHT, NAMES, WIDTH, figures, make_options, recipe_file, results
from test_probe_command import invoke

from brixel_cli.config.files import load_recipe
from brixel_cli.config.labelled import ProbeRecipe
from brixel_cli.config.probe import PredictionsConfig
from brixel_cli.data.predictions import depth_scale, find_predictions, read_prediction
from brixel_cli.engines.probing.probing import plan_only, probe
from brixel_cli.errors import BrixelError, UsageError

EVALUATED = [Path(name) for name in NAMES if "/val/" in name]


def truth(root: Path, kind: str, name: Path) -> np.ndarray:
    """Of an image: labels (H, W), metres (H, W), or normals (H, W, 3)."""
    path = root / kind / "val" / name.name
    if kind == "normals":
        return np.load(path.with_suffix(".npy"))
    values = np.asarray(Image.open(path))
    return values if kind == "labels" else values / 1000


def write_masks(root: Path, folder: Path, wrong: int = 0) -> Path:
    """The true classes, 0 where there is no label; of the first image `wrong` labelled pixels are another class."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in EVALUATED:
        mask = truth(root, "labels", name).copy()
        places = np.flatnonzero(mask.ravel() != 255)[: wrong if name == EVALUATED[0] else 0]
        mask.ravel()[places] = (mask.ravel()[places] + 1) % 3
        mask[mask == 255] = 0
        Image.fromarray(mask).save(folder / name.name)
    return folder


def predicted(root: Path, tmp_path: Path, folder: Path, task: str = "segmentation", **changes):
    return make_options(root, tmp_path / "out", task, sources=[], predictions=[f"theirs={folder}"], **changes)


def test_the_truth_gives_perfect_scores(root: Path, tmp_path: Path, listener: Listener) -> None:
    found = figures(predicted(root, tmp_path, write_masks(root, tmp_path / "p")), listener)
    assert (found["miou"], found["pixel_accuracy"], found["boundary_iou"]) == (1.0, 1.0, 1.0)
    assert found["class_iou"] == [1.0] * 3


def test_each_wrong_pixel_counts(root: Path, tmp_path: Path, listener: Listener) -> None:
    found = figures(predicted(root, tmp_path, write_masks(root, tmp_path / "p", wrong=100)), listener)
    # 4 images of 48x64 pixels, of which 2x5 are void.
    assert found["pixel_accuracy"] == 1 - 100 / (4 * (48 * 64 - 10))


@pytest.mark.parametrize("kind", ["npy", "png"])
def test_true_depth_and_normals_give_no_error(root: Path, tmp_path: Path, listener: Listener, kind: str) -> None:
    for quantity in ("depth", "normals"):
        (tmp_path / "p" / quantity).mkdir(parents=True)
    for name in EVALUATED:
        depth, normals = truth(root, "depth", name), truth(root, "normals", name)
        if kind == "npy":
            np.save(tmp_path / "p" / "depth" / f"{name.stem}.npy", depth)
            np.save(tmp_path / "p" / "normals" / f"{name.stem}.npy", normals)
        else:
            Image.fromarray((depth * 100).astype(np.uint16)).save(tmp_path / "p" / "depth" / name.name)
            coded = ((normals + 1) * 127.5).round().astype(np.uint8)
            Image.fromarray(coded).save(tmp_path / "p" / "normals" / name.name)
    if kind == "png":
        (tmp_path / "p" / "predictions.json").write_text('{"units": {"depth": "centimetres in 16-bit PNGs"}}')
    found = figures(predicted(root, tmp_path, tmp_path / "p", "depth_normals"), listener)
    assert (found["delta1"], found["within_11.25"]) == (1.0, 1.0)
    assert found["rmse_m"] < 1e-6
    assert found["mean_angle_deg"] < (1e-3 if kind == "npy" else 0.5)  # 8 bits of each coordinate


def test_values_of_the_set_are_read_by_its_id_map(root: Path, tmp_path: Path, listener: Listener) -> None:
    folder = write_masks(root, tmp_path / "p")
    for path in folder.iterdir():
        Image.fromarray(np.array([7, 20, 30], np.uint8)[np.asarray(Image.open(path))]).save(path)
    ids = ['data.labels.ids={"sky": [7, 8], "sea": [20], "land": [30]}', 'data.labels.others="ignore"']
    recipe = load_recipe(str(recipe_file(root)), ids, ProbeRecipe)
    path = folder / EVALUATED[0].name
    config = PredictionsConfig(values="set")
    values = read_prediction(path, "segmentation", recipe, config, 0.001)
    labels = truth(root, "labels", EVALUATED[0])
    assert (values == np.where(labels == 255, 0, labels)).all()
    with pytest.raises(
        BrixelError, match="the value 7 .*, and 2 more such values.* 0 to 2, in the order of the recipe"
    ):
        read_prediction(path, "segmentation", recipe, PredictionsConfig(), 0.001)


def test_depth_is_in_the_unit_that_is_said(root: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        str(recipe_file(root, "depth")), ["data.depth.scale=0.5", "data.depth.inverse=true"], ProbeRecipe
    )
    image, array = tmp_path / "a.png", tmp_path / "a.npy"
    Image.fromarray(np.full((2, 3), 4, np.uint16)).save(image)
    np.save(array, np.full((2, 3), 4.0))

    def metres(path: Path, **config) -> float:
        said = PredictionsConfig(**config)
        return float(read_prediction(path, "depth", recipe, said, depth_scale(tmp_path, said))[0, 0])

    assert [metres(image), metres(array)] == [pytest.approx(0.004), 4.0]
    assert [metres(image, scale=0.25), metres(array, scale=0.25)] == [1.0, 1.0]
    assert metres(image, values="set") == 0.5  # 1 / (4 x 0.5)
    (tmp_path / "predictions.json").write_text('{"units": {"depth": "decimetres in 16-bit PNGs"}}')
    assert metres(image) == pytest.approx(0.4)
    (tmp_path / "predictions.json").write_text("[")
    with pytest.raises(BrixelError, match="predictions.json cannot be read"):
        metres(image)


def test_folders_of_one_name_are_seeds_beside_trained_rows(
    root: Path, tmp_path: Path, model: tuple[str, str], listener: Listener
) -> None:
    folders = [write_masks(root, tmp_path / f"p{wrong}", wrong) for wrong in (0, 200)]
    options = make_options(
        root, tmp_path / "out", sources=["backbone"], checkpoints=[model[0]], overrides=FAST,
        predictions=[f"theirs={folder}" for folder in folders],
    )  # fmt: skip
    done = probe(options, listener).results
    rows = [(run.source, run.seed) for run in done.runs]
    assert rows == [("backbone", 0), ("theirs", 0), ("theirs", 1)]
    accuracies = [1.0, 1 - 200 / (4 * (48 * 64 - 10))]
    assert done.summary["theirs"].figure("pixel_accuracy") == pytest.approx(
        (np.mean(accuracies), np.std(accuracies, ddof=1))
    )
    stored = results(tmp_path / "out")
    assert stored["sources"]["theirs"]["files"] == 4
    assert [run["final_loss"] is None for run in stored["runs"]] == [False, True, True]
    assert stored["recovered_gap"] == {}
    with (tmp_path / "out" / "images" / "theirs_seed1.csv").open() as file:
        assert [row["pixel_accuracy"] for row in csv.DictReader(file)][1:] == ["1.0"] * 3
    # The same command again reads what is there; other files under the same name are another row.
    assert probe(options, listener).results.runs == done.runs
    write_masks(root, folders[0], wrong=5)
    with pytest.raises(UsageError, match=r"theirs: sha256"):
        probe(options, listener)


def test_a_row_of_predictions_needs_neither_weights_nor_training(root: Path, tmp_path: Path) -> None:
    folder = write_masks(root, tmp_path / "p", wrong=300)
    command = [
        "--recipe",
        str(recipe_file(root)),
        "--predictions",
        f"theirs={folder}",
        "--output",
        str(tmp_path / "out"),
    ]
    code, out, err = invoke(*command, "--dry-run", "--json")
    assert (code, checked("probe-dry-run", out)["sources"]) == (0, ["theirs"])
    code, out, err = invoke(*command, "--per-class")
    assert code == 0, err
    assert "--apply" not in err  # there is no head
    # 300 of 12,248 pixels are wrong.
    assert any("theirs" in line and "97.55" in line for line in out.splitlines())
    assert "IoU by class" in out
    written = {path.name for path in (tmp_path / "out").rglob("*.*")}
    assert {"results.json", "results.csv", "segmentation_worst.png", "theirs_seed0.csv"} <= written
    assert not {"curves.png", "features.html", "theirs_seed0.safetensors"} & written
    assert not list((tmp_path / "out").glob("features/*train*"))
    assert invoke("--verify", str(tmp_path / "out"))[0] == 0


def test_a_prediction_of_the_evaluated_part_is_taken_as_it_is(root: Path, tmp_path: Path, listener: Listener) -> None:
    folder = write_masks(root, tmp_path / "p")
    changes = {"protocol": "jafar", "overrides": ["protocol.evaluate_labels=40"]}
    whole = figures(predicted(root, tmp_path, folder, **changes), listener)
    assert whole["miou"] == 1.0
    plan = plan_only(predicted(root, tmp_path, folder, **changes), listener)
    split = plan.sources[0].evaluate
    assert split.target_sizes == [(40, 40)] * 4
    from brixel_cli.data.crops import cut_target

    for image, name in enumerate(EVALUATED):
        part = cut_target(np.asarray(Image.open(folder / name.name)), split.crops[image], (40, 40))
        Image.fromarray(part).save(folder / name.name)
    assert figures(predicted(root, tmp_path, folder, overwrite=True, **changes), listener) == whole


def refused(root: Path, tmp_path: Path, listener: Listener, folder: Path) -> str:
    with pytest.raises(BrixelError) as caught:
        probe(predicted(root, tmp_path, folder), listener)
    return str(caught.value)


def test_files_that_cannot_be_used_are_named(root: Path, tmp_path: Path, listener: Listener) -> None:
    folder = write_masks(root, tmp_path / "p")
    first, second = (folder / name.name for name in EVALUATED[:2])
    Image.fromarray(np.zeros((HEIGHT, WIDTH - 1), np.uint8)).save(first)
    Image.fromarray(np.full((HEIGHT, WIDTH), 3, np.uint8)).save(second)
    said = refused(root, tmp_path, listener, folder)
    assert f"2 of the 4 predictions in {folder} cannot be used:" in said
    assert f"{first} is 48x63 pixels (height x width), but images/val/0.png is 48x64" in said
    assert f"{second}: the value 3 (3,072 pixels) means no class: they are 0 to 2" in said
    second.write_bytes(b"no image")
    assert str(second) in refused(root, tmp_path, listener, folder)
    np.save(folder / "0.npy", np.zeros((HEIGHT, WIDTH)))
    first.unlink()
    assert "0.npy has the shape (48, 64) of float64; a mask is (height, width) of integers" in refused(
        root, tmp_path, listener, folder
    )
    assert not (tmp_path / "out" / "results.json").exists()


def test_pixels_without_a_class_are_an_error_only_where_they_are_measured(
    root: Path, tmp_path: Path, listener: Listener
) -> None:
    folder = write_masks(root, tmp_path / "p")
    first = folder / EVALUATED[0].name
    mask = np.array(Image.open(first))
    mask[:2, :5] = 255  # where the label is void
    Image.fromarray(mask).save(first)
    assert figures(predicted(root, tmp_path, folder), listener)["miou"] == 1.0
    mask[10, 10:13] = 255
    Image.fromarray(mask).save(first)
    with pytest.raises(BrixelError, match=r"0.png has no class at 3 of the 3,062 pixels that are measured"):
        probe(predicted(root, tmp_path, folder, overwrite=True), listener)


def test_depth_and_normals_need_a_value_where_they_are_measured(root: Path, tmp_path: Path, listener: Listener) -> None:
    for quantity, values, what in (("depth", np.zeros((HEIGHT, WIDTH)), "no depth above 0"),
                                   ("normals", np.zeros((3, HEIGHT, WIDTH)), "no normal")):  # fmt: skip
        folder = tmp_path / quantity
        folder.mkdir()
        for name in EVALUATED:
            np.save(folder / f"{name.stem}.npy", values)
        with pytest.raises(BrixelError, match=what):
            probe(predicted(root, tmp_path / f"of {quantity}", folder, quantity), listener)


def test_missing_and_ambiguous_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no folder"):
        find_predictions(tmp_path / "absent", "depth", ["a.jpg"])
    names = [f"images/town/{n}.jpg" for n in range(5)]
    with pytest.raises(BrixelError) as caught:
        find_predictions(tmp_path, "depth", names)
    assert "has no depth of 5 of the 5 evaluated images:\n  images/town/0.jpg" in str(caught.value)
    assert "and 2 more" in str(caught.value)
    assert f"{tmp_path / 'images/town/0'}.png, or {tmp_path / '0'}.png" in str(caught.value)
    (tmp_path / "depth" / "town").mkdir(parents=True)
    (tmp_path / "depth" / "town" / "0.png").touch()
    (tmp_path / "depth" / "1.npy").touch()
    assert find_predictions(tmp_path, "depth", names[:2]) == [tmp_path / "depth/town/0.png", tmp_path / "depth/1.npy"]
    with pytest.raises(BrixelError, match=r"1.npy could be of a/1.jpg and of b/1.jpg"):
        find_predictions(tmp_path, "depth", ["a/1.jpg", "b/1.jpg"])


@pytest.mark.parametrize(("given", "message"), [
    (["--predictions", "DIR"], "--predictions DIR: give a name and a folder"),
    (["--predictions", "=DIR"], "give a name and a folder"),
    (["--predictions", "a=DIR", "--predictions", "a=DIR"], "--predictions a: a folder stands twice"),
    (["--predictions", "backbone=DIR", "--source", "backbone"], "The source backbone stands twice"),
    (["--predictions", "a=DIR", "--set", "predictions.value=set"], "predictions"),
    (["--predictions", "a=DIR", "--apply", "head"], "leave out --predictions"),
])  # fmt: skip
def test_a_wrong_command_exits_with_2(root: Path, tmp_path: Path, model, given: list[str], message: str) -> None:
    folder = write_masks(root, tmp_path / "p")
    words = [word.replace("DIR", str(folder)) if "=" in word else word for word in given]
    recipe = [] if "--apply" in given else ["--recipe", str(recipe_file(root)), "--checkpoint", model[0]]
    code, _, err = invoke(*recipe, *words, "--output", str(tmp_path / "out"))
    assert (code, message.replace("DIR", "DIR") in " ".join(err.split())) == (2, True), err
