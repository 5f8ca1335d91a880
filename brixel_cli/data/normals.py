"""Surface normals from depth and intrinsics: planes fitted robustly to inverse depth, in which they are linear."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
STEEPEST = 3.0
"""Slope, in depth over width, up to which a neighbour is taken for part of the same surface at first: 72 degrees."""
REFINEMENTS = (2.0, 1.0, 1.0)
"""Tolerances of the following fits, in units of the given one."""
LEAST_SHARE = 0.08
"""Of the window that has to lie on the plane for the plane to count."""
FAR_OFF = 1e6


def normals_from_depth(
    depth: Array, intrinsics: Sequence[float], radius: int = 5, reduction: int = 2, tolerance: float = 0.04
) -> Array:
    """Surface normals of a depth map.

    A plane n . P = d seen by a pinhole camera has the inverse depth (n . K^-1 (u, v, 1)) / d, linear in the pixel
    (u, v). Around each pixel a plane is fitted to the inverse depth of a window by least squares, then again to the
    pixels that lie within the tolerance of the plane found before, so that neither other surfaces nor the steps of
    quantised depth tilt it.

    Args:
        depth: (H, W), metres; 0 is invalid.
        intrinsics: fx, fy, cx, cy in pixels.
        radius: half the side of the window, in pixels of the reduced map.
        reduction: the map is taken, and fitted, at every so many-th pixel.
        tolerance: metres by which a pixel may lie off the plane; about one step of the depth's quantisation.

    Returns:
        (3, H, W), float32, unit vectors; x right, y down, z forward, facing the camera, so that z < 0 on what the
        camera looks at straight. 0 where depth is invalid or no plane fits.
    """
    height, width = depth.shape
    start = reduction // 2
    reduced = depth[start::reduction, start::reduction] if min(height, width) > start else depth
    valid = reduced > 0
    inverse = np.where(valid, 1 / np.where(valid, reduced, 1), 0).astype(np.float32)
    focal = np.float32((intrinsics[0] + intrinsics[1]) / 2 / reduction)
    across, down, level, count = _fit_planes(inverse, valid, radius, tolerance, focal)

    # The plane is across * (u - u0) + down * (v - v0) + level at the pixel (u0, v0) of the reduced map.
    fx, fy, cx, cy = intrinsics
    rows, columns = np.mgrid[: reduced.shape[0], : reduced.shape[1]].astype(np.float32) * reduction + start
    a, b = across * (fx / reduction), down * (fy / reduction)
    c = level - a * ((columns - cx) / fx) - b * ((rows - cy) / fy)
    normals = -np.stack([a, b, c])
    length = np.sqrt((normals**2).sum(0))
    fits = valid & (count >= max(LEAST_SHARE * (2 * radius + 1) ** 2, 3)) & (length > 0)
    normals = np.where(fits, normals / np.where(fits, length, 1), 0).astype(np.float32)

    rows_of = np.minimum(np.arange(height) // reduction, reduced.shape[0] - 1)
    columns_of = np.minimum(np.arange(width) // reduction, reduced.shape[1] - 1)
    full: Array = normals[:, rows_of[:, None], columns_of]
    full[:, depth <= 0] = 0
    return full


def _fit_planes(
    inverse: Array, valid: npt.NDArray[np.bool_], radius: int, tolerance: float, focal: np.float32
) -> tuple[Array, Array, Array, Array]:
    """Slopes across and down (per pixel), level, and number of pixels on it, of the plane around each pixel."""
    height, width = inverse.shape
    padded = np.pad(np.where(valid, inverse, np.float32(FAR_OFF)), radius, constant_values=FAR_OFF)
    allowed = (tolerance * inverse**2).astype(np.float32)  # dw = dz / z^2
    steepest = inverse * (STEEPEST / focal)  # dz per pixel is slope * z / focal
    plane: tuple[Array, Array, Array] | None = None
    count = np.zeros_like(inverse)
    for factor in (1.0, *REFINEMENTS):
        limit = allowed * np.float32(factor)
        sums = [np.zeros_like(inverse) for _ in range(9)]
        for dv in range(-radius, radius + 1):
            for du in range(-radius, radius + 1):
                other = padded[radius + dv : radius + dv + height, radius + du : radius + du + width] - inverse
                if plane is None:
                    near = np.abs(other) <= limit + steepest * np.float32(np.hypot(du, dv))
                else:
                    near = np.abs(other - (plane[0] * du + plane[1] * dv + plane[2])) <= limit
                _add(sums, near.astype(np.float32), other, du, dv)
        count = sums[0]
        plane = _solve(sums)
    assert plane is not None
    return plane[0], plane[1], plane[2] + inverse, count


def _add(sums: list[Array], weight: Array, value: Array, du: int, dv: int) -> None:
    """Add a neighbour to the moments 1, u, v, uu, uv, vv, w, uw, vw."""
    weighted = weight * value
    sums[0] += weight
    sums[6] += weighted
    for place, factor in ((1, du), (2, dv), (3, du * du), (4, du * dv), (5, dv * dv)):
        if factor:
            sums[place] += weight * np.float32(factor)
    if du:
        sums[7] += weighted * np.float32(du)
    if dv:
        sums[8] += weighted * np.float32(dv)


def _solve(sums: list[Array]) -> tuple[Array, Array, Array]:
    """Least squares plane of the moments: slopes across and down, and level at the centre."""
    one, u, v, uu, uv, vv, w, uw, vw = (moment.astype(np.float64) for moment in sums)
    one = np.maximum(one, 1)
    mean_u, mean_v, mean_w = u / one, v / one, w / one
    # Centred; the small number keeps a window of pixels in one line from having any slope across it.
    suu, svv, suv = uu - u * mean_u + 1e-3, vv - v * mean_v + 1e-3, uv - u * mean_v
    suw, svw = uw - u * mean_w, vw - v * mean_w
    determinant = suu * svv - suv**2
    across = (suw * svv - svw * suv) / determinant
    down = (svw * suu - suw * suv) / determinant
    level = mean_w - across * mean_u - down * mean_v
    return across.astype(np.float32), down.astype(np.float32), level.astype(np.float32)
