"""The student: a frozen backbone with a trained adapter; how it is stored, and how it is loaded again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from brixel_cli.config.distill import AdapterConfig
from brixel_cli.config.files import load_recipe
from brixel_cli.core.adapter import Adapter
from brixel_cli.core.backbone import Backbone, Outputs, load_backbone, same_model
from brixel_cli.core.deformable import DeformableAdapter
from brixel_cli.core.fusion import FusionAdapter
from brixel_cli.core.lora import LayerShapes, LowRankUpdates, linear_layers, stored_layers
from brixel_cli.core.shipped import FILE_NAME, locate
from brixel_cli.core.weights import (
    RELEASED_ADAPTER,
    RELEASED_FACTOR,
    ReleasedStudent,
    check_keys,
    import_released,
    load_metadata,
    load_pth,
    load_tensors,
    save_tensors,
)
from brixel_cli.errors import BrixelError, WeightsError

ADAPTERS: dict[str, type[Adapter]] = {"fusion": FusionAdapter, "deformable": DeformableAdapter}
_Pixels = Annotated[int, Field(gt=0, le=2**20)]
FORMAT = "brixel-student-1"
RELEASED_BACKBONES = {
    384: "vit_small_patch16_dinov3.lvd1689m",
    768: "vit_base_patch16_dinov3.lvd1689m",
    1024: "vit_large_patch16_dinov3.lvd1689m",
    1280: "vit_huge_plus_patch16_dinov3.lvd1689m",
}


def build_adapter(embed_dim: int, factor: int, config: AdapterConfig, layers: LayerShapes | None = None) -> Adapter:
    """The adapter that the recipe asks for, with fresh weights; its output starts out equal to its residual.

    Args:
        embed_dim: channels D of the backbone's maps.
        factor: output grid over token grid.
        config: options of the recipe's `adapter` section.
        layers: the backbone's linear layers, for `lora_rank`; None: has no updates of them.
    """
    adapter = ADAPTERS[config.kind](embed_dim, factor, config)
    if config.lora_rank and layers:
        adapter.lora = LowRankUpdates(layers, config.lora_rank)
    return adapter.to(memory_format=torch.channels_last) if config.channels_last else adapter


class Student(nn.Module):
    """Frozen backbone and adapter as one model: normalised images in, sharp maps out.

    Attributes:
        backbone: the frozen `Backbone`.
        adapter: the trained `Adapter`.
        trunk: the backbone that feeds the adapter: with the adapter's low-rank updates merged into a copy, or itself.
        released: what an import of released weights kept and skipped; None for weights of our own.
    """

    def __init__(self, backbone: Backbone, adapter: Adapter):
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter
        self.trunk = adapter.lora.merged(backbone) if adapter.lora else backbone
        self.released: ReleasedStudent | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Sharp maps (B, D, factor * H / patch, factor * W / patch), float32.

        Args:
            images: (B, 3, H, W), normalised by `backbone.mean` and `backbone.std`; H, W multiples of the patch size.

        Raises:
            SizeError: H or W is not a multiple of the patch size.
        """
        return self._sharpened(images, self.trunk.intermediate_maps(images))

    def outputs(self, images: Tensor, layers: Collection[int]) -> Outputs:
        """The sharp map, with all else that the same pass of the trunk gives; see `Backbone.outputs`."""
        found = self.trunk.outputs(images, {*layers, *self.trunk.layer_indices})
        sharp = self._sharpened(images, [found.layers[index] for index in self.trunk.layer_indices])
        return dataclasses.replace(found, map=sharp)

    def _sharpened(self, images: Tensor, maps: Sequence[Tensor]) -> Tensor:
        dtype = next(self.adapter.parameters()).dtype
        output: Tensor = self.adapter(images.to(dtype), [map_.to(dtype) for map_ in maps]).float()
        return output


