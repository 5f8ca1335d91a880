"""A saved head on new images: from image files to masks, depth or normal maps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from brixel_cli.config.probe import ApplyOptions
from brixel_cli.config.section import Side
from brixel_cli.core.backbone import Backbone
from brixel_cli.core.extras import require
from brixel_cli.core.files import locked, make_folder, save_picture, write_text
from brixel_cli.core.formatting import to_json
from brixel_cli.core.heads import Head, load_head
from brixel_cli.core.identity import file_sha256, tensors_sha256
from brixel_cli.core.memory import check_memory
from brixel_cli.data.crops import Crop, CropKind, cut_image, plan_crops
from brixel_cli.data.feature_layout import picture_names
from brixel_cli.data.inputs import (
    Inputs,
    Item,
    describe_unreadable,
    find_inputs,
    none_usable,
    reason_of,
)
from brixel_cli.data.predictions import DEPTH_UNITS, DESCRIPTION
from brixel_cli.data.references import default_output
from brixel_cli.data.resizing import Resizing
from brixel_cli.data.row_store import Array
from brixel_cli.drawing.predictions import (
    class_colours,
    depth_range,
    paint_depth,
    paint_labels,
    paint_normals,
)
from brixel_cli.engines.models import FeatureExtractor, ModelSpec, model_spec
from brixel_cli.engines.probing.evaluation import finish
from brixel_cli.engines.probing.results import FileDescription, HeadDescription, as_dict
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime, free_memory, memory_errors
from brixel_cli.engines.streams import num_workers, read_ahead
from brixel_cli.errors import BrixelError, UsageError, WeightsError

DEEPEST = 2**16 - 1
UNITS = {
    "segmentation": "class numbers in 8-bit palette PNGs",
    "depth": "{depth_unit} in 16-bit PNGs",
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
    """An image on its way to the model: the crops that it is seen in, and its pixels at its own size."""

    image: Image.Image
    crops: list[Crop]
    pixels: list[Array]


def apply_head(options: ApplyOptions, reporter: Reporter) -> Applied:
    """Predict every image of the input with a saved head, each at its own size; bad images are listed, not fatal.

    Raises:
        BrixelError: something the user can fix: no head, no images, other weights than those it was trained on.
    """
    require("probe", "brixel probe --apply")
    runtime = Runtime(options.device, options.precision)
    head, said = _load_head(options.head)
    spec, size = _model_spec(options, said)
    output = options.output or default_output(options.inputs, f"_{said.recipe.task}")
    inputs = find_inputs(options.inputs, every=1, without=[output])
    if inputs.unreadable:
        reporter.warn(describe_unreadable(inputs.unreadable))
    model = FeatureExtractor(spec, runtime, reporter)
    _check_weights(options.head, said, spec, model.backbone)
    unit = depth_unit(head.spec.depth_range[1])
    units: dict[str, str] = {
        quantity: UNITS[quantity].format(depth_unit=DEPTH_UNITS[unit]) for quantity in head.spec.quantities
    }
    with locked(output):
        _begin(output, options, said, units)
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
                    try:
                        _check_memory(head, loaded, runtime)
                        with memory_errors(f"predicting {item.name}", "Take another --device."):
                            predictions = _predict(head, model, loaded)
                        write_predictions(output, names[number], loaded.image, predictions, unit)
                        num_written += 1
                    except BrixelError as error:
                        failures[item.name] = str(error)
                bar.update(1)
    seconds = time.perf_counter() - began
    if not num_written:
        raise none_usable(failures)
    what = f"{said.recipe.task} by {said.label}, trained on {said.recipe.name}"
    notes = [f"{quantity}: {meaning}." for quantity, meaning in units.items()]
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


def _model_spec(options: ApplyOptions, said: HeadDescription) -> tuple[ModelSpec, Side]:
    """The model that the head was trained on, and the student's input."""
    source, described, size = said.source, _model_of(said), said.size
    checkpoint = options.checkpoint
    if isinstance(source, FileDescription):
        if "backbone" not in described or described.get("pca") or described.get("dtype") == "int8":
            raise BrixelError(
                f"{options.head} was trained on the features of {source.path}, which brixel cannot compute for "
                "new images: train the head on the source backbone, student or teacher."
            )
        size = described["res"]
    elif source.baseline is not None:
        raise BrixelError(
            f"{options.head} was trained on the maps of the upsampler {source.baseline.function}, which --apply does "
            "not load: train the head on the source backbone, student or teacher."
        )
    else:
        checkpoint = checkpoint or source.checkpoint
    is_student = described["source"] == "student"
    if is_student and checkpoint is None:
        raise UsageError(f"{options.head} was trained on a feature file of a student: name it with --checkpoint.")
    spec = model_spec(
        described["source"],
        checkpoint=checkpoint if is_student else None,
        backbone=described["backbone"],
        weights=options.backbone_weights or described["backbone_weights"],
    )
    return dataclasses.replace(spec, factor=described["factor"], scale=described.get("scale", 1.0)), size


