"""The Python functions: from image files to feature maps."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import brixel_cli
from brixel_cli import app
from brixel_cli.api import ImageStudent
from brixel_cli.core import student as students
from brixel_cli.data.images import load_image
from brixel_cli.errors import BrixelError, SizeError, UsageError


@pytest.fixture
def student(model: tuple[str, str]) -> ImageStudent:
    return brixel_cli.load_student(model[0], backbone_weights=model[1], device="auto")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """A wide image and a tall one, and one with an orientation: stored wide, seen tall."""
    drawn = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    paths = [tmp_path / f"{name}.png" for name in ("wide", "tall", "turned")]
    Image.fromarray(drawn).save(paths[0])
    Image.fromarray(drawn.transpose(1, 0, 2)).save(paths[1])
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    Image.fromarray(drawn).save(paths[2], exif=exif)
    return paths


def test_three_lines_from_an_image_file_to_a_feature_map(model: tuple[str, str], images: list[Path]) -> None:
    student = brixel_cli.load_student(model[0], backbone_weights=model[1])
    map_ = student.features(str(images[0]), res=32)
    assert (map_.shape, map_.dtype, map_.requires_grad) == ((64, 8, 12), torch.float32, False)


def test_transform_makes_what_the_student_takes(student: ImageStudent, images: list[Path]) -> None:
    made = student.transform(images[0], res=64)
    # 64x96 stays as it is: the pixels, scaled to 0..1, minus mean over std.
    pixels = torch.from_numpy(np.array(load_image(images[0]))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (student.backbone.mean, student.backbone.std))
    torch.testing.assert_close(made, ((pixels - mean) / std)[None])
    assert torch.equal(student.transform(Image.open(images[0]), res=64), made)
    assert student.transform(images[2], res=64).shape == (1, 3, 96, 64)
    assert torch.equal(student.transform(Image.open(images[2]), res=64), student.transform(images[2], res=64))
    assert student.transform(images[0], res=32, fit="centre").shape == (1, 3, 32, 32)
    assert torch.equal(student.features(images[0], res=64), student(made)[0])


def test_features_of_a_list_come_in_its_order_batched_by_size(
    student: ImageStudent, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    forward = students.Student.forward
    monkeypatch.setattr(
        students.Student, "forward", lambda self, batch: shapes.append(tuple(batch.shape)) or forward(self, batch)
    )
    listed = [images[1], Image.open(images[0]), images[2], images[1], images[1]]
    maps = student.features(listed, res=32, batch_size=3)
    assert sorted(shapes) == [(1, 3, 32, 48), (1, 3, 48, 32), (3, 3, 48, 32)]
    for image, map_ in zip(listed, maps, strict=True):
        torch.testing.assert_close(map_, student.features(image, res=32))
    assert student.features([], res=32) == []


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
            UsageError,
            r"Tensor \(1, 3, 32, 32\) of torch.uint8, pixels that",
        ),
        (torch.full((1, 3, 32, 32), 255.0), UsageError, "values up to 255: scale pixels to 0..1"),
        (torch.zeros(3, 32, 32), SizeError, r"Tensor \(3, 32, 32\) of torch.float32: one image needs .*image\[None\]"),
        (torch.zeros(1, 32, 32, 3), SizeError, r"Tensor \(1, 32, 32, 3\)"),
        (Image.new("RGB", (32, 32)), UsageError, "It was given Image"),
        ("cat.jpg", UsageError, "It was given str"),
        (np.zeros((1, 3, 32, 32)), UsageError, r"It was given ndarray \(1, 3, 32, 32\) of float64"),
    ],
)
def test_what_is_no_normalised_input_is_refused(
    student: ImageStudent, given: object, kind: type[BrixelError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        student(given)
    assert "student.transform(image) makes one" in str(caught.value)


def test_transform_says_what_it_takes(student: ImageStudent, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not Tensor \(3, 32, 32\) of torch.float32. An array becomes one with"):
        student.transform(torch.zeros(3, 32, 32))  # type: ignore[arg-type]
    with pytest.raises(BrixelError, match="No such file"):
        student.features(tmp_path / "absent.jpg")


def test_a_size_under_two_patches_is_refused(student: ImageStudent, images: list[Path]) -> None:
    with pytest.raises(UsageError, match="--res 31 is less than 2 patches of 16 pixels: give 32 or more"):
        student.transform(images[0], res=31)


def test_a_device_that_is_none(model: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="device: a device is auto, cpu"):
        brixel_cli.load_student(model[0], device="gpu")


def test_extract_writes_and_reads_what_the_command_does(
    model: tuple[str, str], images: list[Path], student: ImageStudent, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = images[0].parent
    features = brixel_cli.extract(
        folder, res=32, checkpoint=model[0], backbone_weights=model[1], dtype="float32", device="cpu",
        precision="float32", output=folder / "out.h5",
    )  # fmt: skip
    assert sorted(features.paths) == ["tall.png", "turned.png", "wide.png"]
    for path in images:
        torch.testing.assert_close(torch.from_numpy(features[path.name]), student.features(path, res=32))
    assert capsys.readouterr() == ("", "")


def test_extract_takes_the_options_of_the_command() -> None:
    names = {name.rstrip("_") for name in inspect.signature(app.extract).parameters}
    in_python = set(inspect.signature(brixel_cli.extract).parameters)
    assert in_python - names == {"inputs", "reporter"}
    of_the_command = {"input", "export", "verify", "page", "page_sources", "page_images", "dry_run", "as_json", "quiet"}
    of_the_command |= {"join", "copy"}
    assert names - in_python == of_the_command
