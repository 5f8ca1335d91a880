"""Photographs and recipes that all tests share: made here, small, and the same on every machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import brixel_cli
from brixel_cli.config.distill import AdapterConfig, FusionConfig, Recipe
from brixel_cli.config.extract import ExtractOptions
from brixel_cli.config.files import load_recipe
from brixel_cli.core.backbone import Backbone, load_backbone
from brixel_cli.core.student import StudentCard, build_adapter, save_student

TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
"""What Python is started with for two processes of torchrun; the script, or -m and the module, comes next."""
FIXTURES = Path(__file__).parent / "fixtures"

TINY = """
name: tiny
backbone: {name: test_vit, weights: random}
adapter: {fusion: {width: 16, fine_width: 16, blocks: [1, 1, 1]}}
data: {images: PHOTOS, val_fraction: 0.1}
views: {teacher_size: 128}
loss: {spectral: {weight: 0.1}}
optim: {steps: 4, batch_size: 4, warmup_steps: 0}
run: {device: cpu, workers: 0, validate_every: 2, checkpoint_every: 1, log_every: 1, tensorboard: false}
"""


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@contextmanager
def stopped_writing(monkeypatch: pytest.MonkeyPatch, writer: type, limit: int) -> Iterator[list[int]]:
    """Within, Ctrl-C comes before the first `write` of a class after which more rows than a limit would be written.

    Yields:
        The rows that were written.
    """
    original, written = writer.write, []

    def write(self: object, rows: Sequence[int], *values: object) -> None:
        if len(written) + len(rows) > limit:
            raise KeyboardInterrupt
        written.extend(rows)
        original(self, rows, *values)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write", write)
        yield written
    assert written


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))  # subprocesses see it too


def make_photograph(path: Path, seed: int, width: int = 200, height: int = 160) -> Path:
    """A photograph-like picture: smooth colours, a disc with a sharp edge, some grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    pixels = np.stack(
        [0.5 + 0.4 * np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + i) for i in range(3)], axis=-1
    )
    disc = (x - rng.uniform(0.2, 0.8)) ** 2 + (y - rng.uniform(0.2, 0.6)) ** 2 < rng.uniform(0.02, 0.06)
    pixels[disc] = rng.uniform(0, 1, 3)
    pixels += rng.normal(0, 0.03, pixels.shape)
    Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight photographs, 200x160 px."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(8):
        make_photograph(folder / f"{number}.png", number)
    return folder


@pytest.fixture
def tiny_recipe_file(tmp_path: Path, photographs: Path) -> Path:
    """A recipe that trains in seconds: test_vit, 32 px against 128 px."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("PHOTOS", str(photographs)))
    return path


@pytest.fixture
def tiny_recipe(tiny_recipe_file: Path) -> Recipe:
    return load_recipe(str(tiny_recipe_file))


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return load_backbone("test_vit", "random")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A student of test_vit with weights of its own on disk: (checkpoint, backbone weights)."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    backbone = load_backbone("test_vit", "random")
    save_file(backbone.vit.state_dict(), folder / "vit.safetensors")
    config = AdapterConfig(fusion=FusionConfig(width=16, fine_width=16, blocks=[1, 1, 1]))
    adapter = build_adapter(backbone.embed_dim, 4, config)
    torch.nn.init.normal_(adapter.out[1].weight, std=0.1)
    trained = load_backbone("test_vit", str(folder / "vit.safetensors"))
    card = StudentCard("test_vit", str(folder / "vit.safetensors"), trained.sha256, backbone.embed_dim, 4, config, 7, (64, 64),
                       trained.signature())  # fmt: skip
    save_student(folder / "student.safetensors", adapter.state_dict(), card)
    return str(folder), str(folder / "vit.safetensors")


def with_changes(file: Path, *overrides: str) -> Recipe:
    """A recipe file with overrides."""
    return load_recipe(str(file), overrides)


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make packages look as if they were not installed."""
    from brixel_cli.core import extras

    found = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in packages else found(name))
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)


class Listener:
    """A reporter that keeps what it hears."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)

    def bar(self, title: str, total: int, done: int = 0, unit: str = "it"):
        from contextlib import nullcontext

        class Bar:
            def update(self, count: int) -> None: ...

            def set_postfix_str(self, text: str, refresh: bool = True) -> None: ...

        return nullcontext(Bar())


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def extract_options(model: tuple[str, str], photographs: Path, tmp_path: Path):
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


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """A student that was trained, in float32, on a backbone whose weights are on disk."""
    from brixel_cli.engines.distilling.distillation import distill
    from brixel_cli.engines.distilling.run_folder import RunFolder

    folder = tmp_path_factory.mktemp("benchmarked")
    torch.manual_seed(3)
    save_file(load_backbone("test_vit", "random").vit.state_dict(), folder / "vit.safetensors")
    (folder / "tiny.yaml").write_text(TINY.replace("PHOTOS", str(photographs)))
    changes = [f"backbone.weights={folder / 'vit.safetensors'}", "run.precision=float32", "optim.lr=0.01"]
    distill(load_recipe(str(folder / "tiny.yaml"), changes), RunFolder(folder / "run"), Listener())
    return folder / "run"


@pytest.fixture
def quick_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process for each row takes seconds: only the test of just that starts one. Times are of few rounds."""
    from brixel_cli.engines import latency
    from brixel_cli.engines.benchmarking import benchmarking, cost

    monkeypatch.setattr(latency, "MOST_ROUNDS", latency.MIN_ROUNDS)
    monkeypatch.setattr(benchmarking, "peak_in_fresh_process", lambda *_: cost.PeakMemory(1000, 10))
    monkeypatch.setattr(cost, "LARGEST_SIDE", 512)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small labelled set (see probe_sets.py)."""
    from probe_sets import make_set

    return make_set(tmp_path_factory.mktemp("probe") / "set")


@pytest.fixture
def answers(root: Path, tmp_path: Path) -> str:
    """A feature file whose features are the labels."""
    from probe_sets import one_hot, write_features

    return str(write_features(tmp_path / "answers.h5", root, one_hot(root, "labels", 3)))


@pytest.fixture(params=[False, True], ids=["cuda", "mps_operators"])
def gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Within such a test, device "cuda" can be named: tensors there have shapes, but no numbers (see fake_gpu.py)."""
    from fake_gpu import fake_gpu

    with fake_gpu(request.param):
        yield


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
