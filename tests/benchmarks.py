"""Helpers of the tests that run a whole benchmark of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from brixel_cli.config.benchmark import BenchmarkOptions
from brixel_cli.engines.benchmarking.results import Results, Row

BASELINE = """
import torch.nn.functional as F

def nearest(images, feature_map, output_size):
    return F.interpolate(feature_map, output_size, mode="nearest")
"""


def options(output: Path, **changes: Any) -> BenchmarkOptions:
    return BenchmarkOptions(**{"highres": True, "device": "cpu", "seconds": 0.3, "output": output, **changes})


def row(results: Results, label: str, side: int = 32) -> Row:
    return next(row for row in results.rows if row.label == label and row.size == (side, side))
