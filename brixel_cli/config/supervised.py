"""How networks are trained end to end, as supervised rivals of frozen features: `--set supervised.KEY=VALUE`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from brixel_cli.config.section import Rate, Section, Weight


class SupervisedConfig(Section):
    """Training of the sources `finetuned` and `unet:ENCODER`; crops, labels, head and loss are the protocol's."""

    lr: Rate = 1e-4
    """Peak learning rate of AdamW for trained weights: of the last block of a backbone, or of the encoder's."""
    scratch_lr: Rate = 1e-3
    """Peak learning rate of what begins with random weights: heads, decoders, encoders without weights."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Rate of a block of the backbone over that of the next one."""
    weight_decay: Weight = 0.05
    """Decoupled weight decay of AdamW, of matrices and kernels; biases and norms have none."""
    batch_size: PositiveInt = 8
    """Images in a step."""
    steps: PositiveInt = 1000
    """Steps at most: the rate rises over the first tenth and falls to zero at their end by half a cosine."""
    validate_every: PositiveInt = 25
    """Steps between validations; the state of the training is stored at each."""
    patience: PositiveInt = 10
    """Validations without a better figure after which the training ends; the best weights are kept."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the training images that is set aside for validation, at least one image."""
    flip: bool = True
    """Whether each training image is mirrored with equal chance, drawn in each step."""
    weights: str | None = None
    """Weights of a U-Net or of its encoder, .safetensors or .pth; null: random."""