@dataclass(frozen=True)
class StudentCard:
    """What a student's file says of itself, besides its weights.

    Attributes:
        backbone: timm name.
        backbone_weights: `pretrained`, `random` or a path, as in training.
        backbone_sha256: of the weights.
        embed_dim: channels D of the maps.
        factor: output grid over token grid.
        adapter: its options.
        step: updates it was trained for.
        student_size: input (height, width) in pixels that it was validated at; empty: not known.
        backbone_signature: by which weights that were converted or rounded are known; empty: by SHA-256 alone.
        trained_sides: least and most pixels of the shorter side of its inputs in training; empty: not known.
        recovered_gap: in cosine on held-out images, by the shorter side of the input in pixels; empty: not known.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    backbone: str
    backbone_weights: str
    backbone_sha256: str
    embed_dim: Annotated[int, Field(gt=0, le=2**16)]
    factor: Annotated[int, Field(gt=0, le=64)]
    adapter: AdapterConfig
    step: Annotated[int, Field(ge=0)]
    student_size: Sequence[_Pixels] = ()
    backbone_signature: Sequence[float] = ()
    trained_sides: Sequence[_Pixels] = ()
    recovered_gap: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained_at(self) -> str:
        """For people: `84 to 224 px`, and what was measured there."""
        least, most = self.trained_sides
        gaps = [f"{gap:.0%} at {side} px" for side, gap in self.recovered_gap.items()]
        measured = f" (recovered gap on held-out images: {', '.join(gaps)})" if gaps else ""
        return f"{least} px{measured}" if least == most else f"{least} to {most} px{measured}"

    def to_metadata(self) -> dict[str, str]:
        """As safetensors metadata: strings by strings."""
        fields = dataclasses.asdict(self) | {"adapter": self.adapter.model_dump()}
        return {"format": FORMAT, "card": json.dumps(fields, sort_keys=True)}

    @staticmethod
    def from_metadata(metadata: dict[str, str], path: Path) -> StudentCard:
        """Read back; raises WeightsError where the file is not a student of a version we know."""
        if metadata.get("format") != FORMAT:
            raise WeightsError(f"{path} is no brixel student of format {FORMAT}: {metadata.get('format', 'unmarked')}.")
        try:
            return TypeAdapter(StudentCard).validate_json(metadata["card"])
        except KeyError as error:
            raise WeightsError(f"{path} holds no description of the student.") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "card"
            raise WeightsError(
                f"{path}: its description of the student cannot be read: {where}: {first['msg']}."
            ) from error


def save_student(path: Path, adapter_state: dict[str, Tensor], card: StudentCard) -> None:
    """Write the adapter's weights (never the backbone's) and its card, atomically."""
    save_tensors(path, adapter_state, card.to_metadata())


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as found in a file: ours, or translated from a released one, whose `card` is then inferred."""

    path: Path
    tensors: dict[str, Tensor]
    card: StudentCard
    released: ReleasedStudent | None

    def build(self, config: AdapterConfig | None = None) -> Adapter:
        """The adapter with its stored weights.

        Args:
            config: of the same architecture as the stored one, where memory layout or training options shall differ.

        Raises:
            WeightsError: the stored tensors do not fit the stored description.
        """
        layers = stored_layers(self.tensors)
        if self.card.adapter.lora_rank and not layers:
            raise WeightsError(f"{self.path} does not fit its own description: it holds no low-rank updates.")
        parts = self.card.embed_dim, self.card.factor, config or self.card.adapter, layers
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # a description may ask for more than memory has
            expected = build_adapter(*parts).state_dict()
        check_keys(expected, self.tensors, f"{self.path} does not fit its own description")
        adapter = build_adapter(*parts)
        adapter.load_state_dict(self.tensors)
        return adapter

    def load(self, backbone: str, weights: str, dtype: str = "float32", device: str = "cpu") -> Student:
        """The student that this adapter makes with a backbone, ready for inference; `api.load_student` says more.

        Raises:
            WeightsError: the backbone's weights cannot be had, or the two do not belong together.
        """
        self.check_name(backbone)
        trunk = load_backbone(backbone, weights, dtype=dtype, device=device)
        width = self.card.embed_dim
        if trunk.embed_dim != width:
            raise WeightsError(f"{self.path} has width {width}, the backbone {backbone} has {trunk.embed_dim}.")
        self.check_weights(trunk)
        if (layers := stored_layers(self.tensors)) and layers != linear_layers(trunk):
            raise WeightsError(f"{self.path} has low-rank updates of other layers than those of {backbone}.")
        student = Student(trunk, self.build().to(device))
        student.released = self.released
        if dtype == "bfloat16":
            student.adapter.to(torch.bfloat16)
        return student.eval().requires_grad_(False)

    def check_name(self, backbone: str) -> None:
        """Raise a WeightsError unless it was trained on this timm model; of released weights nobody knows."""
        known = "" if self.released else self.card.backbone
        if known and not same_model(known, backbone):
            raise WeightsError(
                f"{self.path} was trained on {known}, not on {backbone}: leave that out, or name another student."
            )

    def check_weights(self, trunk: Backbone) -> None:
        """Raise a WeightsError unless these are the backbone's weights of the training, or do the same."""
        card = self.card
        if not card.backbone_sha256 or trunk.sha256 == card.backbone_sha256:
            return
        if card.backbone_signature and trunk.does_as(card.backbone_signature):
            return
        if card.backbone_weights == "random":
            raise WeightsError(f"{self.path} was trained on random backbone weights, which are gone with that run.")
        raise WeightsError(
            f"The weights of {trunk.name} ({trunk.weights}) are not those that {self.path} was trained on: "
            f"SHA-256 {trunk.sha256[:16]}..., expected {card.backbone_sha256[:16]}.... "
            "Give backbone_weights= (--backbone-weights)."
        )


def read_adapter(reference: str) -> StoredAdapter:
    """Read an adapter: a run folder, a .safetensors of ours, a shipped name, a released .pth, or `hf-hub:user/name`.

    Raises:
        WeightsError: nothing is there, it cannot be read, or a shipped file is not the one that was shipped.
    """
    path = locate(reference)
    if path.suffix in (".pth", ".pt"):
        released = import_released(load_pth(path), str(path))
        name = RELEASED_BACKBONES.get(released.embed_dim, "")
        card = StudentCard(name, "pretrained", "", released.embed_dim, RELEASED_FACTOR, RELEASED_ADAPTER, 0)
        return StoredAdapter(path, released.tensors, card, released)
    tensors, metadata = load_tensors(path)
    full = {key: tensor.float() if tensor.dtype == torch.float16 else tensor for key, tensor in tensors.items()}
    return StoredAdapter(path, full, _card(metadata, path), None)


def read_card(path: Path) -> StudentCard:
    """The card of one of our students, whose weights are not looked at; errors as `read_adapter`."""
    return _card(load_metadata(path), path)


def _card(metadata: dict[str, str], path: Path) -> StudentCard:
    card, recipe = StudentCard.from_metadata(metadata, path), path.parent / "recipe.yaml"
    if not card.trained_sides and path.name == FILE_NAME and recipe.is_file():  # a run of an earlier version
        with suppress(BrixelError):
            card = dataclasses.replace(card, trained_sides=load_recipe(str(recipe)).trained_sides)
    return card
