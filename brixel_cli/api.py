"""The Python functions: from image files to feature maps, with the same options as the command line.

import brixel_cli

student = brixel_cli.load_student("dinov2_vits14")
map_ = student.features("cat.jpg", res=448)  # (D, h, w)
features = brixel_cli.extract("photos", res=448)  # a FeatureFile
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import torch
from PIL import Image
from torch import Tensor

from brixel_cli.config.base import Precision
from brixel_cli.config.extract import OVERLAP, ExtractOptions, Field, Fit, Number, Source, Storage
from brixel_cli.config.extract_words import named_output
from brixel_cli.config.shard import in_shard
from brixel_cli.core.sampling import Points, covered_part, read_at
from brixel_cli.core.student import Student
from brixel_cli.data.feature_file import FeatureFile
from brixel_cli.data.grouping import batches_of_one_size
from brixel_cli.data.images import load_image, upright
from brixel_cli.data.resizing import Resizing
from brixel_cli.data.views import normalise_pixels
from brixel_cli.engines.default_student import default_student
from brixel_cli.engines.extracting.extractor import Extractor as Extractor
from brixel_cli.engines.models import model_spec
from brixel_cli.engines.reporting import Reporter, Silent
from brixel_cli.engines.runtime import find_device
from brixel_cli.errors import SizeError, UsageError

ImageLike = str | Path | Image.Image
LARGEST_INPUT = 20.0
"""Normalised images stay far below this; pixels of 0 to 255 go far beyond it."""


class ImageStudent(Student):
    """A loaded student that also takes image files and PIL images.

    Called with normalised images (B, 3, H, W) it returns feature maps (B, D, factor * H / patch, factor * W / patch).
    """

    def forward(self, images: Tensor) -> Tensor:
        """Feature maps of normalised images, as `Student.forward`.

        Raises:
            UsageError: the input is no tensor of normalised images.
            SizeError: its shape is not (B, 3, H, W), or H or W is not a multiple of the patch size.
        """
        _check_normalised(images)
        return super().forward(images)

    def transform(self, image: ImageLike, res: int = 448, fit: Fit = "short") -> Tensor:
        """The student's input for an image, resized as `brixel extract` does.

        Args:
            image: path of an image file, or a PIL image.
            res: input size in pixels; sides become multiples of the patch.
            fit: what `res` is the side of: `short`, the shorter side, aspect kept; `centre`, the middle square;
                `stretch`, the image squeezed into a square.

        Returns:
            A normalised image (1, 3, H, W), float32, on the student's device.

        Raises:
            BrixelError: the file cannot be read, or the image is too small or too elongated.
            UsageError: it is neither a path nor a PIL image, or `res` is under two patches.
        """
        picture = _picture(image)
        pixels = Resizing(res, fit, self.backbone.patch_size).apply(picture)
        on_device = pixels.to(next(self.adapter.parameters()).device)
        return normalise_pixels(on_device, self.backbone.mean, self.backbone.std)[None]

    @overload
    def features(  # type: ignore[overload-overlap]
        self, images: ImageLike, res: int = 448, fit: Fit = "short", batch_size: int = 8
    ) -> Tensor: ...

    @overload
    def features(
        self, images: Sequence[ImageLike], res: int = 448, fit: Fit = "short", batch_size: int = 8
    ) -> list[Tensor]: ...

    @torch.no_grad()
    def features(
        self, images: ImageLike | Sequence[ImageLike], res: int = 448, fit: Fit = "short", batch_size: int = 8
    ) -> Tensor | list[Tensor]:
        """The feature map of an image, or those of a list of images.

        All maps are held in memory; for a large set take `brixel_cli.extract`.

        Args:
            images: a path or PIL image, or a list of them.
            res: input size in pixels, as for `transform`.
            fit: what `res` is the side of.
            batch_size: images of one size that pass through the model at once.

        Returns:
            A map (D, h, w), float32, on the student's device; for a list, the list of maps in the same order.

        Raises:
            BrixelError: as for `transform`.
        """
        if not isinstance(images, list | tuple):
            return self(self.transform(images, res, fit))[0]  # type: ignore[no-any-return, arg-type]
        inputs = [self.transform(image, res, fit) for image in images]
        maps: dict[int, Tensor] = {}
        for rows in batches_of_one_size(range(len(inputs)), lambda row: inputs[row].shape, batch_size):
            maps |= dict(zip(rows, self(torch.cat([inputs[row] for row in rows])), strict=True))
        return [maps[row] for row in range(len(inputs))]

    def at(
        self,
        image: ImageLike,
        size: Sequence[int] | None = None,
        points: Points | None = None,
        res: int = 448,
        fit: Fit = "short",
    ) -> Tensor:
        """The feature map of an image at pixels of that image, bilinear, as `FeatureFile.at` reads it from a file.

        Args:
            image: path of an image file, or a PIL image.
            size: height and width in pixels to which the map is resized; default without `points`: the image's own
                (with `fit` centre: that of the middle square).
            points: [[y, x], ...] in pixels of the upright image; they need not be whole.
            res: input size in pixels, as for `transform`.
            fit: what `res` is the side of.

        Returns:
            (D, *size), or (N, D) for N points; float32, on the student's device.

        Raises:
            BrixelError: as for `transform`, or the result does not fit into memory.
            UsageError: both size and points are given, one is no size or points, or a point lies outside of the image.
        """
        picture = _picture(image)
        whole, seen = (picture.height, picture.width), Resizing(res, fit, self.backbone.patch_size)
        part = covered_part(whole, seen.model_size(*whole), fit)
        return read_at(self.features(picture, res, fit), part, size, points)


def load_student(
    checkpoint: str | Path | None = None,
    *,
    backbone: str | None = None,
    backbone_weights: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    res: int = 448,
) -> ImageStudent:
    """Load a student, ready for inference.

    Args:
        checkpoint: a run folder, a .safetensors of brixel, the name of a shipped student, a released .pth, or
            `hf-hub:user/name[@revision]`; default: the student that comes with brixel and was trained at `res`.
        backbone: timm model name; needed only where the file does not know it.
        backbone_weights: `pretrained` or the path of the backbone's weights; default: as in training.
        device: where the student goes: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `float32` or `bfloat16`, the format of the weights held; the maps are float32 in either.
        res: input size in pixels for which a student is chosen where none is named.

    Returns:
        The student in eval mode, all parameters frozen.

    Raises:
        WeightsError: the files cannot be had or read, or do not belong together.
        UsageError: the backbone or the device is not known.
    """
    where = find_device(device, "device")
    weights = None if backbone_weights is None else str(backbone_weights)
    chosen = default_student(backbone, Silent(), res) if checkpoint is None else str(checkpoint)
    spec = model_spec("student", checkpoint=chosen, backbone=backbone, weights=weights, dtype=dtype)
    loaded = spec.load_student(str(where))
    student = ImageStudent(loaded.backbone, loaded.adapter)
    student.released = loaded.released
    return student.eval()


def extract(
    inputs: str | Path | Sequence[str | Path],
    *,
    res: int = 448,
    fit: Fit = "short",
    checkpoint: str | Path | None = None,
    source: Source = "student",
    backbone: str | None = None,
    backbone_weights: str | Path | None = None,
    output: str | Path | None = None,
    format: Storage = "h5",
    dtype: Number = "float16",
    pca: int | None = None,
    fields: Sequence[Field] = ("map",),
    layers: Sequence[int] = (),
    tile: int | None = None,
    overlap: int = OVERLAP,
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    every: int = 1,
    column: str | None = None,
    allow_urls: bool = False,
    preview: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    shard: str | None = None,
    reporter: Reporter | None = None,
) -> FeatureFile:
    """Write the feature maps of images or video frames to disk, as `brixel extract` does with the options of its names.

    The same call again continues an interrupted run, and reads what is complete.

    Args:
        inputs: folder, image, video, tar, parquet file, glob, .txt list or URL, or several of them.
        res: input size in pixels.
        fit: what `res` is the side of: `short`, `centre` or `stretch`.
        checkpoint: the student, as for `load_student`; default: the one that comes with brixel and was
            trained at `res`.
        source: `student`, plain `backbone`, or `teacher`.
        backbone: timm name; default: the one of the student.
        backbone_weights: `pretrained` or a file; default: as in training.
        output: the .h5 file, or folder of single files; default: beside the input.
        format: `h5`, one file; `npy` or `safetensors`, a folder with a file for each image; `parquet`, a
            folder with a table of vectors; `zarr`, a folder with arrays of Zarr.
        dtype: how features are stored.
        pca: number of principal components to store; default: the maps themselves.
        fields: what to store of the last block: some of `map`, `cls`, `registers` and `pooled`.
        layers: 0-based blocks of the backbone whose maps to store too.
        tile: side in pixels of the tiles into which larger inputs are cut; default: none is cut.
        overlap: of the tiles, in pixels.
        device: where the model computes: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: its arithmetic: `auto`, `float32`, `bfloat16` or `float16`.
        batch_size: images at once; default: by memory.
        workers: threads that decode images; default: by the cores.
        every: of a video, every so many frames.
        column: of the images in parquet files; default: the one that looks like it.
        allow_urls: also fetch the URLs that stand in text lists.
        preview: also paint the features, beside the output.
        strict: stop at the first image that fails.
        overwrite: begin anew over a feature file.
        shard: the part of the inputs to take, `3/64`, or `auto`: by the variables of a Slurm array or of torchrun.
        reporter: hears of stages and progress; default: warnings alone are shown.

    Returns:
        The features, by row or by image name. `failures` names the images that have none.

    Raises:
        BrixelError: no model or no image can be had, or the disk is full.
        UsageError: a value is out of range, or the output was begun with other options.
    """
    from brixel_cli.engines.extracting import extraction

    path, upload = named_output(None if output is None else str(output))
    if upload is not None:
        raise UsageError("output is a file on this disk in Python; the command brixel extract copies it to a URL.")
    several = [inputs] if isinstance(inputs, str | Path) else inputs
    with in_shard(shard) as own:
        done = extraction.extract(
            ExtractOptions(
                inputs=[str(reference) for reference in several],
                res=res,
                fit=fit,
                source=source,
                checkpoint=None if checkpoint is None else str(checkpoint),
                backbone=backbone,
                backbone_weights=None if backbone_weights is None else str(backbone_weights),
                output=path,
                storage=format,
                dtype=dtype,
                pca=pca,
                fields=tuple(fields),
                layers=tuple(layers),
                tile=tile,
                overlap=overlap,
                device=device,
                precision=precision,
                batch_size=batch_size,
                workers=workers,
                every=every,
                column=column,
                allow_urls=allow_urls,
                strict=strict,
                overwrite=overwrite,
                preview=preview,
                shard=own,
            ),
            reporter or Silent(),
        )
    return FeatureFile(done.output)


def _picture(image: ImageLike) -> Image.Image:
    if isinstance(image, str | Path):
        return load_image(Path(image).expanduser())
    if isinstance(image, Image.Image):
        return upright(image)
    raise UsageError(
        f"transform and features take the path of an image or a PIL image, not {_described(image)}. An array "
        "becomes one with PIL.Image.fromarray(array); normalised tensors go to student(images)."
    )


def _check_normalised(images: object) -> None:
    expected = "student(images) takes normalised images (B, 3, H, W); student.transform(image) makes one"
    if not isinstance(images, Tensor):
        raise UsageError(f"{expected}. It was given {_described(images)}.")
    if images.ndim != 4 or images.shape[1] != 3:
        one = ": one image needs a first dimension, image[None]" if images.ndim == 3 and len(images) == 3 else ""
        raise SizeError(f"{expected}. It was given {_described(images)}{one}.")
    if not images.is_floating_point():
        raise UsageError(f"{expected}. It was given {_described(images)}, pixels that are not normalised.")
    if torch.compiler.is_compiling() or images.is_meta or not images.numel():
        return
    largest = float(images.detach().abs().amax())
    if largest > LARGEST_INPUT:
        raise UsageError(
            f"{expected}. It was given values up to {largest:.0f}: scale pixels to 0..1, then subtract "
            "student.backbone.mean and divide by student.backbone.std."
        )


def _described(value: object) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {tuple(shape)} of {value.dtype}"  # type: ignore[attr-defined]
