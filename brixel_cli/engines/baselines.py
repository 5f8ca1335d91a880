"""Upsamplers from elsewhere as rows of a comparison: functions that a file or a module of the user's has."""

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

from brixel_cli.core.backbone import Backbone
from brixel_cli.core.identity import file_sha256
from brixel_cli.errors import BrixelError, UsageError

GUIDE_SIZE = "guide_size"
"""Attribute of a function that wants a larger image than the backbone's."""
Size = tuple[int, int]


@dataclass(frozen=True)
class Baseline:
    """A function (images, feature map, output grid) -> map on that grid.

    Attributes:
        reference: as given: `module:function` or `file.py:function`.
        name: of the function.
        function: `function(images, feature_map, output_size)`; see `__call__`.
        sha256: of the module's source file; empty where it has none.
        guide_side: its attribute `guide_size`: shorter side in pixels of the images that it wants; None: as the
            backbone's.
    """

    reference: str
    name: str
    function: Callable[[Tensor, Tensor, Size], Any]
    sha256: str = ""
    guide_side: int | None = None

    def __call__(self, images: Tensor, feature_map: Tensor, output_size: Size) -> Tensor:
        """The function's map, checked.

        Args:
            images: (B, 3, H, W), normalised by the backbone's mean and standard deviation; of `guide_size`.
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

    def guide_size(self, size: Size) -> Size:
        """What it sees where the backbone sees `size`, both (height, width) in pixels: as large, or larger."""
        if self.guide_side is None or self.guide_side <= min(size):
            return size
        height, width = (round(side * self.guide_side / min(size)) for side in size)
        return height, width

    def whole_pass(self, backbone: Backbone, factor: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Backbone and function as one call.

        Args:
            backbone: plain.
            factor: grid of the result over the backbone's.

        Returns:
            (images, guides) -> (B, D, factor * H / patch, factor * W / patch): images (B, 3, H, W) for the backbone,
            and the same images at `guide_size` for the function.
        """

        def call(images: Tensor, guides: Tensor) -> Tensor:
            height, width = (side // backbone.patch_size * factor for side in images.shape[-2:])
            return self(guides, backbone.last_map(images).float(), (height, width))

        return call


def load_baseline(reference: str) -> Baseline:
    """Import a baseline, `module:function` or `file.py:function`.

    Raises:
        UsageError: there is no such module, file or function, or its guide_size is no number of pixels.
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
    side = getattr(function, GUIDE_SIZE, None)
    if side is not None and (type(side) is not int or side < 1):
        raise UsageError(
            f"--baseline {reference}: {name}.{GUIDE_SIZE} is {side!r}. Set it to the shorter side in pixels of the "
            "images that the function wants, such as 448."
        )
    source = getattr(module, "__file__", None)
    return Baseline(reference, name, function, file_sha256(Path(source)) if source else "", side)


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
