"""Weights as the library transformers names them, under the names of timm: DINOv2 and DINOv3.

Source of the names: the state dictionaries of `Dinov2Model` and `DINOv3ViTModel`, of versions 4 and 5.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

MARK = "embeddings.patch_embeddings."
"""In the name of the patch embedding, in every layout of transformers and in no other."""
OUTER = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.register_tokens": "reg_token",
    r"embeddings\.patch_embeddings\.(?:projection\.)?(weight|bias)": r"patch_embed.proj.\1",
    r"(?:layernorm|norm)\.(weight|bias)": r"norm.\1",
}
LAYER = re.compile(r"(?:encoder\.|model\.)?layer\.(\d+)\.(.+)")
INNER = {
    r"(norm[12])\.(weight|bias)": r"\1.\2",
    r"attention\.(?:attention\.)?(?:q_proj|query)\.(weight|bias)": r"q.\1",
    r"attention\.(?:attention\.)?(?:k_proj|key)\.(weight|bias)": r"k.\1",
    r"attention\.(?:attention\.)?(?:v_proj|value)\.(weight|bias)": r"v.\1",
    r"attention\.(?:o_proj|output\.dense)\.(weight|bias)": r"attn.proj.\1",
    r"mlp\.(?:fc1|weights_in)\.(weight|bias)": r"mlp.fc1.\1",
    r"mlp\.(?:fc2|weights_out|down_proj)\.(weight|bias)": r"mlp.fc2.\1",
    r"mlp\.up_proj\.(weight|bias)": r"mlp.up.\1",
    r"mlp\.gate_proj\.(weight|bias)": r"mlp.fc1_g.\1",
    r"layer_scale([12])\.lambda1": r"ls\1.gamma",
}


def is_transformers_layout(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of transformers."""
    return any(MARK in name for name in state)


def from_transformers(state: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """The tensors under the names that timm's model has.

    Args:
        state: by the names of transformers, with or without the name of the model before them.
        expected: names in timm's model; they say how it names its layer scales, gates and biases.

    Returns:
        The tensors by name. A name that is not known stays as it is, so that the caller finds it; the mask token, which
        features do not need, is left out. Biases of queries, keys and values that are all zero are left out where the
        model has none.
    """
    prefix = next(name for name in state if MARK in name).partition(MARK)[0]
    found: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        inner = name.removeprefix(prefix)
        if inner == "embeddings.mask_token":
            continue
        if layer := LAYER.fullmatch(inner):
            layers.setdefault(f"blocks.{layer[1]}.", {})[_renamed(layer[2], INNER)] = tensor
        else:
            found[_renamed(inner, OUTER)] = tensor
    if "reg_token" in found and "pos_embed" in found:  # timm adds the position of the class token beforehand
        found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
        found["pos_embed"] = found["pos_embed"][:, 1:]
    for block, tensors in layers.items():
        found |= {f"{block}{name}": tensor for name, tensor in _block(tensors, block, expected).items()}
    return found


def _block(tensors: dict[str, Tensor], block: str, expected: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a block: one projection for queries, keys and values, and the names of its kind of block."""
    parts = [tensors.pop(f"{part}.weight") for part in "qkv" if f"{part}.weight" in tensors]
    biases = [tensors.pop(f"{part}.bias", torch.zeros(len(weight))) for part, weight in zip("qkv", parts, strict=False)]
    made = {"attn.qkv.weight": torch.cat(parts)} if parts else {}
    if f"{block}attn.q_bias" in expected:
        made |= {f"attn.{part}_bias": bias for part, bias in zip("qkv", biases, strict=True)}
        made = {name: tensor for name, tensor in made.items() if f"{block}{name}" in expected}
    elif f"{block}attn.qkv.bias" in expected or any(bias.any() for bias in biases):
        made["attn.qkv.bias"] = torch.cat(biases)
    gated = any(name.startswith("mlp.fc1_g.") for name in tensors)
    for name, tensor in tensors.items():
        name = name.replace("mlp.up.", "mlp.fc1_x." if gated else "mlp.fc1.")
        scale = re.fullmatch(r"ls([12])\.gamma", name)
        made[f"gamma_{scale[1]}" if scale and f"{block}gamma_{scale[1]}" in expected else name] = tensor
    return made


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for pattern, replacement in table.items():
        if found := re.fullmatch(pattern, name):
            return found.expand(replacement)
    return name
