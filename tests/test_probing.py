"""Probing from end to end: known answers, and what the results say."""

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
    FAST,
    NAMES,
    description,
    figures,
    make_options,
    make_run,
    noise,
    one_hot,
    results,
    write_features,
)

from brixel_cli.core.heads import load_head
from brixel_cli.engines.probing import probing
from brixel_cli.engines.probing.evaluation import evaluate_head
from brixel_cli.engines.probing.features import Targets, open_maps, prepare
from brixel_cli.engines.probing.probing import plan_only, probe
from brixel_cli.engines.probing.results import ProbeResults, Summary, gaps_of, summarise
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import UsageError

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
        make_run(name, seed, {"miou": a + (seed - 1) / 100, "rmse_m": b, "same": 1.0, "class_iou": [a, math.nan]})
        for name, (a, b) in values.items()
        for seed in range(3)
    ]
    summary = summarise(list(sources), runs)
    assert summary["student"].mean_of("miou") == pytest.approx(0.5)
    assert summary["student"].spread["miou"] == pytest.approx(0.01)
    assert summary["student"].by_class("class_iou")[0] == pytest.approx(0.5)
    assert math.isnan(summary["student"].by_class("class_iou")[1])
    gaps = gaps_of(sources, summary)
    assert list(gaps) == ["student"]
    assert (gaps["student"]["miou"].value, gaps["student"]["rmse_m"].value) == (pytest.approx(0.5), pytest.approx(0.5))
    # 0.01 / 0.2 * sqrt(1 + 0.5^2 + 0.5^2)
    assert gaps["student"]["miou"].spread == pytest.approx(0.05 * 1.5**0.5)
    assert math.isnan(gaps["student"]["same"].value)
    worse = {**summary, "teacher": Summary(3, {"miou": 0.3, "rmse_m": 2.1}, {})}  # than the backbone: no gap
    assert all(math.isnan(gaps_of(sources, worse)["student"][name].value) for name in ("miou", "rmse_m"))
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


# Batches


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
