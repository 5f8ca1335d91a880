"""What is fitted in closed form before the first step: the edge term's PCA, and the adapter's linear part."""

from __future__ import annotations

import numpy as np
import torch

from brixel_cli.core.linear_fit import LinearFit
from brixel_cli.core.losses import Basis, fit_basis
from brixel_cli.data.grouping import batches_of_one_size
from brixel_cli.data.views import Views, seed_of
from brixel_cli.engines.distilling.batches import Batches, check_finite
from brixel_cli.engines.distilling.trainer import Trainer
from brixel_cli.engines.reporting import Reporter
from brixel_cli.errors import BrixelError

BASIS_VIEWS = 16
LEFT_OUT = 5
"""Every fifth image serves to choose the ridge; of fewer, one."""
LINEAR = 2
"""Tells the seed of the linear fit's views from others."""


def fit_edge_basis(trainer: Trainer, training: Batches, views: Views) -> None:
    """Fit the edge term's PCA on the first views' targets, the same on every process, unless it is fitted per batch."""
    edge = trainer.recipe.loss.edge
    if edge.weight and edge.basis == "fixed" and trainer.loss.basis is None:
        numbers = [number for number in range(len(views)) if views.size_number(0, number) == 0]
        spread = numbers[:: max(len(numbers) // BASIS_VIEWS, 1)][:BASIS_VIEWS]
        batches = list(training.iterate([[(0, number)] for number in spread]))
        for batch in batches:
            check_finite(batch)
        basis = fit_basis(torch.cat([batch.targets for batch in batches]), edge.components, trainer.recipe.seed)
        from_first = trainer.runtime.from_first
        trainer.loss.basis = Basis(from_first(basis.components), from_first(basis.mean))


def fit_linear_part(trainer: Trainer, training: Batches, views: Views, reporter: Reporter) -> None:
    """Fit the adapter's linear part on views drawn from the training set, some of their images left out."""
    optim, runtime, linear = trainer.recipe.optim, trainer.runtime, trainer.adapter.linear
    assert linear is not None
    numbers = _linear_fit_views(views, optim.linear_views)
    images = sorted({number // views.config.per_image for number in numbers})
    left_out = set(images[1 :: min(LEFT_OUT, max(len(images), 2))])
    at_once = optim.images_per_pass(runtime.world_size)
    chunks = batches_of_one_size(numbers, lambda number: views.size_number(0, number), at_once)
    mine = chunks[runtime.rank :: runtime.world_size]
    fit = LinearFit(linear.out_channels, runtime.device)
    with reporter.bar("linear fit", len(numbers), 0, "view") as bar:
        batches = training.iterate([[(0, number) for number in chunk] for chunk in mine])
        for chunk, batch in zip(mine, batches, strict=True):
            # What stands in for a damaged image has its own turn.
            good = [place for place, replaced in enumerate(batch.replaced) if not replaced]
            maps = [map_[good] for map_ in batch.maps]
            residual = trainer.adapter.residual(maps[-1], (maps[-1].shape[-2], maps[-1].shape[-1]))
            held = torch.tensor([chunk[place] // views.config.per_image in left_out for place in good])
            fit.add(maps, residual, batch.targets[good], held)
            bar.update(len(chunk) * runtime.world_size)
    fit.sums = (runtime.mean(fit.sums[0]), runtime.mean(fit.sums[1]))
    try:
        weight, bias, strength = fit.solve()
    except BrixelError as error:
        reporter.warn(f"the linear part starts at zero: {error}")
        return
    weight, bias = (runtime.from_first(tensor.to(runtime.device)) for tensor in (weight, bias))
    for adapter in (trainer.adapter, trainer.deployed):
        adapter.set_linear(weight, bias)
    reporter.say(f"linear part fitted on {len(numbers)} views, ridge {strength:g} of the mean variance")


def _linear_fit_views(views: Views, most: int) -> list[int]:
    """Which views the linear part is fitted on: all, or `most` of them at random, the same for the same seed."""
    drawn = np.random.default_rng(seed_of(views.seed, LINEAR)).permutation(len(views))[:most]
    return sorted(int(number) for number in drawn)
