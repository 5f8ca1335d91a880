"""Probes that are repeated, stopped, resumed, added to or begun with something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Listener
from probe_sets import (
    FAST,
    make_options,
    noise,
    results,
    write_features,
)

from brixel_cli.config.probe import ProbeOptions
from brixel_cli.core.weights import load_tensors
from brixel_cli.engines.equal_cost import EQUAL_COST
from brixel_cli.engines.probing import probing, runs, sources
from brixel_cli.engines.probing import training as probe_training
from brixel_cli.engines.probing.probing import plan_only, probe
from brixel_cli.errors import BrixelError, UsageError

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

    monkeypatch.setattr(runs, "train_head", stopping)
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
    now = runs.versions()
    monkeypatch.setattr(runs, "versions", lambda: {**now, "torch": "99"})
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


# The backbone at equal cost


def test_the_backbone_at_equal_cost_keeps_the_size_that_was_measured(
    root: Path, tmp_path: Path, model, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(student, size, runtime):
        measured.append((student.adapter.factor, size))
        return 48, 48

    monkeypatch.setattr(sources, "equal_cost_size", measure)
    options = make_options(root, tmp_path / "out", sources=[], checkpoints=[model[0]], overrides=FAST)
    noted = "The input of the backbone at equal cost is measured by the run; here it is the student's."
    assert noted in plan_only(options, listener).notes
    assert measured == []
    first = probe(options, listener).results
    assert list(first.summary) == ["backbone", EQUAL_COST, "student", "teacher"]
    assert measured == [(4, (32, 32))]
    rival, plain = first.sources[EQUAL_COST], first.sources["backbone"]
    # Images of 48x64 px are seen at 32x48 px, 2x3 patches; half as much again, rounded to the patch, is 48x80 px.
    assert (plain.input, rival.input, rival.grid) == ({"32x48": 4}, {"48x80": 4}, {"3x5": 4})
    assert (rival.kind, rival.source, rival.scale, plain.scale) == ("equal_cost", "backbone", 1.5, 1.0)
    assert set(first.recovered_gap) == {EQUAL_COST, "student"}
    assert noted not in plan_only(options, listener).notes
    more = probe(
        make_options(root, tmp_path / "out", sources=[], checkpoints=[model[0]], overrides=FAST, seeds=2), listener
    ).results
    assert len(measured) == 1
    assert more.runs[2].figures == next(run for run in first.runs if run.source == EQUAL_COST).figures
    assert more.summary[EQUAL_COST].seeds == 2
