"""Probe protocols: named rules of training and evaluation, without which a figure cannot be compared.

What each name means is in docs/PROBE.md. A name stands for these values and no others: whatever is set differently is
printed and stored with the name.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from brixel_cli.config import section
from brixel_cli.config.base import scheduled_rate
from brixel_cli.config.labelled import Task
from brixel_cli.config.section import Fraction, Rate, Section, Side, Weight


class CropConfig(Section):
    """What is seen of the images of a split."""

    kind: Literal["whole", "centre", "stretch", "random", "slide"]
    """What is seen of an image: `whole`: all, aspect kept. `centre`: its middle. `stretch`: all, squeezed.
    `random`: `per_image` crops at random places and scales. `slide`: windows that cover it."""
    per_image: PositiveInt = 1
    """Random crops of each image, drawn once and stored; each epoch takes one of them."""
    scale: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)] = [1.0, 1.0]
    """Least and most scale of the image, 1 being where it just covers the input; of random crops, and, both the same,
    of whole images."""
    stride: PositiveInt | None = None
    """Pixels between sliding windows at the published size, and in proportion at others; null: two thirds of them."""
    flip: bool = False
    """Whether each crop is stored mirrored too, and either taken with equal chance."""


class Protocol(Section):
    """Rules of training and evaluation under one name."""

    name: str
    tasks: list[Task]
    """What it can be used for."""
    side: Side | None = None
    """Published input in pixels, short side or [height, width]; null: the recipe's size, whatever it is."""
    train: CropConfig
    """Crops that heads are trained on."""
    train_labels: Side | None = None
    """Size that the labels of a crop are brought to for training, by nearest neighbour; null: their own resolution."""
    evaluate: CropConfig
    """Crops that are evaluated."""
    evaluate_labels: Side | None = None
    """The same for evaluation."""
    head: Literal["linear", "readout"] = "linear"
    """`linear`: a 1x1 convolution. `readout`: 1x1, depthwise 3x3, 1x1."""
    batch_norm: bool = True
    """Whether BatchNorm comes before the head."""
    bins: Annotated[int, Field(ge=0)] = 256
    """Depth bins of a linear head, whose softmax weighs the bin centres; 0: one output through softplus."""
    depth_loss: Literal["sig", "silog"] = "sig"
    """`sig`: SigLoss with warm-up. `silog`: without. Both have beta 0.15."""
    gradient_weight: Weight = 0.5
    """Weight of the gradient term that is added to the depth loss."""
    points: Annotated[int, Field(ge=0)] = 0
    """Random label pixels of each image at which the loss is evaluated in a step, the crossings of as many rows as
    columns: the root, rounded down, of each; 0: all pixels."""
    lr: Rate
    """Peak learning rate of AdamW."""
    weight_decay: Weight
    """Decoupled weight decay of AdamW."""
    batch_size: PositiveInt
    """Images in a step."""
    steps: PositiveInt | None = None
    """Steps of a training; give this or `epochs`."""
    epochs: PositiveInt | None = None
    """Passes over the training images; give this or `steps`."""
    schedule: Literal["cosine", "linear", "constant"]
    """How the rate goes from its peak to zero after the warm-up; or not at all."""
    cosine_steps: PositiveInt | None = None
    """Steps in which a cosine goes from the peak to zero; as many follow in which it goes back, and so on. null: those
    of the whole training, once."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises linearly from zero; at most a tenth of the training is used."""
    align: bool = False
    """Whether each image's depth is brought to the truth by scale and shift before it is measured."""

    @model_validator(mode="after")
    def _consistent(self) -> Protocol:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of protocol.steps and protocol.epochs")
        if self.cosine_steps is not None and (self.schedule != "cosine" or self.warmup_steps):
            raise ValueError("protocol.cosine_steps is for schedule cosine without warm-up")
        if self.points and self.gradient_weight and "depth" in self.tasks:
            raise ValueError("protocol.points leaves no neighbours to compare: set protocol.gradient_weight=0")
        if self.train.kind == "random" and self.train_labels is None:
            raise ValueError("protocol.train.kind random needs protocol.train_labels: each crop has another size else")
        if self.train.kind == "slide":
            raise ValueError("protocol.train.kind slide is for evaluation only")
        for config in (self.train, self.evaluate):
            if config.kind == "whole" and config.scale[0] != config.scale[1]:
                raise ValueError("protocol.train.scale and evaluate.scale of whole images must be one scale, twice")
        if self.evaluate.kind == "random" or self.evaluate.flip:
            raise ValueError("protocol.evaluate must look at every image in one way: neither random nor flip")
        return self

    def num_steps(self, num_images: int) -> int:
        """Steps of a training on so many images."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(self.epochs * num_images // self.batch_size, 1)

    def stride(self, size: Side) -> int | None:
        """Pixels between sliding windows of a size."""
        if self.evaluate.stride is None or self.side is None:
            return self.evaluate.stride
        mine, theirs = (side if isinstance(side, int) else min(side) for side in (size, self.side))
        return max(self.evaluate.stride * mine // theirs, 1)

    def learning_rate(self, step: int, total: int) -> float:
        """Rate of a step, from 0 to total - 1."""
        if self.cosine_steps is not None:
            return scheduled_rate("cosine", self.lr, step, self.cosine_steps, 0)
        return scheduled_rate(self.schedule, self.lr, step, total, self.warmup_steps)


class FrozenProtocol(Section):
    """What the rules of tasks that train nothing have in common; images are seen as a whole."""

    name: str
    tasks: list[Task]
    """What it can be used for."""
    align: ClassVar[bool] = False
    side: ClassVar[Side | None] = None
    evaluate_labels: ClassVar[Side | None] = None
    evaluate: ClassVar[CropConfig] = CropConfig(kind="whole")

    def stride(self, size: Side) -> int | None:
        """Pixels between sliding windows: there are none."""
        return None


class MatchingProtocol(FrozenProtocol):
    """Rules of matching: nearest neighbours of frozen features against correspondences from poses and depth.

    Source of the task and of the bins: El Banani et al. 2024, https://arxiv.org/abs/2404.08636.
    """

    grid: PositiveInt
    """Rows of the shorter side to which every map is enlarged bilinearly: the places that can be matched."""
    frames: Annotated[int, Field(ge=2)]
    """Images of a scene that make pairs; of more, so many at equal distances are taken."""
    pairs: PositiveInt
    """Pairs of images of a scene for each bin of viewpoint changes, drawn by a fixed seed where there are more."""
    queries: PositiveInt
    """Points of a pair's first image that are looked for in its second, drawn from those that are visible in both."""
    overlap: Fraction
    """Least share of the first image's valid points that is visible in the second."""
    tolerance: Rate
    """A point is visible if the depth measured at its place differs by at most this share from its own."""
    angles: Annotated[list[Rate], Field(min_length=1)]
    """Upper ends of the bins of viewpoint changes: the angle of the rotation between both cameras, in degrees."""

    @model_validator(mode="after")
    def _rising(self) -> MatchingProtocol:
        if sorted(set(self.angles)) != self.angles:
            raise ValueError("protocol.angles must rise")
        return self

    @property
    def bins(self) -> list[str]:
        """Names of the bins, such as `0-15 deg`."""
        ends = [0.0, *self.angles]
        return [f"{low:g}-{high:g} deg" for low, high in zip(ends, self.angles, strict=False)]


