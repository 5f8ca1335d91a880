"""Frozen backbones: which blocks feed the adapter, what their maps are, and where their weights may come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from brixel_cli.core.backbone import Backbone, check_size, load_backbone, quarter_indices
from brixel_cli.errors import BrixelError, SizeError, UsageError, WeightsError

HUB_ADVICE = (
    "Check the network, or download them elsewhere and give the file, .safetensors or .pth: "
    "--backbone-weights PATH, or backbone.weights in a recipe."
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(name: str = "test_vit", seed: int = 0, **options: str) -> Backbone:
    torch.manual_seed(seed)
    return load_backbone(name, "random", **options)


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return seeded()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny: Backbone) -> Path:
    """The weights of `tiny` as test_vit.safetensors and test_vit.pth."""
    folder = tmp_path_factory.mktemp("weights")
    state = tiny.vit.state_dict()
    save_file(state, folder / "test_vit.safetensors")
    torch.save(state, folder / "test_vit.pth")
    return folder


@pytest.fixture(scope="module")
def dinov3() -> Backbone:
    """A DINOv3 ViT-S/16 in which no two weights are alike: fresh scales and tokens are, and would hide a mix-up."""
    backbone = seeded("vit_small_patch16_dinov3", seed=3)
    for name, parameter in backbone.vit.named_parameters():
        if "gamma" in name or "token" in name:
            torch.nn.init.normal_(parameter)
    return backbone


# --- which blocks ---


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (12, [3, 6, 9, 11]),
        (24, [6, 12, 18, 23]),
        (32, [8, 16, 24, 31]),
        (40, [10, 20, 30, 39]),
        (6, [1, 3, 4, 5]),
        (5, [1, 2, 3, 4]),
    ],
)
def test_quarters_of_the_depth_with_the_last_block_always_in(depth: int, expected: list[int]) -> None:
    assert quarter_indices(depth) == expected


@pytest.mark.parametrize("depth", range(4, 41))
def test_the_four_blocks_are_different_and_in_order(depth: int) -> None:
    indices = quarter_indices(depth)
    assert len(set(indices)) == 4
    assert indices == sorted(indices)
    assert indices[-1] == depth - 1


@pytest.mark.parametrize("depth", [1, 3])
def test_fewer_than_four_blocks_are_an_error(depth: int) -> None:
    with pytest.raises(UsageError) as caught:
        quarter_indices(depth)
    assert str(caught.value) == f"The adapter reads four blocks of the backbone; this one has {depth}."


def test_a_backbone_of_four_blocks_yields_four_maps() -> None:
    vit = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=16, depth=4, num_heads=2, num_classes=0, dynamic_img_size=True
    )
    assert len(Backbone("four", vit, "random").intermediate_maps(randn(1, 3, 32, 32))) == 4


# --- sizes ---


@pytest.mark.parametrize(("height", "width", "patch"), [(14, 14, 14), (224, 448, 16), (112, 98, 14)])
def test_multiples_of_the_patch_fit(height: int, width: int, patch: int) -> None:
    check_size(height, width, patch)


@pytest.mark.parametrize(
    ("height", "width", "patch", "nearest"),
    [
        (100, 224, 16, "height 96 or 112, width 224"),
        (112, 113, 14, "height 112, width 112 or 126"),
        (8, 50, 16, "height 16, width 48 or 64"),
    ],
)
def test_a_size_that_does_not_fit_is_an_error_that_names_the_nearest(
    height: int, width: int, patch: int, nearest: str
) -> None:
    with pytest.raises(SizeError) as caught:
        check_size(height, width, patch)
    assert str(caught.value) == (
        f"Image size {height}x{width} does not fit patch size {patch}: height and width must be multiples of it. "
        f"Nearest that fit: {nearest}."
    )


def test_maps_of_an_image_that_does_not_fit_are_an_error(tiny: Backbone) -> None:
    for method in (tiny.intermediate_maps, tiny.last_map):
        with pytest.raises(SizeError, match=r"^Image size 40x64 does not fit .* height 32 or 48, width 64"):
            method(randn(1, 3, 40, 64))


# --- maps ---


def test_a_backbone_tells_its_shape_and_normalisation(tiny: Backbone) -> None:
    assert (tiny.name, tiny.weights, tiny.embed_dim, tiny.patch_size) == ("test_vit", "random", 64, 16)
    assert tiny.layer_indices == [1, 3, 4, 5]
    assert tiny.dtype == torch.float32
    config = timm.get_pretrained_cfg("test_vit")
    assert (tiny.mean, tiny.std) == (config.mean, config.std)


@pytest.mark.parametrize(
    ("name", "width", "image", "grid"),
    [
        ("test_vit", 64, (64, 96), (4, 6)),
        ("test_vit", 64, (48, 16), (3, 1)),
        ("vit_small_patch14_dinov2", 384, (56, 42), (4, 3)),
    ],
)
def test_maps_of_any_grid(name: str, width: int, image: tuple[int, int], grid: tuple[int, int]) -> None:
    backbone = seeded(name)
    images = randn(2, 3, *image)
    maps = backbone.intermediate_maps(images)
    assert [tuple(map_.shape) for map_ in maps] == [(2, width, *grid)] * 4
    assert {map_.dtype for map_ in maps} == {torch.float32}
    assert not any(map_.requires_grad for map_ in maps)
    torch.testing.assert_close(maps[-1], backbone.last_map(images))
    torch.testing.assert_close(backbone(images), backbone.last_map(images))
    assert not torch.equal(maps[0], maps[-1])


def test_maps_are_the_patch_tokens_of_the_normed_output_row_by_row(tiny: Backbone) -> None:
    images = randn(2, 3, 32, 48)
    with torch.no_grad():
        tokens = tiny.vit.forward_features(images)  # (2, 1 class token + 2 * 3 patches, 64), after the final norm
    expected = tokens[:, 1:].transpose(1, 2).reshape(2, 64, 2, 3)
    torch.testing.assert_close(tiny.last_map(images), expected)


def test_every_map_went_through_the_final_norm(tiny: Backbone) -> None:
    # With the norm's fresh weights (1 and 0), each location has mean 0 and variance 1 over the channels.
    for map_ in tiny.intermediate_maps(randn(1, 3, 32, 32)):
        torch.testing.assert_close(map_.mean(dim=1), torch.zeros(1, 2, 2), atol=1e-5, rtol=0)
        torch.testing.assert_close(map_.var(dim=1, correction=0), torch.ones(1, 2, 2), atol=1e-3, rtol=0)


def test_registers_are_dropped_too(dinov3: Backbone) -> None:
    images = randn(1, 3, 32, 48)
    with torch.no_grad():
        tokens = dinov3.vit.forward_features(images)
    assert tokens.shape[1] == 1 + 4 + 2 * 3
    torch.testing.assert_close(dinov3.last_map(images), tokens[:, 5:].transpose(1, 2).reshape(1, 384, 2, 3))


def test_a_backbone_is_frozen_and_stays_in_eval_mode(tiny: Backbone) -> None:
    around = torch.nn.Sequential(tiny).train()
    assert around.training
    assert not any(module.training for module in tiny.modules())
    assert not any(parameter.requires_grad for parameter in tiny.parameters())


def test_bfloat16_weights_give_float32_maps_close_to_the_exact_ones(stored: Path) -> None:
    path = str(stored / "test_vit.safetensors")
    exact, rounded = load_backbone("test_vit", path), load_backbone("test_vit", path, dtype="bfloat16")
    assert rounded.dtype == torch.bfloat16
    images = randn(1, 3, 64, 64)
    for one, other in zip(exact.intermediate_maps(images), rounded.intermediate_maps(images), strict=True):
        assert other.dtype == torch.float32
        # 8 bits of mantissa over six blocks: some percent, in features of unit variance.
        assert 0 < (one - other).abs().mean() < 0.05
    assert rounded.sha256 == exact.sha256  # of the weights as stored


def test_random_weights_are_drawn_in_bfloat16_and_the_default_format_is_put_back() -> None:
    backbone = seeded(dtype="bfloat16")
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_random_weights_follow_the_global_seed() -> None:
    assert seeded(seed=1).sha256 == seeded(seed=1).sha256
    assert seeded(seed=1).sha256 != seeded(seed=2).sha256


def test_on_the_meta_device_there_are_shapes_only() -> None:
    backbone = load_backbone("vit_7b_patch16_dinov3", "random", "bfloat16", device="meta")
    assert backbone.embed_dim == 4096
    assert all(parameter.is_meta for parameter in backbone.parameters())


# --- weights ---


def test_the_same_weights_have_the_same_sha256_in_any_file(stored: Path, tiny: Backbone) -> None:
    loaded = [load_backbone("test_vit", str(stored / f"test_vit.{suffix}")) for suffix in ("safetensors", "pth")]
    assert loaded[0].sha256 == loaded[1].sha256 == tiny.sha256
    assert loaded[0].weights == str(stored / "test_vit.safetensors")
    images = randn(1, 3, 32, 32)
    assert torch.equal(loaded[0].last_map(images), loaded[1].last_map(images))


def test_one_changed_number_changes_the_sha256(stored: Path, tmp_path: Path) -> None:
    state = torch.load(stored / "test_vit.pth", weights_only=True)
    state["blocks.3.mlp.fc1.bias"][7] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    first, second = (load_backbone("test_vit", str(path)) for path in (stored / "test_vit.pth", tmp_path / "other.pth"))
    assert first.sha256 != second.sha256


@pytest.fixture(scope="module")
def original_dinov3(tmp_path_factory: pytest.TempPathFactory, dinov3: Backbone) -> Path:
    """The weights of `dinov3` under their original names, with what the original holds besides."""
    original = {"mask_token": torch.ones(1, 384), "rope_embed.periods": torch.ones(16)}
    for key, tensor in dinov3.vit.state_dict().items():
        renamed = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        original[renamed.replace("reg_token", "storage_tokens")] = tensor
    for block in range(12):  # biases of zero, kept and masked
        original[f"blocks.{block}.attn.qkv.bias"] = torch.zeros(3 * 384)
        original[f"blocks.{block}.attn.qkv.bias_mask"] = torch.zeros(3 * 384)
    path = tmp_path_factory.mktemp("original") / "dinov3_vits16.pth"
    torch.save(original, path)
    return path


def test_the_original_layout_of_dinov3_is_read(
    dinov3: Backbone, original_dinov3: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    backbone = load_backbone("vit_small_patch16_dinov3", str(original_dinov3))
    printed = capfd.readouterr().out
    assert backbone.sha256 == dinov3.sha256
    images = randn(1, 3, 48, 32)
    torch.testing.assert_close(backbone.last_map(images), dinov3.last_map(images))
    assert printed == ""  # stdout is for results alone: --json must stay one line


# --- what users get wrong ---


def message(error: type[BrixelError], name: str, weights: str | Path = "random", device: str = "cpu") -> str:
    with pytest.raises(error) as caught:
        load_backbone(name, str(weights), device=device)
    assert type(caught.value) is error
    return str(caught.value)


def test_an_unknown_model_is_an_error_with_the_nearest_names() -> None:
    text = message(UsageError, "vit_smal_patch14_dinov2")
    assert text.startswith("timm has no model vit_smal_patch14_dinov2. Did you mean vit_small_patch14_dinov2 or ")
    assert message(UsageError, "qqqqq") == "timm has no model qqqqq. Names: timm.list_models('vit_*')."


@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_an_unknown_tag_is_an_error_that_lists_the_known_ones(weights: str) -> None:
    tags = ", ".join(timm.list_pretrained("vit_small_patch14_dinov2.*"))
    assert message(UsageError, "vit_small_patch14_dinov2.lvd142", weights) == (
        f"timm has no weights vit_small_patch14_dinov2.lvd142. It has: {tags}."
    )
    assert "lvd142m" in tags


def test_a_model_that_is_no_vit_is_an_error() -> None:
    assert message(UsageError, "resnet18").startswith("resnet18 takes no variable image size, which brixel needs: ")
    assert message(UsageError, "swin_tiny_patch4_window7_224", device="meta") == (
        "swin_tiny_patch4_window7_224 is no plain ViT with square patches of pixels. Names that are: timm.list_models('vit_*')."
    )


def test_a_model_that_is_no_vit_is_not_blamed_on_the_network() -> None:
    # The weights are pretrained unless the recipe says otherwise: this is what a user meets.
    text = message(UsageError, "resnet18", "pretrained")
    assert text.startswith("resnet18 takes no variable image size, which brixel needs: ")


@pytest.mark.parametrize("name", ["vit_base_r50_s16_224", "vitamin_small_224"])
def test_a_hybrid_whose_patches_are_not_pixels_is_refused_or_told_by_its_true_patch_size(name: str) -> None:
    try:
        backbone = load_backbone(name, "random", device="meta")
    except UsageError:
        return
    side = 2 * backbone.patch_size
    assert backbone.last_map(torch.empty(1, 3, side, side, device="meta")).shape[-2:] == (2, 2)


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "none.pth"
    assert message(WeightsError, "test_vit", path) == (
        f"No backbone weights at {path}. Give 'pretrained', 'random' or the path of a file."
    )


@pytest.mark.parametrize(("file", "kind"), [("weights.onnx", ".onnx"), ("weights", "this")])
def test_weights_of_an_unknown_suffix_are_an_error(tmp_path: Path, file: str, kind: str) -> None:
    (tmp_path / file).write_bytes(b"")
    assert message(WeightsError, "test_vit", tmp_path / file) == (
        f"{tmp_path / file}: backbone weights must be .safetensors or .pth, not {kind}."
    )


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_damaged_file_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(b"not weights at all")
    assert message(WeightsError, "test_vit", path).startswith(f"{path} does not hold weights of test_vit: ")


def test_weights_of_another_model_are_an_error(stored: Path) -> None:
    path = stored / "test_vit.pth"
    text = message(WeightsError, "test_vit3", path)
    # 9 blocks against 6, 96 channels against 64: three blocks are missing, and every key of the file is misshapen.
    assert text.startswith(f"{path} does not hold weights of test_vit3: ")
    assert "140 of its keys are wrong" in text
    assert "missing: blocks.6.attn.proj.bias" in text


def test_a_file_with_a_missing_weight_is_an_error_that_names_it(stored: Path, tmp_path: Path) -> None:
    state = torch.load(stored / "test_vit.pth", weights_only=True)
    del state["blocks.2.attn.proj.bias"]
    torch.save(state, tmp_path / "short.pth")
    assert "blocks.2.attn.proj.bias" in message(WeightsError, "test_vit", tmp_path / "short.pth")


def test_a_file_of_something_else_is_an_error(tmp_path: Path) -> None:
    torch.save({"foo": torch.zeros(3), "bar.weight": torch.ones(2, 2)}, tmp_path / "foreign.pth")
    path = tmp_path / "foreign.pth"
    assert message(WeightsError, "test_vit", path).startswith(f"{path} does not hold weights of test_vit: ")


def test_a_head_that_the_file_holds_besides_does_not_matter(stored: Path, tmp_path: Path, tiny: Backbone) -> None:
    state = torch.load(stored / "test_vit.pth", weights_only=True)
    state |= {"head.weight": torch.ones(1000, 64), "head.bias": torch.ones(1000)}
    torch.save(state, tmp_path / "classifier.pth")
    assert load_backbone("test_vit", str(tmp_path / "classifier.pth")).sha256 == tiny.sha256


def test_a_file_does_not_run_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    torch.save({"cls_token": Trap()}, tmp_path / "trap.pth")
    message(WeightsError, "test_vit", tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def test_weights_that_cannot_be_downloaded_are_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub\n\nand more\nlines\nof it\nand on")

    monkeypatch.setattr("brixel_cli.core.backbone.check_hub", lambda *_: None)
    monkeypatch.setattr(timm, "create_model", offline)
    assert message(WeightsError, "test_vit", "pretrained") == (
        "The weights of test_vit could not be downloaded from the hub: "
        "ConnectionError: no route to the hub and more lines of it\n" + HUB_ADVICE
    )
