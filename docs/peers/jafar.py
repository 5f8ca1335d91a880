"""JAFAR, arXiv 2506.11136, for DINOv2 ViT-S/14, from a clone of github.com/PaulCouairon/JAFAR. Needs einops."""

import functools
import os
import sys

import torch

if "JAFAR_REPO" not in os.environ:
    raise ImportError("set JAFAR_REPO to a clone of github.com/PaulCouairon/JAFAR")
sys.path.insert(0, os.environ["JAFAR_REPO"])
from src.upsampler import jafar as package

RELEASE = "https://github.com/PaulCouairon/JAFAR/releases/download/Weights/vit_small_patch14_dinov2.lvd142m.pth"
file = os.environ.get("JAFAR_WEIGHTS")  # else the release is downloaded
weights = (
    torch.load(file, "cpu", weights_only=True)
    if file
    else torch.hub.load_state_dict_from_url(RELEASE, map_location="cpu")
)
model = package.JAFAR(v_dim=384)
model.load_state_dict(weights["jafar"])
model.eval().requires_grad_(False)
coordinates = package.create_coordinate


def jafar(images, feature_map, output_size):
    """Guided by the image that the backbone sees."""
    package.create_coordinate = functools.partial(coordinates, device=images.device)  # it takes a GPU for granted
    return model.to(images.device)(images, feature_map, output_size)


def jafar_448(images, feature_map, output_size):
    """Guided by the image at 448 px, whatever the backbone sees."""
    return jafar(images, feature_map, output_size)


jafar_448.guide_size = 448
