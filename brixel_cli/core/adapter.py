"""What is common to both adapters.

An adapter maps the student's image and the four maps of its frozen backbone to the sharp map:
images (B, 3, H, W) and four maps (B, D, h, w) -> (B, D, factor * h, factor * w).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from brixel_cli.config.distill import AdapterConfig
from brixel_cli.core.lora import LowRankUpdates

if TYPE_CHECKING:
    from brixel_cli.core.backbone import Backbone


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (B, C, H, W) to `size` (height, width), align_corners=False."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


NORM_EPS = 1e-6


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W), at each location."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


CHANNELS_AT_ONCE = 64
"""Of the residual, where memory counts."""


class Adapter(nn.Module):
    """Base of both adapters: the learned difference, plus the enlarged last backbone map.

    Args:
        embed_dim: channels D of the backbone's maps.
        factor: output grid over token grid: 2, 4 or 8.
        config: options of the recipe's `adapter` section.

    Attributes:
        linear: 1x1 from the four maps to the output's channels, to be fitted before the first step; None: has none.
        lora: low-rank updates of the backbone's layers; None: the backbone is taken as it is.
    """

    def __init__(self, embed_dim: int, factor: int, config: AdapterConfig):
        super().__init__()
        self.embed_dim = embed_dim
        self.factor = factor
        self.config = config
        self.linear: nn.Conv2d | None = None
        self.lora: LowRankUpdates | None = None

    def difference(
        self, images: Tensor, maps: Sequence[Tensor], middle: tuple[int, int], fine: tuple[int, int]
    ) -> Tensor:
        """The learned part (B, D, *fine); `middle` is half of `fine`, both (height, width) of a grid."""
        raise TypeError(f"{type(self).__name__} defines no difference")

    def forward(self, images: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Sharp map (B, D, factor * h, factor * w).

        Args:
            images: normalised images (B, 3, H, W), as the backbone saw them.
            maps: four backbone maps (B, D, h, w), the last block's last.
        """
        h, w = maps[-1].shape[-2:]
        fine = (self.factor * h, self.factor * w)
        middle = (fine[0] // 2, fine[1] // 2)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
            maps = [map_.contiguous(memory_format=torch.channels_last) for map_ in maps]
        difference = self.difference(images, maps, middle, fine)
        if torch.is_grad_enabled():
            return difference + self.residual(maps[-1], fine)
        # Without gradients, some channels at a time: the residual never is a second map of the output's size.
        difference = difference.to(torch.promote_types(difference.dtype, maps[-1].dtype))
        parts, last_parts = (map_.split(CHANNELS_AT_ONCE, dim=1) for map_ in (difference, maps[-1]))
        for part, last_part in zip(parts, last_parts, strict=True):
            part += self.residual(last_part, fine)
        return difference

    def from_backbone(self, backbone: Backbone, images: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps that `forward` takes: those with the low-rank updates, computed anew; without any, `maps`.

        Args:
            backbone: frozen.
            images: normalised images (B, 3, H, W).
            maps: the backbone's four maps of them, each (B, D, h, w).
        """
        return self.lora.maps(backbone, images) if self.lora else list(maps)

    def residual(self, last_map: Tensor, fine: tuple[int, int]) -> Tensor:
        """The last backbone map (B, D, h, w) on the output grid: what the student is without its learned part."""
        if self.config.residual == "half_grid":
            h, w = last_map.shape[-2:]
            last_map = resize(last_map, (max(h // 2, 1), max(w // 2, 1)))
        return resize(last_map, fine)

    @torch.no_grad()
    def set_linear(self, weight: Tensor, bias: Tensor) -> None:
        """Give the linear part its weight (D, 4 D) and bias (D)."""
        assert self.linear is not None
        assert self.linear.bias is not None
        self.linear.weight.copy_(weight[..., None, None])
        self.linear.bias.copy_(bias)

    def run(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Call a block, recomputing its activations in the backward pass where the recipe says so."""
        if self.config.checkpointing and torch.is_grad_enabled():
            output: Tensor = checkpoint(block, *inputs, use_reentrant=False)
            return output
        return block(*inputs)
