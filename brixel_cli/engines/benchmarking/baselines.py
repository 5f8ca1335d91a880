"""Functions from elsewhere as rows of a benchmark: imported when asked for, checked at every call."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from brixel_cli.core.identity import file_sha256
from brixel_cli.errors import BrixelError, UsageError


@dataclass(frozen=True)
class Baseline:
    """A function (images, feature map, output grid) -> map on that grid.

    Attributes:
        reference: as given: `module:function` or `file.py:function`.
        name: of the function.
        function: `function(images, feature_map, output_size)`; see `__call__`.
        sha256: of the module's source file; empty where it has none.
    """

    reference: str
    name: str
    function: Callable[[Tensor, Tensor, tuple[int, int]], Any]
    sha256: str = ""

    def __call__(self, images: Tensor, feature_map: Tensor, output_size: tuple[int, int]) -> Tensor:
        """The function's map, checked.

        Args:
            images: (B, 3, H, W), normalised by the backbone's mean and standard deviation.
            feature_map: (B, D, h, w), the backbone's last map of them, float32.
            output_size: grid (oh, ow) that is wanted.

        Returns:
            (B, D, oh, ow), float32.

        Raises:
            BrixelError: the function returns something else.
        """
        output = self.function(images, feature_map, output_size)
        wanted = (*feature_map.shape[:2], *output_size)
        if not isinstance(output, Tensor) or tuple(output.shape) != wanted:
            found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise BrixelError(
                f"--baseline {self.reference} returned {found}, expected a tensor of shape {wanted}: (batch, channels "
                f"of the feature map, {output_size[0]}, {output_size[1]}). It was given images "
                f"{tuple(images.shape)}, feature map {tuple(feature_map.shape)} and output size {output_size}."
            )
        return output.float()


def load_baseline(reference: str) -> Baseline:
    """Import a baseline, `module:function` or `file.py:function`.

    Raises:
        UsageError: there is no such module, file or function.
    """
    where, colon, name = reference.rpartition(":")
    if not colon or not where or not name:
        raise UsageError(f"--baseline takes module:function or file.py:function, not {reference}.")
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except ImportError as error:
        raise UsageError(f"--baseline {reference}: {error}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"--baseline {reference}: {where} has no function {name}.")
    source = getattr(module, "__file__", None)
    digest = file_sha256(Path(source)) if source else ""
    return Baseline(reference, name, function, digest)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"--baseline: no file {path}.")
    name = f"brixel_baseline_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
