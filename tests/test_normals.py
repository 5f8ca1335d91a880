"""Normals from depth, on surfaces whose normals are known: planes, a sphere, a corner, an edge, coarse steps of depth."""

from __future__ import annotations

import numpy as np
import pytest

from brixel_cli.data.normals import normals_from_depth

INTRINSICS = (260.0, 258.0, 162.0, 118.0)
SIZE = (240, 320)
STEP = 0.0392
"""Of depth stored in 8 bits over 10 m."""


def rays() -> np.ndarray:
    v, u = np.mgrid[: SIZE[0], : SIZE[1]].astype(np.float64)
    fx, fy, cx, cy = INTRINSICS
    return np.stack([(u - cx) / fx, (v - cy) / fy, np.ones(SIZE)])


def plane(normal: tuple[float, float, float], metres: float) -> tuple[np.ndarray, np.ndarray]:
    """Depth of a plane through (0, 0, metres), 0 where it is not in front of the camera within 6 m; unit normal."""
    unit = np.array(normal) / np.linalg.norm(normal)
    across = np.einsum("i,ihw->hw", unit, rays())
    depth = unit[2] * metres / np.where(across == 0, np.inf, across)
    return np.where((depth > 0.3) & (depth < 6), depth, 0), unit


def quantised(depth: np.ndarray) -> np.ndarray:
    return (np.round(depth / STEP) * STEP).astype(np.float32)


def degrees(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Angles at the pixels that have a normal."""
    true = np.broadcast_to(true[:, None, None] if true.ndim == 1 else true, found.shape)
    angle = np.degrees(np.arccos(np.clip((found * true).sum(0), -1, 1)))
    return angle[np.abs(found).sum(0) > 0]


FACING = [(0, 0, -1), (0.7, 0, -1), (0, -1, -0.3), (0, 1, -0.4), (-1, 0.3, -0.5)]


@pytest.mark.parametrize("normal", FACING)
@pytest.mark.parametrize("reduction", [1, 2, 3])
def test_the_normal_of_a_plane_is_found_and_faces_the_camera(
    normal: tuple[float, float, float], reduction: int
) -> None:
    depth, true = plane(normal, 2.0)
    found = normals_from_depth(depth.astype(np.float32), INTRINSICS, reduction=reduction)
    assert found.shape == (3, *SIZE)
    assert found.dtype == np.float32
    known = depth > 0
    assert (np.abs(found).sum(0) > 0)[known].mean() > 0.97
    np.testing.assert_array_equal(found[:, ~known], 0)
    assert degrees(found, true).max() < 1
    assert np.abs((found**2).sum(0)[np.abs(found).sum(0) > 0] - 1).max() < 1e-4
    assert ((found * rays()).sum(0) <= 0).all()


@pytest.mark.parametrize("normal", FACING[1:])
def test_steps_of_depth_tilt_the_plane_by_a_few_degrees_at_most(normal: tuple[float, float, float]) -> None:
    depth, true = plane(normal, 2.0)
    error = degrees(normals_from_depth(quantised(depth), INTRINSICS, radius=7, reduction=1, tolerance=0.04), true)
    assert error.mean() < 4
    assert np.median(error) < 2


def test_a_floor_points_up_and_a_wall_on_the_left_points_right() -> None:
    # x right, y down, z forward: up is y = -1. A floor 1 m below the camera: y = 1, depth = 1 / ((v - cy) / fy).
    v = np.arange(SIZE[0])[:, None] - INTRINSICS[3]
    floor = np.where(v > 30, INTRINSICS[1] / np.where(v > 30, v, 1), 0)
    found = normals_from_depth(np.broadcast_to(floor, SIZE).astype(np.float32), INTRINSICS)
    np.testing.assert_allclose(found[:, 200, 100], [0, -1, 0], atol=0.01)
    u = np.arange(SIZE[1])[None] - INTRINSICS[2]
    wall = np.where(u < -30, -INTRINSICS[0] / np.where(u < -30, u, -1), 0)
    found = normals_from_depth(np.broadcast_to(wall, SIZE).astype(np.float32), INTRINSICS)
    np.testing.assert_allclose(found[:, 100, 40], [1, 0, 0], atol=0.01)


def sphere() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depth and normals of a sphere of 0.8 m at 2.5 m before a wall at 3.6 m, and where it is."""
    centre, radius = np.array([0.1, 0.0, 2.5]), 0.8
    ray = rays()
    a, b = (ray**2).sum(0), -2 * np.einsum("i,ihw->hw", centre, ray)
    root = b * b - 4 * a * ((centre**2).sum() - radius**2)
    hit = root > 0
    near = (-b - np.sqrt(np.maximum(root, 0))) / (2 * a)
    normals = np.where(hit, (ray * near - centre[:, None, None]) / radius, np.array([0, 0, -1.0])[:, None, None])
    return np.where(hit, near, 3.6), normals, hit


def test_a_sphere_keeps_its_outline() -> None:
    depth, true, hit = sphere()
    found = normals_from_depth(depth.astype(np.float32), INTRINSICS, reduction=1, tolerance=0.02)
    error = degrees(found, true).reshape(SIZE)
    assert np.median(error[hit]) < 1
    assert error[hit].mean() < 2
    # The wall is not tilted by the sphere before it: but for the outline it is a plane.
    assert np.percentile(error[~hit], 95) < 0.1
    coarse = degrees(normals_from_depth(quantised(depth), INTRINSICS, reduction=1), true).reshape(SIZE)
    assert np.median(coarse[hit]) < 5


def test_two_walls_meet_in_an_edge() -> None:
    left, left_normal = plane((1, 0, -1), 2.0)
    right, right_normal = plane((-1, 0, -1), 2.0)
    true = np.where((left < right)[None], left_normal[:, None, None], right_normal[:, None, None])
    found = normals_from_depth(np.minimum(left, right).astype(np.float32), INTRINSICS, reduction=1, tolerance=0.005)
    error = degrees(found, true).reshape(SIZE)
    beyond_edge = np.abs(np.arange(SIZE[1]) - INTRINSICS[2]) > 6
    assert error[:, beyond_edge].max() < 1
    assert error[:, ~beyond_edge].mean() < 10


def test_invalid_depth_has_no_normal_and_disturbs_no_other() -> None:
    depth, true = plane((0.3, -0.2, -1), 2.0)
    rng = np.random.default_rng(0)
    holes = rng.random(SIZE) < 0.3
    holes[100:140, 100:160] = True
    depth = np.where(holes, 0, depth).astype(np.float32)
    found = normals_from_depth(depth, INTRINSICS, reduction=1)
    np.testing.assert_array_equal(found[:, holes], 0)
    assert (np.abs(found).sum(0) > 0)[~holes].mean() > 0.99
    assert degrees(found, true).max() < 0.5
    assert not normals_from_depth(np.zeros(SIZE, np.float32), INTRINSICS).any()


def test_a_lonely_pixel_has_no_normal() -> None:
    depth = np.zeros(SIZE, np.float32)
    depth[50:52, 60:62] = 2.0
    assert not normals_from_depth(depth, INTRINSICS, reduction=1).any()


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 2), (31, 33)])
@pytest.mark.parametrize("reduction", [1, 2, 4, 9])
def test_any_size_gives_normals_of_that_size(size: tuple[int, int], reduction: int) -> None:
    found = normals_from_depth(np.full(size, 2.0, np.float32), INTRINSICS, radius=2, reduction=reduction)
    assert found.shape == (3, *size)
