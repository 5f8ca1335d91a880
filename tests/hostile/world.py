"""What is damaged: small files of every kind that brixel reads, made by brixel itself, and what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import FIXTURES, TINY, make_photograph
from PIL import Image
from probe_sets import make_set, recipe_file
from safetensors.torch import save_file

from brixel_cli import FeatureFile
from brixel_cli.config.distill import AdapterConfig, FusionConfig
from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.student import StudentCard, build_adapter, save_student
from brixel_cli.core.weights import load_tensors
from hostile import sandbox

FORMATS = {
    "h5": ("out.h5", ["--format", "h5"]),
    "int8": ("out8.h5", ["--format", "h5", "--dtype", "int8"]),
    "npy": ("out_npy", ["--format", "npy"]),
    "safetensors": ("out_safetensors", ["--format", "safetensors", "--dtype", "int8"]),
    "zarr": ("out_zarr", ["--format", "zarr"]),
}
NUM_PHOTOS = 6


class Interruption(BaseException):
    """What cuts a command short here."""


class Inputs:
    """Inputs of the four commands below one folder, which no case may change.

    Attributes:
        photos, set, model: images, a labelled set, a student of test_vit with weights of its own.
    """

    def __init__(self, root: Path):
        self.root = sandbox.fresh(root)
        os.environ["XDG_CACHE_HOME"] = str(self.root / "cache")
        self.photos = self.root / "photos"
        self.photos.mkdir()
        for number in range(NUM_PHOTOS):
            make_photograph(self.photos / f"{number}.png", number, *[(144, 144), (192, 144)][number % 2])
        self.model, self.vit = self._make("model", self._student), str(self.root / "model" / "vit.safetensors")
        self.set = make_set(self.root / "labelled" / "set")
        self.probe_recipe = recipe_file(self.set)
        self.recipe = self.root / "tiny.yaml"
        self.recipe.write_text(TINY.replace("PHOTOS", str(self.photos)).replace("steps: 4", "steps: 6"))

    def command(self, kind: str, output: Path) -> list[str]:
        """The command that writes an output of a kind, or continues it."""
        if kind in FORMATS:
            return ["extract", "--input", str(self.photos), "--res", "64", "--checkpoint", str(self.model), "--device",
                    "cpu", "--precision", "float32", "--batch-size", "2", "--output", str(output), *FORMATS[kind][1]]  # fmt: skip
        if kind == "run":
            began = (output / "recipe.yaml").exists() or (output / "state.safetensors").exists()
            resume = ["--resume"] if began else ["--recipe", str(self.recipe)]
            return ["distill", *resume, "--output", str(output)]
        return ["probe", "--recipe", str(self.probe_recipe), "--checkpoint", str(self.model), "--output", str(output),
                "--set", "protocol.steps=3", "--set", "protocol.points=64", "--device", "cpu", "--seeds", "1",
                "--source", "backbone", "--source", "student"]  # fmt: skip

    def holds(self, kind: str, output: Path) -> Any:
        """What an output of a kind holds, as JSON: all that the same command must give again, and nothing else."""
        return contents_of_features(output) if kind in FORMATS else HOLDS[kind](output)

    def _make(self, name: str, function: Callable[[Path], None]) -> Path:
        folder = self.root / name
        folder.mkdir()
        ended = sandbox.Child(lambda: function(folder), folder).wait()
        assert ended.code == 0, ended
        return folder

    @staticmethod
    def _student(folder: Path) -> None:
        torch.manual_seed(0)
        save_file(load_backbone("test_vit", "random").vit.state_dict(), folder / "vit.safetensors")
        trained = load_backbone("test_vit", str(folder / "vit.safetensors"))
        config = AdapterConfig(fusion=FusionConfig(width=16, fine_width=16, blocks=[1, 1, 1]))
        adapter = build_adapter(trained.embed_dim, 4, config)
        torch.nn.init.normal_(adapter.out[1].weight, std=0.1)
        card = StudentCard("test_vit", str(folder / "vit.safetensors"), trained.sha256, trained.embed_dim, 4, config, 7,
                           (64, 64), trained.signature())  # fmt: skip
        save_student(folder / "student.safetensors", adapter.state_dict(), card)


class World(Inputs):
    """Inputs and outputs of the four commands.

    Attributes:
        parts: a folder of two parts, `out.*.h5`, and of the file that joins them, `all.h5`.
        whole, cut: by kind, an output that is finished, and one that was interrupted half-way.
        expected: by kind, what the finished output holds.
    """

    def __init__(self, root: Path):
        super().__init__(root)
        self.whole: dict[str, Path] = {}
        self.cut: dict[str, Path] = {}
        self.expected: dict[str, Any] = {}
        for kind in (*FORMATS, "run", "probe"):
            self._prepare(kind)
        self.parts = self.root / "parts"
        for shard in ("1/2", "2/2"):
            self._extra(*self.command("h5", self.parts / "out.h5"), "--shard", shard)
        self._extra("extract", "--join", str(self.parts / "out.*.h5"), "--output", str(self.parts / "all.h5"))
        head = next((self.whole["probe"] / "heads").glob("student*"))
        self.head = str(head.relative_to(self.whole["probe"]))
        # By image: the digest of its features where each is computed alone; and those of other commands.
        one_by_one = ["--batch-size", "1", "--output", str(self.root / "alone.h5")]
        self.alone = contents_of_features(self._extra(*self.command("h5", self.root)[:-4], *one_by_one) / "alone.h5")[
            "maps"
        ]
        released = [
            str(FIXTURES / "official_layout_tiny.pth"),
            "--backbone",
            "test_vit",
            "--backbone-weights",
            self.vit,
        ]
        arguments = self.command("h5", self.root / "pth.h5")
        arguments[arguments.index("--checkpoint") + 1 : arguments.index("--checkpoint") + 2] = released
        self.expected["pth"] = contents_of_features(self._extra(*arguments) / "pth.h5")
        self._extra("probe", "--apply", str(head), "--input", str(self.photos), "--output", str(self.root / "apply"),
                    "--device", "cpu")  # fmt: skip
        self.expected["apply"] = pictures_of(self.root / "apply")

    def _extra(self, *arguments: str) -> Path:
        ended = sandbox.run(arguments, self.root)
        if ended.code != 0:
            raise RuntimeError(f"{arguments}: {ended}")
        return self.root

    def _prepare(self, kind: str) -> None:
        name = FORMATS[kind][0] if kind in FORMATS else kind
        for state, function in (("whole", sandbox.command), ("cut", interrupted)):
            folder = self.root / state
            folder.mkdir(exist_ok=True)
            output = folder / name
            ended = sandbox.Child(function(self.command(kind, output)), folder).wait()
            if ended.code != (0 if state == "whole" else sandbox.TRACEBACK):
                raise RuntimeError(f"{kind}, {state}: {ended}")
            getattr(self, state)[kind] = output
        self.expected[kind] = self.holds(kind, self.whole[kind])
        assert unfinished(kind, self.cut[kind])


def interrupted(arguments: Sequence[str]) -> Callable[[], int | None]:
    """A command that ends with an exception half-way."""
    counts = {"n": 0}

    def after(most: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts["n"] += 1
            if counts["n"] > most:
                raise Interruption
            return function(*args, **kwargs)

        return counted

    def run() -> int | None:
        from brixel_cli.engines.distilling.trainer import Trainer
        from brixel_cli.engines.extracting import extraction
        from brixel_cli.engines.probing import runs

        Trainer.update = after(3, Trainer.update)  # type: ignore[method-assign]
        extraction.encode_parts = after(2, extraction.encode_parts)
        runs.train_head = after(1, runs.train_head)
        return sandbox.command(arguments)()

    return run


def unfinished(kind: str, output: Path) -> bool:
    """Whether something is left to be done."""
    if kind in FORMATS:
        return bool((FeatureFile(output).status == 0).any())
    if kind == "run":
        return not (output / "results.json").exists() and (output / "state.safetensors").exists()
    return len(json.loads((output / "results.json").read_text())["runs"]) == 1


def digest(data: bytes) -> str:
    """A short name of some bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def contents_of_features(output: Path) -> dict[str, Any]:
    """By image: the digest of its map as stored."""
    features = FeatureFile(output)
    done = {
        features.paths[row]: digest(b"".join(array.tobytes() for _, array in sorted(features.stored(row).items())))
        for row in features.rows
    }
    return {"maps": done, "failed": sorted(features.failures), "num_images": len(features)}


