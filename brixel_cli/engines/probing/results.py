"""What a probe found out, and its form on disk: results.json, and the description inside each saved head."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import AliasChoices, Field, TypeAdapter, ValidationError

from brixel_cli.config.labelled import ProbeRecipe, Split, SplitConfig, Task
from brixel_cli.config.probe import PredictionsConfig
from brixel_cli.config.protocols import AnyProtocol
from brixel_cli.config.section import Side
from brixel_cli.core.formatting import to_json
from brixel_cli.core.metrics import Gap, Number, gap_over_items, gap_over_seeds
from brixel_cli.core.probe_metrics import HIGHER_IS_BETTER, mean_and_spread
from brixel_cli.engines.probing.network_results import Effort, NetworkDescription

FORMAT = "brixel-probe-1"
Value = Number | list[Number]
"""A metric of a whole set, or of each class."""
Versions = dict[str, str | int]
Items = dict[str, dict[str, float]]
"""By name, the figures of what figures are means of: pairs of images, or objects of sequences."""
Part = TypeVar("Part")


@dataclass(frozen=True)
class BaselineDescription:
    """An upsampler from elsewhere: name of the function, SHA-256 of its source file, and its `guide_size` in pixels."""

    function: str
    sha256: str
    guide_size: int | None


@dataclass(frozen=True)
class ModelDescription:
    """A source that computed its features here.

    Attributes:
        kind, source: which source it is, and which model; `transfer`: with the head of the plain backbone.
        backbone, backbone_weights, backbone_sha256: timm name of the backbone, and its weights.
        checkpoint, student_sha256, student_step: of the student; None for the other sources.
        factor: output grid over token grid of the student; the teacher's input over the student's.
        patch_size: in pixels.
        channels: of the feature maps.
        input: number of evaluated crops of each input size, as `HEIGHTxWIDTH`.
        grid: the same by the size of the feature map.
        scale: of the backbone at equal cost: its input over the student's, as measured; else 1.
        baseline: the upsampler on top of the plain backbone, if there is one; then `input` is the image that it sees.
    """

    kind: Literal["backbone", "equal_cost", "baseline", "student", "teacher", "transfer"]
    source: Literal["backbone", "student", "teacher"]
    backbone: str
    backbone_weights: str
    backbone_sha256: str
    checkpoint: str | None
    student_sha256: str | None
    student_step: int | None
    factor: int
    patch_size: int
    channels: int
    input: dict[str, int]
    grid: dict[str, int]
    scale: float = 1.0
    baseline: BaselineDescription | None = None


@dataclass(frozen=True)
class FileDescription:
    """A source whose features were read from a file of `brixel extract`; `description` is what that file says."""

    kind: Literal["file"]
    source: Literal["file"]
    path: str
    bytes: int
    description: dict[str, Any]
    grid: dict[str, int]
    input: None = None


@dataclass(frozen=True)
class PredictionsDescription:
    """A row of predictions that another model has made, read from files.

    Attributes:
        folders: of the predictions, one for each seed.
        files: evaluated images in each of them.
        sha256: over the files of each folder.
        predicted: what their values mean.
    """

    kind: Literal["predictions"]
    source: Literal["predictions"]
    folders: list[str]
    files: int
    sha256: list[str]
    predicted: PredictionsConfig
    grid: dict[str, int] = field(default_factory=dict)
    input: None = None


FeaturesDescription = ModelDescription | FileDescription
SourceDescription = FeaturesDescription | PredictionsDescription | NetworkDescription


@dataclass(frozen=True)
class SplitUsed:
    """The images of a split: how they were chosen, how many, and the SHA-256 of all their files."""

    split: SplitConfig
    images: int
    sha256: str


@dataclass(frozen=True)
class Settings:
    """All that every figure depends on, besides source and seed.

    Attributes:
        recipe: its name.
        task: what is predicted.
        protocol: its name, with everything that is not as published.
        protocol_settings: its values.
        size: the student's input in pixels.
        data: the splits that are used.
        classes: names of what figures are also listed by: the classes of a segmentation, the viewpoint changes of
            matching, the sequences of propagation; else None.
        precision: arithmetic of the networks.
        device: type of the device.
        label_fraction: share of the training images whose labels were used.
    """

    recipe: str
    task: Task
    protocol: str
    protocol_settings: AnyProtocol
    size: Side
    data: dict[Split, SplitUsed]
    classes: list[str] | None
    precision: str
    device: str
    label_fraction: float = 1.0


@dataclass(frozen=True)
class Run:
    """The figures of a source and seed.

    Attributes:
        source: label of the source.
        seed: of the training.
        figures: of the whole split, by metric; nan where nothing counts.
        final_loss: mean over the last steps; nan where nothing was trained.
        train_seconds, evaluate_seconds, steps_per_second: the time it took.
        versions: of the libraries; a probe can be continued with others.
        effort: of a network that was trained end to end.
        errors: standard errors of figures that are means over pairs of images or objects, over these.
        items: number of these pairs or objects.
    """

    source: str
    seed: int
    figures: dict[str, Value]
    final_loss: Number
    train_seconds: float
    evaluate_seconds: float
    steps_per_second: Number
    versions: Versions
    errors: dict[str, Number] = field(default_factory=dict)
    items: int = 0
    effort: Effort | None = None


@dataclass(frozen=True)
class Summary:
    """Figures of a source over its seeds: mean, and standard deviation (nan for one seed; not for class by class).

    Of tasks that train nothing there is one seed, and the spread is the standard error over pairs or objects.
    """

    seeds: int
    mean: dict[str, Value]
    spread: dict[str, Number]

    def mean_of(self, metric: str) -> float:
        """The mean of a metric of the whole set; nan where it was not measured."""
        value = self.mean.get(metric, math.nan)
        return math.nan if isinstance(value, list) else value

    def figure(self, metric: str) -> tuple[float, float]:
        """Mean and standard deviation of a metric of the whole set; nan where they are not known."""
        return self.mean_of(metric), self.spread.get(metric, math.nan)

    def by_class(self, metric: str) -> list[float]:
        """The means of a metric that is measured class by class; empty where it was not."""
        value = self.mean.get(metric, [])
        return value if isinstance(value, list) else []


@dataclass(frozen=True)
class PassCost:
    """What a source's whole pass over one image costs, from the pixels to the map; timed beside the other sources.

    Attributes:
        input: (height, width) in pixels of what it sees.
        gflop: a multiply-add is 2, attention counted.
        seconds, low, high: median, 10 % and 90 % quantile over interleaved rounds.
    """

    input: tuple[int, int]
    gflop: float
    seconds: float
    low: float
    high: float


@dataclass(frozen=True)
class ProbeResults:
    """All of a probe.

    Attributes:
        settings: all that every figure depends on.
        recipe: of the probe.
        sources: by label.
        seeds: that were trained.
        versions: of the libraries at the end.
        summary: by label.
        recovered_gap: of the mean of each metric, by label; see `core.metrics.gap_over_seeds`.
        gap_spread: its standard deviation; nan where it is not known.
        runs: a row for each source and seed.
        costs: of the sources that compute here, by label; empty until all heads are there.
        format: of the file.
    """

    settings: Settings
    recipe: ProbeRecipe
    sources: dict[str, SourceDescription]
    seeds: list[int]
    versions: Versions
    summary: dict[str, Summary]
    recovered_gap: Annotated[
        dict[str, dict[str, Number]], Field(validation_alias=AliasChoices("recovered_gap", "share_of_gap_closed"))
    ]
    runs: list[Run]
    gap_spread: dict[str, dict[str, Number]] = field(default_factory=dict)
    costs: dict[str, PassCost] = field(default_factory=dict)
    format: str = FORMAT

    def to_json(self) -> str:
        """As results.json has it; nan becomes null."""
        return to_json(as_dict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> ProbeResults:
        """Read back what this or an earlier version wrote.

        Raises:
            ValueError: it holds something else.
        """
        content = json.loads(text)
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise ValueError(f"its format is {found}, not {FORMAT}")
        return _validated(ProbeResults, content)


@dataclass(frozen=True)
class CropsUsed:
    """How a protocol looks at the images of its evaluation; see `config.protocols.CropConfig`."""

    kind: Literal["whole", "centre", "stretch", "slide"]
    stride: int | None
    scale: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class HeadDescription:
    """What is to be known of a saved head, to use it on other images.

    Attributes:
        recipe, protocol, size, seed: of its training.
        evaluate: how images are looked at.
        label: of its source.
        source: of its features.
        versions: of the libraries.
        backbone_signature: by which weights that were converted or rounded are known; empty: by SHA-256 alone.
    """

    recipe: ProbeRecipe
    protocol: str
    evaluate: CropsUsed
    size: Side
    seed: int
    label: str
    source: FeaturesDescription
    versions: Versions
    backbone_signature: list[float] = field(default_factory=list)

    @staticmethod
    def from_dict(said: Mapping[str, Any]) -> HeadDescription:
        """Read back what this or an earlier version wrote.

        Raises:
            ValueError: it is something else.
        """
        return _validated(HeadDescription, said)


def _validated(kind: type[Part], content: object) -> Part:
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def as_dict(part: Any) -> dict[str, Any]:
    """Any of these dataclasses as mappings and lists."""
    plain: dict[str, Any] = TypeAdapter(type(part)).dump_python(part)
    return plain


def summarise(labels: Sequence[str], runs: Sequence[Run]) -> dict[str, Summary]:
    """For each source: mean and standard deviation over its seeds, of every figure; of lists, class by class."""
    summary: dict[str, Summary] = {}
    for label in labels:
        own = [run for run in runs if run.source == label]
        figures = [run.figures for run in own]
        if not figures:
            continue
        means: dict[str, Value] = {}
        spreads: dict[str, float] = {}
        for name in figures[0]:
            values = [some[name] for some in figures]
            single = [value for value in values if not isinstance(value, list)]
            if single:
                means[name], spreads[name] = mean_and_spread(single)
            else:
                classes = [value for value in values if isinstance(value, list)]
                means[name] = [_mean_of_known(column) for column in zip(*classes, strict=True)]
        summary[label] = Summary(len(figures), means, spreads | own[0].errors)
    return summary


def stored_gaps(
    sources: Mapping[str, SourceDescription], summary: Mapping[str, Summary], items: Mapping[str, Items] | None = None
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """The fields `recovered_gap` and `gap_spread` of `ProbeResults`; see `gaps_of`."""
    found = gaps_of(sources, summary, items)
    return (
        {label: {name: gap.value for name, gap in some.items()} for label, some in found.items()},
        {label: {name: gap.spread for name, gap in some.items()} for label, some in found.items()},
    )


def gaps_of(
    sources: Mapping[str, SourceDescription], summary: Mapping[str, Summary], items: Mapping[str, Items] | None = None
) -> dict[str, dict[str, Gap]]:
    """The recovered gap of each metric's mean, for every source between backbone and teacher; empty without them.

    Args:
        sources: by label.
        summary: by label.
        items: by label the figures of the pairs or objects that figures are means of, which are the same for all
            sources; the spread is then over them. None: it is over seeds.
    """
    by_kind = {sources[label].kind: label for label in summary}
    if not {"backbone", "teacher"} <= set(by_kind):
        return {}
    ends = by_kind["backbone"], by_kind["teacher"]

    def gap(label: str, name: str) -> Gap:
        better = name.removesuffix("_image_mean") in HIGHER_IS_BETTER
        if items and label in items:
            plain, own, best = ([items[one][item][name] for item in items[label]] for one in (ends[0], label, ends[1]))
            return gap_over_items(plain, own, best, better)
        backbone, source, teacher = (summary[one].figure(name) for one in (ends[0], label, ends[1]))
        return gap_over_seeds(backbone, source, teacher, better)

    return {
        label: {
            name: gap(label, name)
            for name, value in entry.mean.items()
            if not isinstance(value, list) and all(name in summary[end].mean for end in ends)
        }
        for label, entry in summary.items()
        if sources[label].kind in ("equal_cost", "baseline", "student", "transfer", "file")
    }


def _mean_of_known(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
