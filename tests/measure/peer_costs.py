"""GFLOP of a whole pass with the upsamplers of docs/peers, on their own code with random weights: nothing is downloaded.

    python tests/measure/peer_costs.py anyup=CLONE loftup=CLONE uplift=CLONE     # clones of their repositories

Backbone: DINOv2 ViT-S/14. The shape of each map is checked too. Quality needs the released weights: `brixel probe --baseline`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.cost import count_cost
from brixel_cli.engines.baselines import load_baseline

PEERS = Path(__file__).parents[2] / "docs" / "peers"
BACKBONE, FACTORS = "vit_small_patch14_dinov2.lvd142m", {112: 4, 224: 2}
"""The factor of the student of each input, in pixels."""


def gflop(name: str, clone: str) -> dict[str, list[float]]:
    """GFLOP of a pass at each input, by function of the file of a peer.

    Args:
        name: of the file.
        clone: folder of the peer's repository.
    """
    hub = torch.hub.load

    def load(repository: str, model: str, **options: Any) -> Any:
        options = {key: value for key, value in options.items() if key != "trust_repo"}
        return hub(clone, model, source="local", pretrained=False, **options)

    torch.hub.load = load
    try:
        backbone = load_backbone(BACKBONE, "random")
        baselines = []
        for function in (name, f"{name}_448"):
            if f"def {function}(" in (PEERS / f"{name}.py").read_text(encoding="utf-8"):
                baselines.append(load_baseline(f"{PEERS / name}.py:{function}"))
        found: dict[str, list[float]] = {}
        for baseline in baselines:
            for side, factor in FACTORS.items():
                images = torch.randn(1, 3, side, side)
                guides = torch.randn(1, 3, *baseline.guide_size((side, side)))
                call = partial(baseline.whole_pass(backbone, factor), images, guides)
                found.setdefault(baseline.name, []).append(count_cost(call).flop / 1e9)
        return found
    finally:
        torch.hub.load = hub


def table(peers: Sequence[str]) -> str:
    """A row for each function, a column for each input; `peers`: NAME=CLONE."""
    lines = [f"| row | {' | '.join(f'{side} px' for side in FACTORS)} |", f"| --- |{' ---: |' * len(FACTORS)}"]
    for name, _, clone in (peer.partition("=") for peer in peers):
        for function, values in gflop(name, clone).items():
            lines.append(f"| {function} | {' | '.join(f'{value:.1f}' for value in values)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table(sys.argv[1:]))
