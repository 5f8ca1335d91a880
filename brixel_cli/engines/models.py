"""The model of an extraction: student, plain backbone or teacher, in batches as large as memory allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from brixel_cli.config.extract import ExtractOptions, Number
from brixel_cli.core.backbone import Backbone, load_backbone
from brixel_cli.core.identity import tensors_sha256
from brixel_cli.core.losses import Basis
from brixel_cli.core.student import Student, load_student
from brixel_cli.data.views import normalise_pixels
from brixel_cli.engines.extracting.plan import ModelFacts
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError

CPU_BATCH_PIXELS = 4 * 448 * 448
"""More at once is no faster on a CPU, and costs memory."""
LARGEST_CPU_BATCH = 16
LARGEST_BATCH = 128
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")


class ExtractionModel:
    """Pixels in, maps out.

    Args:
        options: of the extraction.
        facts: of the model.
        runtime: device and precision.
        reporter: hears of memory running out.
        size_option: what sets the size of the input, in errors.

    Raises:
        WeightsError: the weights cannot be had, or do not belong together.
    """

    def __init__(
        self,
        options: ExtractOptions,
        facts: ModelFacts,
        runtime: Runtime,
        reporter: Reporter,
        size_option: str = "--res",
    ):
        self.facts, self.runtime, self.reporter, self.size_option = facts, runtime, reporter, size_option
        self.student: Student | None = None
        if facts.adapter is not None:
            self.student = load_student(
                facts.adapter.path,
                backbone=options.backbone,
                backbone_weights=facts.weights,
                device=str(runtime.device),
            )
            self.backbone: Backbone = self.student.backbone
        else:
            self.backbone = load_backbone(facts.backbone, facts.weights, device=str(runtime.device))
            if facts.trained is not None:
                facts.trained.check_weights(self.backbone)
        self._call: Callable[[Tensor], Tensor] = self.student or self.backbone
        self.most_at_once: int | None = options.batch_size

    def describe(self) -> dict[str, Any]:
        """What the numbers are: of the model, for the feature file."""
        stored = self.facts.adapter
        student: dict[str, Any] | None = None
        if self.student is not None and stored is not None:
            student = {
                "sha256": tensors_sha256(self.student.adapter.state_dict()),
                "step": stored.card.step,
                "adapter": stored.card.adapter.model_dump(),
                "released": stored.released is not None,
            }
        return {
            "source": self.facts.source,
            "backbone": self.backbone.name,
            "backbone_weights": self.backbone.weights,
            "backbone_sha256": self.backbone.sha256,
            "student": student,
            "factor": self.facts.factor,
            "patch_size": self.backbone.patch_size,
            "embed_dim": self.backbone.embed_dim,
            "mean": list(self.backbone.mean),
            "std": list(self.backbone.std),
            "precision": self.runtime.precision,
            "device": self.runtime.device.type,
            "versions": versions(),
        }

    def maps(self, pixels: Tensor) -> Tensor:
        """Maps (B, D, h, w), float32, of upright RGB pixels (B, 3, H, W), uint8, of one size.

        Where memory runs out, the batch is halved, now and for all that follow.

        Raises:
            BrixelError: memory does not suffice for a single image.
        """
        outputs: list[Tensor] = []
        start = 0
        while start < len(pixels):
            size = min(self.most_at_once or len(pixels), len(pixels) - start)
            try:
                outputs.append(self._forward(pixels[start : start + size]))
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if size == 1:
                    height, width = pixels.shape[-2:]
                    raise BrixelError(
                        f"Out of memory on {self.runtime.device} with a single image of {height}x{width} pixels. "
                        f"Lower {self.size_option}, or take --precision bfloat16 or another --device; "
                        "what was computed stays."
                    ) from error
                self.most_at_once = size // 2
                self.reporter.warn(f"out of memory with {size} images at once; going on with {size // 2}")
                self._release()
                continue
            start += size
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def batch_sizes(self, sizes: dict[tuple[int, int], int], batch_size: int | None) -> dict[tuple[int, int], int]:
        """How many images of each model size make a batch.

        Args:
            sizes: number of images of each model size.
            batch_size: as asked for; None: on a CPU by pixels, elsewhere as many as memory takes, tried out here.
        """
        if batch_size is not None:
            return dict.fromkeys(sizes, batch_size)
        if self.runtime.device.type == "cpu":
            budget, most = CPU_BATCH_PIXELS, LARGEST_CPU_BATCH
        else:
            commonest = max(sizes, key=lambda size: sizes[size])
            budget, most = self._largest_batch(commonest) * commonest[0] * commonest[1], LARGEST_BATCH
        return {(h, w): min(max(budget // (h * w), 1), most) for h, w in sizes}

    @torch.inference_mode()
    def _forward(self, pixels: Tensor) -> Tensor:
        on_device = pixels.to(self.runtime.device, non_blocking=True)
        images = normalise_pixels(on_device, self.backbone.mean, self.backbone.std)
        with self.runtime.autocast():
            return self._call(images).float()

    def _largest_batch(self, size: tuple[int, int]) -> int:
        fits, batch = 1, 1
        while batch <= LARGEST_BATCH:
            try:
                self._forward(torch.zeros(batch, 3, *size, dtype=torch.uint8))
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                self._release()
                return max(fits // 2, 1)  # half of what just fits leaves room for the batch that is being written
            fits, batch = batch, batch * 2
        return fits

    def _release(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()


def encode(
    maps: Tensor, dtype: Number, basis: Basis | None, spare: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], list[bool]]:
    """Maps (B, D, h, w) in the form in which they are stored, and which of them hold finite numbers only.

    int8 has a float32 `scale` (B, 1, h, w): the largest absolute value at a location over 127.

    Args:
        maps: of the model.
        dtype: number format to store.
        basis: principal components to project on; None: the maps themselves.
        spare: an earlier result that is no longer needed, whose memory may be used again: fresh memory costs time.
    """
    if basis is not None:
        maps = Basis(basis.components.to(maps.device), basis.mean.to(maps.device)).project(maps)
    largest = torch.maximum(maps.amax(dim=(1, 2, 3)), -maps.amin(dim=(1, 2, 3)))
    finite = largest <= (torch.finfo(torch.float16).max if dtype == "float16" else torch.finfo(torch.float32).max)
    if dtype == "int8":
        scale = (maps.abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        quantised = (maps / scale).round_().clamp_(-127, 127).to(torch.int8)
        return {"features": quantised, "scale": scale}, finite.tolist()
    if dtype == "float16" and spare is not None and spare["features"].shape == maps.shape:
        return {"features": spare["features"].copy_(maps)}, finite.tolist()
    return {"features": maps.to(getattr(torch, dtype), memory_format=torch.preserve_format)}, finite.tolist()


def versions() -> dict[str, str]:
    """Versions of all that the numbers depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("brixel", "torch", "timm", "pillow")}


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in text for part in OUT_OF_MEMORY)
