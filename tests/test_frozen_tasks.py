"""Matching and propagation from end to end, on small sets and feature files whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Listener, make_photograph
from labelled_sets import save
from printed_json import checked
from probe_sets import HEIGHT, WIDTH, results, write_features
from test_app import invoke

from brixel_cli.cli.probe import probe_options
from brixel_cli.config.probe import ProbeOptions
from brixel_cli.core.metrics import gap_over_items
from brixel_cli.data.targets import read_pose
from brixel_cli.engines.probing import propagation
from brixel_cli.engines.probing.folder import EMPTY, ProbeFolder
from brixel_cli.engines.probing.probing import plan_only, probe
from brixel_cli.errors import BrixelError, UsageError

MATCHING = """
name: rail
task: matching
size: 32
data:
  root: ROOT
  images: images/{name}.png
  evaluate: {split: all}
  depth: {files: "depth/{name}.png", range: [0.1, 10], intrinsics: [100, 100, 32, 24]}
  poses: {files: "pose/{name}.txt"}
"""
PROPAGATION = """
name: clips
task: propagation
size: 32
data:
  root: ROOT
  images: images/{folder}/{name}.png
  evaluate: {split: all}
  labels: {files: "masks/{folder}/{name}.png", classes: [background, cat, dog]}
"""
STEP = 8
"""Pixels by which the images of the rail differ: 100 pixels of focal length x 0.16 m / 2 m."""
CODES = np.random.default_rng(0).normal(size=(64, HEIGHT, WIDTH + 4 * STEP))
"""For each point of the wall that the rail looks at, features that no other point has."""


def options_of(recipe: str, root: Path, output: Path, *sources: Path, task: str | None = None, **more) -> ProbeOptions:
    path = output.parent / f"{output.name}.yaml"
    path.write_text(recipe.replace("ROOT", str(root)))
    grid = HEIGHT if recipe == MATCHING else HEIGHT // 2
    overrides = [f"protocol.grid={grid}", *more.pop("overrides", [])]
    return probe_options(
        str(path), task=task, output=output, sources=[str(source) for source in sources], device="cpu",
        precision="float32", overrides=overrides, **more,
    )  # fmt: skip


@pytest.fixture
def rail(tmp_path: Path) -> Path:
    """Three images of a wall 2 m away, by a camera that moves to the right by 0.16 m each time."""
    root = tmp_path / "rail"
    for number in range(3):
        for folder in ("images", "pose"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        make_photograph(root / f"images/{number}.png", number, WIDTH, HEIGHT)
        save(root / f"depth/{number}.png", np.full((HEIGHT, WIDTH), 2000, np.uint16))
        pose = np.eye(4)
        pose[0, 3] = 0.16 * number
        np.savetxt(root / f"pose/{number}.txt", pose)
    return root


def seen_from(offset: int = 0) -> Callable[[str], np.ndarray]:
    """Codes of what each image of the rail sees; all but the first are moved to the right by so many pixels."""

    def maps(name: str) -> np.ndarray:
        number = int(Path(name).stem)
        start = STEP * (number + 1) - (offset if number else 0)
        return CODES[:, :, start : start + WIDTH]

    return maps


RAIL = tuple(f"images/{number}.png" for number in range(3))


def test_features_of_the_place_itself_are_matched_perfectly(rail: Path, tmp_path: Path, listener: Listener) -> None:
    source = write_features(tmp_path / "codes.h5", rail, seen_from(), RAIL)
    done = probe(options_of(MATCHING, rail, tmp_path / "out", source), listener).results
    (run,) = done.runs
    assert [run.figures[name] for name in ("pck_1", "pck_2", "pck_5")] == [1, 1, 1]
    assert run.items == 3  # of three images: two pairs of neighbours, one of the outer ones
    assert run.errors == {"pck_1": 0, "pck_2": 0, "pck_5": 0}
    # Cameras that do not turn are in the first bin; nothing is known of the others.
    assert done.settings.classes == ["0-15 deg", "15-30 deg", "30-60 deg", "60-180 deg"]
    assert run.figures["class_pck_2"][0] == 1
    assert np.isnan(run.figures["class_pck_2"][1:]).all()
    assert set(results(tmp_path / "out")["settings"]["data"]) == {"evaluate"}


@pytest.mark.parametrize(("offset", "expected"), [(1, [1 / 3, 1, 1]), (3, [1 / 3, 1 / 3, 1]), (4, [1 / 3] * 3)])
def test_features_that_are_shifted_are_off_by_as_much(
    rail: Path, tmp_path: Path, listener: Listener, offset: int, expected: list[float]
) -> None:
    # Of 64 pixels, 1, 2 and 5 % are 0.64, 1.28 and 3.2. Pairs with the first image are off by the shift, the third is
    # not: both of its images are shifted alike.
    source = write_features(tmp_path / "codes.h5", rail, seen_from(offset), RAIL)
    (run,) = probe(options_of(MATCHING, rail, tmp_path / "out", source), listener).results.runs
    assert [run.figures[name] for name in ("pck_1", "pck_2", "pck_5")] == pytest.approx(expected)


def test_pairs_are_drawn_by_the_rules(rail: Path, tmp_path: Path, listener: Listener) -> None:
    source = write_features(tmp_path / "codes.h5", rail, seen_from(), RAIL)

    def items(*overrides: str) -> int:
        options = options_of(MATCHING, rail, tmp_path / "out", source, overrides=overrides, overwrite=True)
        return probe(options, listener).results.runs[0].items

    assert items("protocol.pairs=2") == 2
    assert items("protocol.frames=2") == 1
    # Neighbours share 56 of 64 columns, 87 %; the outer images 48, 75 %.
    assert items("protocol.overlap=0.81") == 2


def test_images_that_share_nothing_are_an_error(rail: Path, tmp_path: Path, listener: Listener) -> None:
    for number in range(3):
        pose = np.eye(4)
        pose[0, 3] = 100 * number
        np.savetxt(rail / f"pose/{number}.txt", pose)
    source = write_features(tmp_path / "codes.h5", rail, seen_from(), RAIL)
    with pytest.raises(
        BrixelError, match="No two of the 3 images of rail show the same part of a scene: none shares 20"
    ):
        probe(options_of(MATCHING, rail, tmp_path / "out", source), listener)


@pytest.mark.parametrize(("text", "message"), [
    ("1 0 0 0", "expected are 4 lines of 4 finite numbers; found 4 numbers"),
    ("nan " * 16, "expected are 4 lines of 4 finite numbers; found 16 numbers"),
    ("a b", "could not convert string to float: 'a'. Expected are 4 lines of 4 numbers"),
    ("2 0 0 0  0 2 0 0  0 0 2 0  0 0 0 1", "its first three rows and columns are no rotation"),
    ("1 0 0 0  0 1 0 0  0 0 -1 0  0 0 0 1", "its first three rows and columns are no rotation"),  # a mirror
])  # fmt: skip
def test_what_is_no_pose_is_an_error_that_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(BrixelError, match=message) as caught:
        read_pose(tmp_path / "p.txt")
    assert str(caught.value).startswith(f"{tmp_path}/p.txt is no pose")


# Propagation


def true_mask(sequence: str, frame: int) -> np.ndarray:
    """A cat that moves to the right; in `two`, a dog below it too."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[8:20, 6 + 4 * frame : 20 + 4 * frame] = 1
    if sequence == "two":
        mask[30:40, 10:24] = 2
    return mask


