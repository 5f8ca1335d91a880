"""The closed formula of a ViT's arithmetic: by hand, and against the operator count."""

from __future__ import annotations

import pytest
import torch

from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.cost import count_cost, fake_tensors, hollow
from brixel_cli.core.vit_formula import VitShape, vit_flop


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
    assert counted == vit_flop(backbone.shape, height, width)


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
    shape = load_backbone(name, "random", device="meta").shape
    assert vit_flop(shape, 256, 256) / 1e9 == pytest.approx(small, rel=0.01)
    assert vit_flop(shape, 1024, 1024) / 1e9 == pytest.approx(large, rel=0.01)
