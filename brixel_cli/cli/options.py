"""What the options of the commands share: the panels of the help, and options that several commands take."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from brixel_cli.config.base import Device, Precision

MODEL, INPUT, OUTPUT, COMPUTE = "Model", "Input", "Output", "Computation"
RECIPE, MEASURE, ABLATION, HEAD = "Recipe", "Measurement", "Ablation (with --ablate)", "Saved head (with --apply)"
STUDENT = "run folder, .safetensors, released .pth, hf-hub:user/name, or a shipped one's name."
SHIPPED = "Default: the one that comes with brixel for this --res."


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    """An option in a panel of the help. Its text names what a default of None means."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def flag(panel: str, help: str, name: str) -> Any:
    """An option without a value."""
    return option(panel, help, name, metavar="")


# Options that several commands take.
Json = Annotated[bool, flag(OUTPUT, "Print the result as one line of JSON.", "--json")]
Quiet = Annotated[bool, flag(OUTPUT, "No hints and no progress bars.", "--quiet")]
DryRun = Annotated[bool, flag(COMPUTE, "Report time, memory and disk space; write nothing.", "--dry-run")]
Where = Annotated[Device, option(COMPUTE, "auto, cpu, cuda, cuda:1 or mps.", metavar="NAME")]
Arithmetic = Annotated[
    Precision, option(COMPUTE, "Arithmetic of the models: auto, float32, bfloat16 or float16. auto: bfloat16 if the "
        "device computes in it natively; else float16 on a GPU, float32 elsewhere.", metavar="NAME"),
]  # fmt: skip
Backbone = Annotated[
    str | None, option(MODEL, "Name of the backbone in timm. Default: that of the student.", metavar="NAME")
]
OfShard = Annotated[
    str | None, option(INPUT, "Take one part: 3/64, or auto, by Slurm array or torchrun.", metavar="I/N")
]
Join = Annotated[
    str | None, option(OUTPUT, "Make one file, --output, of the parts of all shards.", metavar="'OUT.*.h5'")
]
Copy = Annotated[bool, flag(OUTPUT, "With --join: copy the parts; else the file refers to them.", "--copy")]
Weights = Annotated[
    str | None,
    option(MODEL, "A .safetensors or .pth file, or pretrained. Default: those of the training.", metavar="FILE"),
]
Sources = Annotated[
    list[str] | None, option(MODEL, "backbone, equal-cost (backbone at the largest input that takes no longer than "
        "the student), student, teacher, finetuned or unet:ENCODER (trained end to end; with @teacher at its input), "
        "or a feature file (.h5); can be repeated. Default: the first four."),
]  # fmt: skip
Baselines = Annotated[
    list[str] | None,
    option(MODEL, "Your own upsampler as a row; can be repeated.", "--baseline", metavar="FILE.py:FUNCTION"),
]
ProtocolName = Annotated[
    str | None,
    option(RECIPE, "quick, jafar, jafar-published, brixel, dinov3-ade, dinov3-nyu, brixel-nyu or normals. Default: by "
        "the recipe.", "--protocol"),
]  # fmt: skip
Predictions = Annotated[
    list[str] | None, option(MODEL, "Predictions of any model, as files; can be repeated.", metavar="NAME=DIR")
]
LabelFraction = Annotated[float, option(INPUT, "Share of the training images whose labels are used, such as 0.1.")]
SavePredictions = Annotated[
    bool, flag(OUTPUT, "Write all predictions of the evaluated images to files.", "--save-predictions")
]
Set = Annotated[
    list[str] | None, option(RECIPE, "Override a value of the recipe; can be repeated.", "--set", metavar="KEY=VALUE")
]
OldRes = Annotated[str | None, typer.Option(hidden=True)]  # what --res was called
ListRecipes = Annotated[bool, flag(RECIPE, "List the recipes that come with brixel.", "--list-recipes")]
CopyRecipe = Annotated[
    tuple[str, str] | None, option(RECIPE, "Copy a shipped recipe to a file, to be changed.", metavar="NAME FILE")
]
