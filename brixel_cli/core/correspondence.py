"""Dense correspondence: which pixels of two images show one point of the scene, and which ones features hold alike.

Pixels are (x, y), the centre of the first one at (0, 0). Cameras look along z, x to the right and y down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Floats = npt.NDArray[np.float64]
THRESHOLDS = (1, 2, 5)
"""Of PCK, in percent of the longer side of the image."""


@dataclass(frozen=True)
class View:
    """What a camera saw.

    Attributes:
        depth: (H, W), metres along z; 0 where it is not known.
        camera: (fx, fy, cx, cy) in pixels.
        pose: (4, 4), from the camera's coordinates to the scene's.
    """

    depth: npt.NDArray[np.float32]
    camera: Sequence[float]
    pose: Floats

    def depth_at(self, pixels: Floats) -> Floats:
        """Depth at pixels (N, 2), of the nearest one; 0 where it is not known and beyond the border."""
        height, width = self.depth.shape
        x, y = np.floor(pixels + 0.5).astype(np.int64).T
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        found = np.zeros(len(pixels))
        found[inside] = self.depth[y[inside], x[inside]]
        return found


def project(pixels: Floats, depths: Floats, view: View, other: View) -> tuple[Floats, Floats]:
    """Where another camera sees the points that a camera sees at some pixels.

    Args:
        pixels: (N, 2), of `view`.
        depths: (N), metres along z of the same camera.
        view: the camera.
        other: the other camera.

    Returns:
        Pixels (N, 2) of the other camera, and depths (N) in metres; nan for points that are not in front of it.
    """
    fx, fy, cx, cy = view.camera
    points = np.stack([(pixels[:, 0] - cx) / fx * depths, (pixels[:, 1] - cy) / fy * depths, depths], axis=1)
    scene = points @ view.pose[:3, :3].T + view.pose[:3, 3]
    seen = (scene - other.pose[:3, 3]) @ other.pose[:3, :3]  # the inverse of a rotation is its transpose
    fx, fy, cx, cy = other.camera
    depth = np.where(seen[:, 2] > 0, seen[:, 2], np.nan)
    return np.stack([seen[:, 0] / depth * fx + cx, seen[:, 1] / depth * fy + cy], axis=1), depth


def visible(pixels: Floats, view: View, other: View, tolerance: float) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Which pixels (N, 2) of a view, all of known depth, another camera sees too, and where (N, 2).

    A point is seen if the depth that the other camera measured at its place differs by at most the share `tolerance`
    from the point's own; else it is hidden, or its place is not known.
    """
    places, depths = project(pixels, view.depth_at(pixels), view, other)
    known = np.isfinite(depths)
    measured = other.depth_at(np.where(known[:, None], places, -1e6))
    seen = known & (measured > 0) & (np.abs(measured - depths) <= tolerance * depths)
    return seen, places


def viewpoint_change_deg(pose: Floats, other: Floats) -> float:
    """Angle in degrees of the rotation between two cameras, of poses (4, 4)."""
    cosine = (np.trace(pose[:3, :3].T @ other[:3, :3]) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def common_grid(size: tuple[int, int], rows: int) -> tuple[int, int]:
    """A grid (height, width) of as many rows on the shorter side of an image of a size (height, width)."""
    height, width = (max(round(side * rows / min(size)), 1) for side in size)
    return height, width


def unit_map(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map (D, h, w) on another grid (height, width), bilinear, antialiased where that is coarser; unit vectors."""
    coarser = features.shape[-2] > grid[0] or features.shape[-1] > grid[1]
    resized = F.interpolate(features[None], size=grid, mode="bilinear", align_corners=False, antialias=coarser)
    return F.normalize(resized[0], dim=0)


@torch.inference_mode()
def features_at(features: Tensor, pixels: Floats, size: tuple[int, int]) -> Tensor:
    """Features (N, D), unit vectors, of a map (D, h, w) at pixels (N, 2) of an image of a size, read bilinearly."""
    height, width = size
    places = torch.from_numpy((pixels + 0.5) / (width, height) * 2 - 1).to(features)
    found = F.grid_sample(features[None], places[None, None], padding_mode="border", align_corners=False)
    return F.normalize(found[0, :, 0].T, dim=1)


@torch.inference_mode()
def nearest_pixels(queries: Tensor, features: Tensor, size: tuple[int, int]) -> Floats:
    """Where an image is most similar to some features, by cosine similarity.

    Args:
        queries: (N, D), unit vectors.
        features: (D, h, w), unit vectors, of the image: its cells are the places to choose from.
        size: (height, width) of the image in pixels.

    Returns:
        (N, 2), pixels of the image: centres of cells.
    """
    (height, width), (rows, columns) = size, features.shape[-2:]
    best = (queries @ features.flatten(1)).max(dim=1).indices.cpu().numpy()
    y, x = np.divmod(best, columns)
    return np.stack([(x + 0.5) * width / columns - 0.5, (y + 0.5) * height / rows - 0.5], axis=1)


def pck(found: Floats, truth: Floats, size: tuple[int, int]) -> dict[str, float]:
    """Share of the pixels found (N, 2) that lie near the true ones: `pck_1`, `pck_2`, `pck_5`.

    Near is at most 1, 2 or 5 percent of the longer side of the image, of a size (height, width), away.
    """
    distance = np.linalg.norm(found - truth, axis=1)
    return {f"pck_{share}": float((distance <= share / 100 * max(size)).mean()) for share in THRESHOLDS}
