"""The only module that prints: results to stdout, everything else to stderr.

Under torchrun only the first process speaks, except to report its own failure.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from brixel_cli.core.formatting import to_json
from brixel_cli.errors import BrixelError, UsageError

_quiet = False


def is_first_process() -> bool:
    """Whether this process is the one that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def set_quiet(quiet: bool) -> None:
    """Keep hints and progress to ourselves; results, warnings and errors still show."""
    global _quiet
    _quiet = quiet


def say(message: str) -> None:
    """A hint or a stage of the work, to stderr."""
    if not _quiet and is_first_process():
        tqdm.write(message, file=sys.stderr)


def warn(message: str) -> None:
    """A warning, to stderr."""
    if is_first_process():
        tqdm.write(f"warning: {message}", file=sys.stderr)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
    figures: bool = True,
) -> None:
    """A table to stdout, with a title above and notes below.

    Args:
        title: of the table.
        columns: headings; with empty ones there is no heading.
        rows: texts of the cells.
        notes: a line each.
        figures: whether all columns but the first hold figures, set right and never broken; else they are text.
    """
    if not is_first_process():
        return
    table = Table(show_header=any(columns))
    for number, column in enumerate(columns):
        figure = figures and number > 0
        table.add_column(
            escape(column),
            justify="right" if figure else "left",
            no_wrap=figure,
            overflow="ellipsis" if figure else "fold",
        )
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = Console(highlight=False)
    if title:
        console.print(escape(title), soft_wrap=True)
    console.print(table)
    print_notes(notes)


def print_notes(notes: Sequence[str]) -> None:
    """What is to be read with the tables, to stdout."""
    if is_first_process():
        console = Console(highlight=False)
        for note in notes:
            console.print(escape(note), soft_wrap=True)


def print_json(result: Mapping[str, Any]) -> None:
    """One line of JSON to stdout, for programs; nan and infinity become null."""
    if is_first_process():
        sys.stdout.write(to_json(result) + "\n")


def print_version(version: str) -> None:
    """The version to stdout."""
    sys.stdout.write(f"brixel {version}\n")


def print_files(files: Sequence[str]) -> None:
    """Name the files that a command wrote, to stdout."""
    if is_first_process():
        sys.stdout.write("".join(f"wrote {file}\n" for file in files))


@contextmanager
def error_boundary() -> Iterator[None]:
    """Turn user faults into one message and their exit code; anything else keeps its traceback."""
    try:
        yield
    except BrixelError as error:
        # Every process finds the same fault in the command; a failure may be one process's own.
        if is_first_process() or not isinstance(error, UsageError):
            who = "" if is_first_process() else f"[process {os.environ['RANK']}] "
            sys.stderr.write(f"{who}error: {error}\n")
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was saved stays\n")
        raise SystemExit(130) from None


class Progress:
    """What the engines report to: stages, warnings and progress bars. See `engines.reporting.Reporter`."""

    def say(self, message: str) -> None:
        """A stage of the work."""
        say(message)

    def warn(self, message: str) -> None:
        """Something that went wrong without ending the work."""
        warn(message)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0, unit: str = "it") -> Iterator[tqdm[Any]]:
        """A progress bar on stderr, with speed and time left; silent when quiet, sparse where stderr is no terminal."""
        interval = 0.2 if sys.stderr.isatty() else 15.0
        with tqdm(
            desc=title, total=total, initial=done, unit=f" {unit}", file=sys.stderr, mininterval=interval,
            maxinterval=60.0, disable=_quiet or not is_first_process(), dynamic_ncols=True,
        ) as bar:  # fmt: skip
            yield bar
