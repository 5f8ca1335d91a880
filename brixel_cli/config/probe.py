"""The options of `brixel probe`, typed; `app.probe` says what each means to the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from brixel_cli.config.base import Device, Precision, check_counts, check_device
from brixel_cli.config.labelled import LABEL_FREE, ProbeRecipe
from brixel_cli.config.protocols import AnyProtocol, Protocol, printed_name
from brixel_cli.config.section import Rate, Section, Side
from brixel_cli.config.supervised import SupervisedConfig
from brixel_cli.errors import UsageError

OUTPUT = Path("runs/probe")


class PredictionsConfig(Section):
    """What the values in files of predictions mean."""

    values: Literal["classes", "set"] = "classes"
    """`classes`: numbers from 0 in the order of the recipe's classes, depth in `scale`, normals as 2 x value / 255 - 1
    with x right, y down, z forward; as `brixel probe --apply` writes them. `set`: as in the set's own files."""
    scale: Rate | None = None
    """Metres in one unit of a depth file; null: 0.001 of an image, or as `predictions.json` beside it says; 1 of .npy;
    that of the set for `values: set`."""


def num_labelled(num_images: int, fraction: float) -> int:
    """Images whose labels are used, of so many: at least one."""
    return max(round(fraction * num_images), 1)


@dataclass(frozen=True)
class ProbeOptions:
    """A probe to be carried out, checked at construction; `app.probe` says what each option means to the user.

    Attributes:
        recipe: task and data set.
        protocol: rules of training and evaluation, with what the user changed of them.
        transfer: whether the backbone's heads are also applied to the maps of the other models.
        predictions: name and folder of predictions that other models have made; folders of one name are its seeds.
        predicted: what the values in their files mean.
        supervised: how networks are trained end to end.
        label_fraction: share of the training images whose labels are used, drawn by the seed, for all sources alike.
        save_predictions: whether the predictions of every source and seed are written to files.

    Raises:
        UsageError: the protocol is for other tasks, or a value is out of range.
    """

    recipe: ProbeRecipe
    protocol: AnyProtocol
    output: Path
    features: Path
    sources: Sequence[str] = ()
    checkpoints: Sequence[str] = ()
    backbone: str | None = None
    backbone_weights: str | None = None
    seeds: int = 3
    device: Device = "auto"
    precision: Precision = "auto"
    overwrite: bool = False
    transfer: bool = False
    predictions: Sequence[tuple[str, Path]] = ()
    predicted: PredictionsConfig = field(default_factory=PredictionsConfig)
    baselines: Sequence[str] = ()
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    label_fraction: float = 1.0
    save_predictions: bool = False

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.recipe.task not in self.protocol.tasks:
            raise UsageError(
                f"The protocol {self.protocol.name} is for {' and '.join(self.protocol.tasks)}, "
                f"not for {self.recipe.task}: take another with --protocol."
            )
        if self.predictions and not self.trains:
            raise UsageError(f"--predictions are of labels, and the task {self.recipe.task} has none: leave them out.")
        if self.transfer and (not self.trains or (self.sources and "backbone" not in self.sources)):
            raise UsageError(
                "--transfer applies the heads of the backbone: it needs a task with heads, and that source."
            )
        check_counts({"--seeds": self.seeds})
        if not 0 < self.label_fraction <= 1:
            raise UsageError(f"--label-fraction must be above 0 and at most 1, not {self.label_fraction:g}.")

    @property
    def size(self) -> Side:
        """The student's input in pixels."""
        return self.recipe.size

    @property
    def trains(self) -> bool:
        """Whether heads are trained; else the task measures the frozen features themselves."""
        return self.recipe.task not in LABEL_FREE

    @property
    def training(self) -> Protocol:
        """The protocol of a task that trains heads."""
        assert isinstance(self.protocol, Protocol)
        return self.protocol

    @property
    def protocol_name(self) -> str:
        """The protocol's name with everything that is not as published."""
        return printed_name(self.protocol, self.recipe.name, self.size)


@dataclass(frozen=True)
class ApplyOptions:
    """The options of `brixel probe --apply`, checked at construction.

    Attributes:
        checkpoint, backbone_weights: in place of those that the head was trained on, where these have moved.

    Raises:
        UsageError: there is no input, or no such device.
    """

    head: Path
    inputs: Sequence[str]
    output: Path | None = None
    checkpoint: str | None = None
    backbone_weights: str | None = None
    device: Device = "auto"
    precision: Precision = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_device(self.device)
        if not self.inputs:
            raise UsageError("--apply needs --input: a folder, an image, a quoted glob, or a .txt list of paths.")
