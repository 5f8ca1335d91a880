"""Measure how much faster a probe trains from stored features than with the models in the loop.

python tests/measure/probe_speed.py --recipe camvid --data DIR --checkpoint RUN [--backbone-weights FILE] [--size 112]

For each source: steps per second of the training as it is, from stored features, and of the same steps where images
are read, cut and run through the model each time. Seconds are of processor time, so that other jobs on the machine do not
count: run it on a CPU with one thread, OMP_NUM_THREADS=1. Prints one line of JSON. Features go to --output and stay there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from brixel_cli.cli.console import Progress
from brixel_cli.cli.probe import probe_options
from brixel_cli.core.heads import build_head
from brixel_cli.data.crops import cut_image
from brixel_cli.data.images import load_image
from brixel_cli.engines.probing.features import Maps, Targets, num_workers, open_maps, prepare
from brixel_cli.engines.probing.plan import ProbePlan, SourcePlan
from brixel_cli.engines.probing.probing import plan_probe
from brixel_cli.engines.probing.training import batch_loss, batches, head_spec
from brixel_cli.engines.runtime import Runtime, keep_freed_memory
from brixel_cli.engines.streams import read_ahead


class GivenMaps:
    """Maps that were computed for this step."""

    def __init__(self, maps: Maps):
        self.grids, self.channels = maps.grids, maps.channels
        self.given = torch.empty(0)

    def read(self, positions) -> torch.Tensor:
        return self.given


def seconds_per_step(plan: ProbePlan, item: SourcePlan, runtime: Runtime, model, steps: int) -> float:
    """Of a training whose maps come from `model`, or from the store where that is None."""
    stored, targets = open_maps(item, item.train), Targets(item.train, plan.options.recipe.task)
    protocol = plan.options.protocol
    head = build_head(head_spec(plan.options, stored.channels), 0).to(runtime.device).train()
    optimiser = torch.optim.AdamW(head.parameters(), lr=protocol.lr)
    generator = torch.Generator().manual_seed(0)
    given = GivenMaps(stored)
    sums: dict[int, torch.Tensor] = {}

    def load(position: int) -> np.ndarray:
        crop = item.train.crops[position]
        image = load_image(item.train.labelled.root / item.train.labelled.names[crop.row])
        return np.asarray(cut_image(image, crop, item.source.spec.input_size(crop.size)))

    every = batches(item.train.positions, stored.grids, protocol.batch_size, steps + 2, seed=0)
    source = ((batch, None) for batch in every) if model is None else read_ahead(every, load, num_workers(), True)
    began = 0.0
    for number, (batch, pixels) in enumerate(itertools.islice(source, steps + 2)):
        if number == 2:  # the first two warm up
            began = time.process_time()
        if pixels is not None:
            given.given = model.maps(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()).clone()
        loss = batch_loss(
            head, protocol, stored if pixels is None else given, targets, batch, generator, number, runtime.device, sums
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return (time.process_time() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="camvid")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--backbone-weights")
    parser.add_argument("--size")
    parser.add_argument("--protocol")
    parser.add_argument("--output", type=Path, default=Path("runs/probe_speed"))
    parser.add_argument("--steps", type=int, default=100, help="from stored features; a tenth of them in the loop")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--source", action="append", default=[])
    given = parser.parse_args()
    options = probe_options(
        given.recipe, data=given.data, protocol=given.protocol, size=given.size, overrides=given.overrides,
        output=given.output, features=None, sources=given.source, checkpoints=[given.checkpoint], backbone=None,
        backbone_weights=given.backbone_weights, seeds=1, device="auto", precision="auto", overwrite=False,
    )  # fmt: skip
    runtime = Runtime(options.device, options.precision)
    keep_freed_memory(runtime.device)  # as a probe does
    plan = plan_probe(options, runtime, Progress())
    prepare(plan, runtime, Progress())
    result = {}
    for item in plan.sources:
        stored = seconds_per_step(plan, item, runtime, None, given.steps)
        model = item.source.load(runtime, Progress())
        loop = seconds_per_step(plan, item, runtime, model, max(given.steps // 10, 3))
        result[item.source.label] = {
            "stored_steps_per_second": round(1 / stored, 2),
            "in_loop_steps_per_second": round(1 / loop, 3),
            "times_faster": round(loop / stored, 1),
        }
    said = {
        "bar": "probe_speed",
        "protocol": options.protocol_name,
        "size": options.size,
        "batch_size": options.protocol.batch_size,
        "threads": torch.get_num_threads(),
        "sources": result,
    }
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
