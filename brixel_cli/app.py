"""The command line: what each command is called, what it takes, and the one error boundary."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from brixel_cli import __version__
from brixel_cli.cli import examples
from brixel_cli.cli.console import error_boundary, print_version, set_quiet
from brixel_cli.config.base import Device, Precision
from brixel_cli.config.benchmark import ABLATION_STEPS, AblationOptions, BenchmarkOptions
from brixel_cli.config.extract import ExtractOptions, Fit, Number, Source, Storage
from brixel_cli.errors import UsageError

app = typer.Typer(
    name="brixel",
    help="Sharp dense features from one cheap pass of a vision transformer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

# Options that several commands take.
Json = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No hints and no progress bars.")]
Where = Annotated[Device, typer.Option(help="auto, cpu, cuda, cuda:1 (the second card) or mps.")]
Backbone = Annotated[str | None, typer.Option(help="timm name; default: the one of the student.", show_default=False)]
OldRes = Annotated[str | None, typer.Option(hidden=True)]  # what --res was called
Weights = Annotated[
    str | None,
    typer.Option(help="pretrained, or a .safetensors or .pth file; default: as in training.", show_default=False),
]


def _version(asked: bool) -> None:
    if asked:
        print_version(__version__)
        raise typer.Exit


@app.callback()
def brixel(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Sharp dense features from one cheap pass of a vision transformer."""


@app.command(epilog=examples.DISTILL)
def distill(
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A recipe file, or the name of a shipped one, such as vitl. Default: dinov2_vits.", show_default=False
        ),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Folder of photographs; short for --set data.images=DIR.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the run. Default: runs/NAME, by the recipe's name.", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe's value; can be repeated.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="Student to start from: run folder, .safetensors, released .pth, hub id or shipped name.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or mps; short for --set run.device=NAME.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew over a run that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the run would cost; write nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter on a folder of photographs, without labels."""
    with error_boundary():
        from brixel_cli.cli.distill import run_distill

        set_quiet(quiet)
        shorthands = {"data.images": images, "init": init, "run.device": device}
        overrides = [f"{key}={json.dumps(value)}" for key, value in shorthands.items() if value is not None]
        run_distill(recipe, output, overrides + (set_ or []), resume, overwrite, dry_run, as_json)