def _model_of(said: HeadDescription) -> dict[str, Any]:
    """The model of the features: as the head describes it, or the feature file that the head was trained on."""
    return said.source.description if isinstance(said.source, FileDescription) else as_dict(said.source)


def _check_weights(path: Path, said: HeadDescription, spec: ModelSpec, backbone: Backbone) -> None:
    """The student must be the one of the training; the backbone's weights may have been converted or rounded.

    Raises:
        WeightsError: student or backbone have other weights.
    """
    described, stored = _model_of(said), spec.stored
    student = described.get("student")
    expected = student["sha256"] if student else described.get("student_sha256")
    found = tensors_sha256(stored.tensors) if stored else None
    if found != expected:
        raise _other_weights("student", path, found, expected, "--checkpoint")
    sha256 = described["backbone_sha256"]
    if backbone.sha256 == sha256:
        return
    signature: Sequence[float] = said.backbone_signature
    if not signature and stored and stored.card.backbone_sha256 == sha256:  # a head of an earlier version
        signature = stored.card.backbone_signature
    if not signature or not backbone.does_as(signature):
        raise _other_weights("backbone", path, backbone.sha256, sha256, "--backbone-weights")


def _other_weights(what: str, path: Path, found: str | None, expected: str | None, option: str) -> WeightsError:
    return WeightsError(
        f"The weights of the {what} are not those that {path} was trained on: SHA-256 {str(found)[:16]}..., "
        f"expected {str(expected)[:16]}.... Name them with {option}."
    )


def _begin(output: Path, options: ApplyOptions, said: HeadDescription, units: Mapping[str, str]) -> None:
    """Make the folder and say what is in it; predictions of another head are not mixed with."""
    description = {
        "head": str(options.head.absolute()),
        "head_sha256": file_sha256(options.head),
        "classes": said.recipe.data.labels.classes if said.recipe.data.labels else [],
        **{key: as_dict(said)[key] for key in ("label", "protocol", "size", "seed", "source", "versions")},
        "recipe": said.recipe.name,
        "units": units,
    }
    path = output / DESCRIPTION
    if path.exists() and description["head_sha256"] not in path.read_text(encoding="utf-8") and not options.overwrite:
        raise UsageError(
            f"{output} holds predictions of another head. Give --overwrite, or another folder with --output."
        )
    make_folder(output)
    write_text(path, to_json(description, indent=1) + "\n")


