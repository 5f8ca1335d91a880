"""Whose features or predictions a probe compares: backbone, students, teacher, feature files, predictions as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from brixel_cli.config.base import height_width
from brixel_cli.config.extract import Source as ModelKind
from brixel_cli.config.probe import PredictionsConfig, ProbeOptions
from brixel_cli.config.supervised import SupervisedConfig
from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.extras import require
from brixel_cli.core.formatting import human_size
from brixel_cli.core.heads import QUANTITIES
from brixel_cli.core.identity import file_sha256, files_sha256, json_digest, tensors_sha256
from brixel_cli.core.student import read_adapter
from brixel_cli.data.feature_file import FeatureFile
from brixel_cli.data.feature_index import INDEX_NAME
from brixel_cli.data.feature_layout import Grid
from brixel_cli.data.predictions import find_predictions
from brixel_cli.data.resizing import snap
from brixel_cli.engines.baselines import Baseline, load_baseline
from brixel_cli.engines.default_student import default_student
from brixel_cli.engines.equal_cost import EQUAL_COST, equal_cost_size
from brixel_cli.engines.models import DEFAULT_FACTOR, FeatureExtractor, ModelSpec, model_spec
from brixel_cli.engines.probing.folder import ProbeFolder
from brixel_cli.engines.probing.results import BaselineDescription, ModelDescription, as_dict
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError, UsageError

MODELS: dict[str, ModelKind] = {
    "backbone": "backbone",
    "equal-cost": "backbone",
    "student": "student",
    "teacher": "teacher",
}
"""The sources that compute here, in the order of the tables, and which model each is."""
Kind = Literal["backbone", "equal_cost", "baseline", "student", "teacher"]
FILE_PREFIX, UNET, FINETUNED = "file:", "unet:", "finetuned"
AT_TEACHER = "@teacher"
"""End of the name of a network whose input is the teacher's."""


