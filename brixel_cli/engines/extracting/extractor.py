"""Feature maps of batches of images, for frameworks that bring the images and take the results: Ray Data, futures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from brixel_cli.config.base import Precision
from brixel_cli.config.extract import ExtractOptions, Fit, Number, Source
from brixel_cli.data.feature_layout import encode
from brixel_cli.data.images import Contents, load_image, upright
from brixel_cli.data.resizing import Resizing
from brixel_cli.data.row_store import Array, batches_of_one_size
from brixel_cli.engines.extracting.plan import model_of
from brixel_cli.engines.models import FeatureExtractor
from brixel_cli.engines.reporting import Silent
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError, UsageError

NUMBERS = ("float16", "float32")
"""What a batch can hold; int8 would need its scales beside it."""


class Extractor:
    """A callable that adds feature maps to batches of images.

    It is what `ray.data.Dataset.map_batches` takes as a class, and what an executor of `concurrent.futures` takes as a
    function. The model is loaded with the first batch of a process, and shared by all extractors with the same
    options there; it is not pickled.

    Args:
        column: of the batch that holds the images: paths, bytes of image files, PIL images, or uint8 arrays (H, W, 3).
        res: input size in pixels.
        fit: what `res` is the side of: `short`, `centre` or `stretch`.
        checkpoint: the student, as for `load_student`; default: the shipped one that was trained at `res`.
        source: `student`, plain `backbone`, or `teacher`.
        backbone: timm name; default: the one of the student.
        backbone_weights: `pretrained` or a file; default: as in training.
        dtype: of the maps, `float16` or `float32`.
        device: where the model computes: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: its arithmetic: `auto`, `float32`, `bfloat16` or `float16`.
        at_once: images of one size that pass through the model at once, at most; default: all of a batch.

    Raises:
        UsageError: a value is out of range.
    """

    def __init__(
        self,
        column: str = "path",
        *,
        res: int = 448,
        fit: Fit = "short",
        checkpoint: str | Path | None = None,
        source: Source = "student",
        backbone: str | None = None,
        backbone_weights: str | Path | None = None,
        dtype: Number = "float16",
        device: str = "auto",
        precision: Precision = "auto",
        at_once: int | None = None,
    ):
        if dtype not in NUMBERS:
            raise UsageError(f"Extractor(dtype={dtype!r}): maps of a batch are {' or '.join(NUMBERS)}.")
        self.column = column
        self.options = ExtractOptions(
            inputs=(),
            res=res,
            fit=fit,
            checkpoint=None if checkpoint is None else str(checkpoint),
            source=source,
            backbone=backbone,
            backbone_weights=None if backbone_weights is None else str(backbone_weights),
            dtype=dtype,
            device=device,
            precision=precision,
            batch_size=at_once,
        )

    def __call__(self, batch: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
        """Compute the maps of a batch.

        Args:
            batch: columns by name, as Ray Data has them; or the images alone, in a list.

        Returns:
            The columns of the batch, none for a list, and two more. `features` has a map (D, h, w) for each image: an
            array (B, D, h, w) where all have one grid, else an array of arrays; an image that failed has an empty map
            (D, 0, 0). `error` says why it failed, and is empty for the others.

        Raises:
            UsageError: the batch has no such column.
            BrixelError: the model cannot be had, or there is too little memory.
        """
        columns = dict(batch) if isinstance(batch, Mapping) else {}
        if columns and self.column not in columns:
            raise UsageError(f"A batch has the columns {', '.join(columns)}: Extractor(column=...) takes one of them.")
        images = columns[self.column] if columns else list(batch)
        model, resizing = _loaded(self.options)
        with torch.inference_mode():
            inputs = [_pixels(image, resizing) for image in images]
            maps: dict[int, Array] = {}
            errors = [value if isinstance(value, str) else "" for value in inputs]
            usable = {row: value for row, value in enumerate(inputs) if not isinstance(value, str)}
            for rows in batches_of_one_size(list(usable), lambda row: usable[row].shape, max(len(images), 1)):
                computed = model.maps(torch.stack([usable[row] for row in rows]))
                tensors, finite = encode(computed, self.options.dtype, None)
                for at, row in enumerate(rows):
                    if finite[at]:
                        maps[row] = tensors["features"][at].contiguous().cpu().numpy()
                    else:
                        errors[row] = f"its features are no finite numbers in {self.options.dtype}"
        channels = model.backbone.embed_dim
        empty = np.zeros((channels, 0, 0), self.options.dtype)
        return columns | {
            "features": _column([maps.get(row, empty) for row in range(len(errors))], empty),
            "error": np.array(errors, dtype=object),
        }


@lru_cache(maxsize=1)
def _loaded(options: ExtractOptions) -> tuple[FeatureExtractor, Resizing]:
    """The model of some options, once for each process."""
    runtime = Runtime(options.device, options.precision)
    spec = model_of(options, Silent())
    model = FeatureExtractor(spec, runtime, Silent(), options.batch_size)
    return model, Resizing(options.res, options.fit, spec.patch_size, spec.enlarge)


def _pixels(image: Any, resizing: Resizing) -> Tensor | str:
    """Pixels (3, H, W), uint8, of an image as the model sees it, or the reason why there are none."""
    try:
        if isinstance(image, str | Path):
            picture = load_image(Path(image).expanduser())
        elif isinstance(image, bytes):
            picture = load_image(Contents("bytes of the batch", io.BytesIO(image)))
        elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
            picture = Image.fromarray(image)
        elif isinstance(image, Image.Image):
            picture = upright(image)
        else:
            return f"neither a path, bytes, a PIL image nor an array (H, W, 3) of uint8: {type(image).__name__}"
        return resizing.apply(picture)
    except BrixelError as error:
        return str(error)


def _column(maps: Sequence[Array], empty: Array) -> Array:
    """Maps as one array where all have one shape, else as an array of arrays."""
    if len({map_.shape for map_ in maps}) == 1:
        return np.stack(maps)
    column = np.empty(len(maps), dtype=object)
    for row, map_ in enumerate(maps):
        column[row] = map_
    return column if len(maps) else empty[None][:0]