@app.command(epilog=examples.EXTRACT)
def extract(
    input_: Annotated[
        list[str] | None,
        typer.Option(
            "--input", help="Folder, image, video, quoted glob or .txt list; can be repeated.", show_default=False
        ),
    ] = None,
    res: Annotated[int, typer.Option(help="Input side in pixels that the student or backbone sees.")] = 448,
    fit: Annotated[
        Fit, typer.Option(help="short: shorter side, aspect kept. centre: middle square. stretch: squeezed square.")
    ] = "short",
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Student: run folder, .safetensors, released .pth, hub id, or a shipped one's name. Default: newest "
            "run, or the shipped student.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        Source, typer.Option(help="Whose maps: student, backbone, or teacher (backbone at the larger size).")
    ] = "student",
    backbone: Backbone = None,
    backbone_weights: Weights = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The .h5 file, or folder of single files. Default: beside the input.", show_default=False),
    ] = None,
    format_: Annotated[
        Storage, typer.Option("--format", help="h5: one file. npy, safetensors: a folder with a file for each image.")
    ] = "h5",
    dtype: Annotated[
        Number, typer.Option(help="How features are stored; int8 has a scale for each location.")
    ] = "float16",
    pca: Annotated[
        int | None,
        typer.Option(help="Store so many principal components of the set instead of all channels.", show_default=False),
    ] = None,
    device: Where = "auto",
    precision: Annotated[Precision, typer.Option(help="Arithmetic of the model.")] = "auto",
    batch_size: Annotated[str, typer.Option(help="Images at once: auto (by memory) or a number.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Threads that read and decode images. Default: by the cores.", show_default=False)
    ] = None,
    every: Annotated[int, typer.Option(help="Of a video, take every so many frames.")] = 1,
    preview: Annotated[bool, typer.Option("--preview", help="Also paint the features, beside the output.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that fails.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew over a feature file.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write the model as an ONNX graph instead of features.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Make all checks, compute one batch, estimate the time; write nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the dense features of images or video frames to disk.

    The same command again continues an interrupted run. Exit code 1: some images failed; they are listed.
    """
    with error_boundary():
        from brixel_cli.cli.extract import run_extract

        set_quiet(quiet)
        options = ExtractOptions(
            inputs=input_ or [],
            res=res,
            fit=fit,
            source=source,
            checkpoint=checkpoint,
            backbone=backbone,
            backbone_weights=backbone_weights,
            output=output,
            storage=format_,
            dtype=dtype,
            pca=pca,
            device=device,
            precision=precision,
            batch_size=_batch_size(batch_size),
            workers=workers,
            every=every,
            strict=strict,
            overwrite=overwrite,
            preview=preview,
        )
        run_extract(options, export, dry_run, as_json)


@app.command(epilog=examples.PROBE)
def probe(
    recipe: Annotated[
        str | None,
        typer.Option(help="A recipe of a labelled set, or the name of a shipped one: camvid ...", show_default=False),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the labelled set; short for --set data.root=DIR.", show_default=False)
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="Student: run folder, .safetensors, released .pth, hub id or a shipped one's name; can be repeated. "
            "Default: newest run, or the shipped student.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="backbone, student, teacher, or a feature file (.h5); can be repeated. Default: the first three.",
            show_default=False,
        ),
    ] = None,
    backbone: Backbone = None,
    backbone_weights: Weights = None,
    res: Annotated[
        str | None,
        typer.Option(
            help="Input size of the student in pixels: 112, or 288x384. Default: the recipe's.", show_default=False
        ),
    ] = None,
    size: OldRes = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="quick, jafar, brixel, dinov3-ade, dinov3-nyu, brixel-nyu, normals. Default: the recipe's.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Short for --protocol quick: an answer in minutes.")] = False,
    seeds: Annotated[int, typer.Option(help="Trainings of each source, with seeds 0, 1, ...")] = 3,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a value of the recipe, or protocol.KEY; can be repeated."
        ),
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also print the IoU of each class.")] = False,
    apply: Annotated[
        Path | None,
        typer.Option(help="A saved head: predict new images with it instead of probing.", show_default=False),
    ] = None,
    input_: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="With --apply: folder, image, quoted glob or .txt list; can be repeated.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the results. Default: runs/probe/NAME, by the recipe's name.", show_default=False),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="Folder of stored features, which probes can share. Default: runs/probe/features; with --output, "
            "features in it.",
            show_default=False,
        ),
    ] = None,
    device: Where = "auto",
    precision: Annotated[Precision, typer.Option(help="Arithmetic of the models; heads are float32.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew over a probe that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take; write nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say how good dense features are: train small heads on them, frozen, and measure.

    The same command again continues an interrupted probe, source by source and seed by seed.
    """
    with error_boundary():
        from brixel_cli.cli.probe import apply_options, probe_options, run_apply, run_probe

        set_quiet(quiet)
        if apply is not None:
            others = {"--recipe": recipe, "--data": data, "--source": source, "--res": res or size,
                      "--protocol": protocol, "--quick": quick, "--set": set_, "--backbone": backbone,
                      "--dry-run": dry_run}  # fmt: skip
            if given := [name for name, value in others.items() if value]:
                raise UsageError(f"--apply takes all from the head; leave out {', '.join(given)}.")
            run_apply(apply_options(apply, input_ or [], output, checkpoint or [], backbone_weights, device, precision,
                                    overwrite), as_json)  # fmt: skip
            return
        if input_:
            raise UsageError("--input goes with --apply; the images of a probe are those of the recipe: --data DIR.")
        if quick and protocol not in (None, "quick"):
            raise UsageError(f"--quick is the protocol quick, and --protocol is {protocol}: give one of them.")
        options = probe_options(
            recipe, data=data, protocol="quick" if quick else protocol, size=res or size, overrides=set_ or [],
            output=output, features=features, sources=source or [], checkpoints=checkpoint or [], backbone=backbone,
            backbone_weights=backbone_weights, seeds=seeds, device=device, precision=precision, overwrite=overwrite,
        )  # fmt: skip
        run_probe(options, per_class, dry_run, as_json)


@app.command(epilog=examples.BENCHMARK)
def benchmark(
    compare_highres: Annotated[
        bool, typer.Option("--compare-highres", help="Also run the teacher: the same backbone on the large image.")
    ] = False,
    models: Annotated[
        str | None,
        typer.Option(
            help="Recipes, run folders or shipped students, by commas. Default: the newest student under runs, or the "
            "shipped one.",
            show_default=False,
        ),
    ] = None,
    res: Annotated[
        str | None,
        typer.Option(
            help="Input sizes of the student in pixels: 112, 96x128, 84,112,168 or 128..512. Default: that of the "
            "training.",
            show_default=False,
        ),
    ] = None,
    sizes: OldRes = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="One student: run folder, .safetensors, .pth, hub id, or a shipped one's name.", show_default=False
        ),
    ] = None,
    backbone_weights: Weights = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Photographs for the fidelity. Default: the run's held-out ones.", show_default=False
        ),
    ] = None,
    max_images: Annotated[int, typer.Option(help="So many photographs at most.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Images at once, for time and memory.")] = 1,
    precision: Annotated[
        Precision, typer.Option(help="Arithmetic of the models; the recipe says how weights are held.")
    ] = "float32",
    device: Where = "auto",
    compile_: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile; its own time is reported apart.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="Timing of each model and size; rows with slower calls than this are not run.")
    ] = 20.0,
    budget: Annotated[
        str | None, typer.Option(help="Memory, such as 4GB: which models and sizes fit?", show_default=False)
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE.py:FUNCTION", help="A function from elsewhere as a row; can be repeated.", show_default=False
        ),
    ] = None,
    ablate: Annotated[
        str | None,
        typer.Option(
            metavar="GROUPS",
            help="Train variants of a recipe instead: losses, spectral, residual, adapter, context, linear, views, "
            "schedule, rate, noise, average, edge, cosine, seed, or a YAML file of your own, by commas.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="With --ablate: the base recipe. Default: dinov2_vits.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="With --ablate: override a value of the base recipe."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help=f"With --ablate: updates of each variant. Default: {ABLATION_STEPS}.", show_default=False),
    ] = None,
    train_seconds: Annotated[
        float | None,
        typer.Option(help="With --ablate: instead of --steps, equal time of updates.", show_default=False),
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="With --ablate: also probe each variant, by a recipe of brixel probe: camvid ...",
            show_default=False,
        ),
    ] = None,
    probe_data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --probe: folder of the labelled set.", show_default=False),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a report too, as HTML and Markdown, into DIR.", show_default=False),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of results and pictures.")] = Path("runs/benchmark"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure anew what was measured before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count only; run and write nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what a student costs beside its backbone and its teacher, and how close it comes to the teacher.

    The same command again takes up what was measured before. Where the backbone's weights cannot be had, cost only.
    """
    with error_boundary():
        from brixel_cli.cli.benchmark import run_benchmark

        set_quiet(quiet)
        options = BenchmarkOptions(
            highres=compare_highres,
            models=models,
            sizes=res or sizes,
            checkpoint=checkpoint,
            backbone_weights=backbone_weights,
            images=images,
            max_images=max_images,
            batch_size=batch_size,
            precision=precision,
            device=device,
            compiled=compile_,
            seconds=seconds,
            budget=budget,
            baselines=tuple(baseline or ()),
            output=output,
            overwrite=overwrite,
        )
        only_with_ablate = {
            "--recipe": recipe, "--set": set_, "--steps": steps, "--train-seconds": train_seconds,
            "--probe": probe, "--probe-data": probe_data,
        }  # fmt: skip
        given = [name for name, value in only_with_ablate.items() if value is not None]
        if ablate is None and given:
            raise UsageError(f"{' and '.join(given)}: only with --ablate.")
        if ablate is None:
            run_benchmark(options, report, dry_run, as_json)
            return
        beside = replace(options, output=BenchmarkOptions.output)
        if beside != BenchmarkOptions():
            raise UsageError(f"--ablate trains variants and does without the options of {beside.command!r}: see --set.")
        from brixel_cli.cli.ablation import run_ablation

        ablation = AblationOptions(
            ablate, recipe or AblationOptions.recipe, tuple(set_ or ()), steps, train_seconds, output, probe, probe_data
        )
        run_ablation(ablation, report, dry_run, as_json)


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--batch-size must be auto or a number from 1 up, not {text}.")
    return int(text)


def main() -> None:
    """Entry point of the `brixel` command."""
    app()
