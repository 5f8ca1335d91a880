"""LoftUp, arXiv 2504.14032, for DINOv2 ViT-S/14: github.com/andrehuang/loftup by torch.hub."""

import torch
import torch.nn.functional as F

model = torch.hub.load("andrehuang/loftup", "loftup_dinov2s", trust_repo=True).eval().requires_grad_(False)


def loftup(images, feature_map, output_size):
    """Guided by the image that the backbone sees."""
    return F.adaptive_avg_pool2d(model.to(images.device)(feature_map, images), output_size)


def loftup_448(images, feature_map, output_size):
    """Guided by the image at 448 px, whatever the backbone sees."""
    return loftup(images, feature_map, output_size)


loftup_448.guide_size = 448
