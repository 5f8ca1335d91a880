"""What results.json says of networks that are trained end to end: what they are, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brixel_cli.config.supervised import SupervisedConfig


@dataclass(frozen=True)
class NetworkDescription:
    """A network that was trained end to end on the labels of the set.

    Attributes:
        kind, source: which of them it is.
        backbone, backbone_weights, backbone_sha256: that it began with; empty for a U-Net.
        encoder: of a U-Net; empty for a backbone.
        weights_sha256: of the file that a U-Net began with; empty: random weights.
        enlarge: side of its input over the student's.
        supervised: how it was trained.
        input: number of evaluated crops of each input size, as `HEIGHTxWIDTH`.
        grid: the same by the size of the map that the head stands on.
    """

    kind: Literal["finetuned", "unet"]
    source: Literal["finetuned", "unet"]
    backbone: str
    backbone_weights: str
    backbone_sha256: str
    encoder: str
    weights_sha256: str
    enlarge: int
    supervised: SupervisedConfig
    input: dict[str, int]
    grid: dict[str, int]


@dataclass(frozen=True)
class Effort:
    """What a network costs that is trained end to end.

    Attributes:
        labels: images whose labels were used, those of the validation among them.
        parameters: that were trained.
        steps, best_step: of the training until it stopped, and until the weights that are kept.
        gflop: of a pass of one image; a multiply-add is 2.
        forward_seconds: of such a pass, median of a few.
    """

    labels: int
    parameters: int
    steps: int
    best_step: int
    gflop: float
    forward_seconds: float
