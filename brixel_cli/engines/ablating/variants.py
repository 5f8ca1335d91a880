"""The groups of variants that `brixel benchmark --ablate` knows, and a user's own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brixel_cli.config.base import did_you_mean
from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import load_variants
from brixel_cli.engines.distilling.plan import TrainingCounts
from brixel_cli.errors import UsageError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Variant:
    """A recipe but for some values.

    Attributes:
        name: unique within its group.
        changes: values by key path, as `--set` takes them.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def overrides(self) -> list[str]:
        """As `load_recipe` takes them."""
        return [f"{key}={json.dumps(value)}" for key, value in self.changes.items()]

    @property
    def described(self) -> str:
        """What it changes, for people."""
        return ", ".join(self.overrides) or "the recipe as it stands"


@dataclass(frozen=True)
class Planned:
    """A variant before its training: its whole recipe, but for the number of steps, and what that costs."""

    group: str
    variant: Variant
    recipe: Recipe
    counts: TrainingCounts


def _terms(edge: bool = False, spectral: float = 0.0, cosine: bool = False) -> dict[str, Any]:
    """The L1 term with some of the others; those that are there keep the recipe's weight."""
    absent = {"loss.edge.weight": edge, "loss.cosine.weight": cosine}
    return {key: 0.0 for key, there in absent.items() if not there} | {"loss.spectral.weight": spectral}


def _fusion(width: int, middle_width: int, fine_width: int, *blocks: int) -> dict[str, Any]:
    sizes = {"width": width, "middle_width": middle_width, "fine_width": fine_width, "blocks": list(blocks)}
    return {"adapter.kind": "fusion"} | {f"adapter.fusion.{key}": value for key, value in sizes.items()}


def _context(kernel_size: int, norm: str = "location", heads: int = 0) -> dict[str, Any]:
    options = {"kernel_sizes": [kernel_size, 3, 3], "norm": norm, "attention_heads": heads}
    return {"adapter.kind": "fusion"} | {f"adapter.fusion.{key}": value for key, value in options.items()}


def _linear(there: bool) -> dict[str, Any]:
    return {"adapter.kind": "fusion", "adapter.fusion.linear": there}


RELEASED_LOSS = {
    "loss.l1.weight": 1.0, "loss.l1.form": "raw",
    "loss.edge.weight": 1.0, "loss.edge.form": "raw", "loss.edge.basis": "batch",
    "loss.spectral.weight": 0.1, "loss.spectral.form": "released",
    "loss.cosine.weight": 0.0,
}  # fmt: skip

GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "losses": {
        "l1": _terms(),
        "l1+edge": _terms(edge=True),
        "l1+spectral": _terms(spectral=0.1),
        "l1+cosine": _terms(cosine=True),
        "l1+edge+spectral": _terms(edge=True, spectral=0.1),
        "all": _terms(edge=True, spectral=0.1, cosine=True),
        "released": RELEASED_LOSS,
        "recipe": {},
    },
    "spectral": {
        "off": {"loss.spectral.weight": 0.0},
        "centred-0.01": {"loss.spectral.weight": 0.01, "loss.spectral.form": "centred"},
        "centred-0.1": {"loss.spectral.weight": 0.1, "loss.spectral.form": "centred"},
        "released-0.01": {"loss.spectral.weight": 0.01, "loss.spectral.form": "released"},
        "released-0.1": {"loss.spectral.weight": 0.1, "loss.spectral.form": "released"},
    },
    "residual": {
        "direct": {"adapter.residual": "direct"},
        "half_grid": {"adapter.residual": "half_grid"},
    },
    "adapter": {
        "fusion-96-64-32": _fusion(96, 64, 32, 2, 1, 1),
        "fusion-192-128-64-shallow": _fusion(192, 128, 64, 1, 1, 1),
        "fusion-192-128-64": _fusion(192, 128, 64, 4, 2, 1),
        "fusion-192-192-128": _fusion(192, 192, 128, 4, 3, 3),
        "fusion-320-128-64": _fusion(320, 128, 64, 4, 2, 1),
        "deformable": {"adapter.kind": "deformable"},
        "recipe": {},
    },
    "context": {
        "location": _context(1),
        "neighbours": _context(3),
        "wide": _context(5),
        "map-norm": _context(1, "map"),
        "neighbours+map-norm": _context(3, "map"),
        "attention": _context(1, heads=8),
    },
    "linear": {
        "fitted": _linear(True),
        "learnt": _linear(True) | {"optim.linear_views": 0},
        "none": _linear(False),
    },
    "lora": {
        "none": {"adapter.lora_rank": 0},
        **{f"rank-{rank}": {"adapter.lora_rank": rank} for rank in (4, 16, 64)},
    },
    "views": {
        "crops": {"views.jitter": [0.0, 0.0, 0.0, 0.0], "views.grayscale": 0.0, "views.perspective": 0.0},
        "crops+colour": {"views.perspective": 0.0},
        "crops+perspective": {"views.jitter": [0.0, 0.0, 0.0, 0.0], "views.grayscale": 0.0},
        "recipe": {},
    },
    "schedule": {name: {"optim.schedule": name} for name in ("cosine", "two_step", "constant")},
    "rate": {f"rate-{rate}": {"optim.lr": rate} for rate in (5e-4, 1e-3, 2e-3, 4e-3)},
    "noise": {f"noise-{share}": {"optim.map_noise": share} for share in (0.0, 0.25, 0.5, 1.0)},
    "average": {f"average-{decay}": {"optim.average": decay} for decay in (0.0, 0.95, 0.99)},
    "edge": {f"edge-{weight}": {"loss.edge.weight": weight} for weight in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)},
    "cosine": {f"cosine-{weight}": {"loss.cosine.weight": weight} for weight in (0.0, 0.25, 0.5, 1.0, 2.0)},
    "seed": {f"seed-{seed}": {"seed": seed} for seed in (0, 1, 2)},
}
"""By group and name: what changes in the recipe. `seed` shows how far figures differ by chance."""


def find_groups(references: Sequence[str]) -> dict[str, list[Variant]]:
    """Groups of variants by name.

    Args:
        references: names of built-in groups, or paths of YAML files; a file's group is called by its stem.

    Raises:
        UsageError: one of them is neither, or is named twice, or a file holds no proper variants.
    """
    groups: dict[str, list[Variant]] = {}
    for reference in references:
        is_file = reference.endswith((".yaml", ".yml"))
        name = Path(reference).stem if is_file else reference
        if name in groups:
            raise UsageError(f"--ablate names {name} twice: give each group once, and your files names of their own.")
        if is_file:
            groups[name] = _own_variants(Path(reference))
        elif reference in GROUPS:
            groups[name] = [Variant(*item) for item in GROUPS[reference].items()]
        else:
            raise UsageError(
                f"--ablate knows no {reference}.{did_you_mean(reference, GROUPS)} It takes {', '.join(GROUPS)}, "
                "or a YAML file of your variants."
            )
    return groups


def _own_variants(path: Path) -> list[Variant]:
    variants = [Variant(name, changes) for name, changes in load_variants(path).items()]
    for variant in variants:
        if not NAME.fullmatch(variant.name):
            raise UsageError(
                f"{path}: a variant's name is made of letters, digits and . _ + -; this one is not: {variant.name!r}."
            )
    return variants
