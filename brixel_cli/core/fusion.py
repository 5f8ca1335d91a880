"""The fusion adapter: what the backbone missed on its token grid is corrected there, and sharpened on finer grids.

Nearly all of the difference between the backbone's map and the teacher's is not blur: pooled to the token grid, the
teacher's map still differs. So the correction is made there, mostly for each location by itself (a larger receptive
field overfits on few images), with a linear part that is fitted in closed form. Image features serve all three grids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brixel_cli.config.distill import AdapterConfig
from brixel_cli.core.adapter import Adapter, ChannelNorm, resize


def _norm(kind: str, channels: int) -> nn.Module:
    return ChannelNorm(channels) if kind == "location" else nn.GroupNorm(1, channels)


class ConvBlock(nn.Module):
    """Residual block (B, C, H, W) -> (B, C, H, W): depthwise, norm, two 1x1 with GELU between, layer scale.

    With `kernel_size` 1 there is no depthwise convolution: each location by itself.
    """

    def __init__(self, channels: int, kernel_size: int, norm: str, expansion: int = 2, layer_scale: float = 0.1):
        super().__init__()
        self.depthwise: nn.Module = nn.Identity()
        if kernel_size > 1:
            self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = _norm(norm, channels)
        self.expand = nn.Conv2d(channels, expansion * channels, 1)
        self.project = nn.Conv2d(expansion * channels, channels, 1)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.project(_gelu(self.expand(self.norm(self.depthwise(x)))))
        return x + self.scale * update


class Attention(nn.Module):
    """Residual self-attention over all locations, (B, C, H, W) -> (B, C, H, W): norm, attention, 1x1, layer scale.

    It has no positions of its own: the backbone's maps carry them, and any size of map can be given.
    """

    def __init__(self, channels: int, heads: int, norm: str, layer_scale: float = 0.1):
        super().__init__()
        self.heads = heads
        self.norm = _norm(norm, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, HW, 3 C)
        queries, keys, values = tokens.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values)  # (B, heads, HW, C / heads)
        update: Tensor = self.project(mixed.transpose(2, 3).reshape(x.shape))
        return x + self.scale * update


def _gelu(x: Tensor) -> Tensor:
    """GELU of a tensor that nobody else needs: in place where there are no gradients, for a lower peak of memory."""
    activated: Tensor = F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)
    return activated


def _zero_conv(channels: int, out_channels: int) -> nn.Conv2d:
    """1x1, zero at first."""
    conv = nn.Conv2d(channels, out_channels, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class FusionAdapter(Adapter):
    """Four maps and the image -> difference on the output grid, the sum of one part for each of three grids.

    Every part starts at zero, until `linear` is fitted. Widths and depths are the recipe's `adapter.fusion`; arguments
    as for `Adapter`.
    """

    def __init__(self, embed_dim: int, factor: int, config: AdapterConfig):
        super().__init__(embed_dim, factor, config)
        fusion = config.fusion
        width, middle_width, fine_width = fusion.widths

        def blocks(grid: int) -> nn.ModuleList:
            size = fusion.kernel_sizes[grid]
            return nn.ModuleList(ConvBlock(fusion.widths[grid], size, fusion.norm) for _ in range(fusion.blocks[grid]))

        self.image_stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, fine_width, 3, stride=2, padding=1),
        )
        self.image_to_middle = nn.Conv2d(fine_width, middle_width, 3, stride=2, padding=1)
        self.image_to_coarse = nn.Conv2d(middle_width, width, 1)
        self.fuse = nn.Conv2d(4 * embed_dim, width, 1)
        self.fuse_norm = _norm(fusion.norm, width)
        self.coarse = blocks(0)
        heads = fusion.attention_heads
        self.attention = nn.ModuleList(
            Attention(width, heads, fusion.norm) if heads else nn.Identity() for _ in self.coarse
        )
        self.to_middle = nn.Conv2d(width, middle_width, 1)
        self.middle = blocks(1)
        self.to_fine = nn.Conv2d(middle_width, fine_width, 1)
        self.fine = blocks(2)
        self.coarse_out, self.middle_out, self.out = (
            nn.Sequential(_norm(fusion.norm, channels), _zero_conv(channels, embed_dim)) for channels in fusion.widths
        )
        if fusion.linear:
            self.linear = _zero_conv(4 * embed_dim, embed_dim)

    def difference(
        self, images: Tensor, maps: Sequence[Tensor], middle: tuple[int, int], fine: tuple[int, int]
    ) -> Tensor:
        fine_image = resize(self.run(self.image_stem, images), fine)
        middle_image = resize(self.image_to_middle(fine_image), middle)
        coarse_image = F.adaptive_avg_pool2d(middle_image, (maps[-1].shape[-2], maps[-1].shape[-1]))
        stacked = torch.cat(list(maps), dim=1)

        x = self.fuse_norm(self.fuse(stacked)) + self.image_to_coarse(coarse_image)
        for attention, block in zip(self.attention, self.coarse, strict=True):
            x = self.run(block, self.run(attention, x))
        correction = self.coarse_out(x)
        if self.linear is not None:
            correction = correction + self.linear(stacked)
        x = resize(self.to_middle(x), middle) + middle_image
        for block in self.middle:
            x = self.run(block, x)
        correction = resize(correction, middle) + self.middle_out(x)
        x = resize(self.to_fine(x), fine) + fine_image
        del fine_image, middle_image, coarse_image, stacked  # without gradients, memory that the widest maps can use
        for block in self.fine:
            x = self.run(block, x)
        output: Tensor = self.out(x)
        output += resize(correction, fine)
        return output
