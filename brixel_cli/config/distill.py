"""Every option of a distillation, typed, with its unit; `files.py` reads the recipes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from brixel_cli.config.base import Precision, height_width
from brixel_cli.config.section import DeviceName, Fraction, Rate, Section, Side, Weight


class BackboneConfig(Section):
    name: str
    """timm model name, with or without the tag of its weights, e.g. `vit_small_patch14_dinov2.lvd142m`."""
    weights: str = "pretrained"
    """`pretrained` (from the hub), `random` (cost and shape tests only), or a path to .safetensors or .pth."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format in which the frozen weights are held; bfloat16 halves their memory."""


Count = Annotated[int, Field(gt=0, le=2**16)]
"""Of channels, heads or points."""


class FusionConfig(Section):
    width: Count = 192
    """Channels on the token grid."""
    middle_width: Count = 128
    """Channels on the middle grid, half as fine as the output grid."""
    fine_width: Count = 64
    """Channels on the output grid."""
    blocks: Annotated[list[Annotated[int, Field(ge=0, le=1000)]], Field(min_length=3, max_length=3)] = [4, 2, 1]
    """Number of convolutional blocks on the token, middle and output grid."""
    kernel_sizes: Annotated[list[Literal[1, 3, 5, 7]], Field(min_length=3, max_length=3)] = [1, 3, 3]
    """Side of the depthwise convolutions on the three grids; 1: each location by itself."""
    attention_heads: Annotated[int, Field(ge=0, le=1000)] = 0
    """Heads of the self-attention before each block on the token grid, which sees the whole image; 0: none.
    `width` must be a multiple of it."""
    norm: Literal["location", "map"] = "location"
    """What is normalised together: the channels of each location, or the whole map."""
    linear: bool = True
    """A linear part from the four backbone maps straight to the output's channels, on the token grid."""

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels on the token, middle and output grid."""
        return self.width, self.middle_width, self.fine_width

    @model_validator(mode="after")
    def _consistent(self) -> FusionConfig:
        if self.attention_heads and self.width % self.attention_heads:
            raise ValueError(
                f"adapter.fusion.width {self.width} is not a multiple of attention_heads {self.attention_heads}"
            )
        return self


class DeformableConfig(Section):
    num_heads: Count = 16
    """Attention heads; half the embedding width must be a multiple of it."""
    num_points: Count = 4
    """Sampling points for each query and head."""
    extractors: Annotated[list[Annotated[int, Field(ge=0, le=1000)]], Field(min_length=4, max_length=4)] = [1, 1, 1, 3]
    """Number of extractors for each of the four backbone maps."""
    head_width: Annotated[int, Field(gt=0, le=2**16, multiple_of=4)] = 64
    """Channels of the convolutional head."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Probability of dropping an extractor's feed-forward branch for a sample, in training."""


class AdapterConfig(Section):
    kind: Literal["fusion", "deformable"] = "fusion"
    """`fusion`: convolutions, the cheaper one. `deformable`: the paper's."""
    lora_rank: Annotated[int, Field(ge=0, le=2**12)] = 0
    """Rank of the updates of the backbone's linear layers that are trained with the adapter (LoRA); merged into the
    student's own copy of the backbone, they cost no time. 0: none, the backbone as it is (paper)."""
    residual: Literal["direct", "half_grid"] = "direct"
    """How the backbone's last map is enlarged: straight, or through half the token grid (released)."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    channels_last: bool = True
    """Memory layout of the convolutions; the faster one on CPU and on recent GPUs."""
    fusion: FusionConfig = FusionConfig()
    """Read when `kind` is `fusion`."""
    deformable: DeformableConfig = DeformableConfig()
    """Read when `kind` is `deformable`."""


class DataConfig(Section):
    images: str = "photos"
    """Folder of training images, searched recursively."""
    val_images: str | None = None
    """Folder of held-out images; null: hold out a share of `images`."""
    held_out: dict[Annotated[str, Field(pattern=r"^[^/\\\\]+$")], str] = {}
    """Folders of held-out images by domain, in place of `val_images`, such as {street: val/street, rooms: val/rooms}:
    the recovered gap of each domain is measured, and their mean."""
    val_fraction: Fraction = 0.05
    """Share of `images` held out, chosen by file name, when neither of both is given; never trained on."""
    max_val_images: PositiveInt = 64
    """At most so many held-out images are looked at in a validation."""
    min_side: PositiveInt | None = None
    """Images with a shorter side than this (pixels) are skipped; null: the teacher's own short side."""

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.held_out and self.val_images is not None:
            raise ValueError("data.held_out names the held-out images by domain, data.val_images all: give one of them")
        return self

    @property
    def held_out_folders(self) -> dict[str, str]:
        """Folders of held-out images by domain, which is empty for that of `val_images`; none: a share is held out."""
        return self.held_out or ({} if self.val_images is None else {"": self.val_images})


