"""ONNX export: the model of an extraction as one graph, checked against PyTorch before it is called done."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brixel_cli.config.extract import ExtractOptions
from brixel_cli.core.backbone import check_size
from brixel_cli.core.cost import count_bytes
from brixel_cli.core.extras import require
from brixel_cli.engines.extracting.plan import model_of
from brixel_cli.engines.reporting import Reporter
from brixel_cli.errors import BrixelError, UsageError

TOLERANCE = 1e-3
OPSET = 20
"""The first with GridSample and antialiased Resize as PyTorch has them."""
LARGEST_SINGLE_FILE = 1_800_000_000
"""Bytes of weights; what is larger goes to a second file, as the format of the first allows 2 GB only."""


@dataclass(frozen=True)
class Exported:
    """A graph that was written and checked.

    Attributes:
        path: of the .onnx file.
        dynamic: which sides of the input are free.
        checked: (batch, height, width) of each input tried, with the largest absolute difference from PyTorch,
            relative to the largest absolute feature.
    """

    path: Path
    dynamic: str
    checked: dict[tuple[int, int, int], float]

    @property
    def largest_error(self) -> float:
        """The largest of the differences."""
        return max(self.checked.values())


def export(options: ExtractOptions, path: Path, reporter: Reporter) -> Exported:
    """Write the model as an ONNX graph: `images` (B, 3, H, W), normalised, to `features` (B, D, h, w), float32.

    Height and width are free where the exporter manages it; else they are those of `--res`, square.

    Raises:
        UsageError: packages are missing, or the path has another extension.
        BrixelError: the graph differs from PyTorch by more than 1e-3.
    """
    _check(path)
    if options.source == "teacher":
        raise UsageError("--export with --source teacher: the teacher is the backbone at a larger --res; export that.")
    spec = model_of(options, reporter)
    side = max(round(options.res / spec.patch_size), 1) * spec.patch_size
    check_size(side, side, spec.patch_size)
    model = spec.load("cpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    patch = spec.patch_size
    attempts: list[tuple[str, bool]] = [("batch, height, width", True), ("batch", False)]
    errors: list[str] = []
    for dynamic, free_size in attempts:
        reporter.say(f"exporting with free {dynamic}")
        example = torch.randn(2, 3, side, side + 2 * patch if free_size else side)
        sizes = [(1, side, side), (3, side, side)]
        if free_size:
            sizes += [(2, side, side + 2 * patch), (1, side + 3 * patch, side)]
        # A large model comes in two files that name each other: both are made elsewhere, under their final names.
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            graph = Path(scratch) / path.name
            try:
                _write(model, example, graph, patch, free_size)
                checked = _check_graph(model, graph, sizes)
            except Exception as error:  # exporter and runtime raise kinds of their own, by the dozen
                reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
                errors.append(f"free {dynamic}: {type(error).__name__}: {reason}")
                continue
            if not max(checked.values()) <= TOLERANCE:
                errors.append(f"free {dynamic}: differs from PyTorch by {max(checked.values()):.1e}")
                continue
            for file in sorted(Path(scratch).iterdir()):
                os.replace(file, path.parent / file.name)
        for reason in errors:
            reporter.warn(f"not possible with {reason}")
        return Exported(path, dynamic, checked)
    raise BrixelError(f"{spec.backbone} could not be exported:\n  " + "\n  ".join(errors))


def _check(path: Path) -> None:
    if path.suffix != ".onnx":
        raise UsageError(f"--export {path}: the file must end in .onnx.")
    require("onnx", "--export")


def _write(model: nn.Module, example: Tensor, path: Path, patch: int, free_size: bool) -> None:
    shapes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=1024)}
    if free_size:
        shapes |= {
            2: patch * torch.export.Dim("token_rows", min=2, max=256),
            3: patch * torch.export.Dim("token_columns", min=2, max=256),
        }
    with _silence(), torch.no_grad():
        torch.onnx.export(
            model,
            (example,),
            str(path),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": shapes},
            opset_version=OPSET,
            dynamo=True,
            external_data=count_bytes(model) > LARGEST_SINGLE_FILE,
            verbose=False,
        )


def _check_graph(model: nn.Module, path: Path, sizes: list[tuple[int, int, int]]) -> dict[tuple[int, int, int], float]:
    import onnxruntime

    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), quiet, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    checked: dict[tuple[int, int, int], float] = {}
    for batch, height, width in sizes:
        images = torch.randn(batch, 3, height, width, generator=generator)
        with torch.no_grad():
            expected = model(images)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        if found.shape != expected.shape:
            raise BrixelError(f"the graph gives {tuple(found.shape)} where PyTorch gives {tuple(expected.shape)}")
        checked[batch, height, width] = float((found - expected).abs().max() / expected.abs().max())
    return checked


@contextlib.contextmanager
def _silence() -> Any:
    """The exporter prints its progress and warns at length; what matters is checked afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "torch")]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
