"""Probing from end to end: known answers, repeatability, resuming, and what is refused."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Listener
from probe_sets import (
    CLASSES,
    NAMES,
    description,
    make_options,
    make_run,
    make_set,
    noise,
    one_hot,
    results,
    write_features,
)

from brixel_cli.config.probe import ProbeOptions
from brixel_cli.core.heads import load_head
from brixel_cli.core.weights import load_tensors
from brixel_cli.engines.probing import probing
from brixel_cli.engines.probing import training as probe_training
from brixel_cli.engines.probing.evaluation import evaluate_head
from brixel_cli.engines.probing.features import Targets, open_maps, prepare
from brixel_cli.engines.probing.probing import plan_only, probe
from brixel_cli.engines.probing.results import ProbeResults, Summary, gaps_of, summarise
from brixel_cli.engines.probing.training import batches
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError, UsageError

FAST = ["protocol.steps=4", "protocol.points=64"]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("probe") / "set")


@pytest.fixture
def answers(root: Path, tmp_path: Path) -> str:
    return str(write_features(tmp_path / "answers.h5", root, one_hot(root, "labels", 3)))


def figures(options: ProbeOptions, listener: Listener) -> dict[str, float]:
    """Of the only source and seed."""
    (run,) = probe(options, listener).results.runs
    return run.figures


# Known answers


def test_the_label_as_feature_gives_miou_1(root: Path, tmp_path: Path, answers: str, listener: Listener) -> None:
    options = make_options(
        root, tmp_path / "out", sources=[answers], overrides=["protocol.steps=60", "protocol.lr=0.1"]
    )
    found = figures(options, listener)
    assert (found["miou"], found["pixel_accuracy"], found["boundary_iou"]) == (1.0, 1.0, 1.0)
    assert found["class_iou"] == [1.0] * 3


def test_random_features_give_chance(root: Path, tmp_path: Path, listener: Listener) -> None:
    source = str(write_features(tmp_path / "noise.h5", root, noise(4, (48, 64))))
    options = make_options(root, tmp_path / "out", sources=[source], overrides=["protocol.steps=60"])
    found = figures(options, listener)
    assert found["pixel_accuracy"] == pytest.approx(1 / 3, abs=0.06)
    assert found["miou"] < 1 / 3


def test_true_depth_gives_rmse_0(root: Path, tmp_path: Path, listener: Listener) -> None:
    source = str(write_features(tmp_path / "depth.h5", root, one_hot(root, "depth", 4)))
    changes = ["protocol.bins=4", "protocol.points=512", "protocol.steps=250", "protocol.lr=0.1"]
    options = make_options(root, tmp_path / "out", "depth", sources=[source], overrides=changes)
    found = figures(options, listener)
    assert found["rmse_m"] < 0.02
    assert (found["delta1"], found["rmse_m_image_mean"] < 0.02) == (1.0, True)
    # With weights that give the answer exactly, nothing remains.
    plan = plan_only(options, listener)
    head, _ = load_head(tmp_path / "out" / "heads" / "file_depth.h5_seed0.safetensors")
    branch = head.branches["depth"]
    branch[0].reset_parameters()
    branch[1].weight.data = 1000 * torch.eye(4)[:, :, None, None]
    branch[1].bias.data.zero_()
    item = plan.sources[0]
    maps, targets = open_maps(item, item.evaluate), Targets(item.evaluate, "depth")
    with listener.bar("", 0) as bar:
        exact = evaluate_head(head, maps, targets, item.evaluate, False, torch.device("cpu"), bar)
    assert exact.figures["rmse_m"] == 0


def test_true_normals_give_no_angle(root: Path, tmp_path: Path, listener: Listener) -> None:
    source = str(write_features(tmp_path / "levels.h5", root, one_hot(root, "depth", 4)))
    changes = ["protocol.bins=4", "protocol.points=512", "protocol.steps=300", "protocol.lr=0.05"]
    options = make_options(root, tmp_path / "out", "depth_normals", sources=[source], overrides=changes)
    found = figures(options, listener)
    # Pixels without depth have normals all the same, which the features do not tell: one block in sixteen at most.
    assert found["median_angle_deg"] < 3
    assert found["rmse_m"] < 0.5
    assert found["within_11.25"] > 0.95


@pytest.mark.parametrize(("task", "protocol", "changes"), [
    ("segmentation", "jafar", ["protocol.epochs=1"]),
    ("segmentation", "dinov3-ade", ["protocol.steps=2", "protocol.batch_size=2", "protocol.train_labels=64"]),
    ("segmentation", "brixel", ["protocol.epochs=1", "protocol.batch_size=2"]),
    ("depth", "dinov3-nyu", ["protocol.steps=2", "protocol.batch_size=2", "protocol.train_labels=64"]),
    ("depth", "brixel-nyu", ["protocol.epochs=1", "protocol.batch_size=2"]),
    ("depth_normals", "normals", ["protocol.steps=2", "protocol.batch_size=2", "protocol.train_labels=64"]),
    ("normals", "quick", ["protocol.steps=2"]),
])  # fmt: skip
def test_every_protocol_runs(
    root: Path, tmp_path: Path, model, listener: Listener, task: str, protocol: str, changes: list[str]
) -> None:
    options = make_options(
        root, tmp_path / "out", task, protocol=protocol, overrides=changes, checkpoints=[model[0]],
        sources=["backbone", "student"],
    )  # fmt: skip
    done = probe(options, listener).results
    assert done.settings.protocol.startswith(f"{protocol} (changed: ")
    for run in done.runs:
        assert all(math.isfinite(value) for value in run.figures.values() if not isinstance(value, list))


# Results


def test_the_result_says_all_that_a_figure_depends_on(root: Path, tmp_path: Path, model, listener: Listener) -> None:
    options = make_options(root, tmp_path / "out", checkpoints=[model[0]], overrides=FAST, seeds=2)
    done = probe(options, listener)
    stored = results(tmp_path / "out")
    settings = stored["settings"]
    assert settings["protocol"] == "quick (changed: points=64, steps=4)"
    assert settings["protocol_settings"]["lr"] == 2e-3
    assert stored["recipe"]["data"]["labels"]["ignore"] == [255]
    assert stored["recipe"]["data"]["root"] == str(root)
    assert settings["classes"] == list(CLASSES)
    assert [settings["data"][split]["images"] for split in ("train", "evaluate")] == [6, 4]
    assert settings["data"]["evaluate"]["split"]["split"] == "val"
    assert stored["seeds"] == [0, 1]
    assert {"brixel", "torch", "timm", "torchmetrics", "threads"} <= set(stored["versions"])
    assert all(run["versions"] == stored["versions"] for run in stored["runs"])
    sources = stored["sources"]
    assert list(sources) == ["backbone", "student", "teacher"]
    # The short side is 32: 32x43, snapped to 32x48 at patch 16; the teacher sees four times that.
    assert [source["input"] for source in sources.values()] == [{"32x48": 4}, {"32x48": 4}, {"128x192": 4}]
    assert [source["grid"] for source in sources.values()] == [{"2x3": 4}, {"8x12": 4}, {"8x12": 4}]
    assert all(len(source["backbone_sha256"]) == 64 for source in sources.values())
    assert len(sources["student"]["student_sha256"]) == 64
    mean, spread = (stored["summary"]["teacher"][key]["miou"] for key in ("mean", "spread"))
    values = [run["figures"]["miou"] for run in stored["runs"] if run["source"] == "teacher"]
    assert (mean, spread) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    table = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [(row["source"], row["seed"]) for row in table[:3]] == [
        ("backbone", "0"),
        ("backbone", "1"),
        ("student", "0"),
    ]
    assert float(table[0]["miou"]) == stored["runs"][0]["figures"]["miou"]
    assert all(path.is_file() for path in done.files)
    curve = [
        json.loads(line) for line in (tmp_path / "out" / "curves" / "student_seed1.jsonl").read_text().splitlines()
    ]
    assert [point["step"] for point in curve] == [1, 2, 3, 4]
    images = list(csv.DictReader((tmp_path / "out" / "images" / "student_seed1.csv").open()))
    assert [row["image"] for row in images] == list(NAMES[6:])


def test_recovered_gaps_by_hand() -> None:
    sources = {kind: description(kind) for kind in ("backbone", "student", "teacher")}
    values = {"backbone": (0.4, 2.0), "student": (0.5, 1.5), "teacher": (0.6, 1.0)}
    runs = [
        make_run(name, seed, {"miou": a + (seed - 1) / 10, "rmse_m": b, "same": 1.0, "class_iou": [a, math.nan]})
        for name, (a, b) in values.items()
        for seed in range(3)
    ]
    summary = summarise(list(sources), runs)
    assert summary["student"].mean_of("miou") == pytest.approx(0.5)
    assert summary["student"].spread["miou"] == pytest.approx(0.1)
    assert summary["student"].by_class("class_iou")[0] == pytest.approx(0.5)
    assert math.isnan(summary["student"].by_class("class_iou")[1])
    gaps = gaps_of(sources, summary)
    assert list(gaps) == ["student"]
    assert (gaps["student"]["miou"], gaps["student"]["rmse_m"]) == (pytest.approx(0.5), pytest.approx(0.5))
    assert math.isnan(gaps["student"]["same"])
    worse = {**summary, "teacher": Summary(3, {"miou": 0.3, "rmse_m": 2.1}, {})}  # than the backbone: no gap
    assert all(math.isnan(gaps_of(sources, worse)["student"][name]) for name in ("miou", "rmse_m"))
    del summary["teacher"]
    assert gaps_of(sources, summary) == {}


def test_results_are_read_back_and_so_are_those_of_earlier_versions(
    root: Path, tmp_path: Path, model, listener: Listener
) -> None:
    done = probe(make_options(root, tmp_path / "out", checkpoints=[model[0]], overrides=FAST), listener).results
    text = (tmp_path / "out" / "results.json").read_text()
    read = ProbeResults.from_json(text)
    assert read.to_json() == text
    assert (read.settings, read.recipe, read.sources) == (done.settings, done.recipe, done.sources)
    assert math.isnan(read.summary["student"].spread["miou"])  # of one seed; null in the file
    earlier = json.loads(text)
    earlier["share_of_gap_closed"] = earlier.pop("recovered_gap")
    assert ProbeResults.from_json(json.dumps(earlier)).to_json() == text


# Repeatability and resuming


def run_files(folder: Path) -> dict[str, object]:
    """Heads, curves and metrics of images, to the last bit."""
    files: dict[str, object] = {}
    for kind in ("heads", "curves", "images"):
        for path in sorted((folder / kind).iterdir()):
            contents: object = path.read_bytes()
            if kind == "heads":  # the order of a safetensors file's metadata is left to chance
                tensors, metadata = load_tensors(path)
                contents = {key: tensor.numpy().tobytes() for key, tensor in tensors.items()} | metadata
            files[path.relative_to(folder).as_posix()] = contents
    return files


def rows(folder: Path) -> list:
    return [[run["source"], run["seed"], run["figures"], run["final_loss"]] for run in results(folder)["runs"]]


def test_the_same_seed_gives_the_same_bits(root: Path, tmp_path: Path, model, listener: Listener) -> None:
    for name in ("a", "b"):
        torch.manual_seed(hash(name) % 1000)
        probe(make_options(root, tmp_path / name, checkpoints=[model[0]], overrides=FAST), listener)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert run_files(tmp_path / "a") == run_files(tmp_path / "b")


def test_seeds_differ(root: Path, tmp_path: Path, answers: str, listener: Listener) -> None:
    probe(make_options(root, tmp_path / "out", sources=[answers], overrides=FAST, seeds=2), listener)
    first, second = rows(tmp_path / "out")
    assert first[3] != second[3]


def test_an_interrupted_probe_goes_on_to_the_same_bits(
    root: Path, tmp_path: Path, model, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(name: str) -> ProbeOptions:
        return make_options(root, tmp_path / name, checkpoints=[model[0]], overrides=FAST, seeds=2)

    probe(options("whole"), listener)
    trained = []
    train = probe_training.train_head

    def stopping(*arguments, **named):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(1)
        return train(*arguments, **named)

    monkeypatch.setattr(probing, "train_head", stopping)
    with pytest.raises(KeyboardInterrupt):
        probe(options("cut"), listener)
    assert [row[:2] for row in rows(tmp_path / "cut")] == [["backbone", 0], ["backbone", 1], ["student", 0]]
    trained[:] = [1] * 10
    probe(options("cut"), listener)
    assert len(trained) == 13  # three of six were there
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert run_files(tmp_path / "cut") == run_files(tmp_path / "whole")


def test_seeds_and_sources_are_added_to_what_is_there(
    root: Path, tmp_path: Path, model, answers: str, listener: Listener
) -> None:
    probe(make_options(root, tmp_path / "out", sources=[answers], overrides=FAST), listener)
    before = run_files(tmp_path / "out")
    changes = {"checkpoints": [model[0]], "sources": ["backbone", answers], "overrides": FAST, "seeds": 2}
    done = probe(make_options(root, tmp_path / "out", **changes), listener).results
    assert [(run.source, run.seed) for run in done.runs] == [
        ("file answers.h5", 0), ("file answers.h5", 1), ("backbone", 0), ("backbone", 1),
    ]  # fmt: skip
    after = run_files(tmp_path / "out")
    assert {name: after[name] for name in before} == before


def test_a_finished_probe_computes_nothing(
    root: Path, tmp_path: Path, model, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = make_options(root, tmp_path / "out", checkpoints=[model[0]], overrides=FAST)
    first = probe(options, listener)
    before = rows(tmp_path / "out")
    for file in (tmp_path / "out" / "features").iterdir():
        file.unlink()  # who needs the room may have it
    monkeypatch.setattr(probing, "prepare", lambda *_: pytest.fail("features were computed again"))
    again = probe(options, listener)
    assert (rows(tmp_path / "out"), again.files) == (before, first.files)


def test_other_settings_are_refused_by_name(root: Path, tmp_path: Path, answers: str, listener: Listener) -> None:
    out = tmp_path / "out"
    probe(make_options(root, out, sources=[answers], overrides=FAST), listener)

    def refused(**changes) -> str:
        with pytest.raises(UsageError) as caught:
            probe(make_options(root, out, **{"sources": [answers], "overrides": FAST, **changes}), listener)
        text = str(caught.value)
        assert text.startswith(f"{out} holds a probe that was begun with something else:")
        assert "Give --overwrite to begin anew, or another folder with --output." in text
        return text

    assert "protocol_settings.lr: 0.002 -> 0.1" in refused(overrides=[*FAST, "protocol.lr=0.1"])
    assert "size: 32 -> 48" in refused(size="48")
    write_features(tmp_path / "answers.h5", root, noise(5))
    assert "file answers.h5: bytes: " in refused()
    (out / "pictures" / "depth_best.png").write_bytes(b"")  # of another task
    done = probe(make_options(root, out, sources=[answers], overrides=FAST, overwrite=True), listener)
    assert "depth_best.png" not in [path.name for path in done.files]


def test_figures_keep_the_versions_that_they_were_made_with(
    root: Path, tmp_path: Path, answers: str, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe(make_options(root, tmp_path / "out", sources=[answers], overrides=FAST), listener)
    now = probing._versions()
    monkeypatch.setattr(probing, "_versions", lambda: {**now, "torch": "99"})
    probe(make_options(root, tmp_path / "out", sources=[answers], overrides=FAST, seeds=2), listener)
    assert [run["versions"]["torch"] for run in results(tmp_path / "out")["runs"]] == [now["torch"], "99"]


def test_damaged_results_are_named(root: Path, tmp_path: Path, answers: str, listener: Listener) -> None:
    options = make_options(root, tmp_path / "out", sources=[answers], overrides=FAST)
    probe(options, listener)
    for text in ("{", '{"format": "other"}'):
        (tmp_path / "out" / "results.json").write_text(text)
        with pytest.raises(BrixelError, match=r"results.json cannot be read: .* Give --overwrite to begin anew"):
            probe(options, listener)


# Batches


def test_an_epoch_takes_every_image_once_in_one_of_its_fields() -> None:
    positions = [[0, 1], [2, 3], [4, 5], [6, 7]]
    taken = list(batches(positions, [(2, 2)] * 8, 2, 20, seed=0))
    for epoch in range(10):
        pair = taken[2 * epoch] + taken[2 * epoch + 1]
        assert sorted(crop // 2 for crop in pair) == [0, 1, 2, 3]
    assert {crop for batch in taken for crop in batch} == set(range(8))
    assert taken == list(batches(positions, [(2, 2)] * 8, 2, 20, seed=0))
    assert taken != list(batches(positions, [(2, 2)] * 8, 2, 20, seed=1))


def test_batches_do_not_mix_grids() -> None:
    grids = [(2, 2), (2, 3), (2, 2), (2, 3), (2, 2)]
    taken = list(batches([[n] for n in range(5)], grids, 4, 50, seed=0))
    assert len(taken) == 50
    assert all(len({grids[crop] for crop in batch}) == 1 for batch in taken)
    counts = np.bincount(np.concatenate(taken), minlength=5)
    assert counts.min() > 30  # 200 draws of 5 images


def test_labels_of_several_sizes_train_together(root: Path, tmp_path: Path, listener: Listener) -> None:
    from PIL import Image

    mixed = make_set(tmp_path / "mixed")
    for split, name in (("train", "0"), ("val", "1")):
        for folder in ("images", "labels"):
            path = mixed / folder / split / f"{name}.png"
            Image.open(path).resize((80, 60), Image.Resampling.NEAREST).save(path)
    whole = one_hot(mixed, "labels", 3)

    def blocks(name: str) -> np.ndarray:
        """The label of each block's middle: the same grid whatever the size."""
        labels = whole(name)
        step = labels.shape[1] // 6
        return labels[:, step // 2 :: step, step // 2 :: step]

    source = str(write_features(tmp_path / "mixed.h5", mixed, blocks))
    for points in (0, 64):
        changes = [f"protocol.points={points}", "protocol.steps=60", "protocol.lr=0.1", "protocol.batch_size=3"]
        found = figures(make_options(mixed, tmp_path / f"{points}", sources=[source], overrides=changes), listener)
        assert found["pixel_accuracy"] > 0.75


def test_a_loss_that_is_not_finite_ends_the_training(root: Path, tmp_path: Path, listener: Listener) -> None:
    source = str(write_features(tmp_path / "nan.h5", root, lambda name: np.full((2, 4, 4), np.nan)))
    with pytest.raises(
        BrixelError, match=r"The loss is nan at step 1, seed 0\. Lower the rate: --set protocol.lr=0.0002"
    ):
        probe(make_options(root, tmp_path / "out", sources=[source], overrides=FAST), listener)


@pytest.mark.parametrize(("name", "message"), [
    ("train_head", r"Out of memory training on backbone with 8 images a step\. Take --set protocol.batch_size=4, a smal"),
    ("evaluate_head", r"Out of memory evaluating backbone, image by image\. Take a smaller --res, or another --device"),
])  # fmt: skip
def test_memory_that_runs_out_names_the_options_to_change(
    root: Path, tmp_path: Path, model, listener: Listener, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(probing, name, full)
    with pytest.raises(BrixelError, match=message):
        probe(make_options(root, tmp_path / "out", checkpoints=[model[0]], overrides=FAST), listener)


def test_stored_features_are_shared_by_probes(
    root: Path, tmp_path: Path, model, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"checkpoints": [model[0]], "features": tmp_path / "common"}
    probe(make_options(root, tmp_path / "a", overrides=FAST, **common), listener)
    from brixel_cli.engines.probing.sources import ModelSource

    monkeypatch.setattr(ModelSource, "load", lambda *_: pytest.fail("a model was loaded"))
    other = make_options(root, tmp_path / "b", overrides=[*FAST, "protocol.lr=0.1"], **common)
    assert plan_only(other, listener).bytes_needed == 0
    probe(other, listener)


def test_the_runtime_is_named_by_the_option(root: Path, tmp_path: Path, answers: str, listener: Listener) -> None:
    options = make_options(root, tmp_path / "out", sources=[answers], device="cuda:7")
    with pytest.raises(UsageError, match="--device is cuda:7, which this machine does not have; present: cpu"):
        probe(options, listener)


def test_several_processes_are_refused(
    root: Path, tmp_path: Path, answers: str, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two(Runtime):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            self.world_size = 2

    monkeypatch.setattr(probing, "Runtime", Two)
    with pytest.raises(UsageError, match="brixel probe runs in one process: start it without torchrun"):
        probe(make_options(root, tmp_path / "out", sources=[answers]), listener)


def test_prepare_says_what_it_takes_first(root: Path, tmp_path: Path, model, listener: Listener) -> None:
    options = make_options(root, tmp_path / "out", checkpoints=[model[0]], overrides=FAST)
    plan = plan_only(options, listener)
    prepare(plan, Runtime("cpu"), listener)
    assert any(said.startswith("features: ") and "needed" in said and "free" in said for said in listener.said)
