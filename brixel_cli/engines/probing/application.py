"""A saved head on new images: from photographs to masks, depth or normal maps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from brixel_cli.config.extract import ExtractOptions
from brixel_cli.config.probe import ApplyOptions
from brixel_cli.config.section import Side
from brixel_cli.core.files import save_picture, write_text
from brixel_cli.core.formatting import to_json
from brixel_cli.core.heads import Head, load_head
from brixel_cli.core.identity import file_sha256, tensors_sha256
from brixel_cli.data.feature_file import picture_names
from brixel_cli.data.fields_of_view import FieldKind, FieldOfView, cut_image, plan_fields
from brixel_cli.data.inputs import Inputs, Item, default_output, find_inputs, reason_of
from brixel_cli.data.resizing import Fitting
from brixel_cli.data.row_store import Array
from brixel_cli.drawing.predictions import (
    class_colours,
    depth_range,
    paint_depth,
    paint_labels,
    paint_normals,
)
from brixel_cli.engines.extracting.plan import model_of
from brixel_cli.engines.models import FeatureExtractor, ModelSpec
from brixel_cli.engines.probing.evaluation import finish
from brixel_cli.engines.probing.results import FileDescription, HeadDescription, as_dict
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime
from brixel_cli.engines.streams import num_workers, read_ahead
from brixel_cli.errors import BrixelError, UsageError, WeightsError

DESCRIPTION = "predictions.json"
UNITS = {
    "segmentation": "class numbers in 8-bit palette PNGs",
    "depth": "millimetres in 16-bit PNGs",
    "normals": "unit vectors as (value / 127.5 - 1) in RGB PNGs: x right, y down, z forward",
}


@dataclass(frozen=True)
class Applied:
    """How it ended.

    Attributes:
        output: folder of the predictions.
        what: of which head they are.
        notes: what the files mean.
        num_images: found.
        num_written: predicted by this run.
        failures: images without a prediction, with the reasons.
        seconds: from the first image to the last.
        files: what was written: description, folders.
    """

    output: Path
    what: str
    notes: list[str]
    num_images: int
    num_written: int
    failures: dict[str, str]
    seconds: float
    files: list[Path]


@dataclass(frozen=True)
class _Loaded:
    """An image on its way to the model: the views that it is seen in, and its pixels at its own size."""

    image: Image.Image
    fields: list[FieldOfView]
    pixels: list[Array]


def apply_head(options: ApplyOptions, reporter: Reporter) -> Applied:
    """Predict every image of the input with a saved head, each at its own size; bad images are listed, not fatal.

    Raises:
        BrixelError: something the user can mend: no head, no images, other weights than those it was trained on.
    """
    runtime = Runtime(options.device, options.precision)
    head, said = _load_head(options.head)
    extract, size = _extract_options(options, said)
    spec = dataclasses.replace(model_of(extract, reporter), factor=_model_of(said)["factor"])
    output = options.output or default_output(options.inputs, f"_{said.recipe.task}")
    inputs = find_inputs(options.inputs, every=1, without=[output])
    model = FeatureExtractor(spec, runtime, reporter)
    _check_weights(options.head, _model_of(said), spec, model)
    _begin(output, options, said)
    head.to(runtime.device)
    names = picture_names([item.name for item in inputs.items])
    failures: dict[str, str] = {}
    num_written = 0
    began = time.perf_counter()
    with reporter.bar("predict", len(inputs.items), unit="image") as bar:
        for number, loaded in _loaded(inputs, said, size, spec, runtime):
            item = inputs.items[number]
            if isinstance(loaded, str):
                failures[item.name] = loaded
            else:
                predictions = _predict(head, model, loaded)
                write_predictions(output, names[number], loaded.image, predictions)
                num_written += 1
            bar.update(1)
    seconds = time.perf_counter() - began
    if not num_written:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in list(failures.items())[:5])
        raise BrixelError(
            f"None of the {len(inputs.items)} images found can be used.{listed}\nName others with --input."
        )
    what = f"{said.recipe.task} by {said.label}, trained on {said.recipe.name}"
    notes = [f"{quantity}: {UNITS[quantity]}." for quantity in head.spec.quantities]
    folders = [output / folder for quantity in head.spec.quantities for folder in (quantity, f"{quantity}_preview")]
    return Applied(
        output, what, notes, len(inputs.items), num_written, failures, seconds, [output / DESCRIPTION, *folders]
    )


def _load_head(path: Path) -> tuple[Head, HeadDescription]:
    head, said = load_head(path)
    try:
        return head, HeadDescription.from_dict(said)
    except ValueError as error:
        raise WeightsError(f"{path}: its description cannot be read: {error}. Train the head again.") from error


def _extract_options(options: ApplyOptions, said: HeadDescription) -> tuple[ExtractOptions, Side]:
    """How the model of the head's source is loaded, and the student's input."""
    source, size = as_dict(said.source), said.size
    if isinstance(said.source, FileDescription):
        inner = said.source.description
        if "backbone" not in inner or inner.get("pca") or inner.get("dtype") == "int8":
            raise BrixelError(
                f"{options.head} was trained on the features of {source['path']}, which brixel cannot compute for "
                "new images: train the head on the source backbone, student or teacher."
            )
        size = inner["res"]
        source = {**inner, "kind": inner["source"], "checkpoint": None}
    checkpoint = options.checkpoint or source["checkpoint"]
    if source["kind"] == "student" and checkpoint is None:
        raise UsageError(f"{options.head} was trained on a feature file of a student: name it with --checkpoint.")
    made = ExtractOptions(
        inputs=options.inputs, source=source["kind"], checkpoint=checkpoint if source["kind"] == "student" else None,
        backbone=source["backbone"], backbone_weights=options.backbone_weights or source["backbone_weights"],
        device=options.device, precision=options.precision,
    )  # fmt: skip
    return made, size


def _model_of(said: HeadDescription) -> dict[str, Any]:
    """What is said of the model: by the head, or by the feature file that it was trained on."""
    return said.source.description if isinstance(said.source, FileDescription) else as_dict(said.source)


def _check_weights(path: Path, said: dict[str, Any], spec: ModelSpec, model: FeatureExtractor) -> None:
    student = said.get("student")
    expected = {
        "backbone": (said["backbone_sha256"], model.backbone.sha256),
        "student": (
            student["sha256"] if student else said.get("student_sha256"),
            tensors_sha256(spec.stored.tensors) if spec.stored else None,
        ),
    }
    for what, (then, now) in expected.items():
        if then != now:
            option = "--backbone-weights" if what == "backbone" else "--checkpoint"
            raise WeightsError(
                f"The weights of the {what} are not those that {path} was trained on: SHA-256 {str(now)[:16]}..., "
                f"expected {str(then)[:16]}.... Name them with {option}."
            )


def _begin(output: Path, options: ApplyOptions, said: HeadDescription) -> None:
    """Make the folder and say what is in it; predictions of another head are not mixed with."""
    description = {
        "head": str(options.head.absolute()),
        "head_sha256": file_sha256(options.head),
        "classes": said.recipe.data.labels.classes if said.recipe.data.labels else [],
        **{key: as_dict(said)[key] for key in ("label", "protocol", "size", "seed", "source", "versions")},
        "recipe": said.recipe.name,
    }
    path = output / DESCRIPTION
    if path.exists() and description["head_sha256"] not in path.read_text(encoding="utf-8") and not options.overwrite:
        raise UsageError(
            f"{output} holds predictions of another head. Give --overwrite, or another folder with --output."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BrixelError(f"The folder {output} cannot be made: {error.strerror}. Choose another one.") from error
    write_text(path, to_json(description, indent=1) + "\n")


def _loaded(
    inputs: Inputs, said: HeadDescription, size: Side, spec: ModelSpec, runtime: Runtime
) -> Iterator[tuple[int, _Loaded | str]]:
    """Each image with its views, or the reason why there is none; read ahead of whoever takes them."""
    crops = said.evaluate
    kind: FieldKind = crops.kind if crops.kind in ("stretch", "slide") else "whole"
    fitting = Fitting(size if isinstance(size, int) else min(size), "short", spec.patch_size)
    side = size if isinstance(size, int) else (size[0], size[1])
    scale = (1.0, 1.0) if isinstance(said.source, FileDescription) else crops.scale

    def load(number: int) -> _Loaded | str:
        item: Item = inputs.items[number]
        if item.reason:
            return item.reason
        try:
            fitting.student_size(item.height, item.width)
            image = inputs.load(item)
        except BrixelError as error:
            return reason_of(error, item.path).removesuffix("; --fit centre takes it")  # here nothing does
        shape = image.height, image.width
        fields = plan_fields(kind, [shape], side, spec.patch_size, stride=crops.stride, scale=scale)
        return _Loaded(image, fields, [np.asarray(cut_image(image, field, spec.enlarge)) for field in fields])

    workers = 1 if inputs.videos else num_workers()
    numbers = [[number] for number in range(len(inputs.items))]
    for chunk, loaded in read_ahead(numbers, load, workers, runtime.device.type == "cpu"):
        yield chunk[0], loaded[0]


@torch.inference_mode()
def _predict(head: Head, model: FeatureExtractor, loaded: _Loaded) -> dict[str, Tensor]:
    outputs = []
    for pixels in loaded.pixels:
        maps = model.maps(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
        outputs.append(head(maps.half().float()))  # as stored features are
    size = loaded.image.height, loaded.image.width
    return finish(outputs, loaded.fields, size)


def write_predictions(output: Path, name: str, image: Image.Image, predictions: Mapping[str, Tensor]) -> None:
    """Write an image's predictions and their previews, under the image's name in a folder for each quantity.

    Args:
        output: folder of the folders.
        name: of the PNG, path included.
        image: that they belong to.
        predictions: `segmentation` (H, W), `depth` (H, W) in metres, `normals` (3, H, W).
    """
    for quantity, values in predictions.items():
        file, preview = encode_prediction(quantity, image, values)
        for folder, picture in ((quantity, file), (f"{quantity}_preview", preview)):
            path = output / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            save_picture(picture, path)


def encode_prediction(quantity: str, image: Image.Image, values: Tensor) -> tuple[Image.Image, Image.Image]:
    """A prediction as the image that is stored, exact, and as one to look at."""
    if quantity == "segmentation":
        stored = Image.fromarray(values.numpy().astype(np.uint8))
        stored.putpalette(class_colours().tobytes())
        return stored, Image.blend(image, paint_labels(values), 0.6)
    if quantity == "depth":
        millimetres = (values * 1000).round().clamp(1, 65535).numpy().astype(np.uint16)
        return Image.fromarray(millimetres), paint_depth(values, *depth_range(values))
    pixels = ((values + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels), paint_normals(values)
