"""The paper's adapter, its live part only: image pyramid, deformable cross-attention to the ViT maps, conv head.

Sources: BRIXEL, arXiv 2511.05168; ViT-Adapter, arXiv 2205.08534 (spatial prior, extractor);
Deformable DETR, arXiv 2010.04159, eq. 2 (deformable attention). Pure PyTorch, forward and backward, on any device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brixel_cli.config.distill import AdapterConfig
from brixel_cli.core.adapter import NORM_EPS, Adapter, ChannelNorm, resize
from brixel_cli.errors import UsageError


class DeformableAttention(nn.Module):
    """Each query looks at a few learned points of one value map, around its own place.

    Args:
        dim: channels D of queries and values; inside, values have D / 2.
        num_heads: heads; D / 2 must be a multiple.
        num_points: sampling points for each query and head.
    """

    def __init__(self, dim: int, num_heads: int, num_points: int):
        super().__init__()
        if dim // 2 % num_heads:
            raise UsageError(
                f"adapter.deformable.num_heads {num_heads} does not divide {dim // 2}, half the embedding width {dim}."
            )
        self.num_heads = num_heads
        self.num_points = num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_points)
        self.value_proj = nn.Linear(dim, dim // 2)
        self.output_proj = nn.Linear(dim // 2, dim)
        # Deformable DETR, appendix: point k of head m starts k + 1 cells away in the head's own direction.
        angles = torch.arange(num_heads) * (2 * math.pi / num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().max(dim=-1, keepdim=True).values
        steps = torch.arange(1, num_points + 1)
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            self.sampling_offsets.bias.copy_((directions[:, None] * steps[None, :, None]).flatten())
            self.attention_weights.weight.zero_()
            self.attention_weights.bias.zero_()

    def forward(self, query: Tensor, query_hw: tuple[int, int], value: Tensor, value_hw: tuple[int, int]) -> Tensor:
        """Attend from the query grid to the value grid.

        Args:
            query: (B, H * W, D) with query_hw = (H, W).
            query_hw: query grid.
            value: (B, h * w, D) with value_hw = (h, w).
            value_hw: value grid.

        Returns:
            (B, H * W, D).
        """
        batch, num_queries, _ = query.shape
        heads, points = self.num_heads, self.num_points
        values = self.value_proj(value).transpose(1, 2).reshape(batch * heads, -1, *value_hw)
        # Queries sit at cell centres; offsets count value cells; grid_sample wants (x, y) in [-1, 1].
        y = (torch.arange(query_hw[0], device=query.device, dtype=torch.float32) + 0.5) / query_hw[0]
        x = (torch.arange(query_hw[1], device=query.device, dtype=torch.float32) + 0.5) / query_hw[1]
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(1, num_queries, 1, 1, 2)
        cells = torch.tensor([value_hw[1], value_hw[0]], device=query.device, dtype=torch.float32)
        offsets = self.sampling_offsets(query).float().reshape(batch, num_queries, heads, points, 2)
        locations = (2 * (centres + offsets / cells) - 1).transpose(1, 2).reshape(batch * heads, num_queries, points, 2)
        sampled = F.grid_sample(values.float(), locations, mode="bilinear", padding_mode="zeros", align_corners=False)
        weights = self.attention_weights(query).float().reshape(batch, num_queries, heads, points).softmax(dim=-1)
        weights = weights.transpose(1, 2).reshape(batch * heads, 1, num_queries, points)
        attended = (sampled * weights).sum(dim=-1).reshape(batch, -1, num_queries).transpose(1, 2)
        output: Tensor = self.output_proj(attended.to(query.dtype))
        return output


class ConvFFN(nn.Module):
    """Feed-forward over (B, H * W, D) tokens: linear to D / 4, depthwise 3x3 on their grid, GELU, linear back."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // 4)
        self.depthwise = nn.Conv2d(dim // 4, dim // 4, 3, padding=1, groups=dim // 4)
        self.fc2 = nn.Linear(dim // 4, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        hidden = self.fc1(x).transpose(1, 2).unflatten(2, grid)
        output: Tensor = self.fc2(F.gelu(self.depthwise(hidden)).flatten(2).transpose(1, 2))
        return output


class Extractor(nn.Module):
    """One refinement of the middle-grid tokens from one backbone map."""

    def __init__(self, dim: int, num_heads: int, num_points: int, drop_path: float):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = DeformableAttention(dim, num_heads, num_points)
        self.ffn_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.ffn = ConvFFN(dim)
        self.drop_path = drop_path

    def forward(self, tokens: Tensor, grid: tuple[int, int], features: Tensor, features_hw: tuple[int, int]) -> Tensor:
        tokens = tokens + self.attn(self.query_norm(tokens), grid, self.feat_norm(features), features_hw)
        update: Tensor = self.ffn(self.ffn_norm(tokens), grid)
        if self.training and self.drop_path:
            keep = torch.rand(len(update), 1, 1, device=update.device) >= self.drop_path
            update = update * keep / (1 - self.drop_path)
        return tokens + update


class HeadBlock(nn.Module):
    """Residual block of the head at full output resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.expand = nn.Conv2d(channels, channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.project(F.gelu(self.expand(F.gelu(self.depthwise(self.norm(x))))))
        return x + update


class ConvHead(nn.Module):
    """Convolutional head (B, D, H, W) -> (B, D, H, W); the trunk of three residual blocks is residual as a whole."""

    def __init__(self, dim: int, channels: int):
        super().__init__()
        self.align_in = nn.Conv2d(dim, channels, 1)
        self.trunk = nn.Sequential(*(HeadBlock(channels) for _ in range(3)))
        self.mix = nn.Conv2d(channels, channels, 3, padding=1, groups=4)
        self.norm = ChannelNorm(channels)
        self.out = nn.Conv2d(channels, dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.align_in(x)
        x = x + self.trunk(x)
        output: Tensor = self.out(self.norm(self.mix(x)))
        return output


def _conv_norm(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


class DeformableAdapter(Adapter):
    """The paper's adapter and head without the branches that never reach its output.

    Options are the recipe's `adapter.deformable`; arguments as for `Adapter`. Any patch size and grid.

    Raises:
        UsageError: D is not a multiple of 32, or half of D not of the number of heads.
    """

    def __init__(self, embed_dim: int, factor: int, config: AdapterConfig):
        super().__init__(embed_dim, factor, config)
        if embed_dim % 32:
            raise UsageError(
                f"The deformable adapter needs an embedding width that is a multiple of 32, not {embed_dim}."
            )
        options = config.deformable
        self.stem = nn.Sequential(
            *_conv_norm(3, 64, 2), *_conv_norm(64, 64, 1), *_conv_norm(64, 64, 1), nn.MaxPool2d(3, stride=2, padding=1)
        )
        self.conv2 = nn.Sequential(*_conv_norm(64, 128, 2))
        self.fc1 = nn.Conv2d(64, embed_dim, 1)
        self.fc2 = nn.Conv2d(128, embed_dim, 1)
        self.level_embed = nn.Parameter(torch.zeros(embed_dim))
        nn.init.normal_(self.level_embed)
        self.extractors = nn.ModuleList(
            nn.ModuleList(
                Extractor(embed_dim, options.num_heads, options.num_points, options.drop_path) for _ in range(count)
            )
            for count in options.extractors
        )
        self.norm = nn.GroupNorm(32, embed_dim)
        self.head = ConvHead(embed_dim, options.head_width)

    def difference(
        self, images: Tensor, maps: Sequence[Tensor], middle: tuple[int, int], fine: tuple[int, int]
    ) -> Tensor:
        # Never recomputed: their BatchNorm would see each batch twice.
        stride4 = self.stem(images)
        stride8 = self.conv2(stride4)
        tokens = resize(self.fc2(stride8), middle).flatten(2).transpose(1, 2) + self.level_embed
        for map_, extractors in zip(maps, self.extractors, strict=True):
            features = map_.flatten(2).transpose(1, 2)
            for extractor in extractors:  # type: ignore[attr-defined]
                tokens = self.run(extractor, tokens, middle, features, tuple(map_.shape[-2:]))
        refined = tokens.transpose(1, 2).unflatten(2, middle)
        merged = resize(self.fc1(stride4), fine) + resize(refined, fine)
        return self.run(self.head, self.norm(merged))
