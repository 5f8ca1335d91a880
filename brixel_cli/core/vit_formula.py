"""Arithmetic of a vision transformer in closed form, to check the operator count of `cost.py` against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VitShape:
    """The numbers on which a plain ViT's arithmetic depends.

    Attributes:
        patch_size: side of a patch in pixels.
        embed_dim: width D of the tokens.
        depth: number of blocks.
        attention_dim: width A of queries, keys and values, all heads together.
        mlp_dim: hidden width M of the feed-forward layers.
        mlp_inputs: projections into that width: 1, or 2 where one gates the other (SwiGLU).
        num_prefix_tokens: class and register tokens.
    """

    patch_size: int
    embed_dim: int
    depth: int
    attention_dim: int
    mlp_dim: int
    mlp_inputs: int
    num_prefix_tokens: int


def vit_flop(shape: VitShape, height: int, width: int) -> int:
    """FLOP of one image (height, width) in pixels through a ViT, a multiply-add as 2.

    With n patches and N = n + prefix tokens, a patch embedding takes 3 p^2 D n multiply-adds, and a block
    3 D A N (queries, keys, values) + 2 A N^2 (their products) + A D N (projection) + (inputs + 1) D M N (feed-forward).
    Norms, activations, softmax, biases and position embeddings are left out, as the operator count leaves them out.
    Source: Dosovitskiy et al., arXiv 2010.11929, section 3.1; SwiGLU: Shazeer, arXiv 2002.05202.
    """
    patches = (height // shape.patch_size) * (width // shape.patch_size)
    tokens = patches + shape.num_prefix_tokens
    embedding = 3 * shape.patch_size**2 * shape.embed_dim * patches
    projections = 4 * shape.embed_dim * shape.attention_dim * tokens
    attention = 2 * shape.attention_dim * tokens**2
    feed_forward = (shape.mlp_inputs + 1) * shape.embed_dim * shape.mlp_dim * tokens
    return 2 * (embedding + shape.depth * (projections + attention + feed_forward))
