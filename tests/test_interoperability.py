"""Models of other libraries: what timm and transformers store is read, and gives their features; torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import brixel_cli
from brixel_cli.core.backbone import Backbone, load_backbone
from brixel_cli.core.transformers_layout import from_transformers
from brixel_cli.errors import WeightsError

SIZES = {"embed_dim": 48, "depth": 4, "num_heads": 3}


def images(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's models in small: their names and layouts, with 48 channels and four blocks."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **options, **SIZES))


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "dinov3"])
def test_weights_that_transformers_saved_give_its_features(kind: str, small: None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "initializer_range": 0.2,
    }
    if kind == "dinov3":
        config = transformers.DINOv3ViTConfig(**options, intermediate_size=192, num_register_tokens=4, patch_size=16)
        model, name = transformers.DINOv3ViTModel(config), "vit_small_patch16_dinov3_qkvb"
    elif kind == "dinov2":
        config = transformers.Dinov2Config(**options, image_size=518, patch_size=14, layerscale_value=0.7)
        model, name = transformers.Dinov2Model(config), "vit_small_patch14_dinov2"
    else:
        config = transformers.Dinov2WithRegistersConfig(**options, image_size=518, patch_size=14, num_register_tokens=4)
        model, name = transformers.Dinov2WithRegistersModel(config), "vit_small_patch14_reg4_dinov2"
    for parameter in model.parameters():  # scales and biases too, which begin as ones and zeros
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(tmp_path)
    loaded = load_backbone(name, str(tmp_path / "model.safetensors"))
    side = 518 if kind != "dinov3" else 64  # at another size each library resizes position embeddings in its own way
    with torch.no_grad():
        expected = model(images(side)[:1]).last_hidden_state
    patches = (side // loaded.patch_size) ** 2
    grid = expected[:, -patches:].transpose(1, 2).unflatten(2, (-1, side // loaded.patch_size))
    torch.testing.assert_close(loaded.last_map(images(side)[:1]), grid, rtol=1e-3, atol=1e-3)


def test_the_layout_of_transformers_4_is_read_as_well() -> None:
    weight = torch.arange(4.0).reshape(2, 2)
    state = {"dinov2.embeddings.patch_embeddings.projection.bias": torch.ones(2), "dinov2.embeddings.mask_token": torch.ones(1),
             "dinov2.layernorm.weight": torch.ones(2), "dinov2.encoder.layer.3.layer_scale2.lambda1": torch.ones(2),
             "dinov2.encoder.layer.3.attention.output.dense.bias": torch.ones(2), "classifier.weight": torch.ones(2)}  # fmt: skip
    state |= {f"dinov2.encoder.layer.3.attention.attention.{part}.weight": weight + number
              for number, part in enumerate(("query", "key", "value"))}  # fmt: skip
    found = from_transformers(state, ())
    assert set(found) == {"patch_embed.proj.bias", "norm.weight", "blocks.3.ls2.gamma", "blocks.3.attn.proj.bias",
                          "blocks.3.attn.qkv.weight", "classifier.weight"}  # fmt: skip
    assert found["blocks.3.attn.qkv.weight"].tolist() == [[0, 1], [2, 3], [1, 2], [3, 4], [2, 3], [4, 5]]


def test_a_gated_layer_of_dinov3_has_the_names_of_timm() -> None:
    state = {"embeddings.patch_embeddings.bias": torch.ones(2), "layer.0.mlp.gate_proj.weight": torch.ones(2),
             "layer.0.mlp.up_proj.weight": torch.zeros(2), "layer.0.layer_scale1.lambda1": torch.ones(2)}  # fmt: skip
    found = from_transformers(state, {"blocks.0.gamma_1"})
    assert set(found) == {
        "patch_embed.proj.bias",
        "blocks.0.mlp.fc1_g.weight",
        "blocks.0.mlp.fc1_x.weight",
        "blocks.0.gamma_1",
    }
    assert found["blocks.0.mlp.fc1_g.weight"].sum() == 2


def test_weights_of_another_size_of_model_are_refused(tmp_path: Path) -> None:
    save_file({"embeddings.patch_embeddings.bias": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="does not hold weights of test_vit"):
        load_backbone("test_vit", str(tmp_path / "model.safetensors"))


def test_a_checkpoint_that_the_user_fine_tuned_with_timm_is_a_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = timm.create_model("test_vit", num_classes=5)
    optimiser = torch.optim.SGD(classifier.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(classifier(images(160)), torch.tensor([1, 3])).backward()
    optimiser.step()
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "tuned.pth")
    save_file(classifier.state_dict(), tmp_path / "tuned.safetensors")
    with torch.no_grad():
        expected = classifier.eval().forward_features(images(160))[:, classifier.num_prefix_tokens :]
    for file in ("tuned.pth", "tuned.safetensors"):
        tuned = load_backbone("test_vit", str(tmp_path / file))
        torch.testing.assert_close(tuned.last_map(images(160)).flatten(2).transpose(1, 2), expected)
    assert "head.weight" in load_file(tmp_path / "tuned.safetensors")  # the classifier is not in the way


def test_a_compiled_student_gives_the_same_map(model: tuple[str, str]) -> None:
    student = brixel_cli.load_student(model[0])
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(64)), student(images(64)))
    assert isinstance(student.backbone, Backbone)
