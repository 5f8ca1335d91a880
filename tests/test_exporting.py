"""The model as an ONNX graph."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Listener, without
from printed_json import checked
from typer.testing import CliRunner

from brixel_cli.app import app
from brixel_cli.errors import UsageError


def test_a_graph_for_onnx_agrees(model, tmp_path: Path, extract_options, listener: Listener):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from brixel_cli.engines.extracting.exporting import export

    done = export(extract_options(inputs=[]), tmp_path / "student.onnx", listener)
    assert done.path.stat().st_size > 1000
    assert done.dynamic == "batch, height, width"
    assert (2, 64, 96) in done.checked
    assert done.largest_error < 1e-3


def test_an_export_tells_programs_what_was_checked(monkeypatch: pytest.MonkeyPatch):
    from brixel_cli.engines.extracting import exporting

    done = exporting.Exported(Path("x.onnx"), "batch", {(1, 64, 96): 0.25})
    monkeypatch.setattr(exporting, "export", lambda *_: done)
    told = CliRunner().invoke(app, ["extract", "--export", "x.onnx", "--json"]).stdout
    known = {"path": "x.onnx", "dynamic": "batch", "checked": {"1x64x96": 0.25}, "error": 0.25}
    assert checked("extract-export", told) == known


def test_missing_packages_of_the_export_are_named(extract_options, tmp_path: Path, listener: Listener, monkeypatch):
    from brixel_cli.engines.extracting import exporting

    without(monkeypatch, "onnxscript")
    with pytest.raises(UsageError, match=r"--export needs onnxscript, not installed: pip install 'brixel\[onnx\]'"):
        exporting.export(extract_options(inputs=[]), tmp_path / "x.onnx", listener)
