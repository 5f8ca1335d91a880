"""Pictures of predictions: colours that always mean the same, and errors where they are."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from brixel_cli.drawing.feature_maps import panel
from brixel_cli.drawing.predictions import (
    class_colours,
    comparison,
    depth_range,
    paint_depth,
    paint_errors,
    paint_labels,
    paint_normals,
)

BLACK, GREY = [0, 0, 0], [128, 128, 128]
VIRIDIS_LAST, VIRIDIS_FIRST = [253, 231, 37], [68, 1, 84]
INFERNO_FIRST, INFERNO_LAST = [0, 0, 4], [252, 255, 164]


def pixel(image: Image.Image, row: int, column: int) -> list[int]:
    return np.asarray(image)[row, column].tolist()


def test_each_class_has_a_colour_of_its_own_and_none_is_black() -> None:
    colours = class_colours()
    assert colours.shape == (256, 3)
    assert colours[255].tolist() == BLACK
    assert len({tuple(colour) for colour in colours.tolist()}) == 256
    assert colours[:255].max(axis=1).min() > 150
    # Number 0: hue 0, saturation 0.85, value 0.95: (0.95, 0.95 * 0.15, 0.95 * 0.15).
    assert colours[0].tolist() == [242, 36, 36]


def test_classes_next_to_each_other_are_told_apart() -> None:
    colours = class_colours()[:150].astype(int)
    assert np.abs(np.diff(colours, axis=0)).sum(axis=1).min() > 100


def test_labels_are_painted_by_number() -> None:
    image = paint_labels(torch.tensor([[0, 255], [1, 0]], dtype=torch.uint8))
    assert pixel(image, 0, 0) == pixel(image, 1, 1) == [242, 36, 36]
    assert pixel(image, 0, 1) == BLACK
    assert pixel(image, 1, 0) == class_colours()[1].tolist()


def test_near_is_yellow_far_is_violet_unknown_is_black() -> None:
    image = paint_depth(torch.tensor([[1.0, 3.0, 0.0, 9.0]]), 1.0, 3.0)
    assert [pixel(image, 0, column) for column in range(4)] == [VIRIDIS_LAST, VIRIDIS_FIRST, BLACK, VIRIDIS_FIRST]


def test_the_range_of_depth_leaves_out_what_is_invalid() -> None:
    depth = torch.cat([torch.zeros(50), torch.linspace(1, 2, 101)])
    low, high = depth_range(depth)
    assert round(low, 6) == 1.02
    assert round(high, 6) == 1.98
    assert depth_range(torch.zeros(4)) == (0.0, 1.0)


def test_normals_have_the_usual_colours() -> None:
    # x right, y down, z forward: facing the camera is -z, up is -y.
    normals = torch.tensor([[0.0, 0, -1], [0, -1, 0], [1, 0, 0], [0, 0, 0]]).T[:, None]
    image = paint_normals(normals)
    assert pixel(image, 0, 0) == [128, 128, 255]
    assert pixel(image, 0, 1) == [128, 255, 128]
    assert pixel(image, 0, 2) == [255, 128, 128]
    assert pixel(image, 0, 3) == BLACK


def test_wrong_labels_are_red_and_void_is_never_wrong() -> None:
    truth = torch.tensor([[0, 1, 255]], dtype=torch.uint8)
    image = paint_errors("segmentation", Image.new("RGB", (6, 2)), torch.tensor([[0, 2, 2]]), truth)
    assert image.size == (3, 1)
    assert [pixel(image, 0, column) for column in range(3)] == [[150] * 3, [230, 30, 30], [150] * 3]


def test_errors_of_depth_are_relative_and_those_of_normals_angles() -> None:
    truth = torch.tensor([[2.0, 2.0, 0.0]])
    image = paint_errors("depth", Image.new("RGB", (3, 1)), torch.tensor([[2.0, 2.6, 1.0]]), truth)  # 0 and 30 %
    assert [pixel(image, 0, column) for column in range(3)] == [INFERNO_FIRST, INFERNO_LAST, GREY]
    facing = torch.tensor([[0.0, 0, -1], [0, 0, -1], [0, 0, 0]]).T[:, None]
    found = torch.tensor([[0.0, 0, -1], [0.75**0.5, 0, -0.5], [0, 0, -1]]).T[:, None]  # cos 60 degrees = 0.5
    image = paint_errors("normals", Image.new("RGB", (3, 1)), found, facing)
    assert pixel(image, 0, 0) == INFERNO_FIRST
    assert np.abs(np.subtract(pixel(image, 0, 1), INFERNO_LAST)).max() <= 4
    assert pixel(image, 0, 2) == GREY


def test_a_comparison_has_a_column_for_each_source_and_fits_a_panel() -> None:
    image = Image.new("RGB", (40, 20), "white")
    depth = torch.rand(1, 20, 40) + 1
    normals = torch.nn.functional.normalize(torch.randn(3, 20, 40), dim=0)
    labels = torch.randint(0, 5, (20, 40), dtype=torch.uint8)
    for quantity, truth in (("segmentation", labels), ("depth", depth), ("normals", normals)):
        titles, rows = comparison(quantity, image, truth, {"plain": truth, "student": truth.clone()})  # type: ignore[arg-type]
        assert titles == ["image, truth", "plain", "student"]
        assert [len(row) for row in rows] == [3, 3]
        assert rows[0][0] is image
        np.testing.assert_array_equal(np.asarray(rows[0][1]), np.asarray(rows[1][0]))
        assert {tile.size for row in rows for tile in row} == {(40, 20)}
        assert panel(titles, rows).width == 3 * 448 + 4 * 4
