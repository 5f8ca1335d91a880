"""The lean installation: what each extra is for, and what is said where it is not installed."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import without
from typer.testing import CliRunner

from brixel_cli.app import app
from brixel_cli.config.files import load_recipe
from brixel_cli.core.extras import EXTRAS

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
}
"""What is imported under another name."""


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[>=<\[]", requirement)[0] for requirement in requirements}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_installs_the_packages_it_stands_for(extra: str) -> None:
    declared = names(PROJECT["optional-dependencies"][extra]) - {"brixel"}
    assert declared == {DISTRIBUTIONS.get(package, package) for package in EXTRAS[extra]}
    assert not declared & names(PROJECT["dependencies"])


@pytest.mark.parametrize(
    ("hidden", "command", "message"),
    [
        ("tensorboard", "distill --recipe demo", "run.tensorboard needs tensorboard, not installed: pip install "
            "'brixel[train]', or do without: --set run.tensorboard=false."),
        ("torchmetrics", "probe --recipe camvid", "brixel probe needs torchmetrics, not installed: pip install 'brixel[probe]'."),
        ("torchmetrics", "probe --apply head.safetensors --input x", "brixel probe --apply needs torchmetrics, not "
            "installed: pip install 'brixel[probe]'."),
        ("matplotlib", "benchmark --report out", "--report needs matplotlib, not installed: pip install 'brixel[report]'."),
        ("matplotlib", "benchmark --ablate seed --report out", "--report needs matplotlib, not installed: pip install 'brixel[report]'."),
        ("matplotlib", "benchmark --ablate seed --probe camvid --dry-run", "--probe needs matplotlib, not installed: "
            "pip install 'brixel[probe]'."),
        ("matplotlib", "benchmark --curve", "--curve needs matplotlib, not installed: pip install 'brixel[report]'."),
        ("skimage", "demo", "The demo needs skimage, not installed: pip install 'brixel[demo]'."),
    ],
)  # fmt: skip
def test_a_missing_package_is_an_error_before_the_work(
    hidden: str, command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, hidden)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, command.split())
    assert (result.exit_code, result.stderr) == (2, f"error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_tensorboard_needs_no_package_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_recipe("demo").run.tensorboard
    without(monkeypatch, "tensorboard")
    result = CliRunner().invoke(
        app, ["distill", "--recipe", "demo", "--images", "nowhere", "--set", "run.tensorboard=false"]
    )
    assert "tensorboard" not in result.stderr


HIDDEN = """
import sys
for name in ("tensorboard", "matplotlib", "torchmetrics", "onnx", "onnxruntime", "onnxscript", "av", "skimage", "sklearn"):
    sys.modules[name] = None
sys.argv = ["brixel", *sys.argv[1:]]
from brixel_cli.__main__ import main
main()
"""


def test_extraction_needs_no_extra(model: tuple[str, str], photographs: Path, tmp_path: Path) -> None:
    command = ["extract", "--input", str(photographs), "--res", "32", "--checkpoint", model[0], "--device", "cpu",
               "--output", str(tmp_path / "x.h5"), "--preview", "--page", str(tmp_path / "x.html"), "--quiet"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", HIDDEN, *command], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "x.h5").is_file()
    assert (tmp_path / "x.html").is_file()
    done = subprocess.run([sys.executable, "-c", HIDDEN, "demo"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, "pip install 'brixel[demo]'" in done.stderr) == (2, True)


def test_the_environment_for_a_report_of_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torchmetrics")
    for order in (["--version", "--verbose"], ["--verbose", "--version"]):
        lines = CliRunner().invoke(app, order).stdout.splitlines()
        assert lines[0].startswith("brixel ")
        assert any(re.match(r"torch \d", line) for line in lines)
        assert "extra probe: without torchmetrics" in lines
        assert any(line.startswith("device ") for line in lines)
