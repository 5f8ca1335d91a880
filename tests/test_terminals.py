"""Terminals of all kinds: without colours, narrow, and without Unicode."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

STYLE = re.compile(r"\x1b\[([\d;]*)m")
HELP, RECIPES = ["extract", "--help"], ["distill", "--list-recipes"]
HELPS = [["--help"], HELP, *([command, "--help"] for command in ("distill", "probe", "benchmark", "demo"))]


def run(command: list[str], where: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    unset = ("FORCE_COLOR", "NO_COLOR", "PYTHONUTF8", "LANG", "COLUMNS")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parent.parent), **variables}
    return subprocess.run(
        [sys.executable, "-m", "brixel_cli", *command], env=environment, cwd=where, capture_output=True
    )


def colours(text: str) -> list[str]:
    """The styles of a text that set a colour: 30 to 49 and 90 to 107; others are bold, dim and the like."""
    codes = [code for style in STYLE.findall(text) for code in style.split(";") if code]
    return [code for code in codes if 30 <= int(code) < 50 or 90 <= int(code) < 108]


@pytest.mark.parametrize("command", [*HELPS, RECIPES], ids=" ".join)
def test_sixty_columns_without_colours(command: list[str], tmp_path: Path) -> None:
    done = run(command, tmp_path, COLUMNS="60", FORCE_COLOR="1", NO_COLOR="1")
    text = done.stdout.decode()
    assert done.returncode == 0
    assert colours(text) == []
    assert max(len(line) for line in STYLE.sub("", text).splitlines()) <= 60


def test_colours_are_there_where_nobody_refuses_them(tmp_path: Path) -> None:
    assert colours(run(HELP, tmp_path, FORCE_COLOR="1").stdout.decode())


@pytest.mark.parametrize(
    ("command", "code"),
    [(HELP, 0), (RECIPES, 0), (["extract", "--input", "schön.png"], 2)],
    ids=["help", "recipes", "error"],
)
def test_a_locale_without_unicode(command: list[str], code: int, tmp_path: Path) -> None:
    done = run(command, tmp_path, LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    text = (done.stdout + done.stderr).decode("ascii")
    assert "Traceback" not in text
    assert done.returncode == code, text
    assert "error: " in text or "│" not in text
