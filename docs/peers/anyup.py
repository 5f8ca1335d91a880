"""AnyUp, arXiv 2510.12764, for any backbone: github.com/wimmerth/anyup by torch.hub."""

import torch

model = torch.hub.load("wimmerth/anyup", "anyup", trust_repo=True).eval().requires_grad_(False)


def anyup(images, feature_map, output_size):
    """Guided by the image that the backbone sees."""
    return model.to(images.device)(images, feature_map, output_size=output_size)


def anyup_448(images, feature_map, output_size):
    """Guided by the image at 448 px, whatever the backbone sees."""
    return anyup(images, feature_map, output_size)


anyup_448.guide_size = 448
