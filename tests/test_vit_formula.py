"""The operator count of a ViT against a closed formula of its arithmetic, and the formula by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from brixel_cli.core.backbone import Backbone, load_backbone
from brixel_cli.core.cost import count_cost, fake_tensors, hollow


@dataclass(frozen=True)
class VitShape:
    """The numbers on which a plain ViT's arithmetic depends.

    Attributes:
        patch_size: side of a patch in pixels.
        embed_dim: width D of the tokens.
        depth: number of blocks.
        attention_dim: width A of queries, keys and values, all heads together.
        mlp_dim: hidden width M of the feed-forward layers.
        mlp_inputs: projections into that width: 1, or 2 where one gates the other (SwiGLU).
        num_prefix_tokens: class and register tokens.
    """

    patch_size: int
    embed_dim: int
    depth: int
    attention_dim: int
    mlp_dim: int
    mlp_inputs: int
    num_prefix_tokens: int


def vit_flop(shape: VitShape, height: int, width: int) -> int:
    """FLOP of one image (height, width) in pixels through a ViT, a multiply-add as 2.

    With n patches and N = n + prefix tokens, a patch embedding takes 3 p^2 D n multiply-adds, and a block
    3 D A N (queries, keys, values) + 2 A N^2 (their products) + A D N (projection) + (inputs + 1) D M N (feed-forward).
    Norms, activations, softmax, biases and position embeddings are left out, as the operator count leaves them out.
    Source: Dosovitskiy et al., arXiv 2010.11929, section 3.1; SwiGLU: Shazeer, arXiv 2002.05202.
    """
    patches = (height // shape.patch_size) * (width // shape.patch_size)
    tokens = patches + shape.num_prefix_tokens
    embedding = 3 * shape.patch_size**2 * shape.embed_dim * patches
    projections = 4 * shape.embed_dim * shape.attention_dim * tokens
    attention = 2 * shape.attention_dim * tokens**2
    feed_forward = (shape.mlp_inputs + 1) * shape.embed_dim * shape.mlp_dim * tokens
    return 2 * (embedding + shape.depth * (projections + attention + feed_forward))


def shape_of(backbone: Backbone) -> VitShape:
    trunk: Any = backbone.vit
    mlp = trunk.blocks[0].mlp
    into = [layer for name, layer in mlp.named_children() if name.startswith("fc1")]
    return VitShape(
        patch_size=backbone.patch_size,
        embed_dim=backbone.embed_dim,
        depth=len(trunk.blocks),
        attention_dim=trunk.blocks[0].attn.proj.in_features,
        mlp_dim=mlp.fc2.in_features,
        mlp_inputs=sum(layer.out_features for layer in into) // mlp.fc2.in_features,
        num_prefix_tokens=trunk.num_prefix_tokens,
    )


def test_by_hand() -> None:
    # 2 x 3 patches of 4 px, 1 prefix token: n = 6, N = 7.
    # Embedding 3 * 16 * 8 * 6 = 2,304. A block: 4 * 8 * 8 * 7 = 1,792; 2 * 8 * 49 = 784; 2 * 8 * 16 * 7 = 1,792.
    # 2 * (2,304 + 2 * 4,368) = 22,080.
    shape = VitShape(4, embed_dim=8, depth=2, attention_dim=8, mlp_dim=16, mlp_inputs=1, num_prefix_tokens=1)
    assert vit_flop(shape, 8, 12) == 22_080


def test_a_gate_is_a_third_matrix() -> None:
    plain = VitShape(4, embed_dim=8, depth=2, attention_dim=8, mlp_dim=16, mlp_inputs=1, num_prefix_tokens=1)
    gated = VitShape(4, embed_dim=8, depth=2, attention_dim=8, mlp_dim=16, mlp_inputs=2, num_prefix_tokens=1)
    # For each of 2 blocks another 8 * 16 * 7 multiply-adds.
    assert vit_flop(gated, 8, 12) - vit_flop(plain, 8, 12) == 2 * 2 * 8 * 16 * 7


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",  # plain
        "vit_small_patch14_dinov2",  # position embedding resized
        "vit_small_plus_patch16_dinov3",  # SwiGLU in two matrices, registers, rotary embedding
        "vit_giant_patch14_reg4_dinov2",  # SwiGLU in one matrix
        "vit_base_patch16_siglip_512",  # no class token
    ],
)
def test_the_operator_count_agrees(name: str) -> None:
    backbone = load_backbone(name, "random", device="meta")
    height, width = 4 * backbone.patch_size, 6 * backbone.patch_size
    with fake_tensors():
        hollow(backbone)
        images = torch.empty(1, 3, height, width)
        counted = count_cost(lambda: backbone.last_map(images)).flop
    assert counted == vit_flop(shape_of(backbone), height, width)


# GFLOP of the method's table, a multiply-add as 2, attention included.
@pytest.mark.parametrize(
    ("name", "small", "large"),
    [
        ("vit_small_patch16_dinov3", 12.5, 486.6),
        ("vit_base_patch16_dinov3", 47.2, 1321.5),
        ("vit_large_patch16_dinov3", 164.7, 4136.7),
        ("vit_huge_plus_patch16_dinov3", 449.5, 9643.9),
    ],
)
def test_the_family_costs_what_the_methods_table_says(name: str, small: float, large: float) -> None:
    shape = shape_of(load_backbone(name, "random", device="meta"))
    assert vit_flop(shape, 256, 256) / 1e9 == pytest.approx(small, rel=0.01)
    assert vit_flop(shape, 1024, 1024) / 1e9 == pytest.approx(large, rel=0.01)
