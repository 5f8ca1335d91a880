"""The command line: what each command is called, what it takes, and the one error boundary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from brixel_cli import __version__
from brixel_cli.console import error_boundary, print_version, set_quiet

app = typer.Typer(
    name="brixel",
    help="Sharp dense features from one cheap pass of a vision transformer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

DISTILL_EXAMPLES = """
[bold]Examples[/bold]

  brixel distill --recipe recipes/vitl.yaml --dry-run

  brixel distill --recipe vits --images ~/photos --output runs/vits

  brixel distill --recipe vits --set optim.lr=3e-4 --set adapter.kind=deformable

  brixel distill --resume --output runs/vits

  torchrun --nproc-per-node 4 -m brixel_cli distill --recipe vitl
"""


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


@app.command(epilog=DISTILL_EXAMPLES)
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
        typer.Option(help="Student to start from: run folder, .safetensors or released .pth.", show_default=False),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or mps; short for --set run.device=NAME.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew over a run that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the run would cost; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No hints and no progress bars.")] = False,
) -> None:
    """Train an adapter on a folder of photographs, without labels."""
    with error_boundary():
        from brixel_cli.commands.distill import run_distill

        set_quiet(quiet)
        shorthands = {"data.images": images, "init": init, "run.device": device}
        overrides = [f"{key}={json.dumps(value)}" for key, value in shorthands.items() if value is not None]
        run_distill(recipe, output, overrides + (set_ or []), resume, overwrite, dry_run, as_json)


def main() -> None:
    """Entry point of the `brixel` command."""
    app()
