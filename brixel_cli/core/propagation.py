"""Propagation of masks from frame to frame by the similarity of features, without training.

Source: the evaluation of DINO, Caron et al. 2021, https://arxiv.org/abs/2104.14294, section 4.2.2, after Jabri et al.
2020, https://arxiv.org/abs/2006.14613.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_VALUES = 16 * 2**20
"""Similarities that are held at once: 64 MiB."""


@torch.inference_mode()
def propagate(
    features: Tensor,
    memory: Sequence[Tensor],
    masks: Sequence[Tensor],
    radius: int,
    top: int,
    temperature: float,
) -> Tensor:
    """Labels of a frame from those of earlier frames: the weighted mean of the labels of the most similar cells.

    Each cell looks at the cells of all earlier frames that are at most `radius` rows and columns away. Of these it
    takes the `top` with the largest cosine similarity s; their weights are exp(s / temperature), and sum to 1.

    Args:
        features: (D, h, w), of the frame, unit vectors.
        memory: (D, h, w) each, of the earlier frames, unit vectors.
        masks: (K, h, w) each, soft labels of the earlier frames.
        radius: in cells.
        top: number of cells.
        temperature: of the softmax.

    Returns:
        (K, h, w), soft labels.
    """
    height, width = features.shape[-2:]
    columns = torch.arange(width, device=features.device)
    near_column = (columns[:, None] - columns).abs() <= radius  # (target, source)
    block = max(min(BLOCK_VALUES // (width * len(memory) * width * min(2 * radius + 1, height)), height), 1)
    parts = []
    for start in range(0, height, block):
        stop = min(start + block, height)
        first, last = max(start - radius, 0), min(stop + radius, height)
        rows = torch.arange(start, stop, device=features.device)[:, None]
        near_row = (rows - torch.arange(first, last, device=features.device)).abs() <= radius
        near = (near_row[:, None, :, None] & near_column[None, :, None, :]).flatten(2).flatten(0, 1)
        targets = features[:, start:stop].flatten(1)
        similar = torch.stack([targets.T @ earlier[:, first:last].flatten(1) for earlier in memory], dim=1)
        similar.masked_fill_(~near[:, None], -torch.inf)
        best, places = similar.flatten(1).topk(min(top, similar[0].numel()), dim=1)
        weights = F.softmax(best / temperature, dim=1)
        labels = torch.stack([mask[:, first:last].flatten(1) for mask in masks], dim=1).flatten(1)  # (K, cells)
        parts.append((labels[:, places] * weights).sum(dim=-1).unflatten(1, (stop - start, width)))
    return torch.cat(parts, dim=1)


def soft_mask(labels: npt.NDArray[np.uint8], num_objects: int, grid: tuple[int, int]) -> Tensor:
    """Labels (H, W) of the background (0) and of objects from 1 as soft labels (K + 1, *grid).

    Each cell has the shares of its pixels; those that count nowhere belong to the background.
    """
    values = torch.from_numpy(labels.astype(np.int64))
    values = torch.where(values > num_objects, 0, values)
    hot = F.one_hot(values, num_objects + 1).permute(2, 0, 1).float()
    return F.interpolate(hot[None], size=grid, mode="area")[0]


def hard_mask(soft: Tensor, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Labels (H, W) of a size (height, width) from soft labels (K + 1, h, w).

    They are enlarged bilinearly. Each object's values are brought to [0, 1] over the frame, as in DINO's evaluation, so
    that a small object is not lost to the background; then the largest counts.
    """
    enlarged = F.interpolate(soft[None], size=size, mode="bilinear", align_corners=False)[0]
    low, high = enlarged.amin(dim=(1, 2), keepdim=True), enlarged.amax(dim=(1, 2), keepdim=True)
    spread = torch.where(high > 0, high - low, 1).clamp(min=1e-12)
    scaled = torch.where(high > 0, (enlarged - low) / spread, enlarged)
    labels: npt.NDArray[np.uint8] = scaled.max(dim=0).indices.cpu().numpy().astype(np.uint8)
    return labels
