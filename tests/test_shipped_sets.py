"""The shipped recipes on tiny sets that lie and are coded as the real ones are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from brixel_cli.config.files import load_recipe
from brixel_cli.config.labelled import ProbeRecipe
from brixel_cli.data.labelled import LabelledSet, Sample

HEIGHT, WIDTH = 480, 640  # of NYU, whose evaluation crop has to fit

SETS: dict[str, tuple[str, str, list[int], list[int]]] = {
    # recipe: image and mask of one evaluation image, values of the mask, the labels they mean
    "ade20k": ("images/validation/ADE_1.jpg", "annotations/validation/ADE_1.png", [0, 1, 2, 150], [255, 0, 1, 149]),
    "ade20k_151": ("images/validation/ADE_1.jpg", "annotations/validation/ADE_1.png", [0, 1, 150], [0, 1, 150]),
    "cityscapes": (
        "leftImg8bit/val/ulm/ulm_1_19_leftImg8bit.png", "gtFine/val/ulm/ulm_1_19_gtFine_labelIds.png",
        [0, 3, 7, 8, 11, 14, 26, 29, 31, 33], [255, 255, 0, 1, 2, 255, 13, 255, 16, 18],
    ),
    "voc2012": ("JPEGImages/2007_1.jpg", "SegmentationClass/2007_1.png", [0, 15, 20, 255], [0, 15, 20, 255]),
    "coco_stuff27": (
        "images/val2017/01.jpg", "annotations/val2017/01.png", [0, 1, 9, 91, 156, 181, 255], [9, 11, 8, 17, 23, 24, 255],
    ),
    "camvid": ("images/test/0001.jpg", "labels/test/0001.png", [0, 10, 11, 255], [0, 10, 255, 255]),
    "nyuv2_subset_segmentation": ("images/0885.jpg", "labels40/0885.png", [0, 38, 39, 255], [0, 38, 255, 255]),
    "chasedb1": ("images/Image_11L.jpg", "labels/Image_11L.png", [0, 1, 255], [0, 1, 1]),
    "dubai_aerial": ("images/t5_001.jpg", "labels/t5_001.png", [0, 4, 255], [0, 4, 255]),
}  # fmt: skip
LISTS = {"voc2012": "ImageSets/Segmentation/val.txt", "camvid": "test.txt", "chasedb1": "test.txt",
         "nyuv2_subset_segmentation": "val.txt", "nyuv2_subset_depth": "val.txt", "dubai_aerial": "val.txt"}  # fmt: skip


def put(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def put_image(path: Path, height: int = HEIGHT, width: int = WIDTH) -> None:
    put(path, np.full((height, width, 3), 90, np.uint8))


def load_only(name: str, root: Path, image: str) -> Sample:
    if name in LISTS:
        (root / LISTS[name]).parent.mkdir(parents=True, exist_ok=True)
        (root / LISTS[name]).write_text(Path(image).stem + "\n")
    found = LabelledSet(load_recipe(name, (), ProbeRecipe), "evaluate", root)
    assert found.names == [image]
    return found.load(0)


@pytest.mark.parametrize("name", SETS)
def test_masks_mean_what_they_should(tmp_path: Path, name: str) -> None:
    image, mask, values, expected = SETS[name]
    put_image(tmp_path / image, 8, 12)
    pixels = np.full((8, 12), values[0], np.uint8)
    pixels[3, : len(values)] = values
    put(tmp_path / mask, pixels)
    labels = load_only(name, tmp_path, image).labels
    assert labels is not None
    assert labels[3, : len(values)].tolist() == expected


@pytest.mark.parametrize(
    ("name", "image", "depth"),
    [("nyuv2", "images/test/kitchen_1.jpg", "annotations/test/kitchen_1.png"),
     ("nyuv2_subset_depth", "images/0885.jpg", "depth/0885.png")],
)  # fmt: skip
def test_millimetres_inside_the_crop_of_eigen(tmp_path: Path, name: str, image: str, depth: str) -> None:
    put_image(tmp_path / image)
    values = np.full((HEIGHT, WIDTH), 2500, np.uint16)
    values[0, :2] = 0, 10_001
    put(tmp_path / depth, values)
    sample = load_only(name, tmp_path, image)
    assert sample.depth is not None
    assert sample.depth[0, :3].tolist() == [0, 0, 2.5]
    assert sample.valid.sum() == (471 - 45) * (601 - 41)


def test_navi_holds_inverse_millimetres_and_a_focal_length_for_each_image(tmp_path: Path) -> None:
    scene = tmp_path / "cup/wild_set"
    height, width, focal = 160, 240, 200.0
    put_image(scene / "images/000.jpg", height, width)
    put_image(tmp_path / "cup/multiview-00-pixel_5/images/000.jpg", height, width)
    # A plane that is 500 mm away in the middle, its depth growing by 1 for 1 to the right: z = 500 / (1 - x).
    x = (np.arange(width) - width / 2) / focal
    code = np.broadcast_to(np.round(65535 * 10 * (1 - x) / 500), (height, width)).astype(np.uint16)  # 1 / z, coded
    code = code.copy()
    code[0] = 0
    for folder in (scene, tmp_path / "cup/multiview-00-pixel_5"):
        put(folder / "depth/000.png", code)
        (folder / "annotations.json").write_text(
            json.dumps([{"filename": "000.jpg", "camera": {"focal_length": focal}}])
        )
    sample = load_only("navi", tmp_path, "cup/wild_set/images/000.jpg")
    assert sample.depth is not None
    assert sample.normals is not None
    assert sample.depth[80, 120] == pytest.approx(0.5, rel=1e-3)
    assert not sample.depth[0].any()
    np.testing.assert_allclose(sample.normals[:, 80, 120], [0.5**0.5, 0, -(0.5**0.5)], atol=0.02)