@dataclass(frozen=True)
class ModelSource:
    """A source that computes its features here.

    Attributes:
        label: names it in tables and files.
        kind: which of the sources it is.
        spec: of the model before its weights are loaded.
        backbone_sha256: of the backbone's weights; empty where they were not to be read, and are not known.
        backbone_signature: of the same weights; see `Backbone.signature`.
        baseline: upsampler from elsewhere, on top of the plain backbone.
    """

    label: str
    kind: Kind
    spec: ModelSpec
    backbone_sha256: str
    backbone_signature: list[float]
    baseline: Baseline | None = None

    @property
    def patch_size(self) -> int:
        """Of the backbone, in pixels."""
        return self.spec.patch_size

    def grid(self, size: tuple[int, int]) -> Grid:
        """The grid of its map where the student's input has this size."""
        rows, columns = self.spec.grid(self.spec.input_size(size))
        finer = self.spec.factor if self.baseline else 1
        return rows * finer, columns * finer

    def seen(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Sizes (height, width) in pixels of what it sees of an image, the network's input first, then a guide."""
        own = self.spec.input_size(size)
        return [own, self.baseline.guide_size(own)] if self.baseline else [own]

    @property
    def described_baseline(self) -> BaselineDescription | None:
        """The upsampler, for the results."""
        found = self.baseline
        return BaselineDescription(found.name, found.sha256, found.guide_side) if found else None

    def identity(self) -> dict[str, Any]:
        """All that its features depend on, besides the images: model and weights."""
        stored = self.spec.stored
        return {
            "source": self.spec.source,
            "backbone": self.spec.backbone,
            "backbone_weights": self.spec.weights,
            "backbone_sha256": self.backbone_sha256,
            "checkpoint": str(stored.path) if stored else None,
            "student_sha256": tensors_sha256(stored.tensors) if stored else None,
            "student_step": stored.card.step if stored else None,
            "factor": self.spec.factor,
            "patch_size": self.spec.patch_size,
            "channels": self.spec.embed_dim,
            **({"scale": self.spec.scale} if self.kind == "equal_cost" else {}),
            **({"baseline": as_dict(self.described_baseline)} if self.baseline else {}),
        }

    def load(self, runtime: Runtime, reporter: Reporter) -> FeatureExtractor:
        """The model itself; errors as `FeatureExtractor`."""
        return FeatureExtractor(self.spec, runtime, reporter, baseline=self.baseline)


@dataclass(frozen=True)
class FileSource:
    """A source whose features `brixel extract` has written to a file, of whole images.

    Attributes:
        label: names it in tables and files.
        path: of the feature file.
    """

    label: str
    path: Path
    kind: ClassVar[Literal["file"]] = "file"

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


@dataclass(frozen=True)
class PredictionSource:
    """A row of predictions that another model has made: nothing is trained.

    Attributes:
        label: names it in tables and files.
        folders: of the predictions, one for each seed.
        files: for each folder and quantity the file of each evaluated image.
        config: what the values mean.
        patch_size: of the backbone beside which the row stands: crops are the same; 1: there is none.
        digests: SHA-256 over the files of each folder.
    """

    label: str
    folders: tuple[Path, ...]
    files: tuple[Mapping[str, Sequence[Path]], ...]
    config: PredictionsConfig
    patch_size: int
    digests: tuple[str, ...]
    kind: ClassVar[Literal["predictions"]] = "predictions"

    def identity(self) -> dict[str, Any]:
        """The files, and how they are read."""
        return {
            "source": "predictions",
            "folders": [str(folder.absolute()) for folder in self.folders],
            "files": len(next(iter(self.files[0].values()))),
            "sha256": list(self.digests),
            "predicted": self.config,
        }


@dataclass(frozen=True)
class NetworkSource:
    """A network that is trained end to end on the labels of the set.

    Attributes:
        label: names it in tables and files.
        kind: `finetuned`, the backbone, or `unet`.
        spec: of the backbone before its weights are loaded; None: a U-Net.
        backbone_sha256: of its weights; empty where they were not to be read.
        encoder: of a U-Net.
        weights_sha256: of the file that a U-Net begins with.
        enlarge: side of its input over the student's.
        patch_size: by which crops are planned.
        config: of the training.
    """

    label: str
    kind: Literal["finetuned", "unet"]
    spec: ModelSpec | None
    backbone_sha256: str
    encoder: str
    weights_sha256: str
    enlarge: int
    patch_size: int
    config: SupervisedConfig

    def input_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Its input where the student's has this size."""
        return size[0] * self.enlarge, size[1] * self.enlarge

    def grid(self, size: tuple[int, int]) -> Grid:
        """The grid of the map that its head stands on."""
        return self.spec.grid(self.input_size(size)) if self.spec else self.input_size(size)

    def identity(self) -> dict[str, Any]:
        """All that its predictions depend on, besides images, labels and protocol."""
        return {
            "source": self.kind,
            "backbone": self.spec.backbone if self.spec else "",
            "backbone_weights": self.spec.weights if self.spec else "",
            "backbone_sha256": self.backbone_sha256,
            "encoder": self.encoder,
            "weights_sha256": self.weights_sha256,
            "enlarge": self.enlarge,
            "supervised": self.config,
        }


Source = ModelSource | FileSource | PredictionSource | NetworkSource


def resolve_sources(
    options: ProbeOptions, runtime: Runtime, reporter: Reporter, evaluated: Sequence[str], read_weights: bool = True
) -> list[Source]:
    """The sources that were asked for, in that order.

    Args:
        options: of the probe.
        runtime: where the cost of backbone and student is measured.
        reporter: hears which student is taken where none is named.
        evaluated: names of the images that predictions as files have to be of.
        read_weights: whether the backbone's weights are read, once, for their SHA-256, and cost is measured; else a
            student's description says it, or nothing.

    Raises:
        UsageError: a source is unknown or stands twice, or no model is named.
        BrixelError: a checkpoint, weights, a feature file or predictions cannot be read.
    """
    names = list(options.sources) or ([] if options.predictions else list(MODELS))
    baselines = [load_baseline(reference) for reference in options.baselines]
    checkpoints = list(options.checkpoints)
    adapted = {"student", "equal-cost"} & set(names)
    computed = {*MODELS, FINETUNED, FINETUNED + AT_TEACHER} & set(names) or set(options.baselines)
    if not checkpoints and (adapted or (computed and not options.backbone)):
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
            source = _model(MODELS[name], name, first, options, identities, read_weights)
            if first is not None and name == "equal-cost":
                source = _at_equal_cost(source, first, options, runtime, reporter, read_weights)
            sources.append(source)
        elif name.removesuffix(AT_TEACHER) == FINETUNED or name.startswith(UNET):
            sources.append(_network(name, checkpoints, options, identities, read_weights))
        else:
            sources.append(_file(name))
    if baselines:
        plain = _model("backbone", "", checkpoints[0] if checkpoints else None, options, identities, read_weights)
        place = next((place for place, source in enumerate(sources) if source.kind in ("student", "teacher")), None)
        rows = [replace(plain, label=baseline.name, kind="baseline", baseline=baseline) for baseline in baselines]
        sources[len(sources) if place is None else place : place] = rows
    patch_size = next((source.patch_size for source in sources if source.patch_size > 1), 1)
    sources = [
        replace(source, patch_size=patch_size) if isinstance(source, NetworkSource) and not source.spec else source
        for source in sources
    ]
    sources += _predictions(options, evaluated, patch_size)
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


def _network(
    name: str,
    checkpoints: Sequence[str],
    options: ProbeOptions,
    identities: dict[tuple[str, str], tuple[str, list[float]]],
    read_weights: bool,
) -> NetworkSource:
    """A network that is trained end to end; a U-Net's crops are those of the sources beside it."""
    base, at_teacher = name.removesuffix(AT_TEACHER), name.endswith(AT_TEACHER)
    first = checkpoints[0] if checkpoints else None
    if base == FINETUNED:
        found = _model("teacher" if at_teacher else "backbone", name, first, options, identities, read_weights)
        spec, sha256 = found.spec, found.backbone_sha256
        return NetworkSource(name, "finetuned", spec, sha256, "", "", spec.enlarge, spec.patch_size, options.supervised)
    encoder, weights = base.removeprefix(UNET), options.supervised.weights
    if not encoder:
        raise UsageError(f"--source {name}: name the encoder, such as unet:resnet18.")
    require("unet", f"--source {name}")
    sha256 = file_sha256(Path(weights).expanduser()) if weights else ""
    card = read_adapter(first).card if at_teacher and first else None
    factor = (card.factor if card else DEFAULT_FACTOR) if at_teacher else 1
    return NetworkSource(name, "unet", None, "", encoder, sha256, factor, 1, options.supervised)


def _at_equal_cost(
    backbone: ModelSource, checkpoint: str, options: ProbeOptions, runtime: Runtime, reporter: Reporter, measure: bool
) -> ModelSource:
    """The backbone at the largest input that takes no longer than the student; as measured before, in a probe's folder.

    Its map is not enlarged: a linear head and bilinear enlargement to the student's grid may change places.
    """
    spec, folder = backbone.spec, ProbeFolder(options.output)
    before = None if options.overwrite else folder.earlier()
    earlier = before.sources.get(EQUAL_COST) if before is not None else None
    scale = earlier.scale if isinstance(earlier, ModelDescription) else 1.0
    if measure and earlier is None:
        height, width = (snap(side, spec.patch_size) for side in height_width(options.size))
        student = model_spec("student", checkpoint=checkpoint, backbone=spec.backbone, weights=spec.weights)
        found = equal_cost_size(student.load_student(str(runtime.device)), (height, width), runtime)
        scale = min(found) / min(height, width)
        reporter.say(
            f"{EQUAL_COST}: at {human_size(found)} px it takes no longer than the student at {height}x{width} px"
        )
    return replace(backbone, label=EQUAL_COST, kind="equal_cost", spec=replace(spec, scale=scale))


def _file(name: str) -> FileSource:
    path = Path(name.removeprefix(FILE_PREFIX)).expanduser()
    if not name.startswith(FILE_PREFIX) and path.suffix != ".h5" and not (path / INDEX_NAME).is_file():
        raise UsageError(
            f"--source {name}: give backbone, equal-cost, student, teacher, finetuned, unet:ENCODER, or a feature file "
            "that brixel extract has written (.h5, or file:PATH)."
        )
    source = FileSource(f"file {path.name}", path)
    said = source.file.description
    if said.get("fit", "short") == "centre":
        raise BrixelError(
            f"{path} holds features of the middle of each image alone: extract them again with --fit short."
        )
    return source


def _predictions(options: ProbeOptions, names: Sequence[str], patch_size: int) -> list[PredictionSource]:
    """The rows of predictions as files; folders of one name are the seeds of a row."""
    folders: dict[str, list[Path]] = {}
    for label, folder in options.predictions:
        folders.setdefault(label, []).append(folder)
    sources = []
    for label, some in folders.items():
        if len({folder.resolve() for folder in some}) < len(some):
            raise UsageError(f"--predictions {label}: a folder stands twice. Each is another seed of the row.")
        quantities = QUANTITIES[options.recipe.task]
        files: list[dict[str, list[Path]]] = [
            {quantity: find_predictions(folder, quantity, names) for quantity in quantities} for folder in some
        ]
        digests = [json_digest(files_sha256([path for paths in by.values() for path in paths])) for by in files]
        sources.append(
            PredictionSource(label, tuple(some), tuple(files), options.predicted, patch_size, tuple(digests))
        )
    return sources


def _labels(checkpoints: Sequence[str]) -> list[str]:
    """`student`, or, of several, each with the shortest end of its path that tells them apart."""
    if len(checkpoints) == 1:
        return ["student"]
    parts = [Path(checkpoint).absolute().parts for checkpoint in checkpoints]
    length = next(
        (n for n in range(1, max(map(len, parts)) + 1) if len({part[-n:] for part in parts}) == len(parts)), 1
    )
    return [f"student {'/'.join(part[-length:])}" for part in parts]
