"""The script that measures on a GPU, on the CPU with a tiny model."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import gpu_figures
import pytest


def test_a_table_with_card_and_command(
    tiny_recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick_benchmark: None
) -> None:
    arguments = ["--models", str(tiny_recipe_file), "--device", "cpu", "--precision", "float32", "--seconds", "0.2"]
    monkeypatch.setattr(sys, "argv", ["gpu_figures.py", *arguments])
    gpu_figures.main()
    where, empty, header, _, line = capsys.readouterr().out.splitlines()
    assert "float32, brixel " in where
    assert "`python tests/measure/gpu_figures.py --models" in where
    assert empty == ""
    name, size, *values = [cell.strip() for cell in line.strip("|").split("|")]
    assert (name, size) == ("tiny", "32x32")
    assert header.count("|") == line.count("|")
    assert all(re.fullmatch(r"[0-9.e+]+", value) and float(value) > 0 for value in values)
