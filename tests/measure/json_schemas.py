"""JSON schemas of what `--json` prints, made from the typed results of the engines.

    python tests/measure/json_schemas.py    # writes docs/schemas/*.json

A number may be null: nan and infinity are written so. A result may have more keys in a later version.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from brixel_cli.engines.ablating.results import Ablations
from brixel_cli.engines.benchmarking.curve import Curve
from brixel_cli.engines.benchmarking.results import Results as Benchmark
from brixel_cli.engines.distilling.distillation import Results as Distilled
from brixel_cli.engines.distilling.plan import Plan
from brixel_cli.engines.extracting.joining import Joined
from brixel_cli.engines.extracting.verification import Verified
from brixel_cli.engines.probing.results import ProbeResults

FOLDER = Path(__file__).resolve().parent.parent.parent / "docs" / "schemas"


@dataclass
class Extraction:
    """What `brixel extract` did."""

    output: str
    images: int
    computed: int
    before: int
    failed: int
    failures: dict[str, str]
    seconds: float
    pictures: list[str]


@dataclass
class Shard:
    """Which part of an extraction is meant: its number, of how many, and what all parts together are of."""

    number: int
    count: int
    num_inputs: int
    sha256: str


@dataclass
class ExtractionPlan:
    """What `brixel extract` would compute and store. What has a default is there only where it is known."""

    output: str
    images: int
    unusable: int
    grids: dict[str, int]
    channels: int
    fields: list[str]
    layers: list[int]
    dtype: str
    source: str
    backbone: str
    patch_size: int
    snapped: int
    most_snapped_px: float
    bytes_needed: int
    bytes_free: int
    shard: Shard | None = None
    images_left: int = 0
    seconds: float | None = None
    how_timed: str = ""


@dataclass
class Export:
    """An ONNX graph: its free sides, the largest differences from PyTorch by input, and the largest of them all."""

    path: str
    dynamic: str
    checked: dict[str, float]
    error: float


@dataclass
class ProbePlan:
    """What `brixel probe` would train and store."""

    recipe: str
    protocol: str
    sources: list[str]
    train_images: int
    evaluate_images: int
    seeds: int
    steps: int
    bytes_needed: int
    bytes_free: int
    notes: list[str]


@dataclass
class Application:
    """What `brixel probe --apply` predicted."""

    output: str
    images: int
    written: int
    failed: int
    failures: dict[str, str]
    seconds: float


@dataclass
class Variant:
    """A variant of a training."""

    group: str
    name: str
    changes: dict[str, Any]
    parameters: int
    training_bytes: int


@dataclass
class AblationPlan:
    """The variants that `brixel benchmark --ablate` would train."""

    variants: list[Variant]


@dataclass
class Verification:
    """What `--verify` of `brixel distill` and `brixel probe` found."""

    path: str
    files: int
    damaged: dict[str, str]


@dataclass
class Recipes:
    """The recipes that come with brixel: what each is for, by its name."""

    recipes: dict[str, str]


@dataclass
class Copied:
    """What `--copy-recipe` did."""


@dataclass
class Demo:
    """What `brixel demo` wrote."""

    weights: str
    training: str
    held_out: str


TYPES: dict[str, tuple[Any, bool]] = {
    "distill": (Distilled, True),
    "distill-dry-run": (Plan, False),
    "distill-verify": (Verification, False),
    "extract": (Extraction, False),
    "extract-dry-run": (ExtractionPlan, False),
    "extract-verify": (Verified, False),
    "extract-join": (Joined, False),
    "extract-export": (Export, False),
    "probe": (ProbeResults, True),
    "probe-dry-run": (ProbePlan, False),
    "probe-apply": (Application, False),
    "benchmark": (Benchmark, True),
    "benchmark-curve": (Curve, True),
    "benchmark-ablate": (Ablations, True),
    "benchmark-ablate-dry-run": (AblationPlan, False),
    "list-recipes": (Recipes, False),
    "copy-recipe": (Copied, True),
    "demo": (Demo, True),
}
"""The type of each result by the name of its schema, and whether `files`, the files that were written, stands beside it."""


def schemas() -> dict[str, str]:
    """Each schema as text, by its file name."""
    return {f"{name}.json": json.dumps(schema(name), indent=1, ensure_ascii=False) + "\n" for name in TYPES}


def schema(name: str) -> dict[str, Any]:
    """The schema of what a command prints."""
    kind, with_files = TYPES[name]
    made = TypeAdapter(kind).json_schema(mode="serialization")
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"brixel/{name}", **_loosened(made)}
    if with_files:
        made["properties"]["files"] = {
            "type": "array",
            "items": {"type": "string"},
            "description": "Files that were written.",
        }
        made["required"] = [*made.get("required", []), "files"]
    return made


def _loosened(value: Any) -> Any:
    """A schema in which numbers may be null, more keys may come, and no default is stated."""
    if isinstance(value, list):
        return [_loosened(item) for item in value]
    if not isinstance(value, dict):
        return value
    loose = {
        key: _loosened(item) for key, item in value.items() if key not in ("default", "title") or isinstance(item, dict)
    }
    if loose.get("type") == "number":
        loose["type"] = ["number", "null"]
    if loose.get("additionalProperties") is False:
        del loose["additionalProperties"]
    if loose.get("format") in ("path", "binary"):
        del loose["format"]
    return loose


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in schemas().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