def _loaded(
    inputs: Inputs, said: HeadDescription, size: Side, spec: ModelSpec, runtime: Runtime
) -> Iterator[tuple[int, _Loaded | str]]:
    """Each image with its crops, or the reason why there is none; read ahead of whoever takes them."""
    rules = said.evaluate
    kind: CropKind = rules.kind if rules.kind in ("stretch", "slide") else "whole"
    resizing = Resizing(size if isinstance(size, int) else min(size), "short", spec.patch_size)
    side = size if isinstance(size, int) else (size[0], size[1])
    scale = (1.0, 1.0) if isinstance(said.source, FileDescription) else rules.scale

    def load(number: int) -> _Loaded | str:
        item: Item = inputs.items[number]
        if item.reason:
            return item.reason
        try:
            resizing.student_size(item.height, item.width)
            with inputs.decoded(item) as image:
                shape = image.height, image.width
                crops = plan_crops(kind, [shape], side, spec.patch_size, stride=rules.stride, scale=scale)
                pixels = [np.asarray(cut_image(image, crop, spec.input_size(crop.size))) for crop in crops]
                return _Loaded(image, crops, pixels)
        except BrixelError as error:
            return reason_of(error, item.path).removesuffix("; --fit centre takes it")  # here nothing does

    workers = 1 if inputs.videos else num_workers()
    numbers = [[number] for number in range(len(inputs.items))]
    for chunk, loaded in read_ahead(numbers, load, workers, runtime.device.type == "cpu"):
        yield chunk[0], loaded[0]


def _check_memory(head: Head, loaded: _Loaded, runtime: Runtime) -> None:
    """Raise a BrixelError where the head's outputs at the image's own size do not fit; of windows there are two."""
    height, width = loaded.image.height, loaded.image.width
    channels = max(head.spec.num_classes, 3) * min(len(loaded.crops), 2)
    what = f"a prediction of {width}x{height} pixels"
    check_memory(4 * channels * height * width, free_memory(runtime.device), what, "Reduce the image.")


@torch.inference_mode()
def _predict(head: Head, model: FeatureExtractor, loaded: _Loaded) -> dict[str, Tensor]:
    outputs = []
    for pixels in loaded.pixels:
        maps = model.maps(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
        outputs.append(head(maps.half().float()))  # as stored features are
    size = loaded.image.height, loaded.image.width
    return finish(outputs, loaded.crops, size)


def write_predictions(
    output: Path, name: str, image: Image.Image, predictions: Mapping[str, Tensor], unit: int
) -> None:
    """Write an image's predictions and their previews, under the image's name in a folder for each quantity.

    Args:
        output: folder of the folders.
        name: of the PNG, path included.
        image: that they belong to.
        predictions: `segmentation` (H, W), `depth` (H, W) in metres, `normals` (3, H, W).
        unit: of stored depth: as many of it make a metre.

    Raises:
        BrixelError: a depth is too large for the unit; nothing is written.
    """
    encoded = {quantity: encode_prediction(quantity, image, values, unit) for quantity, values in predictions.items()}
    for quantity, (file, preview) in encoded.items():
        for folder, picture in ((quantity, file), (f"{quantity}_preview", preview)):
            path = output / folder / name
            make_folder(path.parent)
            save_picture(picture, path)


def depth_unit(deepest: float) -> int:
    """The finest unit of stored depth in which this depth in metres fits into 16 bits: so many of it make a metre."""
    return next((unit for unit in DEPTH_UNITS if deepest * unit <= DEEPEST), 1)


def encode_prediction(quantity: str, image: Image.Image, values: Tensor, unit: int) -> tuple[Image.Image, Image.Image]:
    """A prediction as the image that is stored, exact, and as one to look at; arguments as `write_predictions`.

    Raises:
        BrixelError: a depth is too large for the unit.
    """
    if quantity == "segmentation":
        stored = Image.fromarray(values.numpy().astype(np.uint8))
        stored.putpalette(class_colours().tobytes())
        return stored, Image.blend(image, paint_labels(values), 0.6)
    if quantity == "depth":
        deepest = float(values.max())
        if not deepest * unit < DEEPEST + 0.5:
            raise BrixelError(
                f"its depth reaches {deepest:.1f} m, and the files end at {DEEPEST / unit:g} m: far beyond the depths "
                "that the head was trained on"
            )
        stored_depth = (values * unit).round().clamp(min=1).numpy().astype(np.uint16)
        return Image.fromarray(stored_depth), paint_depth(values, *depth_range(values))
    pixels = ((values + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels), paint_normals(values)
