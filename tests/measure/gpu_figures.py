"""Measure on a GPU how fast models train, extract and run, and print a Markdown table with card and command.

python tests/measure/gpu_figures.py [--models vits,vitb,vitl,vithplus] [--device cuda] [--precision auto] [--seconds 10]

Weights are random, and no images are read: the figures are of the GPU alone. For each recipe:
- distil: images a second of an update, teacher and backbone included, at the recipe's sizes and batch (the same
  measurement as `brixel distill --dry-run`);
- extract: images a second of the student at its training size, in batches as large as memory takes;
- student, teacher: milliseconds of a call on one image, by `brixel benchmark --compare-highres`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

import torch

from brixel_cli.cli.console import Progress
from brixel_cli.config.benchmark import BenchmarkOptions
from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import find_recipe, load_recipe
from brixel_cli.engines.benchmarking.benchmarking import benchmark
from brixel_cli.engines.benchmarking.environment import describe_environment
from brixel_cli.engines.benchmarking.results import Row
from brixel_cli.engines.distilling.plan import plan
from brixel_cli.engines.models import FeatureExtractor, model_spec
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime, call_seconds

CALLS = 5


def distil_speed(name: str, device: str, precision: str, reporter: Reporter) -> float | None:
    """Images a second of an update; None where it does not fit into memory."""
    changes = [f"run.device={device}", "backbone.weights=random", "init=null", "cache.enabled=false"]
    if precision != "float16":  # which is for inference alone
        changes.append(f"run.precision={precision}")
    recipe = load_recipe(str(find_recipe(name)), changes)
    seconds = plan(recipe, reporter).step_seconds
    return recipe.optim.batch_size / seconds if seconds else None


def extract_speed(recipe: Recipe, runtime: Runtime, reporter: Reporter) -> float:
    """Images a second of the student, from uint8 pixels on the CPU to maps on the device."""
    spec = model_spec(
        "student", backbone=recipe.backbone.name, weights="random", adapter=recipe.adapter, factor=recipe.views.factor
    )
    extractor = FeatureExtractor(spec, runtime, reporter)
    size = recipe.student_hw
    batch = extractor.batch_sizes({size: 1}, None)[size]
    pixels = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
    extractor.maps(pixels)
    return batch / min(call_seconds(lambda: extractor.maps(pixels), runtime.device) for _ in range(CALLS))


def milliseconds(rows: list[Row], label: str) -> float | None:
    """Median time of a row's call on one image; None where it was not run."""
    latency = next(row.latency for row in rows if row.label == label)
    return latency.median * 1000 if latency else None


def figures(models: str, device: str, precision: str, seconds: float, reporter: Reporter) -> list[list[str]]:
    """A line of the table for each recipe."""
    runtime = Runtime(device, precision)
    with tempfile.TemporaryDirectory() as folder:
        results, _ = benchmark(
            BenchmarkOptions(highres=True, models=models, device=device, precision=precision, seconds=seconds,
                             output=Path(folder)), reporter,
        )  # fmt: skip
    lines = []
    for name in models.split(","):
        recipe = load_recipe(str(find_recipe(name)))
        rows = [row for row in results.rows if row.model == recipe.name]
        student, teacher = milliseconds(rows, "student"), milliseconds(rows, "teacher")
        values = [
            distil_speed(name, device, precision, reporter),
            extract_speed(recipe, runtime, reporter),
            student,
            teacher,
            teacher / student if teacher and student else None,
        ]
        height, width = recipe.student_hw
        lines.append(
            [recipe.name, f"{height}x{width}", *("-" if value is None else f"{value:.3g}" for value in values)]
        )
    return lines


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vits,vitb,vitl,vithplus", help="recipes, by commas")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each model")
    options = parser.parse_args()
    lines = figures(options.models, options.device, options.precision, options.seconds, Progress())
    environment = describe_environment(Runtime(options.device, options.precision))
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    command = shlex.join(["python", "tests/measure/gpu_figures.py", *sys.argv[1:]])
    print(f"{environment.processor}, {environment.precision}, {versions}: `{command}`\n")  # noqa: T201
    header = [
        "recipe",
        "student's input",
        "distil, images/s",
        "extract, images/s",
        "student, ms",
        "teacher, ms",
        "times",
    ]
    for line in [header, ["---"] * len(header), *lines]:
        print("| " + " | ".join(line) + " |")  # noqa: T201


if __name__ == "__main__":
    main()
