"""Probe heads: what is trained on frozen maps, from a 1x1 convolution to a small readout; how they are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from brixel_cli.core.weights import check_keys, load_tensors, save_tensors
from brixel_cli.errors import WeightsError

FORMAT = "brixel-head-1"
READOUT_WIDTH = 128
_Metres = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
HeadKind = Literal["linear", "readout"]
Quantity = Literal["segmentation", "depth", "normals"]
QUANTITIES: dict[str, tuple[Quantity, ...]] = {
    "segmentation": ("segmentation",),
    "depth": ("depth",),
    "normals": ("normals",),
    "depth_normals": ("depth", "normals"),
    "matching": (),
    "propagation": (),
}
"""What a head of each task predicts, from one map; of tasks without a head, nothing."""


@dataclass(frozen=True)
class HeadSpec:
    """All that determines a head's architecture.

    Attributes:
        task: a key of `QUANTITIES`.
        channels: D of the maps.
        num_classes: of a segmentation; 0 otherwise.
        kind: `linear`, a 1x1 convolution, or `readout`: 1x1, depthwise 3x3 and 1x1 convolutions with GELU between.
        batch_norm: whether BatchNorm comes first, as in DINOv2's and DINOv3's probes.
        bins: of a linear depth head; their softmax weighs the bin centres. 0: one output through softplus.
        depth_range: least and most depth in metres, the first and the last bin centre.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    task: Literal["segmentation", "depth", "normals", "depth_normals"]
    channels: Annotated[int, Field(gt=0, le=2**16)]
    num_classes: Annotated[int, Field(ge=0, le=255)] = 0
    kind: HeadKind = "linear"
    batch_norm: bool = True
    bins: Annotated[int, Field(ge=0, le=2**16)] = 256
    depth_range: tuple[_Metres, _Metres] = (0.001, 10.0)

    def __post_init__(self) -> None:
        if (self.task == "segmentation") != (self.num_classes > 0):
            raise ValueError(f"a head for {self.task} with {self.num_classes} classes")
        if not self.depth_range[0] < self.depth_range[1]:
            raise ValueError(f"its depth_range {self.depth_range} is empty")

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """What the head predicts."""
        return QUANTITIES[self.task]

    def num_outputs(self, quantity: Quantity) -> int:
        """Channels of the last convolution."""
        if quantity == "segmentation":
            return self.num_classes
        if quantity == "normals":
            return 3
        return self.bins if self.has_bins else 1

    @property
    def has_bins(self) -> bool:
        """Whether depth is a weighted mean of bin centres."""
        return self.kind == "linear" and self.bins > 0


class Head(nn.Module):
    """One branch for each quantity, on the same map; the branches share no weights.

    Depth is worked out on the map's own grid, so that all outputs are few channels and cheap to enlarge.
    """

    centres: Tensor

    def __init__(self, spec: HeadSpec):
        super().__init__()
        self.spec = spec
        self.branches = nn.ModuleDict({name: _branch(spec, name) for name in spec.quantities})
        low, high = spec.depth_range
        self.register_buffer("centres", torch.linspace(low, high, max(spec.bins, 1)), persistent=False)

    def forward(self, maps: Tensor, sums: Tensor | None = None) -> dict[str, Tensor]:
        """Outputs on the map's grid, from maps (B, D, h, w).

        Args:
            maps: float32.
            sums: `channel_sums` of the maps, if they are known already.

        Returns:
            `segmentation`: logits (B, C, h, w). `depth`: metres, positive (B, 1, h, w). `normals`: vectors of any
            length (B, 3, h, w); `enlarge` and the losses normalise them.
        """
        moments = _moments(maps, sums) if self.needs_sums else None  # the branches see the same maps
        outputs: dict[str, Tensor] = {}
        for name, branch in self.branches.items():
            output = branch(maps) if moments is None else _folded(branch, maps, *moments)
            outputs[name] = self._finish(name, output)
        return outputs

    @property
    def needs_sums(self) -> bool:
        """Whether BatchNorm is in training and folded into the 1x1 convolution after it."""
        return self.training and self.spec.kind == "linear" and self.spec.batch_norm

    def _finish(self, quantity: str, output: Tensor) -> Tensor:
        if quantity != "depth":
            return output
        if self.spec.has_bins:
            return torch.einsum("bkhw,k->bhw", output.softmax(dim=1), self.centres)[:, None]
        return F.softplus(output) + self.spec.depth_range[0]


