"""The only module that prints: results to stdout, everything else to stderr.

Under torchrun only the first process speaks, except to report its own failure. Whatever is printed is made printable
first: a file's name can neither steer the terminal nor begin a line that looks like one of ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from brixel_cli.core.formatting import printable, printable_lines, to_json
from brixel_cli.errors import BrixelError, UsageError

if TYPE_CHECKING:
    from tqdm import tqdm

_quiet = False
INDENT = "  "
"""Before the further lines of a message."""


def is_first_process() -> bool:
    """Whether this process is the one that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def set_quiet(quiet: bool) -> None:
    """Keep hints and progress to ourselves; results, warnings and errors still show."""
    global _quiet
    _quiet = quiet


def say(message: str) -> None:
    """A hint or a stage of the work, to stderr."""
    if not _quiet:
        _write(message)


def warn(message: str) -> None:
    """A warning, to stderr."""
    _write(f"warning: {message}")


def _write(line: str) -> None:
    if is_first_process():
        from tqdm import tqdm  # slow to import

        tqdm.write(printable_lines(line, INDENT), file=sys.stderr)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
    figures: bool = True,
) -> None:
    """A table to stdout, with a title above and notes below.

    A table of figures that is too wide for the terminal is printed in parts, each with the names of the rows.

    Args:
        title: of the table.
        columns: headings; with empty ones there is no heading.
        rows: texts of the cells.
        notes: a line each.
        figures: whether all columns but the first hold figures, set right and never broken; else they are text.
    """
    if not is_first_process():
        return
    console = Console(highlight=False)
    if title:
        console.print(escape(printable(title)), soft_wrap=True)
    columns, rows = [printable(column) for column in columns], [[printable(cell) for cell in row] for row in rows]
    widths = [max(cell_len(cell) for cell in cells) for cells in zip(columns, *rows, strict=True)]
    least = min(widths[0], console.width // 3) if figures else None  # of the names, which may be folded
    parts = _parts(widths, least, console.width) if least is not None else [range(len(columns))]
    for part in parts:
        table = Table(show_header=any(columns))
        for number in part:
            figure = figures and number > 0
            table.add_column(
                escape(columns[number]),
                justify="right" if figure else "left",
                min_width=None if number else least,
                no_wrap=figure,
                overflow="ellipsis" if figure else "fold",
            )
        for row in rows:
            table.add_row(*(escape(row[number]) for number in part))
        console.print(table)
    print_notes(notes)


def _parts(widths: Sequence[int], first: int, width: int) -> list[list[int]]:
    """The columns of each part of a table: the first in all of them, and so many of the others as fit.

    Args:
        widths: characters of the columns.
        first: least width of the first column.
        width: of the terminal.
    """
    parts = [[0]]
    used = start = first + 4  # with the borders and the spaces beside the text
    for number in range(1, len(widths)):
        if used + widths[number] + 3 > width and len(parts[-1]) > 1:
            parts.append([0])
            used = start
        parts[-1].append(number)
        used += widths[number] + 3
    return parts


def print_notes(notes: Sequence[str]) -> None:
    """What is to be read with the tables, to stdout."""
    if is_first_process():
        console = Console(highlight=False)
        for note in notes:
            console.print(escape(printable(note)), soft_wrap=True)


def print_json(result: Mapping[str, Any]) -> None:
    """One line of JSON to stdout, for programs; nan and infinity become null."""
    if is_first_process():
        sys.stdout.write(to_json(result) + "\n")


def print_files(files: Sequence[Path]) -> None:
    """Name the files that a command wrote, to stdout."""
    if is_first_process():
        sys.stdout.write("".join(f"wrote {printable(str(file))}\n" for file in files))


def print_results(results: Mapping[str, Any], files: Sequence[Path], as_json: bool, show: Callable[[], object]) -> None:
    """What a command found out, and the files that it wrote: as a line of JSON, or as the tables that `show` prints."""
    if as_json:
        print_json({**results, "files": files})
        return
    show()
    print_files(files)


def show_verified(folder: Path, found: Mapping[Path, str], advice: str, as_json: bool) -> None:
    """What reading every file of a folder again has found.

    Args:
        folder: of the files.
        found: for each file what is wrong with it; an empty text where nothing is.
        advice: what to do with damaged ones.
        as_json: as one line of JSON, not as a table.

    Raises:
        BrixelError: some are damaged.
    """
    damaged = {str(path.relative_to(folder)): reason for path, reason in found.items() if reason}
    if as_json:
        print_json({"path": str(folder), "files": len(found), "damaged": damaged})
    else:
        print_table(str(folder), ["", ""], [["files", f"{len(found):,}"], ["  damaged", f"{len(damaged):,}"]])
        if damaged:
            print_table("damaged files", ["file", "reason"], list(damaged.items()), figures=False)
    if damaged:
        raise BrixelError(f"{len(damaged)} of {len(found)} files in {folder} are damaged. {advice}")


@contextmanager
def error_boundary() -> Iterator[None]:
    """Turn errors of the user into one message and their exit code; anything else keeps its traceback."""
    try:
        yield
    except BrixelError as error:
        # Every process finds the same error in the command; a failure may be one process's own.
        if is_first_process() or not isinstance(error, UsageError):
            _write_error(str(error))
        raise SystemExit(error.exit_code) from error
    except OSError as error:
        if error.filename is None or isinstance(error, ConnectionError):
            raise
        _write_error(
            f"{os.fsdecode(error.filename)}: {error.strerror}. Make the file, its folders or the disk usable, or name "
            "another path, and give the same command again; what was finished stays."
        )
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was saved stays\n")
        raise SystemExit(130) from None


def _write_error(message: str) -> None:
    who = "" if is_first_process() else f"[process {os.environ['RANK']}] "
    sys.stderr.write(f"{who}error: {printable_lines(message, INDENT)}\n")


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
        from tqdm import tqdm

        interval = 0.2 if sys.stderr.isatty() else 15.0
        with tqdm(
            desc=printable(title), total=total, initial=done, unit=f" {unit}", file=sys.stderr, mininterval=interval,
            maxinterval=60.0, disable=_quiet or not is_first_process(), dynamic_ncols=True,
        ) as bar:  # fmt: skip
            yield bar