class PropagationProtocol(FrozenProtocol):
    """Rules of propagation: the first frame's mask is handed on by the similarity of frozen features.

    Source: the evaluation of DINO, Caron et al. 2021, https://arxiv.org/abs/2104.14294, after Jabri et al. 2020,
    https://arxiv.org/abs/2006.14613.
    """

    grid: PositiveInt
    """Rows of the shorter side to which every map is brought bilinearly, and on which masks are propagated."""
    memory: Annotated[int, Field(ge=0)]
    """Last frames whose masks are handed on, besides the first frame."""
    radius: PositiveInt
    """Cells, in either direction, within which a cell looks for similar ones."""
    top: PositiveInt
    """Most similar cells whose labels are averaged."""
    temperature: Rate
    """Of the softmax of cosine similarities that weighs them."""


AnyProtocol = Protocol | MatchingProtocol | PropagationProtocol

_WHOLE = CropConfig(kind="whole")
_CENTRE = CropConfig(kind="centre")
_JAFAR = Protocol(
    name="jafar", tasks=["segmentation"], side=448,
    train=CropConfig(kind="centre", flip=True), train_labels=448,
    evaluate=_CENTRE, evaluate_labels=448, batch_norm=False,
    lr=5e-4, weight_decay=1e-5, batch_size=2, epochs=20, schedule="cosine",
)  # fmt: skip
_NYU_SCALE = [480 / 416, 480 / 416]
"""NYUv2 has 480x640 pixels: crops of 416x544 are taken, and whole images evaluated, at that size."""
_NYU_CROPS = CropConfig(kind="random", per_image=4, scale=_NYU_SCALE)
_NYU_WHOLE = CropConfig(kind="whole", scale=_NYU_SCALE)

