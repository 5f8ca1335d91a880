"""Whether a model's batches fit into memory, counted before the first of them is computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from brixel_cli.core.cost import count_cost, fake_tensors, hollow
from brixel_cli.core.formatting import human_bytes
from brixel_cli.core.memory import check_memory
from brixel_cli.engines.models import CPU_BATCH_PIXELS, FeatureExtractor
from brixel_cli.engines.runtime import free_memory

MAPS_ON_THE_WAY = 2
"""Batches of maps that are converted and written while the next is computed."""


def check_batch(model: FeatureExtractor, sizes: Mapping[tuple[int, int], int], batch_size: int | None) -> None:
    """Count what the largest batch takes of memory, and say so where it is much.

    On a GPU a single image is counted: batches are halved until they fit, which a CPU's system does not allow.

    Args:
        model: that computes them; that of a baseline is not counted.
        sizes: number of images of each size of the model's input, (height, width) in pixels.
        batch_size: as asked for; None: by memory.

    Raises:
        BrixelError: it does not fit.
    """
    if not sizes or model.baseline is not None:  # a baseline runs on tensors that hold numbers alone
        return
    counts = dict.fromkeys(sizes, 1)
    if model.runtime.device.type == "cpu":
        counts = {size: min(most, sizes[size]) for size, most in model.batch_sizes(counts, batch_size).items()}
    (height, width), count = max(counts.items(), key=lambda item: item[0][0] * item[0][1] * item[1])
    if height * width * count <= CPU_BATCH_PIXELS:
        return
    hollowed = model.spec.load("meta")
    with fake_tensors(), torch.inference_mode(), model.runtime.autocast("cpu"):
        hollow(hollowed)
        images = torch.empty(count, 3, height, width)
        cost = count_cost(lambda: hollowed(images).float())
    rows, columns = model.spec.grid((height, width))
    of_images, of_maps = 12 * count * height * width, 4 * count * model.spec.embed_dim * rows * columns
    needed, free = cost.peak_bytes + of_images + MAPS_ON_THE_WAY * of_maps, free_memory(model.runtime.device)
    what = f"A batch of {count} image{'s' * (count > 1)} of {height}x{width} pixels"
    model.reporter.say(
        f"{what}: {cost.flop / 1e12:,.1f} TFLOP, about {human_bytes(needed)} of memory, {human_bytes(free)} free"
    )
    smaller = "Lower --batch-size or --res" if batch_size and count > 1 else "Lower --res"
    check_memory(needed, free, what, f"{smaller}, or take a machine with more.")