CLIPS = tuple(f"images/{sequence}/{frame}.png" for sequence in ("one", "two") for frame in range(5))


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    root = tmp_path / "clips"
    for number, name in enumerate(CLIPS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        make_photograph(root / name, number, WIDTH, HEIGHT)
        sequence, frame = Path(name).parts[1:]
        save(root / f"masks/{sequence}/{frame}", true_mask(sequence, int(Path(frame).stem)))
    return root


def answers(name: str) -> np.ndarray:
    mask = true_mask(Path(name).parts[1], int(Path(name).stem))
    return np.stack([mask[::2, ::2] == value for value in range(3)])


def test_the_truth_as_feature_is_propagated_perfectly(clips: Path, tmp_path: Path, listener: Listener) -> None:
    source = write_features(tmp_path / "answers.h5", clips, answers, CLIPS)
    done = probe(options_of(PROPAGATION, clips, tmp_path / "out", source), listener).results
    (run,) = done.runs
    assert [run.figures[name] for name in ("jf_mean", "j_mean", "f_mean", "j_recall", "j_decay")] == [1, 1, 1, 1, 0]
    assert (run.items, done.settings.classes) == (3, ["one", "two"])
    rows = ProbeFolder(tmp_path / "out").read_items("file answers.h5")
    assert list(rows) == ["one/cat", "two/cat", "two/dog"]


def test_features_that_say_nothing_leave_the_mask_where_it_was(clips: Path, tmp_path: Path, listener: Listener) -> None:
    # Of equal cells the label is a mean: what moves away is lost, what stays is kept.
    source = write_features(tmp_path / "flat.h5", clips, lambda _: np.ones((2, HEIGHT // 2, WIDTH // 2)), CLIPS)
    options = options_of(
        PROPAGATION, clips, tmp_path / "out", source, overrides=["protocol.radius=1", "protocol.top=99"]
    )
    rows = (probe(options, listener), ProbeFolder(tmp_path / "out").read_items("file flat.h5"))[1]
    assert rows["two/dog"]["j_mean"] > 0.8
    # The cat moves by 4 of its 14 columns a frame: 10 of 18, 6 of 22 and 2 of 26 columns are where it was.
    assert rows["two/cat"]["j_mean"] == pytest.approx((10 / 18 + 6 / 22 + 2 / 26) / 3, abs=0.08)


def test_an_interrupted_propagation_goes_on_with_the_next_sequence(
    clips: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_features(tmp_path / "answers.h5", clips, answers, CLIPS)
    whole = probe(options_of(PROPAGATION, clips, tmp_path / "whole", source), listener).results
    options, seen, measure = options_of(PROPAGATION, clips, tmp_path / "out", source), [], propagation._measure_sequence

    def interrupted(*arguments, after: int):
        seen.append(len(arguments[2]))
        if len(seen) > after:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(propagation, "_measure_sequence", lambda *given: interrupted(*given, after=1))
    with pytest.raises(KeyboardInterrupt):
        probe(options, listener)
    assert results(tmp_path / "out")["runs"] == []
    seen.clear()
    done = probe(options, listener).results
    assert seen == [5]  # frames of the second sequence alone
    assert done.runs[0].figures == whole.runs[0].figures
    assert probe(options, listener).results.runs == done.runs  # nothing is measured again
    assert seen == [5]


def propagated(clips: Path, tmp_path: Path, listener: Listener) -> ProbeOptions:
    """A finished propagation of features that say the truth, in `out`; its options."""
    source = write_features(tmp_path / "answers.h5", clips, answers, CLIPS)
    options = options_of(PROPAGATION, clips, tmp_path / "out", source)
    probe(options, listener)
    return options


def test_figures_that_no_results_vouch_for_are_neither_taken_nor_deleted(
    clips: Path, tmp_path: Path, listener: Listener
) -> None:
    options = propagated(clips, tmp_path, listener)
    folder = ProbeFolder(tmp_path / "out")
    file = folder.images("file answers.h5", 0)
    file.write_text(file.read_text().replace("1.0", "0.25"))
    assert "it does not hold the figures of results.json" in folder.verify()[file]
    for name in (folder.results, folder.table):
        name.unlink()
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    for overwrite in (False, True):
        with pytest.raises(
            UsageError, match=r"out holds images/file_answers.h5_seed0.csv, but no results.json of a pr"
        ):
            probe(replace(options, overwrite=overwrite), listener)
    assert {path: path.read_bytes() for path in before} == before
    folder.results.write_text('{"format": "brixel-benchmark-1"}')
    with pytest.raises(UsageError, match=r"out holds results.json, but no results.json of a probe: brixel does not re"):
        probe(replace(options, overwrite=True), listener)
    folder.results.write_text(EMPTY)  # killed while an earlier probe was being deleted
    assert probe(options, listener).results.runs[0].figures["j_mean"] == 1


def test_a_run_that_is_made_again_does_not_take_damaged_figures(
    clips: Path, tmp_path: Path, listener: Listener
) -> None:
    options = propagated(clips, tmp_path, listener)
    file = ProbeFolder(tmp_path / "out").images("file answers.h5", 0)
    file.write_text(file.read_text().replace("1.0", "0.25"))
    assert probe(options, listener).results.runs[0].figures["j_mean"] == 1


@pytest.mark.parametrize(("change", "message"), [
    (lambda root: save(root / "masks/two/0.png", np.zeros((HEIGHT, WIDTH), np.uint8)),
     "images/two/0.png: the mask of a sequence's first frame has no object, only background"),
    (lambda root: [path.unlink() for kind in ("images", "masks") for path in sorted((root / kind / "one").iterdir())[2:]],
     "1 of the 2 sequences of clips have fewer than 3 frames, such as one"),
])  # fmt: skip
def test_sequences_that_cannot_be_measured(
    clips: Path, tmp_path: Path, listener: Listener, change: Callable[[Path], object], message: str
) -> None:
    source = write_features(tmp_path / "answers.h5", clips, answers, CLIPS)
    change(clips)
    with pytest.raises(BrixelError, match=message):
        probe(options_of(PROPAGATION, clips, tmp_path / "out", source), listener)


# Sources and figures


def test_all_sources_are_compared_and_the_gap_has_a_spread(
    clips: Path, tmp_path: Path, model: tuple[str, str], listener: Listener
) -> None:
    sources = map(Path, ("backbone", "student", "teacher"))
    options = options_of(
        PROPAGATION, clips, tmp_path / "out", *sources, checkpoints=[model[0]], overrides=["protocol.grid=8"]
    )
    assert plan_only(options, listener).trains is False
    done = probe(options, listener).results
    assert list(done.summary) == ["backbone", "student", "teacher"]
    assert {run.seed for run in done.runs} == {0}
    rows = {label: ProbeFolder(tmp_path / "out").read_items(label) for label in done.summary}
    plain, own, best = ([item["f_mean"] for item in rows[name].values()] for name in ("backbone", "student", "teacher"))
    gap = gap_over_items(plain, own, best)
    assert done.recovered_gap["student"]["f_mean"] == pytest.approx(gap.value, nan_ok=True)
    assert done.gap_spread["student"]["f_mean"] == pytest.approx(gap.spread, nan_ok=True)


def test_a_gap_over_items_is_paired() -> None:
    # Each item recovers half of its own gap, however large: there is no spread.
    gap = gap_over_items([1, 2, 5], [2, 4, 6], [3, 6, 7])
    assert (gap.value, gap.spread) == (pytest.approx(0.5), pytest.approx(0))


def test_the_table_and_the_json_of_a_task_without_training(clips: Path, tmp_path: Path) -> None:
    source = write_features(tmp_path / "answers.h5", clips, answers, CLIPS)
    recipe = tmp_path / "clips.yaml"
    recipe.write_text(PROPAGATION.replace("ROOT", str(clips)).replace("task: propagation", "task: segmentation"))
    command = ["probe", "--recipe", str(recipe), "--task", "propagation", "--source", str(source), "--device", "cpu",
               "--set", f"protocol.grid={HEIGHT // 2}", "--output", str(tmp_path / "out")]  # fmt: skip
    code, _, err = invoke(*command[:3], *command[5:])  # the recipe's own task, segmentation
    assert code == 2
    assert "task segmentation needs the section data.train" in err
    code, out, _ = invoke(*command, "--dry-run", "--json")
    plan = checked("probe-dry-run", out)
    assert (code, plan["train_images"], plan["steps"]) == (0, 0, 0)
    code, out, err = invoke(*command, "--per-class")
    assert code == 0, err
    assert "clips: propagation, protocol propagation (changed: grid=24), student's input 32 px" in out
    assert "Evaluated on 10 images; nothing was trained. Mean and standard error over 3 objects of sequences." in out
    assert "J&F by sequence" in out
    code, out, _ = invoke(*command, "--json")
    assert checked("probe", out)["summary"]["file answers.h5"]["mean"]["j_mean"] == 1
    assert invoke("probe", "--verify", str(tmp_path / "out"))[0] == 0


@pytest.mark.parametrize(("arguments", "message"), [
    (["--task", "magic"], "--task magic: there is no such task. There are: segmentation, depth"),
    (["--task", "matching", "--predictions", "a=b"], "--predictions are of labels, and the task matching has none"),
    (["--task", "matching", "--transfer"], "--transfer applies the heads of the backbone: it needs a task with heads"),
    (["--recipe", "camvid", "--source", "student", "--transfer"], "--transfer applies the heads of the backbone: it"),
    (["--task", "matching", "--protocol", "quick"], "The protocol quick is for segmentation and depth and"),
    (["--task", "matching", "--set", "protocol.angles=[30,15]"], "protocol.angles must rise"),
    (["--task", "matching", "--set", "data.poses=null"], "task matching needs the section data.poses"),
    (["--task", "matching", "--set", "data.depth=null"], "task matching needs the section data.depth"),
    (["--task", "matching", "--set", "data.depth.intrinsics=null"], "task matching needs data.depth.intrinsics or"),
    (["--task", "propagation", "--set", "data.labels=null"], "task propagation needs the section data.labels"),
])  # fmt: skip
def test_what_does_not_go_together(arguments: list[str], message: str) -> None:
    code, _, err = invoke("probe", *arguments)
    assert code == 2
    assert message in err
