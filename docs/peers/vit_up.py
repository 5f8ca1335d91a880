"""ViT-Up for DINOv3 ViT-S+: github.com/krispinwandel/vit-up by torch.hub. It runs a backbone of its own, at 448 px.

Its features are DINOv3's: compare it with a student of vit_small_plus_patch16_dinov3.lvd1689m. The pass of brixel's
backbone, which it does not use, is in the cost of the row: subtract that of the row `backbone`.
"""

import torch

model = torch.hub.load("krispinwandel/vit-up", "vit_up_dinov3_splus", use_bfloat16=False, device="cpu", trust_repo=True)
model.eval()


def vit_up(images, feature_map, output_size):
    """Asks for the features at the centres of the cells, as (x, y) from 0 to 1."""
    y, x = ((torch.arange(cells, device=images.device) + 0.5) / cells for cells in output_size)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(1, -1, 2)
    found = model(images, points.expand(len(images), -1, -1))
    return found.transpose(1, 2).reshape(len(images), -1, *output_size)


vit_up.guide_size = 448
