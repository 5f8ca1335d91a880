"""The command line: what each command is called, what it takes, and the one error boundary."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from brixel_cli import __version__
from brixel_cli.cli import examples
from brixel_cli.cli.console import error_boundary, print_version, set_quiet
from brixel_cli.config.base import Device, Precision, check_device
from brixel_cli.config.benchmark import ABLATION_STEPS, AblationOptions, BenchmarkOptions
from brixel_cli.config.extract import ExtractOptions, Fit, Number, Source, Storage
from brixel_cli.errors import UsageError

app = typer.Typer(
    name="brixel",
    help="Sharp dense features from one cheap pass of a vision transformer.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

MODEL, INPUT, OUTPUT, COMPUTE = "Model", "Input", "Output", "Computation"
RECIPE, MEASURE, ABLATION, HEAD = "Recipe", "Measurement", "Ablation (with --ablate)", "Saved head (with --apply)"
STUDENT = "run folder, .safetensors, released .pth, hf-hub:user/name, or a shipped one's name."
SHIPPED = "Default: the one that comes with brixel for this --res."


def _option(panel: str, help: str, *names: str, show_default: bool = False, **more: Any) -> Any:
    """An option in a panel of the help; its default is in the text, unless it is shown."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=show_default, **more)


# Options that several commands take.
Json = Annotated[bool, _option(OUTPUT, "Print the result as one line of JSON.", "--json")]
Quiet = Annotated[bool, _option(OUTPUT, "No hints and no progress bars.", "--quiet")]
DryRun = Annotated[bool, _option(COMPUTE, "Say what it would take; write nothing.", "--dry-run")]
Where = Annotated[Device, _option(COMPUTE, "auto, cpu, cuda, cuda:1 or mps.", show_default=True)]
Arithmetic = Annotated[
    Precision,
    _option(COMPUTE, "Arithmetic of the models. auto: bfloat16 where the device computes in it; else, on a GPU, "
            "float16; else float32.", show_default=True),
]  # fmt: skip
Backbone = Annotated[str | None, _option(MODEL, "timm name. Default: that of the student.")]
Weights = Annotated[
    str | None, _option(MODEL, "Of the backbone: pretrained, or a .safetensors or .pth file. Default: as in training.")
]
Sources = Annotated[
    list[str] | None, _option(MODEL, "backbone, equal-cost (backbone at the largest input that takes no longer than "
            "the student), student, teacher, or a feature file (.h5); can be repeated. Default: the first four."),
]  # fmt: skip
Set = Annotated[
    list[str] | None, _option(RECIPE, "Override a value of the recipe; can be repeated.", "--set", metavar="KEY=VALUE")
]
OldRes = Annotated[str | None, typer.Option(hidden=True)]  # what --res was called
ListRecipes = Annotated[bool, _option(RECIPE, "List the recipes that come with brixel.", "--list-recipes")]
CopyRecipe = Annotated[
    tuple[str, str] | None, _option(RECIPE, "Copy a shipped recipe to a file, to be changed.", metavar="NAME FILE")
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
        str | None, _option(RECIPE, "Recipe file, or name of a shipped one: vitl. Default: dinov2_vits.")
    ] = None,
    set_: Set = None,
    list_recipes: ListRecipes = False,
    copy_recipe: CopyRecipe = None,
    images: Annotated[
        str | None, _option(INPUT, "Of training images; short for --set data.images=DIR.", metavar="DIR")
    ] = None,
    init: Annotated[str | None, _option(MODEL, f"Student to start from: {STUDENT}")] = None,
    backbone_weights: Annotated[
        str | None, _option(MODEL, "A .safetensors or .pth file; as --set backbone.weights=FILE.")
    ] = None,
    output: Annotated[Path | None, _option(OUTPUT, "Folder of the run. Default: runs/NAME of the recipe.")] = None,
    resume: Annotated[bool, _option(OUTPUT, "Continue the run in the output folder.", "--resume")] = False,
    verify: Annotated[Path | None, _option(OUTPUT, "Read all of a run again; name what is damaged.")] = None,
    overwrite: Annotated[bool, _option(OUTPUT, "Begin anew over a run that is there.", "--overwrite")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    device: Annotated[str | None, _option(COMPUTE, "auto, cpu, cuda, cuda:1 or mps; as --set run.device=NAME.")] = None,
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
        run_distill(recipe, output, overrides + (set_ or []), resume, overwrite, verify, dry_run, as_json)


@app.command(epilog=examples.EXTRACT)
def extract(
    input_: Annotated[
        list[str] | None,
        _option(INPUT, "Folder, image, video, quoted glob or .txt list; can be repeated.", "--input"),
    ] = None,
    res: Annotated[int, _option(INPUT, "Input size of the student or backbone in pixels.", show_default=True)] = 448,
    fit: Annotated[
        Fit,
        _option(
            INPUT,
            "What --res is the side of. short: the shorter side, aspect kept. centre: the middle square. "
            "stretch: the image, squeezed into a square.",
            show_default=True,
        ),
    ] = "short",
    every: Annotated[int, _option(INPUT, "Of a video, take every so many frames.", show_default=True)] = 1,
    checkpoint: Annotated[str | None, _option(MODEL, f"Student: {STUDENT} {SHIPPED}")] = None,
    source: Annotated[
        Source,
        _option(MODEL, "Whose maps: student, backbone, or teacher (backbone at the larger size).", show_default=True),
    ] = "student",
    backbone: Backbone = None,
    backbone_weights: Weights = None,
    output: Annotated[
        Path | None, _option(OUTPUT, "The .h5 file, or folder of single files. Default: beside the input.")
    ] = None,
    format_: Annotated[
        Storage,
        _option(OUTPUT, "h5: one file. npy, safetensors: a file for each image.", "--format", show_default=True),
    ] = "h5",
    dtype: Annotated[
        Number, _option(OUTPUT, "How features are stored; int8 has a scale for each location.", show_default=True)
    ] = "float16",
    pca: Annotated[
        int | None, _option(OUTPUT, "Store so many principal components of the set instead of all channels.")
    ] = None,
    preview: Annotated[bool, _option(OUTPUT, "Also paint the features, beside the output.", "--preview")] = False,
    page: Annotated[Path | None, _option(OUTPUT, "Also write a page to look at them.", metavar="FILE.html")] = None,
    page_sources: Annotated[
        str | None, _option(OUTPUT, "Of the page: student,backbone,teacher. Default: --source and backbone.")
    ] = None,
    page_images: Annotated[int, _option(OUTPUT, "So many images of it at most.", show_default=True)] = 12,
    export: Annotated[Path | None, _option(OUTPUT, "Write the model as an ONNX graph instead of features.")] = None,
    verify: Annotated[
        Path | None, _option(OUTPUT, "Read a feature file, or folder of single files, again; name what is damaged.")
    ] = None,
    overwrite: Annotated[bool, _option(OUTPUT, "Begin anew over a feature file.", "--overwrite")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    device: Where = "auto",
    precision: Arithmetic = "auto",
    batch_size: Annotated[
        str, _option(COMPUTE, "Images at once: a number, or auto: by memory.", show_default=True)
    ] = "auto",
    workers: Annotated[int | None, _option(COMPUTE, "Threads that decode images. Default: by the cores.")] = None,
    strict: Annotated[bool, _option(COMPUTE, "Stop at the first image that fails.", "--strict")] = False,
    dry_run: Annotated[bool, _option(COMPUTE, "Check all, time one batch; write nothing.", "--dry-run")] = False,
) -> None:
    """Write the dense features of images or video frames to disk.

    The same command again continues an interrupted run. Exit code 1: some images failed; they are listed.
    """
    with error_boundary():
        from brixel_cli.cli.extract import run_extract

        set_quiet(quiet)
        if batch_size != "auto" and not (batch_size.isdecimal() and len(batch_size) < 7 and int(batch_size)):
            raise UsageError(f"--batch-size must be auto or a number from 1 up, not {batch_size[:40]}.")
        options = ExtractOptions(
            inputs=input_ or [], res=res, fit=fit, source=source, checkpoint=checkpoint, backbone=backbone,
            backbone_weights=backbone_weights, output=output, storage=format_, dtype=dtype, pca=pca, device=device,
            precision=precision, batch_size=None if batch_size == "auto" else int(batch_size), workers=workers,
            every=every, strict=strict, overwrite=overwrite, preview=preview, page=page,
            page_sources=tuple(page_sources.split(",")) if page_sources else None, page_images=page_images,
        )  # fmt: skip
        run_extract(options, export, verify, dry_run, as_json)


@app.command(epilog=examples.PROBE)
def probe(
    recipe: Annotated[
        str | None, _option(RECIPE, "Recipe of a labelled set, or name of a shipped one: camvid ...")
    ] = None,
    set_: Annotated[
        list[str] | None,
        _option(
            RECIPE, "Override a value of the recipe, or protocol.KEY; can be repeated.", "--set", metavar="KEY=VALUE"
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        _option(RECIPE, "quick, jafar, brixel, dinov3-ade, dinov3-nyu, brixel-nyu, normals. Default: the recipe's."),
    ] = None,
    quick: Annotated[bool, _option(RECIPE, "Short for --protocol quick: an answer in minutes.", "--quick")] = False,
    list_recipes: ListRecipes = False,
    copy_recipe: CopyRecipe = None,
    data: Annotated[
        Path | None, _option(INPUT, "Of the labelled set; short for --set data.root=DIR.", metavar="DIR")
    ] = None,
    res: Annotated[
        str | None, _option(INPUT, "Input size of the student in pixels: 112, or 288x384. Default: the recipe's.")
    ] = None,
    size: OldRes = None,
    checkpoint: Annotated[list[str] | None, _option(MODEL, f"Student; can be repeated: {STUDENT} {SHIPPED}")] = None,
    source: Sources = None,
    backbone: Backbone = None,
    backbone_weights: Weights = None,
    apply: Annotated[Path | None, _option(HEAD, "A saved head: predict new images with it instead of probing.")] = None,
    input_: Annotated[
        list[str] | None, _option(HEAD, "Folder, image, quoted glob or .txt list; can be repeated.", "--input")
    ] = None,
    output: Annotated[
        Path | None, _option(OUTPUT, "Folder of the results. Default: runs/probe/NAME of the recipe.")
    ] = None,
    features: Annotated[
        Path | None, _option(OUTPUT, "Stored features, to be shared. Default: runs/probe/features, or within --output.")
    ] = None,
    verify: Annotated[Path | None, _option(OUTPUT, "Read all of a probe again; name what is damaged.")] = None,
    per_class: Annotated[bool, _option(OUTPUT, "Also print the IoU of each class.", "--per-class")] = False,
    overwrite: Annotated[bool, _option(OUTPUT, "Begin anew over a probe that is there.", "--overwrite")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    seeds: Annotated[int, _option(COMPUTE, "Trainings of each source, with seeds 0, 1, ...", show_default=True)] = 3,
    device: Where = "auto",
    precision: Arithmetic = "auto",
    dry_run: DryRun = False,
) -> None:
    """Say how good dense features are: train small heads on them, frozen, and measure.

    The same command again continues an interrupted probe, source by source and seed by seed.
    """
    with error_boundary():
        from brixel_cli.cli.probe import probe_options, run_apply, run_probe, verify_probe
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
            others = {"--recipe": recipe, "--data": data, "--source": source, "--res": res or size,
                      "--protocol": protocol, "--quick": quick, "--set": set_, "--backbone": backbone,
                      "--dry-run": dry_run}  # fmt: skip
            if given := [name for name, value in others.items() if value]:
                raise UsageError(f"--apply takes all from the head; leave out {', '.join(given)}.")
            if len(checkpoint or []) > 1:
                raise UsageError("--apply takes one --checkpoint: the student that the head was trained on.")
            run_apply(ApplyOptions(apply, input_ or [], output, checkpoint[0] if checkpoint else None, backbone_weights,
                                   device, precision, overwrite), as_json)  # fmt: skip
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
        bool, _option(MODEL, "Also run the teacher, on large images.", "--compare-highres")
    ] = False,
    curve: Annotated[
        bool,
        _option(MODEL, "Instead, draw fidelity against cost: the backbone at many inputs, and students.", "--curve"),
    ] = False,
    models: Annotated[
        str | None, _option(MODEL, f"Recipes, run folders, shipped students or hf-hub:user/name, by commas. {SHIPPED}")
    ] = None,
    checkpoint: Annotated[str | None, _option(MODEL, f"One student: {STUDENT}")] = None,
    backbone_weights: Weights = None,
    baseline: Annotated[
        list[str] | None,
        _option(MODEL, "A function from elsewhere as a row; can be repeated.", metavar="FILE.py:FUNCTION"),
    ] = None,
    res: Annotated[
        str | None,
        _option(
            INPUT,
            "Input sizes of the student in pixels: 112, 96x128, 84,112,168 or 128..512. Default: that of the training.",
        ),
    ] = None,
    sizes: OldRes = None,
    images: Annotated[
        Path | None, _option(INPUT, "Images for the fidelity. Default: the run's held-out ones.", metavar="DIR")
    ] = None,
    max_images: Annotated[int, _option(INPUT, "So many of them at most.", show_default=True)] = 64,
    batch_size: Annotated[int, _option(MEASURE, "Images at once, for time and memory.", show_default=True)] = 1,
    seconds: Annotated[
        float,
        _option(
            MEASURE, "Timing of each model and size; rows with slower calls than this are not run.", show_default=True
        ),
    ] = 20.0,
    budget: Annotated[str | None, _option(MEASURE, "Memory, such as 4GB: which models and sizes fit?")] = None,
    compile_: Annotated[bool, _option(MEASURE, "Use torch.compile; reported with its own time.", "--compile")] = False,
    ablate: Annotated[
        str | None,
        _option(
            ABLATION,
            "Train variants of a recipe instead: losses, spectral, residual, adapter, context, linear, "
            "views, schedule, rate, noise, average, edge, cosine, seed, or a YAML file of your own, by commas.",
            metavar="GROUPS",
        ),
    ] = None,
    recipe: Annotated[str | None, _option(ABLATION, "The base recipe. Default: dinov2_vits.")] = None,
    set_: Annotated[
        list[str] | None, _option(ABLATION, "Override a value of the base recipe.", "--set", metavar="KEY=VALUE")
    ] = None,
    steps: Annotated[int | None, _option(ABLATION, f"Updates of each variant. Default: {ABLATION_STEPS}.")] = None,
    train_seconds: Annotated[float | None, _option(ABLATION, "Instead of --steps, equal time of updates.")] = None,
    probe: Annotated[
        str | None,
        _option(ABLATION, "Also probe each variant, by a recipe of brixel probe: camvid ...", metavar="RECIPE"),
    ] = None,
    probe_data: Annotated[Path | None, _option(ABLATION, "With --probe: the labelled set.", metavar="DIR")] = None,
    output: Annotated[
        Path, _option(OUTPUT, "Folder of results and pictures.", show_default=True)
    ] = BenchmarkOptions.output,
    report: Annotated[Path | None, _option(OUTPUT, "Also write a report, HTML and Markdown.", metavar="DIR")] = None,
    overwrite: Annotated[bool, _option(OUTPUT, "Measure anew what was measured before.", "--overwrite")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    device: Where = "auto",
    precision: Arithmetic = "float32",
    dry_run: DryRun = False,
) -> None:
    """Measure what a student costs beside its backbone and its teacher, and how close it comes to the teacher.

    The same command again takes up what was measured before. Where the backbone's weights cannot be had, cost only.
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
