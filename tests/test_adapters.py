from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from brixel_cli.config.distill import AdapterConfig, DeformableConfig, FusionConfig
from brixel_cli.core.adapter import resize
from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.cost import count_parameters
from brixel_cli.core.deformable import DeformableAttention
from brixel_cli.core.fusion import Attention
from brixel_cli.core.student import build_adapter
from brixel_cli.errors import UsageError

KINDS = ("fusion", "attention", "deformable")


def config_of(kind: str, **changes: object) -> AdapterConfig:
    """Of `adapter.kind` fusion or deformable, or `attention`: fusion with attention on the token grid."""
    heads, kind = (4, "fusion") if kind == "attention" else (0, kind)
    fusion = FusionConfig(width=32, fine_width=16, blocks=[1, 1, 1], attention_heads=heads)
    return AdapterConfig(kind=kind, fusion=fusion, **changes)


def awake(adapter: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter a random value: fresh adapters end in zeros, which would hide mistakes."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter.eval()


def inputs_for(patch: int, grid: tuple[int, int], batch: int, dim: int = 64) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, patch * grid[0], patch * grid[1], generator=generator)
    return images, [torch.randn(batch, dim, *grid, generator=generator) for _ in range(4)]


def slow_bilinear(value: Tensor, x: float, y: float) -> Tensor:
    """Value (C, h, w) at pixel coordinates x, y, where cell centres are whole numbers; zero outside."""
    result = torch.zeros(value.shape[0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < value.shape[1] and 0 <= column < value.shape[2]:
                result += value[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return result


def slow_attention(
    attention: DeformableAttention, query: Tensor, query_hw: tuple[int, int], value: Tensor, value_hw: tuple[int, int]
) -> Tensor:
    """Deformable attention written out in loops, after eq. 2 of Deformable DETR."""
    heads, points = attention.num_heads, attention.num_points
    outputs = torch.zeros_like(query)
    for image in range(len(query)):
        values = attention.value_proj(value[image]).T.reshape(heads, -1, *value_hw)
        for number in range(query.shape[1]):
            row, column = divmod(number, query_hw[1])
            offsets = attention.sampling_offsets(query[image, number]).reshape(heads, points, 2)
            weights = attention.attention_weights(query[image, number]).reshape(heads, points)
            parts = []
            for head in range(heads):
                shares = [math.exp(weight) for weight in weights[head].tolist()]
                part = torch.zeros(values.shape[1])
                for point in range(points):
                    x = (column + 0.5) / query_hw[1] * value_hw[1] + offsets[head, point, 0].item() - 0.5
                    y = (row + 0.5) / query_hw[0] * value_hw[0] + offsets[head, point, 1].item() - 0.5
                    part += shares[point] / sum(shares) * slow_bilinear(values[head], x, y)
                parts.append(part)
            outputs[image, number] = attention.output_proj(torch.cat(parts))
    return outputs


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("query_hw", "value_hw"), [((4, 4), (2, 2)), ((4, 6), (2, 3)), ((6, 4), (3, 2)), ((3, 5), (2, 4))]
)
@torch.no_grad()
def test_deformable_attention_equals_the_slow_reference(
    query_hw: tuple[int, int], value_hw: tuple[int, int], batch: int
) -> None:
    torch.manual_seed(0)
    attention = awake(DeformableAttention(32, num_heads=4, num_points=4))
    query = torch.randn(batch, math.prod(query_hw), 32) * 2
    value = torch.randn(batch, math.prod(value_hw), 32)
    fast = attention(query, query_hw, value, value_hw)
    slow = slow_attention(attention, query, query_hw, value, value_hw)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    assert slow.abs().mean() > 0.05


@pytest.mark.parametrize(("patch", "grid", "batch"), [(14, (2, 3), 2), (16, (3, 2), 1)])
@torch.no_grad()
def test_the_whole_deformable_adapter_equals_one_with_slow_attention(
    patch: int, grid: tuple[int, int], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = awake(build_adapter(64, 4, config_of("deformable", channels_last=False)))
    images, maps = inputs_for(patch, grid, batch)
    fast = adapter(images, maps)
    assert fast.shape == (batch, 64, 4 * grid[0], 4 * grid[1])
    monkeypatch.setattr(DeformableAttention, "forward", slow_attention)
    torch.testing.assert_close(fast, adapter(images, maps), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize(("patch", "grid"), [(14, (3, 5)), (16, (4, 4))])
@torch.no_grad()
def test_every_factor_patch_and_grid_gives_the_output_grid(
    kind: str, factor: int, patch: int, grid: tuple[int, int]
) -> None:
    images, maps = inputs_for(patch, grid, 2)
    output = awake(build_adapter(64, factor, config_of(kind)))(images, maps)
    assert output.shape == (2, 64, factor * grid[0], factor * grid[1])
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(kind: str) -> None:
    adapter = awake(build_adapter(64, 4, config_of(kind)))
    images, maps = inputs_for(16, (3, 4), 2)
    alone = adapter(images[1:], [map_[1:] for map_ in maps])
    torch.testing.assert_close(adapter(images, maps)[1:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_fresh_student_is_the_bilinear_backbone(kind: str) -> None:
    images, maps = inputs_for(16, (3, 4), 2)
    output = build_adapter(64, 4, config_of(kind)).eval()(images, maps)
    expected = torch.nn.functional.interpolate(maps[-1], size=(12, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(output, expected)


@torch.no_grad()
def test_the_released_residual_goes_through_half_the_grid() -> None:
    images, maps = inputs_for(16, (4, 6), 1)
    output = build_adapter(64, 4, config_of("deformable", residual="half_grid")).eval()(images, maps)
    torch.testing.assert_close(output, resize(resize(maps[-1], (2, 3)), (16, 24)))
    assert not torch.allclose(output, resize(maps[-1], (16, 24)), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_neither_output_nor_gradients(kind: str) -> None:
    images, maps = inputs_for(16, (3, 4), 2)
    results = []
    for checkpointing in (False, True):
        adapter = awake(build_adapter(64, 4, config_of(kind, checkpointing=checkpointing))).train()
        torch.manual_seed(5)
        output = adapter(images, maps)
        output.square().mean().backward()
        results.append([output.detach(), *(parameter.grad for parameter in adapter.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_channels_last_changes_the_layout_only(kind: str) -> None:
    images, maps = inputs_for(16, (3, 4), 2)
    outputs = [
        awake(build_adapter(64, 4, config_of(kind, channels_last=layout)))(images, maps) for layout in (False, True)
    ]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_alive(kind: str) -> None:
    """The released model carries branches that never reach its output; ours has none."""
    config = config_of(kind, deformable=DeformableConfig(drop_path=0.0))
    adapter = awake(build_adapter(64, 4, config)).train()
    images, maps = inputs_for(16, (3, 4), 2)
    adapter(images, maps).square().mean().backward()
    dead = [
        name for name, parameter in adapter.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert dead == []


def test_widths_and_depths_are_options() -> None:
    small, large = (
        AdapterConfig(fusion=FusionConfig(width=width, fine_width=16, blocks=blocks))
        for width, blocks in ((16, [0, 1, 1]), (32, [2, 3, 3]))
    )
    assert count_parameters(build_adapter(64, 4, small)) < count_parameters(build_adapter(64, 4, large))
    # One block of 16 channels: the depthwise weights go from 9 to 25 a channel, 16 * (25 - 9) = 256 more.
    wide = AdapterConfig(fusion=FusionConfig(width=16, fine_width=16, blocks=[0, 1, 1], kernel_sizes=[1, 3, 5]))
    assert count_parameters(build_adapter(64, 4, wide)) - count_parameters(build_adapter(64, 4, small)) == 256
    # The linear part: four times 64 channels to 64, and a bias.
    plain = AdapterConfig(fusion=FusionConfig(width=16, fine_width=16, blocks=[0, 1, 1], linear=False))
    assert count_parameters(build_adapter(64, 4, small)) - count_parameters(build_adapter(64, 4, plain)) == 16_448
    images, maps = inputs_for(16, (3, 4), 1)
    assert build_adapter(64, 4, wide)(images, maps).shape == (1, 64, 12, 16)
    few = AdapterConfig(
        kind="deformable", deformable=DeformableConfig(extractors=[0, 0, 0, 1], num_heads=8, num_points=2)
    )
    many = AdapterConfig(kind="deformable")
    assert count_parameters(build_adapter(64, 4, few)) < count_parameters(build_adapter(64, 4, many))


def test_a_location_sees_as_much_as_the_recipe_says() -> None:
    """On the token grid: by itself, its neighbours, or through normalisation the whole map."""
    images, maps = inputs_for(16, (6, 6), 1)
    changed = [map_.clone() for map_ in maps]
    for map_ in changed:
        map_[..., 0, 0] += 1
    # Two bilinear steps and the middle grid's 3x3 blur a change over 3 token cells at most.
    for kernel_size, norm, heads, far in ((1, "location", 0, False), (7, "location", 0, True), (1, "map", 0, True),
                                          (1, "location", 2, True)):  # fmt: skip
        fusion = FusionConfig(width=16, middle_width=16, fine_width=16, blocks=[2, 1, 1],
                              kernel_sizes=[kernel_size, 3, 1], norm=norm, attention_heads=heads)  # fmt: skip
        adapter = awake(build_adapter(64, 4, AdapterConfig(fusion=fusion)))
        moved = (adapter(images, changed) - adapter(images, maps)).abs().amax(dim=1)[0]
        assert bool(moved[-8:, -8:].any()) == far


def test_attention_mixes_all_locations_by_the_likeness_of_keys_to_queries() -> None:
    """One head of width 2 over two locations, without the norm and with layer scale 1: worked by hand."""
    attention = Attention(2, 1, "location", layer_scale=1.0)
    attention.norm = torch.nn.Identity()
    with torch.no_grad():
        # queries: the first channel times ln 3 times the root of the width; keys: the first channel; values: the input
        weights = torch.zeros(6, 2)
        weights[0, 0], weights[2, 0] = math.log(3) * math.sqrt(2), 1.0
        weights[4, 0] = weights[5, 1] = 1.0
        attention.qkv.weight.copy_(weights[..., None, None])
        attention.project.weight.copy_(torch.eye(2)[..., None, None])
        for layer in (attention.qkv, attention.project):
            assert layer.bias is not None
            layer.bias.zero_()
    x = torch.tensor([[1.0, 0.0], [4.0, 8.0]])[None, :, None]  # location 0: (1, 4), location 1: (0, 8)
    # Location 0 asks with ln 3: weights 3/4 on itself (key 1) and 1/4 on the other (key 0); location 1 asks with 0: halves.
    expected = torch.tensor([[1 + 0.75, 0.5], [4 + 5.0, 8 + 6.0]])[None, :, None]
    torch.testing.assert_close(attention(x), expected)


def test_heads_that_do_not_divide_the_width_are_named() -> None:
    with pytest.raises(ValidationError, match=r"adapter\.fusion\.width 32 is not a multiple of attention_heads 5"):
        FusionConfig(width=32, attention_heads=5)


def test_drop_path_drops_whole_samples_in_training_only() -> None:
    adapter = awake(build_adapter(64, 4, config_of("deformable")))
    images, maps = inputs_for(16, (2, 2), 1)
    assert torch.equal(adapter(images, maps), adapter(images, maps))
    adapter.train()
    for module in adapter.modules():  # BatchNorm would differ in training anyway
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    torch.manual_seed(0)
    assert len({round(adapter(images, maps).sum().item(), 4) for _ in range(8)}) > 1


def test_widths_that_do_not_fit_are_named() -> None:
    with pytest.raises(UsageError, match=r"num_heads 24 does not divide 32, half the embedding width 64"):
        build_adapter(64, 4, AdapterConfig(kind="deformable", deformable=DeformableConfig(num_heads=24)))
    with pytest.raises(UsageError, match="multiple of 32, not 72"):
        build_adapter(72, 4, AdapterConfig(kind="deformable"))


@torch.no_grad()
def test_adapters_take_what_a_real_backbone_gives() -> None:
    backbone = load_backbone("test_vit", "random")
    images = torch.randn(2, 3, 48, 80)
    for kind in KINDS:
        adapter = build_adapter(backbone.embed_dim, 4, config_of(kind)).eval()
        assert adapter(images, backbone.intermediate_maps(images)).shape == (2, 64, 12, 20)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_map_is_the_same_and_the_inputs_are_left_alone(kind: str, bfloat16: bool) -> None:
    # Without gradients the sum of difference and residual is made in place.
    adapter = awake(build_adapter(64, 4, config_of(kind)))
    images, maps = inputs_for(16, (2, 3), 2)
    before = [map_.clone() for map_ in maps]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        trained = adapter(images, maps)
        with torch.no_grad():
            deployed = adapter(images, maps)
    assert deployed.dtype == trained.dtype == torch.float32
    assert torch.equal(deployed, trained)
    assert all(torch.equal(map_, old) for map_, old in zip(maps, before, strict=True))