class ViewConfig(Section):
    teacher_size: Side = 1024
    """Input of the teacher in pixels: one side, or [height, width]."""
    factor: Literal[2, 4, 8] = 4
    """Teacher side over student side; also output grid over token grid."""
    other_sizes: list[Side] = []
    """Further teacher inputs to train on, each batch of one size, all sizes equally often; a size given twice counts
    twice. Held-out images are looked at in `teacher_size` alone."""
    kind: Literal["centre", "random", "fixed"] = "centre"
    """`centre`: cover and centre crop (released). `random`: a new random crop and flip each epoch.
    `fixed`: for each image the centre crop and `per_image - 1` random ones, the same in every epoch."""
    per_image: PositiveInt = 1
    """Views of each image when `kind` is `fixed`."""
    scale: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=2, max_length=2)] = [0.06, 1.0]
    """Area of a random crop, as a share of the image's, least and most."""
    flip: bool = True
    """Mirror random crops left to right half of the time."""
    jitter: Annotated[list[Fraction], Field(min_length=4, max_length=4)] = [0.6, 0.6, 0.6, 0.4]
    """How far brightness, contrast, saturation (of 1) and hue (of the colour circle; 0.5 at most) of random crops
    change. The teacher sees the changed image too."""
    grayscale: Fraction = 0.1
    """Share of the random crops that lose their colour."""
    perspective: Fraction = 0.4
    """Distortion of half of the random crops, as if seen from the side: 1 moves corners up to the middle."""

    @model_validator(mode="after")
    def _consistent(self) -> ViewConfig:
        if self.per_image > 1 and self.kind != "fixed":
            raise ValueError(f"views.per_image is {self.per_image}, but only kind: fixed has more than one view")
        if self.scale[0] > self.scale[1]:
            raise ValueError("views.scale must be [least, most]")
        if self.jitter[3] > 0.5:
            raise ValueError("views.jitter: the last value, hue, is at most 0.5, half of the colour circle")
        if self.kind == "fixed" and self.per_image % self.num_sizes:
            raise ValueError(
                f"views.per_image {self.per_image} is not a multiple of the {self.num_sizes} sizes "
                "(teacher_size and other_sizes)"
            )
        return self

    @property
    def teacher_hw(self) -> tuple[int, int]:
        """Teacher input (height, width) in pixels."""
        return self.teacher_sizes[0]

    @property
    def teacher_sizes(self) -> list[tuple[int, int]]:
        """Every teacher input (height, width) in pixels, `teacher_size` first."""
        return [height_width(size) for size in (self.teacher_size, *self.other_sizes)]

    @property
    def num_sizes(self) -> int:
        """How many sizes are interleaved."""
        return 1 + len(self.other_sizes)


class CacheConfig(Section):
    enabled: bool = False
    """Compute the teacher's targets and the backbone's maps once and store them; needs views that stay the same."""
    directory: str | None = None
    """Folder of the cache files; null: `cache` inside the run. Runs that share views and backbone can share it."""


class L1Config(Section):
    weight: Weight = 1.0
    """1 as released."""
    form: Literal["relative", "raw"] = "relative"
    """`relative`: divided by the target's mean absolute value. `raw`: as released."""


class EdgeConfig(Section):
    weight: Weight = 0.5
    """1 as released, where it is raw."""
    form: Literal["relative", "raw"] = "relative"
    """`relative`: divided by the target's own Sobel energy. `raw`: as released."""
    basis: Literal["fixed", "batch"] = "fixed"
    """PCA basis: fitted once before the first step, or on every batch (released; slower)."""
    components: Annotated[int, Field(gt=0, le=24)] = 8
    """Number of principal components compared."""


class SpectralConfig(Section):
    weight: Weight = 0.0
    """0.1 as released; in short runs it made L1, cosine and edges worse, so that it is off unless asked for."""
    form: Literal["centred", "released"] = "centred"
    """`centred`: zero frequency in the middle of the radial bins. `released`: without that shift."""


class CosineConfig(Section):
    weight: Weight = 0.5
    """0 as released: the term is ours."""


class LossConfig(Section):
    l1: L1Config = L1Config()
    edge: EdgeConfig = EdgeConfig()
    spectral: SpectralConfig = SpectralConfig()
    cosine: CosineConfig = CosineConfig()

    @model_validator(mode="after")
    def _some_weight(self) -> LossConfig:
        if not any((self.l1.weight, self.edge.weight, self.spectral.weight, self.cosine.weight)):
            raise ValueError("every loss weight is 0: there is nothing to train on")
        return self


