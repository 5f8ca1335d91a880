"""Correspondence from poses and depth, worked by hand; what features find, and how near that is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brixel_cli.core.correspondence import (
    View,
    common_grid,
    features_at,
    nearest_pixels,
    pck,
    project,
    unit_map,
    viewpoint_change_deg,
    visible,
)

HEIGHT, WIDTH = 80, 100
CAMERA = (100.0, 100.0, 50.0, 40.0)


def pose(turn: list[list[float]] | None = None, at: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    """Of a camera at a place of the scene; `turn` has its axes in the columns."""
    found = np.eye(4)
    if turn is not None:
        found[:3, :3] = turn
    found[:3, 3] = at
    return found


def view(depth: float, where: np.ndarray) -> View:
    return View(np.full((HEIGHT, WIDTH), depth, np.float32), CAMERA, where)


QUARTER_ROLL = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
"""About the viewing axis: the camera's x points down in the scene."""
HALF_TURN = [[-1, 0, 0], [0, 1, 0], [0, 0, -1]]
"""About the vertical axis."""


def test_a_camera_that_moves_right_sees_things_further_left() -> None:
    pixels = np.array([[50.0, 40.0], [70.0, 30.0]])
    places, depths = project(pixels, np.array([2.0, 4.0]), view(2, pose()), view(2, pose(at=(0.1, 0, 0))))
    # f * t / z pixels: 100 * 0.1 / 2 = 5, and 100 * 0.1 / 4 = 2.5.
    assert places == pytest.approx(np.array([[45.0, 40.0], [67.5, 30.0]]))
    assert depths == pytest.approx([2.0, 4.0])


def test_a_camera_that_moves_forward_sees_things_larger() -> None:
    # 10 pixels from the middle at 2 m are 0.2 m; at 1 m they are 20 pixels.
    places, depths = project(np.array([[60.0, 40.0]]), np.array([2.0]), view(2, pose()), view(1, pose(at=(0, 0, 1))))
    assert places == pytest.approx(np.array([[70.0, 40.0]]))
    assert depths == pytest.approx([1.0])


def test_a_camera_that_rolls() -> None:
    # What is right of the middle lies above it where the camera's own x axis points down.
    places, _ = project(np.array([[60.0, 40.0]]), np.array([2.0]), view(2, pose()), view(2, pose(QUARTER_ROLL)))
    assert places == pytest.approx(np.array([[50.0, 30.0]]))
    assert viewpoint_change_deg(pose(), pose(QUARTER_ROLL)) == pytest.approx(90)
    assert viewpoint_change_deg(pose(), pose(HALF_TURN)) == pytest.approx(180)
    assert viewpoint_change_deg(pose(QUARTER_ROLL), pose(QUARTER_ROLL, (1, 2, 3))) == pytest.approx(0, abs=1e-4)


def test_what_is_hidden_beside_or_behind_is_not_seen() -> None:
    pixels = np.array([[50.0, 40.0], [2.0, 40.0]])
    here, right = view(2, pose()), pose(at=(0.1, 0, 0))
    # The second pixel moves 5 to the left, out of the image.
    assert visible(pixels, here, view(2, right), 0.05)[0].tolist() == [True, False]
    # The other camera measures 1.5 m, where the points are 2 m away; or 1.95 m, which is within 5 %; or nothing.
    assert not visible(pixels, here, view(1.5, right), 0.05)[0].any()
    assert visible(pixels, here, view(1.95, right), 0.05)[0][0]
    assert not visible(pixels, here, view(0, right), 0.05)[0].any()
    assert not visible(pixels, here, view(2, pose(HALF_TURN)), 0.05)[0].any()


def test_depth_is_read_at_the_nearest_pixel() -> None:
    depth = np.zeros((HEIGHT, WIDTH), np.float32)
    depth[3, 7] = 4
    found = View(depth, CAMERA, pose()).depth_at(np.array([[7.4, 2.6], [7.6, 3.0], [-1, 0], [200, 3]]))
    assert found.tolist() == [4, 0, 0, 0]


def test_pck_is_a_share_of_the_longer_side() -> None:
    # Of 100 pixels: 1, 2 and 5. Distances 0.5, 1, 1.5, 5 (of 3 and 4) and 6.
    found = np.array([[0.5, 0], [1, 0], [0, 1.5], [3, 4], [6, 0]])
    assert pck(found, np.zeros((5, 2)), (HEIGHT, WIDTH)) == {"pck_1": 2 / 5, "pck_2": 3 / 5, "pck_5": 4 / 5}


def test_the_nearest_cell_is_named_by_its_centre() -> None:
    cells = torch.eye(4).reshape(4, 2, 2)
    # An image of 20x40 pixels: cells of 10x20. Cell (0, 1) has columns 20 to 39, whose middle is 29.5, rows 0 to 9.
    assert nearest_pixels(torch.eye(4)[[1, 2]], cells, (20, 40)).tolist() == [[29.5, 4.5], [9.5, 14.5]]


def test_features_are_read_between_cells() -> None:
    cells = torch.eye(2).reshape(2, 1, 2)  # of 10 pixels each, with centres at 4.5 and 14.5
    found = features_at(cells, np.array([[4.5, 2.0], [9.5, 2.0], [0.0, 0.0]]), (5, 20))
    half = 0.5**0.5
    assert found.flatten().tolist() == pytest.approx([1, 0, half, half, 1, 0])


def test_the_common_grid_keeps_the_proportions() -> None:
    assert common_grid((480, 854), 32) == (32, 57)  # 854 * 32 / 480 = 56.9
    assert common_grid((640, 480), 96) == (128, 96)
    assert torch.allclose(unit_map(torch.full((4, 2, 2), 3.0), (6, 8)), torch.full((4, 6, 8), 0.5))
