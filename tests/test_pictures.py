"""Feature maps as colours, and the panel in which they stand side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from brixel_cli.data.views import normalise_pixels
from brixel_cli.drawing.feature_maps import denormalise, panel, pca_colours

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("channels", [1, 2, 3, 64])
def test_each_map_becomes_a_picture_of_its_own_grid(channels: int) -> None:
    reference = randn(channels, 12, 16)
    images = pca_colours([randn(channels, 3, 4, seed=1), reference, randn(channels, 5, 2, seed=2)], reference)
    assert [image.size for image in images] == [(4, 3), (16, 12), (2, 5)]
    assert {image.mode for image in images} == {"RGB"}


def test_basis_and_range_come_from_the_reference_alone() -> None:
    reference, map_ = randn(16, 12, 12), randn(16, 6, 6, seed=1)
    alone = pca_colours([map_], reference)[0]
    beside = pca_colours([100 * randn(16, 6, 6, seed=2), map_, reference], reference)[1]
    np.testing.assert_array_equal(pixels(alone), pixels(beside))
    other = pca_colours([map_], randn(16, 12, 12, seed=3))[0]
    assert (pixels(alone) != pixels(other)).any()


def test_the_same_map_gets_the_same_colours() -> None:
    reference = randn(16, 12, 12)
    first, second = pca_colours([reference, reference.clone()], reference)
    np.testing.assert_array_equal(pixels(first), pixels(second))


def test_equal_features_have_equal_colours_on_any_grid() -> None:
    reference = randn(16, 12, 12)
    whole, part = pca_colours([reference, reference[:, 3:6, 5:7]], reference)
    # The projection sums in another order on another grid: a colour may fall on the other side of a rounding.
    np.testing.assert_allclose(pixels(part), pixels(whole)[3:6, 5:7], atol=1)


def test_the_reference_uses_the_whole_range_of_colours() -> None:
    image = pixels(pca_colours([randn(16, 32, 32)], randn(16, 32, 32))[0])
    assert image.min(axis=(0, 1)).tolist() == [0, 0, 0]
    assert image.max(axis=(0, 1)).tolist() == [255, 255, 255]
    # The 1st and the 99th percentile are the ends: about a hundredth of the 1024 locations lie at or beyond each.
    for channel in range(3):
        assert 5 <= (image[..., channel] == 255).sum() <= 30


def test_a_flat_reference_gives_a_picture_all_the_same() -> None:
    assert pca_colours([torch.ones(8, 4, 4)], torch.ones(8, 4, 4))[0].size == (4, 4)


def test_denormalise_undoes_normalise() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    np.testing.assert_array_equal(
        pixels(denormalise(normalise_pixels(tvf.pil_to_tensor(image), MEAN, STD), MEAN, STD)), pixels(image)
    )


def test_denormalise_clips_what_is_out_of_range() -> None:
    image = denormalise(torch.tensor([[[9.0]], [[-9.0]], [[0.0]]]), MEAN, STD)
    # The third channel is at its mean: 0.406 * 255 = 103.53 -> 104.
    assert pixels(image).tolist() == [[[255, 0, 104]]]


def test_the_panel_is_as_large_as_its_tiles_by_hand() -> None:
    square, wide = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (16, 8), "blue")
    # Tiles 224 high: 224 and 448 wide. Width: 4 + 224 + 4 + 448 + 4 = 684; height: 22 + 3 * (224 + 4) + 4 = 710.
    picture = panel(["a", "b"], [[square, wide]] * 3)
    assert picture.size == (684, 710)
    # Rows begin at 22, 250, 478; the first column at 4, the second at 232.
    for top in (22, 250, 478):
        assert picture.getpixel((4, top)) == picture.getpixel((227, top + 223)) == (255, 0, 0)
        assert picture.getpixel((232, top)) == picture.getpixel((679, top + 223)) == (0, 0, 255)
        assert picture.getpixel((229, top)) == (255, 255, 255)


def test_the_panel_is_as_wide_as_the_widest_tile_of_each_column() -> None:
    square, tall = Image.new("RGB", (8, 8)), Image.new("RGB", (4, 8))
    assert panel(["a"], [[tall], [square]]).size == (224 + 8, 22 + 2 * 228 + 4)


def test_tiles_are_enlarged_without_smoothing() -> None:
    tile = Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]] * 2, np.uint8))
    shown = pixels(panel(["a"], [[tile]]))[22:246, 4:228]
    assert np.unique(shown).tolist() == [0, 255]
    assert (shown[:, :112] == 0).all()


def test_the_titles_are_written_above_the_columns() -> None:
    tile = Image.new("RGB", (8, 8), "white")
    blank, titled = pixels(panel(["", ""], [[tile, tile]])), pixels(panel(["", "teacher"], [[tile, tile]]))
    assert (blank == 255).all()
    ink = np.argwhere((titled < 128).any(axis=-1))
    assert ink[:, 0].max() < 22
    assert ink[:, 1].min() >= 232