PROTOCOLS: dict[str, AnyProtocol] = {
    protocol.name: protocol
    for protocol in (
        _JAFAR,
        _JAFAR.model_copy(update={"name": "jafar-published", "cosine_steps": 20}),
        Protocol(
            name="dinov3-ade", tasks=["segmentation"], side=512,
            train=CropConfig(kind="random", per_image=4, scale=[0.5, 2.0]), train_labels=512,
            evaluate=CropConfig(kind="slide", stride=341),
            lr=1e-3, weight_decay=1e-3, batch_size=16, steps=40_000, schedule="linear", warmup_steps=1500,
        ),
        Protocol(
            name="dinov3-nyu", tasks=["depth"], side=[416, 544], train=_NYU_CROPS,
            train_labels=[416, 544], evaluate=_NYU_WHOLE,
            lr=3e-4, weight_decay=1e-4, batch_size=16, steps=38_400, schedule="linear", warmup_steps=1500,
        ),
        Protocol(
            name="brixel", tasks=["segmentation"], side=256, train=_CENTRE, evaluate=_CENTRE, batch_norm=False,
            lr=1e-3, weight_decay=0.01, batch_size=16, epochs=20, schedule="constant",
        ),
        Protocol(
            name="brixel-nyu", tasks=["depth"], side=[288, 384], train=CropConfig(kind="stretch"),
            evaluate=CropConfig(kind="stretch"), head="readout", batch_norm=False, depth_loss="silog",
            gradient_weight=0.0, lr=1e-3, weight_decay=0.01, batch_size=16, epochs=80, schedule="constant", align=True,
        ),
        Protocol(
            name="normals", tasks=["normals", "depth_normals"], side=[416, 544], train=_NYU_CROPS,
            train_labels=[416, 544], evaluate=_NYU_WHOLE,
            lr=5e-4, weight_decay=1e-4, batch_size=16, steps=38_400, schedule="linear", warmup_steps=1500,
        ),
        Protocol(
            name="quick", tasks=["segmentation", "depth", "normals", "depth_normals"],
            train=_WHOLE, evaluate=_WHOLE, depth_loss="silog", gradient_weight=0.0, points=4096,
            lr=2e-3, weight_decay=1e-4, batch_size=8, steps=1500, schedule="cosine",
        ),
        MatchingProtocol(
            name="matching", tasks=["matching"], grid=96, frames=200, pairs=150, queries=400, overlap=0.2,
            tolerance=0.05, angles=[15.0, 30.0, 60.0, 180.0],
        ),
        PropagationProtocol(
            name="propagation", tasks=["propagation"], grid=32, memory=7, radius=12, top=5, temperature=0.1,
        ),
    )
}  # fmt: skip

_ADE = {"batch_size": 32, "epochs": 40}
BY_DATA: dict[str, dict[str, dict[str, int]]] = {
    "brixel": {"ade20k": _ADE, "ade20k_151": _ADE, "cityscapes": {"epochs": 50}},
}
"""What a protocol prescribes for single data sets, by the recipe's name."""


def published(name: str, data: str) -> AnyProtocol:
    """The protocol of a name as it is for a data set.

    Raises:
        KeyError: there is no such protocol.
    """
    return PROTOCOLS[name].model_copy(update=BY_DATA.get(name, {}).get(data, {}))


def differences(protocol: AnyProtocol, data: str, size: Side) -> list[str]:
    """What is not as published, as `key=value`; the input's size among it."""
    changed = section.differences(published(protocol.name, data), protocol)
    own_size = [f"size={size}"] if protocol.side is not None and size != protocol.side else []
    return [f"{key}={value}" for key, (_, value) in changed.items()] + own_size


def printed_name(protocol: AnyProtocol, data: str, size: Side) -> str:
    """The name as it stands in tables and files: with everything that is not as published."""
    changed = differences(protocol, data, size)
    return f"{protocol.name} (changed: {', '.join(changed)})" if changed else protocol.name
