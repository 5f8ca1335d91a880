"""Small labelled sets and feature files made here, on which the answer of a probe is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import Listener, make_photograph
from PIL import Image

from brixel_cli.cli.probe import probe_options
from brixel_cli.config.labelled import Split
from brixel_cli.config.probe import ProbeOptions
from brixel_cli.data.feature_layout import FORMAT, Layout, text_array
from brixel_cli.data.row_store import Store, create_store
from brixel_cli.engines.probing.probing import probe
from brixel_cli.engines.probing.results import (
    FileDescription,
    ModelDescription,
    ProbeResults,
    Run,
    Settings,
    SourceDescription,
    SplitUsed,
    Value,
    stored_gaps,
    summarise,
)

HEIGHT, WIDTH = 48, 64
FAST = ["protocol.steps=4", "protocol.points=64"]
MACHINE = "/home/somebody/study"
"""A place that no page may name."""
CLASSES = ("sky", "sea", "land")
DEPTHS = (1.0, 2.0, 3.0, 4.0)
"""Metres; with bins=4 over [1, 4] the bin centres."""
RECIPE = """
name: mine
task: TASK
size: 32
protocol: quick
data:
  root: ROOT
  download: Bake it at home.
  images: images/{split}/{name}.png
  train: {split: train}
  evaluate: {split: val}
  labels: {files: "labels/{split}/{name}.png", classes: [sky, sea, land]}
  depth: {files: "depth/{split}/{name}.png", range: [1.0, 4.0]}
  normals: {files: "normals/{split}/{name}.npy", encoding: npy}
