"""Distilling, extracting, probing and benchmarking on a GPU that is there: `make test-gpu`, some minutes.

BRIXEL_TEST_DEVICE=cpu runs the same on the CPU, but for what is about a GPU's memory: so their code is tried without one.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Listener, with_changes
from probe_sets import make_options, make_set
from test_processes import distil_with

import brixel_cli
from brixel_cli.config.benchmark import BenchmarkOptions
from brixel_cli.config.distill import AdapterConfig
from brixel_cli.config.extract import ExtractOptions
from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.student import Student, build_adapter
from brixel_cli.core.weights import load_tensors
from brixel_cli.engines.benchmarking.benchmarking import benchmark
from brixel_cli.engines.distilling.distillation import distill
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.engines.distilling.trainer import Trainer
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.engines.models import FeatureExtractor
from brixel_cli.engines.probing.probing import probe
from brixel_cli.errors import BrixelError

DEVICE = os.environ.get("BRIXEL_TEST_DEVICE", "cuda")
NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cpu" and not NUM_GPUS, reason="no CUDA device here"),
]
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="about a GPU's own memory")
needs_two = pytest.mark.skipif(DEVICE != "cpu" and NUM_GPUS < 2, reason=f"needs two GPUs; here are {NUM_GPUS}")
H_PLUS_BYTES = 4e9


class _StoppedError(Exception):
    """In the place of a power cut."""


@pytest.fixture
def little_memory() -> Iterator[Any]:
    """A function after whose call torch can take hardly any more of the GPU's memory."""

    def limit() -> None:
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + 2**20) / total, 0)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0, 0)
    torch.cuda.empty_cache()


# Distilling


def changes_of(kind: str) -> list[str]:
    return [
        f"run.device={DEVICE}", "run.precision=bfloat16", "run.checkpoint_every=10", "run.validate_every=20",
        "run.workers=2", "optim.steps=20", f"adapter.kind={kind}",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["fusion", "deformable"])
