"""One way to load a model for inference: a description, made from plain arguments, and the model that it loads.

    spec = model_spec("student", checkpoint="runs/vits")     # from headers alone: shapes, factor, normalisation
    model = spec.load("cuda")                                # a `Student`, or a `Backbone` for the other two sources
    maps = FeatureExtractor(spec, runtime, reporter).maps(pixels)    # uint8 pixels to maps, as memory allows

Extraction and probing take the third line, the benchmark the second. Where no checkpoint is named, the caller finds one
first (`engines.default_student`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brixel_cli.config.distill import AdapterConfig
from brixel_cli.config.extract import Field, Source
from brixel_cli.core.backbone import Backbone, load_backbone
from brixel_cli.core.identity import library_versions, tensors_sha256
from brixel_cli.core.lora import linear_layers
from brixel_cli.core.memory import is_out_of_memory
from brixel_cli.core.student import (
    StoredAdapter,
    Student,
    build_adapter,
    read_adapter,
)
from brixel_cli.data.feature_layout import MAP, dataset_of, layer_name
from brixel_cli.data.resizing import snap
from brixel_cli.data.views import normalise_pixels
from brixel_cli.engines.baselines import Baseline
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime, release_cached
from brixel_cli.errors import BrixelError, UsageError

DEFAULT_FACTOR = 4
"""Of a teacher whose student is not named."""
CPU_BATCH_PIXELS = 4 * 448 * 448
"""More at once is no faster on a CPU, and costs memory."""
LARGEST_CPU_BATCH = 16
LARGEST_BATCH = 128


@dataclass(frozen=True)
class ModelSpec:
    """A model before its weights are loaded.

    Attributes:
        source: `student`, plain `backbone`, or `teacher`, which is the backbone at `factor` times the input.
        backbone: timm name.
        weights: of the backbone: `pretrained`, `random` or a path.
        dtype: `float32` or `bfloat16`, in which all weights are held.
        embed_dim: channels D of every map.
        patch_size: side of a patch in pixels.
        mean, std: by which images in [0, 1] are normalised.
        factor: output grid over token grid of the student; the teacher's input over the student's.
        adapter: options of the student's adapter; None for the other sources.
        stored: the student's trained adapter; None for the other sources, and for fresh weights.
        chosen_by: the student by whose card the backbone's weights were chosen, which must be those; None: by the user.
        trained_size: the student's input (height, width) in pixels in its training; None: not known.
        scale: of a plain backbone at equal cost: its input over the student's, before rounding to the patch.
        depth, has_cls, num_registers: blocks of the backbone, and its tokens besides those of the patches.
    """

    source: Source
    backbone: str
    weights: str
    dtype: str
    embed_dim: int
    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    factor: int
    adapter: AdapterConfig | None = None
    stored: StoredAdapter | None = None
    chosen_by: StoredAdapter | None = None
    trained_size: tuple[int, int] | None = None
    scale: float = 1.0
    depth: int = 0
    has_cls: bool = False
    num_registers: int = 0

    @property
    def enlarge(self) -> int:
        """Side of the model's input over the student's."""
        return self.factor if self.source == "teacher" else 1

    def input_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The model's input where the student's has this size; both (height, width) in pixels."""
        if self.scale != 1:
            return snap(size[0] * self.scale, self.patch_size), snap(size[1] * self.scale, self.patch_size)
        return size[0] * self.enlarge, size[1] * self.enlarge

    def grid(self, model_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of the map of a model's input of this size in pixels; both (height, width)."""
        finer = self.factor if self.source == "student" else 1
        return model_size[0] // self.patch_size * finer, model_size[1] // self.patch_size * finer

    def load(self, device: str = "cpu") -> Student | Backbone:
        """The model, in eval mode, all parameters frozen.

        Fresh weights of an adapter are drawn by a fixed seed. On the device `meta` shapes alone are built.

        Raises:
            WeightsError: the weights cannot be had, or do not belong together.
        """
        if self.stored is not None and device != "meta":
            return self.stored.load(self.backbone, self.weights, self.dtype, device)
        if self.adapter is not None and device != "meta":
            torch.manual_seed(0)
        backbone = load_backbone(self.backbone, self.weights, self.dtype, device)
        if self.adapter is None:
            if self.chosen_by is not None and device != "meta":
                self.chosen_by.check_weights(backbone)
            return backbone
        layers = linear_layers(backbone) if self.adapter.lora_rank else None
        adapter = build_adapter(self.embed_dim, self.factor, self.adapter, layers)
        student = Student(backbone, adapter.to(device, getattr(torch, self.dtype)))
        return student.eval().requires_grad_(False)

    def load_student(self, device: str = "cpu") -> Student:
        """The same, of the source `student`."""
        student = self.load(device)
        assert isinstance(student, Student)
        return student


def model_spec(
    source: Source,
    *,
    checkpoint: str | None = None,
    backbone: str | None = None,
    weights: str | None = None,
    dtype: str = "float32",
    adapter: AdapterConfig | None = None,
    factor: int = DEFAULT_FACTOR,
) -> ModelSpec:
    """Describe a model: reads the checkpoint, and builds the backbone's shapes; no weights of the backbone are read.

    Args:
        source: `student`, `backbone` or `teacher`.
        checkpoint: of a student: what `load_student` takes. The other sources take from it what is not said here.
        backbone: timm name; default: as the checkpoint says.
        weights: of the backbone; default: as the checkpoint says, or else `pretrained`.
        dtype: in which all weights are held.
        adapter: options of an adapter with fresh weights, for a student without a checkpoint.
        factor: of a student or teacher without a checkpoint.

    Raises:
        UsageError: the backbone is not known, or the checkpoint's is another one.
        WeightsError: the checkpoint cannot be read.
    """
    stored = read_adapter(checkpoint) if checkpoint is not None else None
    card = stored.card if stored else None
    name = backbone or (card.backbone if card else "")
    if not name:
        where = stored.path if stored else f"A {source} without a checkpoint"
        raise UsageError(
            f"{where} does not say which backbone it belongs to{f' (D = {card.embed_dim})' if card else ''}: "
            "give --backbone NAME (in Python backbone=), such as vit_small_patch14_dinov2.lvd142m."
        )
    if stored:
        stored.check_name(name)
    student = source == "student"
    if student and stored is None and adapter is None:
        raise ValueError("a student needs a checkpoint, or the options of an adapter")
    meta = load_backbone(name, device="meta")
    size = card.student_size if card else ()
    return ModelSpec(
        source=source,
        backbone=name,
        weights=weights or (card.backbone_weights if card else "pretrained"),
        dtype=dtype,
        embed_dim=meta.embed_dim,
        patch_size=meta.patch_size,
        mean=meta.mean,
        std=meta.std,
        factor=card.factor if card else factor,
        adapter=(card.adapter if card else adapter) if student else None,
        stored=stored if student else None,
        chosen_by=None if weights else stored,
        trained_size=(size[0], size[1]) if size else None,
        depth=meta.depth,
        has_cls=meta.has_cls,
        num_registers=meta.num_registers,
    )


class FeatureExtractor:
    """A loaded model that takes pixels and gives maps, in batches as large as memory allows.

    Args:
        spec: of the model.
        runtime: device and precision.
        reporter: is warned where memory runs out.
        batch_size: images at once at most; None: as many as come.
        baseline: upsampler from elsewhere on top of a plain backbone.

    Attributes:
        student: None for plain backbone and teacher.
        backbone: of the student, or the model itself.

    Raises:
        WeightsError: the weights cannot be had, or do not belong together.
    """

    def __init__(
        self,
        spec: ModelSpec,
        runtime: Runtime,
        reporter: Reporter,
        batch_size: int | None = None,
        baseline: Baseline | None = None,
    ):
        self.spec, self.runtime, self.reporter, self.baseline = spec, runtime, reporter, baseline
        model = spec.load(str(runtime.device))
        self.student = model if isinstance(model, Student) else None
        self.backbone: Backbone = model.backbone if isinstance(model, Student) else model
        self._model = model
        self._call = runtime.in_precision(baseline.whole_pass(self.backbone, spec.factor) if baseline else model)
        self.most_at_once = batch_size

    def describe(self) -> dict[str, Any]:
        """What the numbers are: of the model, for the feature file."""
        stored = self.spec.stored
        student: dict[str, Any] | None = None
        if self.student is not None and stored is not None:
            student = {
                "sha256": tensors_sha256(self.student.adapter.state_dict()),
                "step": stored.card.step,
                "adapter": stored.card.adapter.model_dump(),
                "released": stored.released is not None,
            }
        return {
            "source": self.spec.source,
            "backbone": self.backbone.name,
            "backbone_weights": self.backbone.weights,
            "backbone_sha256": self.backbone.sha256,
            "student": student,
            "factor": self.spec.factor,
            "patch_size": self.backbone.patch_size,
            "embed_dim": self.backbone.embed_dim,
            "mean": list(self.backbone.mean),
            "std": list(self.backbone.std),
            "precision": self.runtime.precision,
            "tf32": False,
            "device": self.runtime.device.type,
            "versions": library_versions(),
        }

    def maps(self, pixels: Tensor, *guides: Tensor) -> Tensor:
        """Maps (B, D, h, w), float32, of upright RGB pixels (B, 3, H, W), uint8, of one size.

        Where memory runs out, the batch is halved, now and for all that follow.

        Args:
            pixels: for the network.
            guides: for a baseline, the same images as large as it wants them.

        Raises:
            BrixelError: memory does not suffice for a single image.
        """
        return self._in_parts((pixels, *guides), lambda *parts: {MAP: self._forward(*parts)})[MAP]

    def parts(self, pixels: Tensor, fields: Sequence[Field], layers: Sequence[int]) -> dict[str, Tensor]:
        """What is stored of images, by dataset, float32; arguments and errors as `maps`.

        Args:
            pixels: as for `maps`.
            fields: what of the last block.
            layers: 0-based blocks whose maps are wanted too.
        """
        if tuple(fields) == ("map",) and not layers:
            return {MAP: self.maps(pixels)}
        return self._in_parts((pixels,), lambda part: self._outputs(part, fields, layers))

    @torch.inference_mode()
    def _outputs(self, pixels: Tensor, fields: Sequence[Field], layers: Sequence[int]) -> dict[str, Tensor]:
        with self.runtime.autocast():
            found = self._model.outputs(self._normalised(pixels), layers)
        tokens = {"map": found.map, "cls": found.cls, "registers": found.registers, "pooled": found.map.mean((2, 3))}
        named: dict[str, Tensor | None] = {dataset_of(field): tokens[field] for field in fields}
        named |= {layer_name(layer): found.layers[layer] for layer in layers}
        return {name: value.float() for name, value in named.items() if value is not None}

    def _in_parts(self, images: Sequence[Tensor], forward: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        outputs: list[dict[str, Tensor]] = []
        start, pixels = 0, images[0]
        while start < len(pixels):
            size = min(self.most_at_once or len(pixels), len(pixels) - start)
            try:
                outputs.append(forward(*(seen[start : start + size] for seen in images)))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    height, width = pixels.shape[-2:]
                    raise BrixelError(
                        f"Out of memory on {self.runtime.device} with a single image of {height}x{width} pixels. "
                        "Lower --res, or take --precision bfloat16 or another --device; "
                        "what was computed stays."
                    ) from error
                self.most_at_once = size // 2
                self.reporter.warn(f"out of memory with {size} images at once; going on with {size // 2}")
                release_cached(self.runtime.device)
                continue
            start += size
        if len(outputs) == 1:
            return outputs[0]
        return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}

    def batch_sizes(self, sizes: dict[tuple[int, int], int], batch_size: int | None) -> dict[tuple[int, int], int]:
        """How many images of each model size make a batch.

        Args:
            sizes: number of images of each model size.
            batch_size: as asked for; None: on a CPU by pixels, elsewhere as many as memory takes, tried out here.
        """
        if batch_size is not None:
            return dict.fromkeys(sizes, batch_size)
        if self.runtime.device.type == "cpu" or self.baseline:  # what a function from elsewhere takes is not known
            budget, most = CPU_BATCH_PIXELS, LARGEST_CPU_BATCH
        else:
            commonest = max(sizes, key=lambda size: sizes[size])
            budget, most = self._largest_batch(commonest) * commonest[0] * commonest[1], LARGEST_BATCH
        return {(h, w): min(max(budget // (h * w), 1), most) for h, w in sizes}

    @torch.inference_mode()
    def _forward(self, *pixels: Tensor) -> Tensor:
        return self._call(*map(self._normalised, pixels))

    def _normalised(self, pixels: Tensor) -> Tensor:
        on_device = pixels.to(self.runtime.device, non_blocking=True)
        return normalise_pixels(on_device, self.backbone.mean, self.backbone.std)

    def _largest_batch(self, size: tuple[int, int]) -> int:
        fits, batch = 1, 1
        while batch <= LARGEST_BATCH:
            try:
                self._forward(torch.zeros(batch, 3, *size, dtype=torch.uint8))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                release_cached(self.runtime.device)
                return max(fits // 2, 1)  # half of what just fits leaves room for the batch that is being written
            fits, batch = batch, batch * 2
        return fits
