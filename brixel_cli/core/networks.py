"""Networks that are trained end to end: a backbone with a probe's head, and U-Nets; rates layer by layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brixel_cli.config.supervised import SupervisedConfig
from brixel_cli.core.backbone import Backbone
from brixel_cli.core.heads import Head
from brixel_cli.core.weights import check_keys, load_pth, load_tensors
from brixel_cli.errors import UsageError

UNET_CHANNELS = 32
"""Of a U-Net's map, on which the head stands."""
UNET_STRIDE = 32
"""Images are padded to multiples of this many pixels, which five halvings need."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, by which the images of a U-Net are normalised."""


class Network(nn.Module):
    """A trunk, which gives a map of normalised images, and a head on it, trained together.

    Args:
        trunk: images (B, 3, H, W) to maps (B, D, h, w).
        head: on the maps.
        scales: for each parameter, by the beginning of its name, its rate over `SupervisedConfig.lr`; those that no
            beginning fits have `scratch_lr`.
    """

    def __init__(self, trunk: nn.Module, head: Head, scales: dict[str, float]):
        super().__init__()
        self.trunk, self.head, self.scales = trunk, head, scales

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs of the head, as `Head.forward`, from normalised images (B, 3, H, W)."""
        outputs: dict[str, Tensor] = self.head(self.trunk(images).float())
        return outputs

    def groups(self, config: SupervisedConfig) -> list[dict[str, Any]]:
        """Parameters for AdamW: those of one peak rate and one weight decay together; `peak` is the rate."""
        found: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            scale = next((scale for start, scale in self.scales.items() if name.startswith(start)), None)
            peak = config.scratch_lr if scale is None else config.lr * scale
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            found.setdefault((peak, decay), []).append(parameter)
        return [
            {"params": some, "peak": peak, "lr": peak, "weight_decay": decay} for (peak, decay), some in found.items()
        ]


class _LastMap(nn.Module):
    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.maps_with_gradients(images)[-1]


def finetuned(backbone: Backbone, head: Head, layer_decay: float) -> Network:
    """A backbone whose weights are all trained, with a head on its last map.

    The rate of a block is `layer_decay` times that of the next one; embeddings come before the first block. Source:
    BEiT, https://arxiv.org/abs/2106.08254, appendix. The backbone stays in eval mode: no stochastic depth.
    """
    backbone.vit.requires_grad_(True)
    blocks: Any = backbone.vit.blocks
    start = "trunk.backbone.vit."
    scales = {f"{start}blocks.{n}.": layer_decay ** (len(blocks) - 1 - n) for n in range(len(blocks))}
    return Network(_LastMap(backbone), head, {**scales, f"{start}norm.": 1.0, start: layer_decay ** len(blocks)})


class _UNet(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padding = (0, -width % UNET_STRIDE, 0, -height % UNET_STRIDE)
        map_: Tensor = self.net(F.pad(images, padding, mode="replicate"))
        return map_[..., :height, :width]


def unet(encoder: str, head: Head, weights: str | None, seed: int) -> Network:
    """A U-Net of segmentation_models_pytorch with a head on its map, which has the size of the image.

    Args:
        encoder: name in segmentation_models_pytorch, or in timm.
        head: on `UNET_CHANNELS` channels.
        weights: of the network or of the encoder alone, a file; None: random.
        seed: of random weights.

    Raises:
        UsageError: there is no such encoder.
        WeightsError: the weights cannot be read, or belong to another network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _build(encoder)
    scales: dict[str, float] = {}
    if weights is not None:
        path = Path(weights).expanduser()
        state = load_tensors(path)[0] if path.suffix == ".safetensors" else load_pth(path)
        whole = any(key.startswith("decoder.") for key in state)
        part: Any = net if whole else net.encoder
        expected = part.state_dict()
        beginning = "" if whole else "encoder."
        named = {key.removeprefix(beginning): value for key, value in state.items()}
        # Of a classifier, and of a head for other classes, nothing is taken.
        wanted = {key: value for key, value in expected.items() if not key.startswith("segmentation_head")}
        found = {key: value for key, value in named.items() if key in wanted}
        check_keys(wanted, found, f"{path} does not hold weights of the {'U-Net' if whole else 'encoder'} {encoder}")
        part.load_state_dict(found, strict=False)
        scales = {"trunk.net.encoder.": 1.0} | ({"trunk.net.decoder.": 1.0} if whole else {})
    return Network(_UNet(net), head, scales)


def _build(encoder: str) -> Any:
    import segmentation_models_pytorch as smp  # an extra, and slow to import

    name = encoder if encoder in smp.encoders.get_encoder_names() else f"tu-{encoder}"
    try:
        return smp.Unet(encoder_name=name, encoder_weights=None, in_channels=3, classes=UNET_CHANNELS)
    except Exception as error:  # of many kinds: timm does not know the name, or the model has no maps of five sizes
        reason = re.split(r"[\n`]", str(error))[0][:200]
        raise UsageError(
            f"unet:{encoder}: there is no such encoder, or it suits no U-Net ({type(error).__name__}: {reason}). "
            "Names: those of segmentation_models_pytorch, such as resnet18, and of timm, such as convnext_tiny."
        ) from error