def test_twenty_steps_in_bfloat16_and_a_resumed_run(
    kind: str, tiny_recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_changes(tiny_recipe_file, *changes_of(kind))
    whole = distill(recipe, RunFolder(tmp_path / "whole"), Listener()).results
    update = Trainer.update

    def stopping(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.step == 13:
            raise _StoppedError
        return update(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stopping)
        with pytest.raises(_StoppedError):
            distill(recipe, RunFolder(tmp_path / "halves"), Listener())
    halves = distill(recipe, RunFolder(tmp_path / "halves"), Listener(), resume=True).results
    assert whole.steps == halves.steps == 20
    for name, value in whole.best.student.items():
        assert np.isfinite(value)
        assert halves.best.student[name] == pytest.approx(value, rel=1e-2, abs=1e-4)
    left, right = (load_tensors(tmp_path / name / "last.safetensors")[0] for name in ("whole", "halves"))
    assert left.keys() == right.keys()
    difference = sum((left[key].double() - right[key].double()).square().sum().item() for key in left)
    # Kernels of a GPU may add up in another order from run to run.
    assert difference <= 1e-4 * sum(value.double().square().sum().item() for value in left.values())


def test_a_cache_of_targets(tiny_recipe_file: Path, tmp_path: Path) -> None:
    recipe = with_changes(tiny_recipe_file, *changes_of("fusion"), "cache.enabled=true", "views.kind=fixed")
    found = distill(recipe, RunFolder(tmp_path / "run"), Listener()).results
    assert found.best.student["cosine"] > 0


@needs_two
def test_two_processes_give_the_validation_of_one(tiny_recipe_file: Path, tmp_path: Path) -> None:
    changes = (f"run.device={DEVICE}", "run.precision=float32")
    one = distil_with(1, tiny_recipe_file, tmp_path / "one", *changes)
    two = distil_with(2, tiny_recipe_file, tmp_path / "two", *changes)
    for name, value in one["best"]["student"].items():
        assert two["best"]["student"][name] == pytest.approx(value, rel=1e-3, abs=1e-3)


@needs_cuda
def test_memory_running_out_in_a_step_is_explained(
    tiny_recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, little_memory: Any
) -> None:
    update = Trainer.update

    def starved(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        little_memory()
        return update(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "update", starved)
    large = ["views.teacher_size=512", "data.min_side=1", "optim.batch_size=16", "optim.linear_views=0"]
    recipe = with_changes(tiny_recipe_file, *changes_of("fusion"), *large)
    with pytest.raises(BrixelError, match=r"(?s)Out of memory.*optim\."):
        distill(recipe, RunFolder(tmp_path / "run"), Listener())


# Extracting


def cosines(one: Path, other: Path) -> np.ndarray:
    """Mean cosine similarity of each image's features in two files."""
    left, right = brixel_cli.FeatureFile(one), brixel_cli.FeatureFile(other)
    assert left.paths == right.paths
    found = []
    for row in range(len(left)):
        a, b = (torch.from_numpy(np.array(file[row])).double() for file in (left, right))
        found.append(torch.nn.functional.cosine_similarity(a, b, dim=0).mean().item())
    return np.array(found)


@pytest.mark.parametrize("source", ["student", "backbone", "teacher"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_extracted_features_are_those_of_the_cpu(
    source: str, precision: str, extract_options: Any, tmp_path: Path, listener: Listener
) -> None:
    if DEVICE == "cpu" and precision == "float16":
        pytest.skip("float16 is for GPUs")
    extract(extract_options(source=source, output=tmp_path / "cpu.h5"), listener)
    options: ExtractOptions = extract_options(
        source=source, device=DEVICE, precision=precision, output=tmp_path / "gpu.h5"
    )
    extract(options, listener)
    assert cosines(tmp_path / "cpu.h5", tmp_path / "gpu.h5").min() > 0.999


def test_principal_components_and_int8(extract_options: Any, tmp_path: Path, listener: Listener) -> None:
    extract(extract_options(device=DEVICE, pca=3, dtype="int8", preview=True), listener)
    features = brixel_cli.FeatureFile(tmp_path / "out.h5")
    assert features[0].shape[0] == 3
    assert not features.failures


@needs_two
def test_the_second_gpu(extract_options: Any, tmp_path: Path, listener: Listener, model: tuple[str, str]) -> None:
    second = "cpu" if DEVICE == "cpu" else "cuda:1"
    extract(extract_options(output=tmp_path / "cpu.h5"), listener)
    extract(extract_options(output=tmp_path / "first.h5", device=DEVICE), listener)
    extract(extract_options(output=tmp_path / "second.h5", device=second), listener)
    assert cosines(tmp_path / "cpu.h5", tmp_path / "second.h5").min() > 0.999
    student = brixel_cli.load_student(model[0], device=second)
    assert str(student(torch.zeros(1, 3, 64, 64, device=second)).device) == second


@needs_cuda
def test_memory_running_out_for_one_image_is_explained(
    extract_options: Any, monkeypatch: pytest.MonkeyPatch, little_memory: Any, listener: Listener
) -> None:
    forward = FeatureExtractor._forward

    def starved(model: FeatureExtractor, *args: Any, **kwargs: Any) -> Any:
        little_memory()
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(FeatureExtractor, "_forward", starved)
    with pytest.raises(BrixelError, match="Out of memory"):
        extract(extract_options(device=DEVICE, res=2048, batch_size=2), listener)


# Probing and benchmarking


@pytest.mark.parametrize("task", ["segmentation", "depth_normals"])
def test_a_probe_comes_to_the_figures_of_the_cpu(
    task: str, model: tuple[str, str], tmp_path: Path, listener: Listener
) -> None:
    root = make_set(tmp_path / "set")
    figures = []
    for device in ("cpu", DEVICE):
        options = make_options(
            root, tmp_path / f"out-{len(figures)}", task, device=device, sources=["student"], checkpoints=[model[0]],
            backbone_weights=model[1], overrides=["protocol.steps=20"], features=tmp_path / f"features-{len(figures)}",
        )  # fmt: skip
        figures.append(probe(options, listener).results.runs[0].figures)
    for name in ("pixel_accuracy", "rmse_m", "mean_angle_deg"):
        if name in figures[0]:
            assert figures[1][name] == pytest.approx(figures[0][name], rel=0.05, abs=0.02)
    assert figures[0].keys() == figures[1].keys()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_benchmark(compiled: bool, model: tuple[str, str], tmp_path: Path, listener: Listener) -> None:
    options = BenchmarkOptions(
        highres=True, checkpoint=model[0], sizes="64", device=DEVICE, compiled=compiled, seconds=0.3,
        precision="bfloat16", output=tmp_path / "out",
    )  # fmt: skip
    results, _ = benchmark(options, listener)
    assert [row.label for row in results.rows] == ["backbone", "bilinear", "student", "teacher"]
    for row in results.rows:
        assert row.latency is not None
        assert row.memory == "measured"
        assert (row.latency.compile_seconds is not None) == compiled


@needs_cuda
def test_the_largest_student_takes_less_than_four_gigabytes() -> None:
    torch.manual_seed(0)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backbone = load_backbone("vit_huge_plus_patch16_dinov3", "random", "bfloat16", "cuda")
    adapter = build_adapter(backbone.embed_dim, 4, AdapterConfig()).to("cuda", torch.bfloat16)
    student = Student(backbone, adapter).eval()
    with torch.inference_mode():
        maps = student(torch.randn(1, 3, 256, 256, device="cuda"))
    assert tuple(maps.shape) == (1, 1280, 64, 64)
    assert torch.cuda.max_memory_allocated() - before < H_PLUS_BYTES
