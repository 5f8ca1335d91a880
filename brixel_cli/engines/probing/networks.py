"""Networks that are trained end to end as rows of a probe: built, trained, measured, stored, and loaded again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from brixel_cli.config.labelled import Split
from brixel_cli.core.backbone import Backbone
from brixel_cli.core.cost import count_flop, count_parameters
from brixel_cli.core.files import make_folder
from brixel_cli.core.identity import json_digest
from brixel_cli.core.networks import MEAN, STD, UNET_CHANNELS, Network, finetuned, unet
from brixel_cli.core.weights import load_tensors, save_tensors
from brixel_cli.data.views import seed_of
from brixel_cli.engines.probing.evaluation import Predict, evaluate, evaluating, meters
from brixel_cli.engines.probing.features import Targets, image_loader
from brixel_cli.engines.probing.folder import PLACES, ProbeFolder
from brixel_cli.engines.probing.network_results import Effort
from brixel_cli.engines.probing.plan import ProbePlan, SourcePlan, SplitPlan
from brixel_cli.engines.probing.results import Run, Settings, SourceDescription, Versions, as_dict
from brixel_cli.engines.probing.sources import NetworkSource
from brixel_cli.engines.probing.supervised import Pictures, network_predict, train_network
from brixel_cli.engines.probing.training import fresh_head, head_spec, labelled_images
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime, call_seconds, memory_errors

FORMAT = "brixel-network-1"
PASSES = 5
"""That are timed."""
_DECODER = 14
"""What a seed is used for: random weights of a U-Net."""


def build_network(plan: ProbePlan, source: NetworkSource, seed: int) -> Network:
    """A network as its training begins, a function of the seed; errors as those of the weights."""
    options = plan.options
    if source.spec is None:
        head = fresh_head(head_spec(options, UNET_CHANNELS), seed)
        return unet(source.encoder, head, source.config.weights, seed_of(seed, _DECODER))
    backbone = source.spec.load()
    assert isinstance(backbone, Backbone)
    return finetuned(backbone, fresh_head(head_spec(options, source.spec.embed_dim), seed), source.config.layer_decay)


def load_network(plan: ProbePlan, source: NetworkSource, seed: int, folder: ProbeFolder) -> Network:
    """The trained network of a seed, in eval mode.

    Raises:
        WeightsError: its file is missing or damaged.
    """
    network = build_network(plan, source, seed)
    network.load_state_dict(load_tensors(folder.network(source.label, seed))[0])
    return network.eval().requires_grad_(False)


def predictor(item: SourcePlan, source: NetworkSource, network: Network, runtime: Runtime) -> Predict:
    """Predictions of a network on the evaluated images."""
    pictures = _pictures(source, item.evaluate)
    return network_predict(network.to(runtime.device), pictures, runtime.device, _dtype(runtime))


def run_network(
    plan: ProbePlan,
    item: SourcePlan,
    source: NetworkSource,
    seed: int,
    targets: Mapping[Split, Targets],
    folder: ProbeFolder,
    described: tuple[Settings, SourceDescription, Versions],
    runtime: Runtime,
    reporter: Reporter,
) -> Run:
    """Train, evaluate and store a network; an interrupted training goes on.

    Raises:
        BrixelError: something the user can fix; the training up to its last validation stays.
    """
    options, label, config = plan.options, source.label, source.config
    settings, description, versions = described
    path = folder.network(label, seed)
    state = path.with_suffix(".training")
    make_folder(path.parent)
    plain = {key: value for key, value in as_dict(description).items() if key not in PLACES}
    key = json_digest([as_dict(settings), plain, seed])
    make = partial(meters, options.recipe.task, options.recipe.num_classes, options.training.align)
    network = build_network(plan, source, seed)
    images = labelled_images(len(item.train.labelled), options.label_fraction, seed)
    smaller = f"--set supervised.batch_size={max(config.batch_size // 2, 1)}, a smaller --res, or another --device"
    with (
        memory_errors(f"training {label} with {config.batch_size} images a step", f"Take {smaller}."),
        reporter.bar(f"{label}, seed {seed}", config.steps, unit="step") as bar,
    ):
        trained = train_network(
            network, _pictures(source, item.train), targets["train"], images, make, options.training, config, seed,
            runtime.device, _dtype(runtime), (state, key), bar,
        )  # fmt: skip
    began = time.perf_counter()
    predict = predictor(item, source, trained.network, runtime)
    with evaluating(label, f"{label}, seed {seed}, evaluation", item.evaluate, reporter) as bar:
        evaluated = evaluate(predict, make(), targets["evaluate"], item.evaluate, bar)
    gflop, seconds = _cost(trained.network, _pictures(source, item.evaluate), runtime)
    parameters = count_parameters(trained.network)
    folder.write_run(label, seed, trained.curve, item.evaluate.labelled.names, evaluated.images)
    save_tensors(path, trained.network.state_dict(), {"format": FORMAT, "key": key})
    state.unlink(missing_ok=True)
    steps = int(trained.curve[-1]["step"])
    return Run(
        source=label,
        seed=seed,
        figures=evaluated.figures,
        final_loss=trained.curve[-1]["loss"],
        train_seconds=round(trained.seconds, 3),
        evaluate_seconds=round(time.perf_counter() - began, 3),
        steps_per_second=round(steps / trained.seconds, 2),
        versions=versions,
        effort=Effort(len(images), parameters, steps, trained.best_step, gflop, seconds),
    )


def _pictures(source: NetworkSource, split: SplitPlan) -> Pictures:
    mean, std = (source.spec.mean, source.spec.std) if source.spec else (MEAN, STD)
    views = image_loader(split.labelled, split.crops, lambda size: [source.input_size(size)])
    return Pictures(
        split, lambda position: views(position)[0], [source.input_size(crop.size) for crop in split.crops], mean, std
    )


def _dtype(runtime: Runtime) -> torch.dtype:
    """float16 would need its gradients scaled."""
    return torch.float32 if runtime.dtype == torch.float16 else runtime.dtype


@torch.inference_mode()
def _cost(network: Network, pictures: Pictures, runtime: Runtime) -> tuple[float, float]:
    """GFLOP, and the median seconds of a few passes, of the first evaluated crop."""
    images = pictures.batch([pictures.load(0)], runtime.device)

    def call() -> dict[str, Tensor]:
        with torch.autocast(runtime.device.type, dtype=_dtype(runtime), enabled=_dtype(runtime) != torch.float32):
            outputs: dict[str, Tensor] = network(images)
            return outputs

    flop = count_flop(call)
    return flop / 1e9, statistics.median(call_seconds(call, runtime.device) for _ in range(PASSES))