class OptimConfig(Section):
    batch_size: PositiveInt = 16
    """Images in one update, over all processes and accumulated passes."""
    accumulate: PositiveInt = 1
    """Passes into which an update is split; more needs less memory."""
    steps: PositiveInt | None = None
    """Updates in the whole run; give this or `epochs`."""
    epochs: Rate | None = None
    """Passes over the training views in the whole run; give this or `steps`."""
    lr: Rate = 1e-3
    """Peak learning rate."""
    weight_decay: Weight = 0.01
    """Decoupled weight decay of AdamW; 0 makes it plain Adam."""
    clip: Weight = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    schedule: Literal["cosine", "two_step", "constant"] = "cosine"
    """`cosine`: warm-up, then a half cosine to zero. `two_step`: `first_epoch_lr`, then `lr` (released)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Updates over which the rate rises from zero; at most a tenth of the run is used."""
    first_epoch_lr: Rate = 1e-4
    """Rate of the first epoch when `schedule` is `two_step`."""
    linear_views: Annotated[int, Field(ge=0)] = 2048
    """Before the first step the adapter's linear part is fitted on so many training views at most, by ridge
    regression; 0: it is not. Without one, or with `init`, there is nothing to fit."""
    lora_lr: Rate = 2e-4
    """Peak learning rate of the low-rank updates of the backbone, where `adapter.lora_rank` is not 0."""
    map_noise: Weight = 0.5
    """Gaussian noise on the backbone's maps in training, as a share of their standard deviation: it counters
    overfitting to few images."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the moving average of the weights that is validated and saved; 0 switches averaging off."""

    def images_per_pass(self, world_size: int = 1) -> int:
        """Images that one process handles at once."""
        return max(self.batch_size // (self.accumulate * world_size), 1)

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of optim.steps and optim.epochs")
        if self.batch_size % self.accumulate:
            raise ValueError(f"optim.batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        return self


class RunConfig(Section):
    """How the run is carried out. Only what stands here may differ when a run is resumed."""

    device: DeviceName = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps`."""
    precision: Precision = "auto"
    """Arithmetic of the networks; `auto`: bfloat16 where the device computes in it, else float32. `float16` is for
    inference only. Losses are always float32."""
    workers: Annotated[int | None, Field(ge=0)] = None
    """Processes that read and crop images; 0: the training itself does. null: one for each core but one on a GPU, 16
    at most, and 2 on the CPU."""
    log_every: PositiveInt = 10
    """Updates between lines of the metrics."""
    validate_every: PositiveInt = 500
    """Updates between validations, each with a picture."""
    checkpoint_every: PositiveInt = 250
    """Updates between checkpoints."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""


class Recipe(Section):
    """A whole distillation: what is trained, on what, how long and how."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the run folder, runs/NAME, unless --output is given."""
    seed: Annotated[int, Field(ge=0)] = 0
    backbone: BackboneConfig
    adapter: AdapterConfig = AdapterConfig()
    init: str | None = None
    """A student to start from: run folder, .safetensors, released .pth, `hf-hub:user/name` or shipped name. null: a new
    one."""
    data: DataConfig = DataConfig()
    views: ViewConfig = ViewConfig()
    cache: CacheConfig = CacheConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.cache.enabled and self.views.kind == "random":
            raise ValueError("cache.enabled needs views that stay the same: views.kind centre or fixed, not random")
        if self.run.precision == "float16":
            raise ValueError("run.precision float16 is for inference; train in bfloat16 or float32")
        for number, size in enumerate(self.views.teacher_sizes):
            for side in size:
                if side % self.views.factor:
                    key = "views.other_sizes" if number else "views.teacher_size"
                    raise ValueError(f"{key} {side} is not a multiple of views.factor {self.views.factor}")
        return self

    @property
    def fits_linear_part(self) -> bool:
        """Whether the adapter's linear part is fitted before the first step."""
        linear = self.adapter.kind == "fusion" and self.adapter.fusion.linear
        return linear and self.optim.linear_views > 0 and self.init is None

    @property
    def student_hw(self) -> tuple[int, int]:
        """Student input (height, width) in pixels, of `views.teacher_size`."""
        height, width = self.views.teacher_hw
        return height // self.views.factor, width // self.views.factor

    @property
    def trained_sides(self) -> tuple[int, int]:
        """Least and most pixels that the shorter side of a student input has in the training."""
        sides = [min(size) // self.views.factor for size in self.views.teacher_sizes]
        return min(sides), max(sides)
