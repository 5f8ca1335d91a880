"""The convolutional adapter: backbone maps and image features fused on three grids, coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brixel_cli.core.adapter import Adapter, resize
from brixel_cli.recipe import AdapterConfig


class ConvBlock(nn.Module):
    """Residual block (B, C, H, W) -> (B, C, H, W): depthwise, norm, two 1x1 with GELU between, layer scale."""

    def __init__(self, channels: int, kernel_size: int, expansion: int = 2, layer_scale: float = 0.1):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.GroupNorm(1, channels)
        self.expand = nn.Conv2d(channels, expansion * channels, 1)
        self.project = nn.Conv2d(expansion * channels, channels, 1)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.project(_gelu(self.expand(self.norm(self.depthwise(x)))))
        return x + self.scale * update


def _gelu(x: Tensor) -> Tensor:
    """GELU of a tensor that nobody else needs: in place where there are no gradients, for a lower peak of memory."""
    activated: Tensor = F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)
    return activated


class FusionAdapter(Adapter):
    """Four maps and the image -> difference on the output grid; the last projection starts at zero.

    Widths and depths are the recipe's `adapter.fusion`; arguments as for `Adapter`.
    """

    def __init__(self, embed_dim: int, factor: int, config: AdapterConfig):
        super().__init__(embed_dim, factor, config)
        width, fine_width = config.fusion.width, config.fusion.fine_width
        coarse_blocks, middle_blocks, fine_blocks = config.fusion.blocks
        kernel_size = config.fusion.kernel_size
        self.image_stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, fine_width, 3, stride=2, padding=1),
        )
        self.image_to_middle = nn.Conv2d(fine_width, width, 3, stride=2, padding=1)
        self.fuse = nn.Conv2d(4 * embed_dim, width, 1)
        self.fuse_norm = nn.GroupNorm(1, width)
        self.coarse = nn.ModuleList(ConvBlock(width, kernel_size) for _ in range(coarse_blocks))
        self.middle = nn.ModuleList(ConvBlock(width, kernel_size) for _ in range(middle_blocks))
        self.to_fine = nn.Conv2d(width, fine_width, 1)
        self.fine = nn.ModuleList(ConvBlock(fine_width, kernel_size) for _ in range(fine_blocks))
        self.out_norm = nn.GroupNorm(1, fine_width)
        self.out = nn.Conv2d(fine_width, embed_dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def difference(
        self, images: Tensor, maps: Sequence[Tensor], middle: tuple[int, int], fine: tuple[int, int]
    ) -> Tensor:
        fine_image = resize(self.run(self.image_stem, images), fine)
        middle_image = resize(self.image_to_middle(fine_image), middle)
        x = self.fuse_norm(self.fuse(torch.cat(list(maps), dim=1)))
        for block in self.coarse:
            x = self.run(block, x)
        x = resize(x, middle) + middle_image
        for block in self.middle:
            x = self.run(block, x)
        x = resize(self.to_fine(x), fine) + fine_image
        del fine_image, middle_image  # without gradients, memory that the widest blocks can use
        for block in self.fine:
            x = self.run(block, x)
        x = self.out_norm(x)
        output: Tensor = self.out(x)
        return output