"""
NAMES = tuple(f"images/train/{n}.png" for n in range(6)) + tuple(f"images/val/{n}.png" for n in range(4))


def make_set(root: Path) -> Path:
    """Ten images with blocky labels (a few of them void), depth of four levels, and normals."""
    for number, name in enumerate(NAMES):
        split, stem = Path(name).parts[1], Path(name).stem
        for folder in ("images", "labels", "depth", "normals"):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
        make_photograph(root / name, number, WIDTH, HEIGHT)
        rng = np.random.default_rng(100 + number)
        labels = np.kron(rng.integers(0, 3, (6, 8)), np.ones((8, 8))).astype(np.uint8)
        labels[:2, :5] = 255
        Image.fromarray(labels).save(root / "labels" / split / f"{stem}.png")
        levels = np.kron(rng.integers(0, 4, (6, 8)), np.ones((8, 8))).astype(int)
        depth = (np.array(DEPTHS)[levels] * 1000).astype(np.uint16)
        depth[-3:, :4] = 0
        Image.fromarray(depth).save(root / "depth" / split / f"{stem}.png")
        normals = np.array([[0, 0, -1], [0.6, 0, -0.8], [0, 0.6, -0.8], [-0.6, 0, -0.8]], np.float32)[levels]
        np.save(root / "normals" / split / f"{stem}.npy", normals)
    return root


def recipe_file(root: Path, task: str = "segmentation") -> Path:
    path = root.parent / f"{task}.yaml"
    path.write_text(RECIPE.replace("TASK", task).replace("ROOT", str(root)))
    return path


SOURCES = ["backbone", "student", "teacher"]
"""Of most tests; without any, brixel probe also takes the backbone at equal cost."""


def make_options(root: Path, output: Path, task: str = "segmentation", **changes) -> ProbeOptions:
    """As the command line would make them."""
    values = {
        "data": None, "protocol": None, "size": None, "overrides": [], "output": output, "features": None,
        "sources": SOURCES, "checkpoints": [], "backbone": None, "backbone_weights": None, "seeds": 1, "device": "cpu",
        "precision": "float32", "overwrite": False,
    }  # fmt: skip
    return probe_options(str(recipe_file(root, task)), **values | changes)


def stored_levels(root: Path, name: str, folder: str) -> np.ndarray:
    """Labels, or depth levels, of an image (H, W); void pixels are -1."""
    values = np.asarray(Image.open(root / folder / Path(name).relative_to("images"))).astype(int)
    return np.where(values == 255, -1, values) if folder == "labels" else values // 1000 - 1


def one_hot(root: Path, folder: str, channels: int) -> Callable[[str], np.ndarray]:
    """Features that are the answer: (C, H, W); nothing where there is no label."""
    return lambda name: np.stack([stored_levels(root, name, folder) == level for level in range(channels)])


def noise(channels: int, grid: tuple[int, int] = (12, 16)) -> Callable[[str], np.ndarray]:
    """Features that know nothing of the image."""
    return lambda name: np.random.default_rng(sum(name.encode())).normal(size=(channels, *grid))


def write_features(
    path: Path, root: Path, maps: Callable[[str], np.ndarray], names: Sequence[str] = NAMES, **said: object
) -> Path:
    """A feature file as `brixel extract --input ROOT` would write it."""
    arrays = [maps(name).astype(np.float16) for name in names]
    layout = Layout(tuple(array.shape[1:] for array in arrays), arrays[0].shape[0], "float16")
    sizes = np.array([[HEIGHT, WIDTH]] * len(names), np.int32)
    filled = {
        "paths": text_array(names),
        "reason": text_array([""] * len(names), 10),
        "original_size": sizes,
        "model_size": sizes,
        "grid_size": np.array(layout.grids, np.int32),
        "grid_row": layout.grid_rows,
    }
    description = {"source": "synthetic", "storage": "h5", "root": str(root), "fit": "short", **said}
    create_store(path, len(names), layout.columns, description, filled, {"format": FORMAT})
    store = Store(path, writable=True)
    for row, array in enumerate(arrays):
        grid = "x".join(map(str, array.shape[1:]))
        store.put("features" if "features" in store else f"features/{grid}", [int(layout.grid_rows[row])], [array])
        store.mark(row, 1)
    return path


def description(kind: str, **changes: Any) -> SourceDescription:
    """A source as a probe describes it."""
    if kind == "file":
        return FileDescription("file", "file", "f.h5", 1, {}, {"8x8": 1})
    values: dict[str, Any] = {
        "kind": kind, "source": kind, "backbone": "vit", "backbone_weights": "w.safetensors", "backbone_sha256": "ab" * 32,
        "checkpoint": None, "student_sha256": None, "student_step": None, "factor": 4, "patch_size": 14, "channels": 8,
        "input": {"112x112": 1}, "grid": {"8x8": 1},
    }  # fmt: skip
    return ModelDescription(**values | changes)


def make_run(source: str, seed: int, figures: dict[str, Value]) -> Run:
    return Run(source, seed, figures, 0.5, 1.0, 1.0, 10.0, {"torch": "2"})


def make_results(options: ProbeOptions, sources: dict[str, SourceDescription], runs: Sequence[Run]) -> ProbeResults:
    """All of a probe, as `probe` would put it together."""
    recipe, protocol = options.recipe, options.protocol
    data: dict[Split, SplitUsed] = {
        "train": SplitUsed(recipe.data.train, 1367, "cd" * 32), "evaluate": SplitUsed(recipe.data.evaluate, 233, "ef" * 32)
    }  # fmt: skip
    settings = Settings(
        recipe.name, recipe.task, options.protocol_name, protocol, options.size, data, None, "float32", "cpu"
    )
    summary = summarise(list(sources), runs)
    gaps, spreads = stored_gaps(sources, summary)
    return ProbeResults(
        settings,
        recipe,
        sources,
        sorted({run.seed for run in runs}),
        {},
        summary,
        gaps,
        list(runs),
        spreads,
    )


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def constant_head(head, weights: torch.Tensor) -> None:
    """Set the last convolution of every branch."""
    for branch in head.branches.values():
        branch[-1].weight.data = weights[:, :, None, None]
        branch[-1].bias.data.zero_()


def figures(options: ProbeOptions, listener: Listener) -> dict[str, float]:
    """Of the only source and seed."""
    (run,) = probe(options, listener).results.runs
    return run.figures


def options_of(recipe: str, *overrides: str, **changes: Any) -> ProbeOptions:
    """As the command line would make them, of a shipped recipe."""
    given = {
        "data": Path(MACHINE, "set"), "protocol": None, "size": None, "output": None, "features": None, "sources": [],
        "checkpoints": [], "backbone": None, "backbone_weights": None, "seeds": 3, "device": "auto",
        "precision": "auto", "overwrite": False,
    }  # fmt: skip
    return probe_options(recipe, overrides=overrides, **{**given, **changes})


def probed(
    options: ProbeOptions, figures: dict[str, list[dict[str, float]]], checkpoint: str = "run/s.safetensors"
) -> ProbeResults:
    """What results.json of a probe would hold, of figures by source and seed."""
    student = {"checkpoint": f"{MACHINE}/{checkpoint}", "student_sha256": "cd" * 32, "student_step": 7}
    sources = {name: description(name, **(student if name == "student" else {})) for name in figures}
    runs = [make_run(name, seed, dict(values)) for name, seeds in figures.items() for seed, values in enumerate(seeds)]
    return make_results(options, sources, runs)


def segmentation(*values: float) -> list[dict[str, float]]:
    return [{"miou": value, "boundary_iou": value / 2} for value in values]