def _tensors(path: Path) -> str:
    tensors = load_tensors(path)[0]
    return digest(b"".join(key.encode() + value.numpy().tobytes() for key, value in sorted(tensors.items())))


def _lines(path: Path, without: Sequence[str]) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in without} for line in lines]


def contents_of_run(output: Path) -> dict[str, Any]:
    """Tensors, results and metrics of a run, without speeds."""
    names = ("state.safetensors", "student.safetensors", "last.safetensors")
    return {name: _tensors(output / name) for name in names} | {
        "results": json.loads((output / "results.json").read_text()),
        "metrics": _lines(output / "metrics.jsonl", ["images_per_second"]),
    }


def contents_of_probe(output: Path) -> dict[str, Any]:
    """Figures, heads, curves and the figures of the images."""
    results = json.loads((output / "results.json").read_text())
    timed = ("train_seconds", "evaluate_seconds", "steps_per_second")
    runs = [{key: value for key, value in run.items() if key not in timed} for run in results["runs"]]
    return {
        "runs": runs,
        "summary": results["summary"],
        "heads": {path.name: _tensors(path) for path in sorted((output / "heads").glob("*.safetensors"))},
        "curves": {path.name: path.read_text() for path in sorted((output / "curves").glob("*.jsonl"))},
        "images": {path.name: path.read_text() for path in sorted((output / "images").glob("*.csv"))},
    }


HOLDS: Mapping[str, Callable[[Path], dict[str, Any]]] = {"run": contents_of_run, "probe": contents_of_probe}


def pictures_of(folder: Path) -> dict[str, list[int]]:
    """Shape and sum of every picture below a folder."""
    arrays = {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}
    return {name: [*array.shape, int(array.sum())] for name, array in arrays.items()}


def copy(source: Path, target: Path) -> Path:
    """A copy of a file or folder, times included."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)
    return target
