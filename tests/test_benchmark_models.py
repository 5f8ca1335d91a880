"""Which models a benchmark measures, what it takes up again, and what it measures anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmarks import BASELINE, options, row
from conftest import TINY, Listener
from PIL import Image

from brixel_cli.cli.tables import fidelity_tables
from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.weights import load_tensors, save_tensors
from brixel_cli.engines.benchmarking.benchmarking import benchmark, count_only
from brixel_cli.engines.benchmarking.models import find_candidates
from brixel_cli.errors import BrixelError, SizeError, UsageError

pytestmark = pytest.mark.usefixtures("quick_benchmark")


# Which models


def test_a_recipe_is_measured_for_cost_and_says_so(tmp_path: Path, photographs: Path, listener: Listener) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("PHOTOS", str(photographs)))
    results, _ = benchmark(options(tmp_path / "out", models="tiny.yaml"), listener)
    assert (results.models[0].weights, results.models[0].student) == ("random", None)
    assert all(row.latency and not row.fidelity for row in results.rows)
    assert "Random weights, on purpose, as only cost is measured: tiny." in results.notes


def test_weights_that_cannot_be_had_leave_the_cost(run: Path, tmp_path: Path, listener: Listener) -> None:
    other = tmp_path / "runs" / "copy"
    other.mkdir(parents=True)
    weights, gone = str(run.parent / "vit.safetensors"), str(tmp_path / "gone.safetensors")
    (other / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(weights, gone))
    tensors, metadata = load_tensors(run / "student.safetensors")
    save_tensors(
        other / "student.safetensors", tensors, {key: text.replace(weights, gone) for key, text in metadata.items()}
    )
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(other)), listener)
    (warning,) = listener.warned
    assert warning.startswith("copy: cost only, with random weights.")
    assert "Give --backbone-weights PATH" in warning
    assert results.models[0].weights == "random"
    assert all(row.latency and not row.fidelity for row in results.rows)


def test_weights_that_were_named_must_do(run: Path, tmp_path: Path, listener: Listener) -> None:
    with pytest.raises(BrixelError, match="No backbone weights at absent.pth"):
        benchmark(options(tmp_path / "out", checkpoint=str(run), backbone_weights="absent.pth"), listener)


def test_a_file_is_a_student_among_models_as_alone(run: Path, tmp_path: Path, listener: Listener) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes((run / "student.safetensors").read_bytes())
    found = find_candidates(options(tmp_path, models=f"{file},{run / 'student.safetensors'}"), listener)
    assert [candidate.name for candidate in found] == ["mine", "run"]
    assert all(candidate.spec.stored for candidate in found)


def test_two_models_of_one_name_are_refused(run: Path, tmp_path: Path, listener: Listener) -> None:
    with pytest.raises(UsageError, match="--models: two models are called run"):
        benchmark(options(tmp_path / "out", models=f"{run},{run}"), listener)


def test_models_that_name_none_are_refused(tmp_path: Path, listener: Listener) -> None:
    with pytest.raises(UsageError, match="--models names no recipe and no student: ' ,'"):
        benchmark(options(tmp_path / "out", models=" ,"), listener)


def test_a_run_is_called_by_its_folder_from_within_too(
    run: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(run)
    (candidate,) = find_candidates(options(tmp_path, checkpoint="."), listener)
    assert candidate.name == run.name


def test_a_size_that_does_not_fit_names_those_that_do(run: Path, tmp_path: Path, listener: Listener) -> None:
    with pytest.raises(SizeError, match="Nearest that fit: height 32 or 48"):
        benchmark(options(tmp_path / "out", checkpoint=str(run), sizes="40"), listener)
    assert not (tmp_path / "out").exists()


# What is kept, and what is not run


def test_a_damaged_photograph_is_not_among_those_compared(run: Path, tmp_path: Path, listener: Listener) -> None:
    (tmp_path / "photos").mkdir()
    for name, colour in (("one", "red"), ("two", "blue")):
        Image.new("RGB", (128, 128), colour).save(tmp_path / "photos" / f"{name}.png")
    damaged = tmp_path / "photos" / "two.png"
    damaged.write_bytes(damaged.read_bytes()[:60])  # the header is sound
    results, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), images=Path("photos")), listener)
    (model,) = results.models
    figures, _ = fidelity_tables(results, model, (32, 32))
    assert figures.title.endswith(": 1 images of photos")


def test_what_was_measured_is_taken_up_again(run: Path, tmp_path: Path, listener: Listener) -> None:
    first, _ = benchmark(options(tmp_path / "out", checkpoint=str(run)), listener)
    second, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), sizes="32,48"), listener)
    assert [row for row in second.rows if row.size == (32, 32)] == list(first.rows)
    assert len(second.rows) == 10
    assert "run at 32x32 px: measured before; --overwrite measures anew" in listener.said
    third, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), overwrite=True), listener)
    assert third.rows != first.rows  # no two measurements of time are equal


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"precision": "bfloat16"}])
def test_other_settings_are_measured_anew(
    run: Path, tmp_path: Path, listener: Listener, change: dict[str, Any]
) -> None:
    first, _ = benchmark(options(tmp_path / "out", checkpoint=str(run)), listener)
    second, _ = benchmark(options(tmp_path / "out", checkpoint=str(run), **change), listener)
    assert any("of another machine or other settings: everything is measured anew" in text for text in listener.said)
    assert row(first, "teacher").latency != row(second, "teacher").latency


@pytest.mark.parametrize("changed", ["photograph", "weights", "baseline"])
def test_what_changed_on_disk_is_measured_anew(tmp_path: Path, run: Path, listener: Listener, changed: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "tiny.yaml").write_text(TINY.replace("PHOTOS", "photos"))
    (tmp_path / "mine.py").write_text(BASELINE)
    (tmp_path / "vit.safetensors").write_bytes((run.parent / "vit.safetensors").read_bytes())
    Image.new("RGB", (128, 128), "red").save(tmp_path / "photos" / "one.png")
    wanted = options(
        tmp_path / "out", models="tiny.yaml", backbone_weights="vit.safetensors", images=Path("photos"),
        baselines=("mine.py:nearest",), highres=False,
    )  # fmt: skip
    first, _ = benchmark(wanted, listener)
    assert benchmark(wanted, listener)[0].rows == first.rows
    if changed == "photograph":
        Image.new("RGB", (128, 128), "blue").save(tmp_path / "photos" / "one.png")
    elif changed == "weights":
        save_tensors(tmp_path / "vit.safetensors", load_backbone("test_vit", "random").vit.state_dict(), {})
    else:
        (tmp_path / "mine.py").write_text(BASELINE.replace('mode="nearest"', 'mode="bicubic"'))
    second, _ = benchmark(wanted, listener)
    assert row(second, "nearest").latency != row(first, "nearest").latency
    assert row(second, "nearest").fidelity != row(first, "nearest").fidelity


def test_precision_is_of_the_arithmetic_and_the_recipe_says_how_weights_are_held(
    run: Path, tmp_path: Path, listener: Listener
) -> None:
    wide, _ = benchmark(options(tmp_path / "wide", checkpoint=str(run)), listener)
    half, _ = benchmark(options(tmp_path / "half", checkpoint=str(run), precision="bfloat16"), listener)
    assert (wide.environment.precision, half.environment.precision) == ("float32", "bfloat16")
    assert row(wide, "student").weights_bytes == row(half, "student").weights_bytes
    exact, rounded = row(wide, "student").fidelity, row(half, "student").fidelity
    assert exact is not None
    assert rounded is not None
    assert exact.cosine == pytest.approx(rounded.cosine, abs=0.02)
    assert exact.cosine != rounded.cosine
    (tmp_path / "copy").mkdir()
    for name in ("student.safetensors", "recipe.yaml"):
        (tmp_path / "copy" / name).write_bytes((run / name).read_bytes())
    recipe = (run / "recipe.yaml").read_text().replace("dtype: float32", "dtype: bfloat16")
    (tmp_path / "copy" / "recipe.yaml").write_text(recipe)
    held = count_only(options(tmp_path / "out", checkpoint=str(tmp_path / "copy")), listener)
    assert 2 * row(held, "student").weights_bytes == row(wide, "student").weights_bytes


def test_a_student_on_the_hub_is_one_of_the_models(
    run: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brixel_cli.core.hub.check_hub", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(run / "student.safetensors"))
    names = "hf-hub:someone/sharp@v2,dinov2_vits14"
    hub, shipped = find_candidates(options(tmp_path, models=names), listener)
    assert (hub.name, hub.spec.backbone, shipped.name) == ("sharp@v2", "test_vit", "dinov2_vits14")
