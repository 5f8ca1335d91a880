"""Every option of a benchmark, typed, with its unit."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from brixel_cli.config.base import Device, Precision, check_counts, check_device, parse_bytes, parse_sizes
from brixel_cli.errors import UsageError

ABLATION_STEPS = 300
PROBE_SEEDS = 3
"""Heads that an ablation trains on each variant."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """The options of `brixel benchmark`, checked at construction; `app.benchmark` says what each means to the user.

    Raises:
        UsageError: a value is out of range, or two do not go together.
    """

    highres: bool = False
    curve: bool = False
    models: str | None = None
    sizes: str | None = field(default=None, metadata={"option": "res"})
    checkpoint: str | None = None
    backbone_weights: str | None = None
    images: Path | None = None
    max_images: int = 64
    batch_size: int = 1
    precision: Precision = "float32"
    device: Device = "auto"
    compiled: bool = field(default=False, metadata={"option": "compile"})
    seconds: float = 20.0
    budget: str | None = None
    baselines: tuple[str, ...] = field(default=(), metadata={"option": "baseline"})
    output: Path = Path("runs/benchmark")
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_device(self.device)
        check_counts({"--max-images": self.max_images, "--batch-size": self.batch_size})
        if not self.seconds > 0:
            raise UsageError(f"--seconds must be above 0, not {self.seconds:g}.")
        if self.models and self.checkpoint:
            raise UsageError("--models names recipes and run folders, --checkpoint one student: give one of them.")
        if self.sizes:
            parse_sizes(self.sizes, 1)
        if self.budget:
            parse_bytes(self.budget)
        beside = {
            "--compare-highres": self.highres, "--budget": self.budget, "--baseline": self.baselines,
            "--compile": self.compiled,
        }  # fmt: skip
        if self.curve and (given := [name for name, value in beside.items() if value]):
            raise UsageError(f"--curve does without {', '.join(given)}.")

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes; None where none was given."""
        return parse_bytes(self.budget) if self.budget else None

    @property
    def command(self) -> str:
        """The command line that says the same."""
        parts = ["brixel", "benchmark"]
        for option in fields(self):
            value = getattr(self, option.name)
            if value == option.default:
                continue
            name = (
                "--compare-highres" if option.name == "highres" else "--" + option.metadata.get("option", option.name)
            )
            name = name.replace("_", "-")
            if value is True:
                parts.append(name)
            else:
                for item in value if isinstance(value, tuple) else (value,):
                    parts += [name, f"{item:g}" if isinstance(item, float) else str(item)]
        return shlex.join(parts)


@dataclass(frozen=True)
class AblationOptions:
    """The options of `brixel benchmark --ablate`, checked at construction; `app.benchmark` says what each means.

    Raises:
        UsageError: a value is out of range, or two do not go together.
    """

    groups: str
    recipe: str = "dinov2_vits"
    overrides: tuple[str, ...] = ()
    steps: int | None = None
    train_seconds: float | None = None
    output: Path = Path("runs/benchmark")
    probe: str | None = None
    probe_data: Path | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise UsageError("--ablate names no group of variants.")
        if self.steps is not None and self.train_seconds is not None:
            raise UsageError("--steps and --train-seconds: give one of them.")
        check_counts({"--steps": self.steps})
        if self.train_seconds is not None and not self.train_seconds > 0:
            raise UsageError(f"--train-seconds must be above 0, not {self.train_seconds:g}.")

        if self.probe_data is not None and self.probe is None:
            raise UsageError("--probe-data is the labelled set of a probe: name its recipe with --probe.")

    @property
    def names(self) -> list[str]:
        """The groups, one by one."""
        return [name.strip() for name in self.groups.split(",") if name.strip()]

    @property
    def equal(self) -> Literal["steps", "time"]:
        """What all variants have in common."""
        return "steps" if self.train_seconds is None else "time"

    @property
    def budget(self) -> float:
        """Updates of each variant, or seconds of updates."""
        return self.train_seconds or self.steps or ABLATION_STEPS

    @property
    def command(self) -> str:
        """The command line that says the same."""
        parts = ["brixel", "benchmark", "--ablate", self.groups, "--recipe", self.recipe]
        for override in self.overrides:
            parts += ["--set", override]
        parts += ["--steps" if self.equal == "steps" else "--train-seconds", f"{self.budget:g}"]
        parts += ["--probe", self.probe] if self.probe else []
        parts += ["--probe-data", str(self.probe_data)] if self.probe_data else []
        return shlex.join([*parts, "--output", str(self.output)])
