"""Targets of a labelled set: what the values in masks, depth maps and normals mean, and faults in them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from labelled_sets import HEIGHT, WIDTH, fault, first, make_root, opened, ramp, save
from PIL import Image

from brixel_cli.errors import BrixelError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path)


def test_labels_keep_their_resolution_and_void_is_255(root: Path) -> None:
    sample = first(root)
    assert sample.name == "images/train/a.png"
    assert sample.labels is not None
    assert sample.labels.dtype == np.uint8
    expected = ramp() % 3
    expected[0, 0] = 255
    np.testing.assert_array_equal(sample.labels, expected)
    assert sample.depth is None
    assert sample.normals is None
    assert sample.valid.all()
    assert sample.valid.shape == (HEIGHT, WIDTH)


def write_mask(root: Path, values: list[int], dtype: type = np.uint8) -> None:
    """A mask whose first row begins with these values; the rest repeats the last one."""
    mask = np.full((HEIGHT, WIDTH), values[-1], dtype)
    mask[0, : len(values)] = values
    save(root / "labels/train/a.png", mask)


def labels_of(root: Path, count: int, *changes: str) -> list[int]:
    labels = first(root, *changes).labels
    assert labels is not None
    return labels[0, :count].tolist()


def test_an_offset_moves_the_numbers_and_zero_can_be_void(root: Path) -> None:
    write_mask(root, [0, 1, 2, 3])
    assert labels_of(root, 4, "data.labels.offset=-1", "data.labels.ignore=[0]") == [255, 0, 1, 2]


def test_ids_map_values_to_classes(root: Path) -> None:
    write_mask(root, [7, 8, 11, 12, 40, 255])
    ids = "data.labels.ids={sky: [7], sea: [11, 12], land: [8]}"
    assert labels_of(root, 6, ids, "data.labels.others=ignore") == [0, 2, 1, 1, 255, 255]
    assert fault(root, ids) == (
        "ROOT/labels/train/a.png: the value 40 (1 pixel) means no class: the recipe has 3 classes, the values of "
        "data.labels.ids, and ignores 255. See data.labels.classes, offset, ids and ignore; "
        "data.labels.others: ignore leaves such pixels out."
    )


def test_a_value_outside_the_range_is_named_with_its_file(root: Path) -> None:
    write_mask(root, [0, 3, 9, 9, 2])
    assert fault(root) == (
        "ROOT/labels/train/a.png: the value 9 (2 pixels, and 1 more such values) means no class: the recipe has 3 "
        "classes, 0 to 2, and ignores 255. See data.labels.classes, offset, ids and ignore; "
        "data.labels.others: ignore leaves such pixels out."
    )
    write_mask(root, [0, 1])
    assert "the value 0 (1 pixel) means no class: the recipe has 3 classes, 1 to 3, and ignores nothing." in fault(
        root, "data.labels.offset=-1", "data.labels.ignore=[]"
    )


def test_masks_of_sixteen_bits_of_one_bit_and_grey_ones_in_colour_are_read(root: Path) -> None:
    write_mask(root, [1000, 2000, 3000], np.uint16)
    ids = "data.labels.ids={sky: [1000], sea: [2000], land: [3000]}"
    assert labels_of(root, 3, ids) == [0, 1, 2]
    Image.fromarray((ramp() % 2).astype(bool)).save(root / "labels/train/a.png")
    assert labels_of(root, 3) == [0, 1, 0]
    save(root / "labels/train/a.png", np.repeat((ramp() % 3).astype(np.uint8)[..., None], 3, axis=2))
    assert labels_of(root, 4) == [0, 1, 2, 0]


def test_the_indices_of_a_palette_are_the_classes_not_its_colours(root: Path) -> None:
    mask = Image.fromarray((ramp() % 3).astype(np.uint8), "P")
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    mask.save(root / "labels/train/a.png")
    assert labels_of(root, 4) == [0, 1, 2, 0]


COLOURS = "data.labels.colours={sky: [[0, 0, 255]], sea: [[0, 80, 0], [0, 90, 0]], land: [[200, 100, 0]]}"


def test_colours_map_to_classes(root: Path) -> None:
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[:] = 200, 100, 0
    picture[0, :3] = [[0, 0, 255], [0, 80, 0], [0, 90, 0]]
    path = save(root / "labels/train/a.png", picture)
    assert labels_of(root, 4, COLOURS) == [0, 1, 1, 2]
    assert fault(root) == (
        "RGB pixels, expected a mask of class numbers; for one of colours give data.labels.colours: "
        "ROOT/labels/train/a.png"
    )
    picture[0, 3] = 1, 2, 3
    save(path, picture)
    assert labels_of(root, 4, COLOURS, "data.labels.others=ignore") == [0, 1, 1, 255]
    assert fault(root, COLOURS) == (
        "ROOT/labels/train/a.png: the colour [1, 2, 3] (1 pixel) means no class: the recipe has 3 classes. "
        "Add it to data.labels.colours, or set data.labels.others to ignore."
    )


def test_image_and_target_of_different_sizes_are_both_named(root: Path) -> None:
    save(root / "labels/train/a.png", np.zeros((HEIGHT, WIDTH + 1), np.uint8))
    message = (
        f"ROOT/images/train/a.png is {WIDTH}x{HEIGHT} pixels, but its labels, ROOT/labels/train/a.png, "
        f"{WIDTH + 1}x{HEIGHT}: they have to be of the same size."
    )
    assert fault(root) == message
    save(root / "labels/train/a.png", np.zeros((WIDTH, HEIGHT), np.uint8))
    assert fault(root).endswith("size. One of them is turned: look at the EXIF orientation of the image.")


def test_damaged_files_are_named(root: Path) -> None:
    (root / "labels/train/a.png").write_bytes(b"")
    assert fault(root) == "empty: 0 bytes: ROOT/labels/train/a.png"
    (root / "images/train/a.png").write_bytes(b"no image")
    assert fault(root) == "not an image of a format that brixel reads: ROOT/images/train/a.png"
    with pytest.raises(BrixelError, match="not an image of a format that brixel reads"):
        opened(root).size(0)


def test_depth_is_metres_and_zero_where_unknown_or_out_of_range(root: Path) -> None:
    sample = first(root, "task=depth")
    assert sample.depth is not None
    assert sample.labels is None
    assert sample.depth.dtype == np.float32
    assert sample.depth[0, :4].tolist() == pytest.approx([0, 0, 1.002, 1.003])  # 0 unknown, 20 m beyond the range
    assert sample.depth[5, 7] == pytest.approx(1.507)


def test_depth_can_be_inverse_and_of_other_kinds(root: Path) -> None:
    path = root / "depth/a.png"
    save(path, np.full((HEIGHT, WIDTH), 50, np.uint8))
    inverse = first(root, "task=depth", "data.depth.scale=0.01", "data.depth.inverse=true").depth
    assert inverse is not None
    assert inverse[3, 3] == pytest.approx(2)  # 1 / (50 x 0.01)
    values = np.full((HEIGHT, WIDTH), 1.5, np.float32)
    values[0, :3] = np.nan, np.inf, -1
    for name in "ab":
        np.save(root / f"depth/{name}.npy", values)
    (root / "depth/town").mkdir(exist_ok=True)
    np.save(root / "depth/town/c.npy", values)
    floats = first(root, "task=depth", "data.depth.scale=1", "data.depth.files=depth/{name}.npy").depth
    assert floats is not None
    assert floats[0, :4].tolist() == [0, 0, 0, 1.5]


def test_values_that_mean_unknown_do_not_count(root: Path) -> None:
    depth = first(root, "task=depth", "data.depth.invalid=[1003, 1004]").depth
    assert depth is not None
    assert depth[0, 2:6].tolist() == pytest.approx([1.002, 0, 0, 1.005])


def test_the_evaluation_crop_is_a_mask(root: Path) -> None:
    sample = first(root, "task=depth", "data.depth.crop=[2, 12, 3, 20]")
    assert sample.valid.sum() == 10 * 17
    assert sample.valid[2:12, 3:20].all()
    assert fault(root, "task=depth", "data.depth.crop=[2, 16, 3, 20]") == (
        "ROOT/depth/a.png is 22x15 pixels, but data.depth.crop [2, 16, 3, 20] ([top, bottom, left, right]) "
        "reaches to 20x16."
    )
    assert fault(root, "task=depth", "data.depth.crop=[0, 1, 0, 2]") == (
        "ROOT/depth/a.png has no valid depth inside data.depth.crop [0, 1, 0, 2] ([top, bottom, left, right])."
    )


def test_depth_without_a_valid_pixel_is_named_with_its_values(root: Path) -> None:
    assert fault(root, "task=depth", "data.depth.scale=1") == (
        "ROOT/depth/a.png has no valid depth: 1002 to 2e+04 m, with data.depth.scale 1; "
        "valid are 0.001 to 10 m, data.depth.range."
    )
    save(root / "depth/a.png", np.zeros((HEIGHT, WIDTH), np.uint16))
    assert fault(root, "task=depth").startswith("ROOT/depth/a.png has no valid depth: every pixel is unknown, with")


def test_depth_of_another_kind_is_refused(root: Path) -> None:
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[0, 0, 0] = 1
    save(root / "depth/a.png", picture)
    assert fault(root, "task=depth") == "RGB pixels, expected a depth map of one channel: ROOT/depth/a.png"
    for name in ("a", "b", "town/c"):
        (root / "depth" / name).parent.mkdir(exist_ok=True)
        np.save(root / f"depth/{name}.npy", np.zeros((2, 3, 4)))
    npy = "data.depth.files=depth/{name}.npy"
    assert fault(root, "task=depth", npy) == "ROOT/depth/a.npy has the shape (2, 3, 4); a depth map is (height, width)."
    (root / "depth/a.npy").write_bytes(b"junk")
    assert fault(root, "task=depth", npy).startswith("ROOT/depth/a.npy is no .npy file that can be read: ")


def flat(root: Path) -> None:
    save(root / "depth/a.png", np.full((HEIGHT, WIDTH), 2000, np.uint16))


def test_normals_are_derived_from_depth(root: Path) -> None:
    flat(root)
    sample = first(root, "task=depth_normals")
    assert sample.normals is not None
    assert sample.depth is not None
    np.testing.assert_allclose(sample.normals, np.broadcast_to([[[0.0]], [[0]], [[-1]]], (3, HEIGHT, WIDTH)), atol=1e-5)
    alone = first(root, "task=normals")
    assert alone.depth is None
    np.testing.assert_array_equal(alone.normals, sample.normals)


def test_normals_that_cannot_be_derived_are_a_fault(root: Path) -> None:
    rng = np.random.default_rng(0)
    save(root / "depth/a.png", rng.integers(500, 9000, (HEIGHT, WIDTH)).astype(np.uint16))
    assert fault(root, "task=normals", "data.normals.tolerance=1e-6") == (
        "ROOT/depth/a.png: no normal can be derived. Are data.depth.intrinsics right, "
        "data.normals.tolerance (1e-06 m) and radius large enough?"
    )


CAMERA = ["task=normals", "data.depth.intrinsics=null", "data.normals.reduction=1",
          "data.depth.camera={files: cameras.json, image: filename, focal: camera.focal_length}"]  # fmt: skip


def test_focal_lengths_are_read_for_each_image(root: Path) -> None:
    # A slope of 1 in depth over width: with the focal length f, depth is 2 / (1 - x), x = (u - 11) / f.
    for focal in (30.0, 60.0):
        records = [{"filename": "a.png", "camera": {"focal_length": focal}}]
        (root / f"cameras{focal:g}.json").write_text(json.dumps(records))
        x = (np.arange(WIDTH) - WIDTH / 2) / focal
        depth = np.broadcast_to(2000 / (1 - x), (HEIGHT, WIDTH)).round().astype(np.uint16)
        save(root / "depth/a.png", depth)
        normals = first(root, *CAMERA, f"data.depth.camera.files=cameras{focal:g}.json").normals
        assert normals is not None
        half = np.sqrt(0.5)
        np.testing.assert_allclose(normals[:, 7, 11], [half, 0, -half], atol=0.01)


def test_a_camera_file_that_lacks_the_image_is_named(root: Path) -> None:
    path = root / "cameras.json"
    path.write_text(json.dumps([{"filename": "b.png", "camera": {"focal_length": 20}}]))
    assert fault(root, *CAMERA) == (
        "ROOT/cameras.json has no focal length for a.png: expected a record whose filename is the file's name, "
        "with a number above 0 at camera.focal_length."
    )


@pytest.mark.parametrize("text", ["[", "[3]", '[{"name": 1}]', "3"])
def test_a_camera_file_of_another_kind_is_named(root: Path, text: str) -> None:
    (root / "cameras.json").write_text(text)
    assert fault(root, *CAMERA) == "ROOT/cameras.json is no JSON list of records with the key filename."


def test_normals_in_colours_are_turned_into_our_axes(root: Path) -> None:
    # A file with x right, y up, z towards the viewer; its first pixels: unknown (black), unknown (grey), up, right.
    coded = np.full((HEIGHT, WIDTH, 3), [128, 128, 255], np.uint8)
    coded[0, :4] = [[0, 0, 0], [128, 128, 128], [128, 255, 128], [255, 128, 128]]
    for name in ("a", "b", "town/c"):
        save(root / f"normals/{name}.png", coded)
    files = "data.normals.files=normals/{name}.png"
    normals = first(root, "task=normals", files, "data.normals.axes=[1, -1, -1]").normals
    assert normals is not None
    assert normals.dtype == np.float32
    np.testing.assert_allclose(
        normals[:, 0, :5].T, [[0, 0, 0], [0, 0, 0], [0, -1, 0], [1, 0, 0], [0, 0, -1]], atol=0.005
    )
    assert fault(root, "task=normals", files) == (
        "ROOT/normals/a.png: its normals point away from the camera, z > 0 on average. Turn them with "
        "data.normals.axes, the signs that make x point right, y down and z forward."
    )
    save(root / "normals/a.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    assert fault(root, "task=normals", files) == "ROOT/normals/a.png has no valid normal; see data.normals.encoding."
    save(root / "normals/a.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    assert fault(root, "task=normals", files) == (
        "L pixels, expected RGB that encodes normals as 2 x value / 255 - 1: ROOT/normals/a.png"
    )


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_normals_in_arrays_are_read(root: Path, order: tuple[int, int, int]) -> None:
    vectors = np.zeros((3, HEIGHT, WIDTH), np.float64)
    vectors[0], vectors[2] = 3, -4
    vectors[:, 0, 0] = np.nan
    for name in ("a", "b", "town/c"):
        (root / "normals" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / f"normals/{name}.npy", vectors.transpose(order))
    changes = ["task=normals", "data.normals={files: 'normals/{name}.npy', encoding: npy}"]
    normals = first(root, *changes).normals
    assert normals is not None
    assert normals[:, 5, 5].tolist() == pytest.approx([0.6, 0, -0.8])
    assert normals[:, 0, 0].tolist() == [0, 0, 0]
    np.save(root / "normals/a.npy", np.zeros((4, 5)))
    assert fault(root, *changes) == (
        "ROOT/normals/a.npy has the shape (4, 5); normals are (height, width, 3) or (3, height, width)."
    )


# --- the set as a whole ---
