"""UPLiFT, arXiv 2601.17950, for DINOv2 ViT-S/14: github.com/mwalmer-umd/UPLiFT by torch.hub. Needs omegaconf."""

import math

import torch
import torch.nn.functional as F

model = torch.hub.load("mwalmer-umd/UPLiFT", "uplift_dinov2_s14", include_extractor=False, trust_repo=True)
model.eval().requires_grad_(False)


def uplift(images, feature_map, output_size):
    """Guided by the image that the backbone sees."""
    model.iters = max(math.ceil(math.log2(output_size[0] / feature_map.shape[-2])), 1)  # each doubles the grid
    finer = model.to(images.device)(images, feature_map)
    return F.interpolate(finer, output_size, mode="bilinear", antialias=True)
