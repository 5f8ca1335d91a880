"""Frozen vision transformers from timm: the teacher, and the trunk of the student. The only importer of timm.

Names and behaviour follow timm's feature interface, https://huggingface.co/docs/timm/feature_extraction.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from brixel_cli.core.hub import check_hub
from brixel_cli.core.identity import tensors_sha256
from brixel_cli.core.transformers_layout import from_transformers, is_transformers_layout
from brixel_cli.core.weights import check_keys, check_pth
from brixel_cli.errors import SizeError, UsageError, WeightsError

FILES_OF_TIMM = ("model.safetensors", "pytorch_model.bin")
"""Of weights on the hub, one of which is enough."""
SIGNATURE_TOLERANCE = 0.02
"""Relative distance of two signatures; rounding all weights to bfloat16 makes less, other weights make far more."""


def quarter_indices(depth: int) -> list[int]:
    """0-based blocks whose outputs feed the adapter: the quarters of the depth, the last block always in.

    Source: the method's four intermediate maps; depth 12 -> 3, 6, 9, 11.
    """
    if depth < 4:
        raise UsageError(f"The adapter reads four blocks of the backbone; this one has {depth}.")
    # In the shallowest models the quarters make room for one another.
    return [min(quarter * depth // 4, depth - 5 + quarter) for quarter in (1, 2, 3)] + [depth - 1]


def same_model(one: str, other: str) -> bool:
    """Whether two timm names mean one architecture: they may differ in the tag of the weights, after the point."""
    return one.partition(".")[0] == other.partition(".")[0]


def check_size(height: int, width: int, patch_size: int) -> None:
    """Raise a SizeError that names the nearest sizes that fit, unless both sides are multiples of the patch."""
    if height % patch_size == 0 and width % patch_size == 0 and height and width:
        return

    def around(side: int) -> str:
        below, above = side // patch_size * patch_size, -(-side // patch_size) * patch_size
        return str(above) if below in (0, above) else f"{below} or {above}"

    raise SizeError(
        f"Image size {height}x{width} does not fit patch size {patch_size}: height and width must be multiples of it. "
        f"Nearest that fit: height {around(height)}, width {around(width)}."
    )


@dataclass(frozen=True)
class Outputs:
    """All that one pass gives; float32.

    Attributes:
        map: (B, D, h, w), of the model.
        layers: maps (B, D, H / patch, W / patch) of blocks of the transformer, by 0-based number.
        cls: class token (B, D) after the last block; None where there is none.
        registers: register tokens (B, R, D) after the last block.
    """

    map: Tensor
    layers: dict[int, Tensor]
    cls: Tensor | None
    registers: Tensor


class Backbone(nn.Module):
    """A frozen timm ViT that yields dense maps; always in eval mode, never trained, never in a checkpoint.

    Attributes:
        name: timm model name.
        embed_dim: channels D of every map.
        patch_size: side of a patch in pixels.
        layer_indices: 0-based blocks of `intermediate_maps`.
        depth: number of blocks.
        has_cls, num_registers: which tokens come before those of the patches.
        mean, std: per-channel statistics by which an RGB image in [0, 1] is normalised.
        weights: where the weights came from: `pretrained`, `random` or a path.
    """

    def __init__(self, name: str, vit: nn.Module, weights: str):
        super().__init__()
        trunk: Any = vit
        self.name = name
        self.weights = weights
        self.embed_dim: int = trunk.embed_dim
        self.patch_size: int = trunk.patch_embed.patch_size[0]
        self.depth = len(trunk.blocks)
        self.layer_indices = quarter_indices(self.depth)
        self.has_cls = getattr(trunk, "cls_token", None) is not None
        registers = getattr(trunk, "reg_token", None)
        self.num_registers = 0 if registers is None else registers.shape[1]
        config = timm.data.resolve_model_data_config(vit)
        self.mean: tuple[float, ...] = tuple(config["mean"])
        self.std: tuple[float, ...] = tuple(config["std"])
        trunk.prune_intermediate_layers(self.layer_indices[-1:], prune_head=True)
        self.vit = trunk.requires_grad_(False)
        self.train()
        self._sha256: str | None = None
        self._signature: list[float] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        dtype: torch.dtype = next(self.vit.parameters()).dtype
        return dtype

    @property
    def sha256(self) -> str:
        """SHA-256 over names and values of the weights; the same however and in whatever file they were stored."""
        if self._sha256 is None:
            self._sha256 = tensors_sha256(self.vit.state_dict())
        return self._sha256

    def signature(self) -> list[float]:
        """Mean feature vector (D) of a fixed synthetic image: nearly the same for weights that do the same.

        Weights that were converted or rounded have another SHA-256, but a signature within `SIGNATURE_TOLERANCE`.
        """
        if self._signature is not None:
            return self._signature
        ramp = torch.linspace(-2.0, 2.0, 8 * self.patch_size)
        across, down = ramp.expand(len(ramp), -1), ramp[:, None].expand(-1, len(ramp))
        image = torch.stack([across, down, across * down / 2]).to(next(self.vit.parameters()).device)
        mean = self.last_map(image[None])[0].mean(dim=(1, 2))
        self._signature = [round(value, 4) for value in mean.tolist()]
        return self._signature

    def does_as(self, signature: Sequence[float]) -> bool:
        """Whether its signature is another one's up to the tolerance: the relative distance of the vectors."""
        mine, other = torch.tensor(self.signature()), torch.tensor(signature)
        return len(mine) == len(other) and bool((mine - other).norm() <= SIGNATURE_TOLERANCE * other.norm())

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode, whatever the module around this one does."""
        return super().train(False)

    def _maps(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        check_size(images.shape[-2], images.shape[-1], self.patch_size)
        maps: list[Tensor] = self.vit.forward_intermediates(
            images.to(self.dtype), indices=list(indices), norm=True, intermediates_only=True, output_fmt="NCHW"
        )
        return [map_.float() for map_ in maps]

    @torch.no_grad()
    def intermediate_maps(self, images: Tensor) -> list[Tensor]:
        """Four maps (B, D, h, w), float32, each through the final norm, prefix tokens dropped; the last block's last.

        Args:
            images: normalised images (B, 3, H, W); H and W multiples of the patch size.

        Raises:
            SizeError: H or W is not a multiple of the patch size.
        """
        return self._maps(images, self.layer_indices)

    def maps_with_gradients(self, images: Tensor) -> list[Tensor]:
        """As `intermediate_maps`, differentiable: for updates of the weights that are trained."""
        return self._maps(images, self.layer_indices)

    @torch.no_grad()
    def last_map(self, images: Tensor) -> Tensor:
        """The last block's map (B, D, H / patch, W / patch), float32, through the final norm.

        Raises:
            SizeError: H or W is not a multiple of the patch size.
        """
        return self._maps(images, self.layer_indices[-1:])[0]

    @torch.no_grad()
    def outputs(self, images: Tensor, layers: Collection[int]) -> Outputs:
        """The last map with all else that the same pass gives, each through the final norm.

        Args:
            images: as for `last_map`.
            layers: 0-based blocks whose maps are wanted.

        Raises:
            SizeError: H or W is not a multiple of the patch size.
        """
        check_size(images.shape[-2], images.shape[-1], self.patch_size)
        indices = sorted({*layers, self.depth - 1})
        with_prefix = self.has_cls or self.num_registers > 0
        found: list[Any] = self.vit.forward_intermediates(
            images.to(self.dtype), indices=indices, norm=True, intermediates_only=True, return_prefix_tokens=with_prefix
        )
        maps = [map_.float() for map_ in ((each[0] for each in found) if with_prefix else found)]
        prefix = found[-1][1].float() if with_prefix else maps[-1].new_empty(len(images), 0, self.embed_dim)
        return Outputs(
            maps[-1],
            dict(zip(indices, maps, strict=True)),
            prefix[:, 0] if self.has_cls else None,
            prefix[:, prefix.shape[1] - self.num_registers :],
        )

    forward = last_map


def load_backbone(name: str, weights: str = "pretrained", dtype: str = "float32", device: str = "cpu") -> Backbone:
    """Build a frozen backbone by timm name.

    Args:
        name: timm model name, with or without the tag of its weights.
        weights: `pretrained` (downloaded once from the hub), `random` (seeded by torch's global generator), or the
            path of a .safetensors or .pth file in the layout of timm, of transformers or of the original DINO.
        dtype: `float32` or `bfloat16`, the format in which the weights are held.
        device: where the weights go; `meta` builds the shapes only.

    Raises:
        UsageError: timm has no such model, or it is no ViT with patch tokens.
        WeightsError: the weights cannot be downloaded, read, or matched with the model.
    """
    _check_name(name)
    options: dict[str, Any] = {"num_classes": 0, "dynamic_img_size": True}
    random = weights == "random" or device == "meta"
    default_dtype = torch.get_default_dtype()
    try:
        # Random weights are drawn in their final format: the largest models would not fit in memory twice.
        if random and dtype == "bfloat16":
            torch.set_default_dtype(torch.bfloat16)
        with torch.device(device if device == "meta" else "cpu"), contextlib.redirect_stdout(io.StringIO()):
            if weights == "pretrained" and not random:
                vit: Any = _create_pretrained(name, options)
            else:
                vit = timm.create_model(name, **options)
                if not random:
                    _load_file(vit, name, Path(weights).expanduser())
    except TypeError as error:
        raise UsageError(f"{name} takes no variable image size, which brixel needs: {error}") from error
    finally:
        torch.set_default_dtype(default_dtype)
    if not hasattr(vit, "blocks") or hasattr(vit.patch_embed, "backbone") or len(set(vit.patch_embed.patch_size)) != 1:
        raise UsageError(
            f"{name} is no plain ViT with square patches of pixels. Names that are: timm.list_models('vit_*')."
        )
    backbone = Backbone(name, vit, weights)
    if dtype == "bfloat16" and not random:
        _ = backbone.sha256  # of the weights as they were stored, before they are rounded
    return backbone.to(device=device, dtype=getattr(torch, dtype))


def _check_name(name: str) -> None:
    if timm.is_model(name.partition(".")[0]):
        tags = timm.list_pretrained(name.partition(".")[0] + ".*")
        if "." in name and name not in tags:
            raise UsageError(f"timm has no weights {name}. It has: {', '.join(tags) or 'none for this model'}.")
        return
    close = difflib.get_close_matches(name.partition(".")[0], timm.list_models("vit_*"), n=3)
    hint = f"Did you mean {' or '.join(close)}?" if close else "Names: timm.list_models('vit_*')."
    raise UsageError(f"timm has no model {name}. {hint}")


def _create_pretrained(name: str, options: dict[str, Any]) -> nn.Module:
    stored = timm.get_pretrained_cfg(name)
    try:
        if stored is not None and stored.hf_hub_id and not stored.file:
            _check_hub(name, stored, options)
        vit: nn.Module = timm.create_model(name, pretrained=True, **options)
        return vit
    except TypeError:
        raise
    except Exception as error:  # timm, torch and the hub's client each raise their own kinds here
        raise WeightsError(
            f"The weights of {name} could not be downloaded from the hub: {_first_lines(error)}\n"
            "Check the network, or download them elsewhere and give the file, .safetensors or .pth: "
            "--backbone-weights PATH, or backbone.weights in a recipe."
        ) from error


def _check_hub(name: str, stored: Any, options: dict[str, Any]) -> None:
    """Raise an OSError where the weights cannot be had, or a TypeError where the model does not take these options."""
    try:
        check_hub(stored.hf_hub_id, [stored.hf_hub_filename] if stored.hf_hub_filename else FILES_OF_TIMM)
    except OSError:
        with torch.device("meta"):
            timm.create_model(name, **options)
        raise


def _load_file(vit: nn.Module, name: str, path: Path) -> None:
    """Load weights in the layout of timm, transformers or DINO; all must be there, and a classifier may be."""
    if not path.is_file():
        raise WeightsError(f"No backbone weights at {path}. Give 'pretrained', 'random' or the path of a file.")
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise WeightsError(f"{path}: backbone weights must be .safetensors or .pth, not {path.suffix or 'this'}.")
    if path.suffix != ".safetensors":
        check_pth(path)
    what = f"{path} does not hold weights of {name}"
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", lambda state, _: state)
    try:
        stored = timm.models.load_state_dict(str(path), weights_only=True)
        if is_transformers_layout(stored):
            stored = from_transformers(stored, vit.state_dict())
        state = convert(stored, vit)
    except Exception as error:  # timm, torch and safetensors each raise their own kinds here
        raise WeightsError(f"{what}: {_first_lines(error)}") from error
    expected = vit.state_dict()
    found = {
        key: value for key, value in state.items() if key in expected or not key.startswith(("head.", "head_dist."))
    }
    check_keys(expected, found, what)
    vit.load_state_dict(found)


def _first_lines(error: BaseException, count: int = 4) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + " ".join(line[:300] for line in lines[:count])
