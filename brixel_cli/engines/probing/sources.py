"""Whose features a probe compares: plain backbone, students, teacher, and feature files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from brixel_cli.config.base import height_width
from brixel_cli.config.extract import Source as ModelKind
from brixel_cli.config.probe import ProbeOptions
from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.identity import tensors_sha256
from brixel_cli.data.feature_file import INDEX_NAME, FeatureFile, Grid
from brixel_cli.engines.models import FeatureExtractor, ModelSpec, default_student, model_spec
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError, UsageError

MODELS: dict[str, ModelKind] = {"backbone": "backbone", "student": "student", "teacher": "teacher"}
FILE_PREFIX = "file:"


@dataclass(frozen=True)
class ModelSource:
    """A source that computes its features here.

    Attributes:
        label: names it in tables and files.
        kind: which of the models it is.
        spec: of the model before its weights are loaded.
        backbone_sha256: of the backbone's weights; empty where they were not to be read, and are not known.
        backbone_signature: of the same weights; see `Backbone.signature`.
    """

    label: str
    kind: ModelKind
    spec: ModelSpec
    backbone_sha256: str
    backbone_signature: list[float]

    @property
    def patch_size(self) -> int:
        """Of the backbone, in pixels."""
        return self.spec.patch_size

    @property
    def enlarge(self) -> int:
        """Side of its input over the student's."""
        return self.spec.enlarge

    def grid(self, size: tuple[int, int]) -> Grid:
        """The grid of its map where the student's input has this size."""
        return self.spec.grid((size[0] * self.enlarge, size[1] * self.enlarge))

    def identity(self) -> dict[str, Any]:
        """All that its features depend on, besides the images: model and weights."""
        stored = self.spec.stored
        return {
            "source": self.kind,
            "backbone": self.spec.backbone,
            "backbone_weights": self.spec.weights,
            "backbone_sha256": self.backbone_sha256,
            "checkpoint": str(stored.path) if stored else None,
            "student_sha256": tensors_sha256(stored.tensors) if stored else None,
            "student_step": stored.card.step if stored else None,
            "factor": self.spec.factor,
            "patch_size": self.spec.patch_size,
            "channels": self.spec.embed_dim,
        }

    def load(self, runtime: Runtime, reporter: Reporter) -> FeatureExtractor:
        """The model itself; errors as `FeatureExtractor`."""
        return FeatureExtractor(self.spec, runtime, reporter)


@dataclass(frozen=True)
class FileSource:
    """A source whose features `brixel extract` has written to a file, of whole images.

    Attributes:
        label: names it in tables and files.
        path: of the feature file.
    """

    label: str
    path: Path

    @cached_property
    def file(self) -> FeatureFile:
        """The open file."""
        return FeatureFile(self.path)

    @property
    def patch_size(self) -> int:
        """Of the backbone, in pixels; 1 where the file does not say."""
        return int(self.file.description.get("patch_size", 1))

    def identity(self) -> dict[str, Any]:
        """The file, and what it says of itself."""
        stat = self.file.path.stat()
        said = {key: value for key, value in self.file.description.items() if key not in ("root", "batch_sizes")}
        return {"source": "file", "path": str(self.file.path.absolute()), "bytes": stat.st_size, "description": said}


Source = ModelSource | FileSource


def resolve_sources(options: ProbeOptions, reporter: Reporter, read_weights: bool = True) -> list[Source]:
    """The sources that were asked for, in that order.

    Args:
        options: of the probe.
        reporter: hears which student is taken where none is named.
        read_weights: whether the backbone's weights are read, once, for their SHA-256; else a student's description
            says it, or nothing.

    Raises:
        UsageError: a source is unknown or stands twice, or no model is named.
        BrixelError: a checkpoint, weights or a feature file cannot be read.
    """
    names = list(options.sources) or list(MODELS)
    checkpoints = list(options.checkpoints)
    if not checkpoints and ("student" in names or (not options.backbone and any(name in MODELS for name in names))):
        checkpoints = [default_student(options.backbone, reporter, min(height_width(options.size)))]
    identities: dict[tuple[str, str], tuple[str, list[float]]] = {}
    sources: list[Source] = []
    for name in names:
        if name == "student":
            labels = _labels(checkpoints)
            pairs = zip(labels, checkpoints, strict=True)
            sources += [
                _model("student", label, checkpoint, options, identities, read_weights) for label, checkpoint in pairs
            ]
        elif name in MODELS:
            first = checkpoints[0] if checkpoints else None
            sources.append(_model(MODELS[name], name, first, options, identities, read_weights))
        else:
            sources.append(_file(name))
    labels = [source.label for source in sources]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise UsageError(f"The source {twice} stands twice: name each once.")
    return sources


def _model(
    kind: ModelKind,
    label: str,
    checkpoint: str | None,
    options: ProbeOptions,
    identities: dict[tuple[str, str], tuple[str, list[float]]],
    read_weights: bool,
) -> ModelSource:
    spec = model_spec(kind, checkpoint=checkpoint, backbone=options.backbone, weights=options.backbone_weights)
    key = spec.backbone, spec.weights
    if read_weights and key not in identities:
        loaded = load_backbone(*key)
        identities[key] = loaded.sha256, loaded.signature()
    sha256, signature = identities.get(key, (spec.chosen_by.card.backbone_sha256 if spec.chosen_by else "", []))
    return ModelSource(label, kind, spec, sha256, signature)


def _file(name: str) -> FileSource:
    path = Path(name.removeprefix(FILE_PREFIX)).expanduser()
    if not name.startswith(FILE_PREFIX) and path.suffix != ".h5" and not (path / INDEX_NAME).is_file():
        raise UsageError(
            f"--source {name}: give backbone, student, teacher, or a feature file that brixel extract has written "
            "(.h5, or file:PATH)."
        )
    source = FileSource(f"file {path.name}", path)
    said = source.file.description
    if said.get("fit", "short") == "centre":
        raise BrixelError(
            f"{path} holds features of the middle of each image alone: extract them again with --fit short."
        )
    return source


def _labels(checkpoints: Sequence[str]) -> list[str]:
    """`student`, or, of several, each with the shortest end of its path that tells them apart."""
    if len(checkpoints) == 1:
        return ["student"]
    parts = [Path(checkpoint).absolute().parts for checkpoint in checkpoints]
    length = next(
        (n for n in range(1, max(map(len, parts)) + 1) if len({part[-n:] for part in parts}) == len(parts)), 1
    )
    return [f"student {'/'.join(part[-length:])}" for part in parts]


def kind_of(source: Source) -> Literal["student", "backbone", "teacher", "file"]:
    """What a source is."""
    return source.kind if isinstance(source, ModelSource) else "file"