def enlarge(quantity: str, output: Tensor, size: tuple[int, int]) -> Tensor:
    """An output of a head at (height, width) of the labels: bilinear, align_corners=False; normals of length 1."""
    enlarged = F.interpolate(output, size=size, mode="bilinear", align_corners=False)
    return F.normalize(enlarged, dim=1) if quantity == "normals" else enlarged


def build_head(spec: HeadSpec, seed: int) -> Head:
    """A head with fresh weights on the CPU, a pure function of spec and seed, whatever device it is moved to."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        head = Head(spec)
        for branch in head.branches.values():
            _initialise(branch)
    return head


def save_head(path: Path, head: Head, description: Mapping[str, Any]) -> None:
    """Write a head and what is to be known of it (recipe, classes, source ...), atomically; JSON-able values."""
    metadata = {
        "format": FORMAT,
        "head": json.dumps(asdict(head.spec)),
        "description": json.dumps(description, sort_keys=True),
    }
    save_tensors(path, head.state_dict(), metadata)


def load_head(path: Path) -> tuple[Head, dict[str, Any]]:
    """Read a head in eval mode, and its description.

    Raises:
        WeightsError: the file is missing, damaged, or holds no head.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"{path} is no probe head of format {FORMAT}: {metadata.get('format', 'unmarked')}. "
            "Heads are what brixel probe leaves in the folder heads of its output."
        )
    try:
        spec = TypeAdapter(HeadSpec).validate_json(metadata["head"])
        description = TypeAdapter(dict[str, Any]).validate_json(metadata["description"])
    except (KeyError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc'])) or 'head'}: {first['msg']}" if first else f"it lacks {error}"
        raise WeightsError(f"{path}: its description of the head cannot be read: {reason}.") from error
    with torch.device("meta"):  # a description may ask for more than memory has
        expected = Head(spec).state_dict()
    check_keys(expected, tensors, f"{path} does not fit its own description")
    head = Head(spec)
    head.load_state_dict(tensors)
    return head.eval().requires_grad_(False), description


def channel_sums(maps: Tensor) -> Tensor:
    """Sum and sum of squares of each channel of each map of (B, D, h, w): (B, 2, D), float64 on the CPU.

    Sums along the rows of memory take a small part of the time of `torch.var_mean` over these axes.
    """
    rows = maps.flatten(2)
    norms = torch.linalg.vector_norm(rows, dim=-1).cpu().double()  # not every device has float64
    return torch.stack([rows.sum(dim=-1).cpu().double(), norms.square()], dim=1)


def _moments(maps: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance (over the number itself) of each channel of maps (B, D, h, w)."""
    first, second = (channel_sums(maps) if sums is None else sums).sum(dim=0) / (maps.numel() // maps.shape[1])
    # The number format first: a device may lack float64.
    variance = (second - first.square()).clamp(min=0).to(maps.dtype).to(maps.device)
    return first.to(maps.dtype).to(maps.device), variance


def _folded(branch: nn.Module, maps: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """A linear branch in training as a single 1x1 convolution, into which BatchNorm is folded: outputs (B, K, h, w).

    The batch's statistics depend on no parameter, so that the gradients are those of both modules one after the
    other, without a pass of BatchNorm over whole maps. The running statistics are updated as by BatchNorm.
    """
    assert isinstance(branch, nn.Sequential)
    norm, convolution = branch
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    momentum, count = norm.momentum or 0.0, maps.numel() // maps.shape[1]
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(variance * (count / max(count - 1, 1)), momentum)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    weight = convolution.weight[:, :, 0, 0]
    bias = convolution.bias + weight @ (norm.bias - mean * scale)
    return F.conv2d(maps, (weight * scale)[:, :, None, None], bias)


def _branch(spec: HeadSpec, quantity: Quantity) -> nn.Module:
    outputs = spec.num_outputs(quantity)
    first: list[nn.Module] = [nn.BatchNorm2d(spec.channels)] if spec.batch_norm else []
    if spec.kind == "linear":
        return nn.Sequential(*first, nn.Conv2d(spec.channels, outputs, 1))
    width = min(READOUT_WIDTH, spec.channels)
    return nn.Sequential(
        *first,
        nn.Conv2d(spec.channels, width, 1),
        nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1, groups=width),
        nn.GELU(),
        nn.Conv2d(width, outputs, 1),
    )


def _initialise(branch: nn.Module) -> None:
    """Last convolution: normal with deviation 0.01 and no bias, as the published linear probes start."""
    last = [module for module in branch.modules() if isinstance(module, nn.Conv2d)][-1]
    nn.init.normal_(last.weight, std=0.01)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
