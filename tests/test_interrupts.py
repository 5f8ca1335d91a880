"""Ctrl-C at any time of a command: exit code 130 and a line, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LINE = "interrupted; what was saved stays\n"


@pytest.mark.parametrize(
    ("command", "imported"),
    [("extract", name) for name in ("brixel_cli.errors", "typer", "torch._utils", "timm")]
    + [("distill", name) for name in ("pydantic", "numpy", "torchvision.transforms")],
)
def test_an_interrupt_of_the_imports_is_a_line(
    imported: str, command: str, model: tuple[str, str], photographs: Path, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    arguments = {
        "extract": ["--input", str(photographs), "--checkpoint", model[0]],
        "distill": ["--recipe", str(tiny_recipe_file)],
    }[command]
    start = [sys.executable, "-X", "importtime", "-m", "brixel_cli", command, *arguments]
    output = tmp_path / ("out.h5" if command == "extract" else "out")
    process = subprocess.Popen([*start, "--output", str(output)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:  # a line for each module, once it is imported; the command goes on to the next
        if line.startswith("import time:") and line.split("|")[-1].strip() == imported:
            process.send_signal(signal.SIGINT)
            break
    rest = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.wait() == 130, rest
    assert rest == [LINE]
    assert not output.exists()


def test_an_interrupt_of_the_work_is_reported_by_the_command(tiny_recipe_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "brixel_cli", "distill", "--recipe", str(tiny_recipe_file),
               "--set", "optim.steps=100000", "--output", str(tmp_path / "run")]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (tmp_path / "run" / "state.safetensors").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert f"continue this run with: brixel distill --resume --output {tmp_path / 'run'}\n" in errors
    assert errors.endswith(LINE)
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("*.lock"))
