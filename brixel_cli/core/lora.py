"""Low-rank updates of a backbone's linear layers: how the student's trunk learns, with few numbers to store.

Source: LoRA, arXiv 2106.09685. A layer's weight W becomes W + up @ down. For inference the sums are computed once, so
that the updates cost no time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from brixel_cli.core.backbone import Backbone

LayerShapes = Mapping[str, tuple[int, int]]
"""Outputs and inputs of linear layers, by their names in a backbone."""


def linear_layers(backbone: Backbone) -> LayerShapes:
    """The linear layers of a backbone's blocks, those whose weights some models use without calling the layer left out.

    Found by a pass of the smallest image.
    """
    called: dict[str, tuple[int, int]] = {}

    def note(name: str) -> Any:
        return lambda layer, *_: called.update({name: (layer.out_features, layer.in_features)})

    layers = {name: layer for name, layer in backbone.vit.blocks.named_modules() if isinstance(layer, nn.Linear)}
    handles = [layer.register_forward_hook(note(f"blocks.{name}")) for name, layer in layers.items()]
    side = 2 * backbone.patch_size
    backbone.last_map(torch.zeros(1, 3, side, side, device=next(backbone.vit.parameters()).device))
    for handle in handles:
        handle.remove()
    return called


def stored_layers(tensors: Mapping[str, Tensor]) -> LayerShapes:
    """The layers of which an adapter's stored tensors hold updates."""
    prefix = "lora.layers."
    found: dict[str, tuple[int, int]] = {}
    for key, up in tensors.items():
        if key.startswith(prefix) and key.endswith(".up") and up.ndim == 2:
            name = key.removeprefix(prefix).removesuffix(".up")
            down = tensors.get(f"{prefix}{name}.down")
            found[name.replace("/", ".")] = (up.shape[0], down.shape[-1] if down is not None and down.ndim else 0)
    return found


class LowRankUpdate(nn.Module):
    """The update of one layer: (..., inputs) -> (..., outputs), zero at first.

    Attributes:
        down: (rank, inputs).
        up: (outputs, rank).
    """

    def __init__(self, outputs: int, inputs: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)


class LowRankUpdates(nn.Module):
    """The updates of all layers, by their names in the trunk with `/` for the points."""

    def __init__(self, shapes: LayerShapes, rank: int):
        super().__init__()
        self.layers = nn.ModuleDict(
            {name.replace(".", "/"): LowRankUpdate(outputs, inputs, rank) for name, (outputs, inputs) in shapes.items()}
        )

    def maps(self, backbone: Backbone, images: Tensor) -> list[Tensor]:
        """The backbone's four maps with the updates, as `Backbone.intermediate_maps`, through which gradients flow."""
        with self._applied(backbone):
            return backbone.maps_with_gradients(images)

    def _pairs(self, vit: nn.Module) -> Iterator[tuple[Any, Any]]:
        for name, update in self.layers.items():
            yield vit.get_submodule(name.replace("/", ".")), update

    @contextmanager
    def _applied(self, backbone: Backbone) -> Iterator[None]:

        def add(update: LowRankUpdate) -> Any:
            return lambda _, inputs, output: output + update(inputs[0])

        handles = [layer.register_forward_hook(add(update)) for layer, update in self._pairs(backbone.vit)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def merged(self, backbone: Backbone) -> Backbone:
        """A copy of the backbone with the updates in its weights."""
        trunk = copy.deepcopy(backbone)
        for layer, update in self._pairs(trunk.vit):
            layer.weight += (update.up.float() @ update.down.float()).to(layer.weight)
        return trunk
