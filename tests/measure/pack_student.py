"""Put the student of a run into the package: small, in float16, with the backbone's weights to be had from the hub.

    python tests/measure/pack_student.py --run runs/dinov2_vits --name dinov2_vits14

Writes brixel_cli/students/NAME.safetensors and its line in SHA256SUMS. The model card, NAME.md, is written by hand.
`--trained 84..224` and `--measured 112=0.525` say for the file what the run does not: short sides in pixels, and the
recovered gap in cosine on held-out images. Weights are rounded to seven significant bits: a wheel compresses the zeros.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from brixel_cli.cli.console import say
from brixel_cli.core.files import write_text
from brixel_cli.core.identity import file_sha256
from brixel_cli.core.shipped import STUDENTS, SUMS
from brixel_cli.core.student import read_adapter, save_student
from brixel_cli.errors import BrixelError

SIGNIFICANT_BITS = 7
"""Of a stored weight; float16 has 11, bfloat16 8."""


def rounded(tensor: Tensor, bits: int = SIGNIFICANT_BITS) -> Tensor:
    """The nearest float16 numbers of so many significant bits."""
    fractions, exponents = torch.frexp(tensor.float())  # 0.5 <= |fraction| < 1
    return torch.ldexp(torch.round(fractions * 2**bits) / 2**bits, exponents).half()


def pack(
    run: Path, name: str, folder: Path = STUDENTS, trained: Sequence[int] = (), measured: Mapping[str, float] = {}
) -> Path:
    """Write a student's file and the sums of all students of the folder; returns the file."""
    stored = read_adapter(str(run))
    if stored.card.backbone_weights == "random" or not stored.card.backbone_signature:
        raise BrixelError(f"{stored.path}: nobody could have the backbone's weights that it was trained on.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    card = dataclasses.replace(
        stored.card,
        backbone_weights="pretrained",
        trained_sides=trained or stored.card.trained_sides,
        recovered_gap={**stored.card.recovered_gap, **measured},
    )
    if not card.trained_sides:
        raise BrixelError(f"{stored.path} does not say at which sizes it was trained: give --trained LEAST..MOST.")
    halved = {key: rounded(tensor) if tensor.is_floating_point() else tensor for key, tensor in stored.tensors.items()}
    for key, tensor in halved.items():
        if not tensor.isfinite().all():
            raise BrixelError(f"{stored.path}: {key} is beyond the range of float16.")
    save_student(path, halved, card)
    files = sorted(folder.glob("*.safetensors"))
    write_text(folder / SUMS, "".join(f"{file_sha256(file)}  {file.name}\n" for file in files))
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder of brixel distill")
    parser.add_argument("--name", required=True, help="by which the student is to be known")
    parser.add_argument("--trained", default="", help="short sides in pixels: LEAST..MOST; default: as the run says")
    parser.add_argument("--measured", nargs="*", default=[], help="recovered gaps by short side: 112=0.525")
    arguments = parser.parse_args()
    sides = [int(side) for side in arguments.trained.split("..") if side]
    gaps = {side: float(gap) for side, gap in (text.split("=") for text in arguments.measured)}
    written = pack(arguments.run, arguments.name, STUDENTS, sides, gaps)
    say(f"wrote {written} ({written.stat().st_size / 1e6:.2f} MB)")
