"""Terminals of all kinds: without colours, narrow, and without Unicode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = {
    "help": ["--help"],
    "help of extract": ["extract", "--help"],
    "recipes": ["distill", "--list-recipes"],
    "error": ["distill", "--recipe", "vitx"],
}


def run(command: list[str], where: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    environment = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "PYTHONUTF8", "LANG")}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parent.parent), **variables}
    return subprocess.run(
        [sys.executable, "-m", "brixel_cli", *command], env=environment, cwd=where, capture_output=True
    )


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_no_color_means_no_colours(command: list[str], tmp_path: Path) -> None:
    done = run(command, tmp_path, NO_COLOR="1", FORCE_COLOR="")
    assert b"\x1b[3" not in done.stdout + done.stderr
    assert b"\x1b[4" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_sixty_columns_are_enough(command: list[str], tmp_path: Path) -> None:
    done = run(command, tmp_path, COLUMNS="60")
    lines = done.stdout.decode().splitlines()
    assert [line for line in lines if len(line) > 60] == []
    assert done.returncode in (0, 2)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_locale_without_unicode_is_no_traceback(command: list[str], tmp_path: Path) -> None:
    done = run(command, tmp_path, LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert b"Traceback" not in done.stderr
    assert done.returncode in (0, 2)
    assert done.stdout or done.stderr
    (done.stdout + done.stderr).decode("ascii")


def test_files_with_unicode_in_their_names_are_named_in_such_a_locale(tmp_path: Path) -> None:
    done = run(["extract", "--input", "schön.png"], tmp_path, LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode in (1, 2)
    assert b"Traceback" not in done.stderr
    assert b"error: " in done.stderr
