"""NAF, arXiv 2511.18452, for any backbone: github.com/valeoai/NAF by torch.hub. Needs natten and einops."""

import torch

model = torch.hub.load("valeoai/NAF", "naf", trust_repo=True).eval().requires_grad_(False)


def naf(images, feature_map, output_size):
    """Guided by the image that the backbone sees."""
    return model.to(images.device)(images, feature_map, output_size)


def naf_448(images, feature_map, output_size):
    """Guided by the image at 448 px, whatever the backbone sees."""
    return naf(images, feature_map, output_size)


naf_448.guide_size = 448
