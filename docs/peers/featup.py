"""FeatUp, arXiv 2403.10516, for DINOv2 ViT-S/14: github.com/mhamilton723/FeatUp by torch.hub.."""

import torch
import torch.nn.functional as F

whole = torch.hub.load("mhamilton723/FeatUp", "dinov2", use_norm=False, trust_repo=True)
model = whole.upsampler.eval().requires_grad_(False)


def featup(images, feature_map, output_size):
    """Guided by the image that the backbone sees."""
    return F.adaptive_avg_pool2d(model.to(images.device)(feature_map, images), output_size)


def featup_448(images, feature_map, output_size):
    """Guided by the image at 448 px, whatever the backbone sees."""
    return featup(images, feature_map, output_size)


featup_448.guide_size = 448
