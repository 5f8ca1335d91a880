"""Crops: image, target and map are cut alike. Proved with a coordinate ramp as image, label and map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from brixel_cli.data.crops import Crop, cut_image, cut_map, cut_target, plan_crops, stitch

ODD = (97, 141)
KINDS = ["whole", "centre", "stretch", "random", "slide"]


def scale_of(kind: str) -> tuple[float, float]:
    return (0.5, 2.0) if kind == "random" else (1.0, 1.0)


def ramp(height: int, width: int) -> np.ndarray:
    """(3, H, W) in 0..255: red grows to the right, green downwards; both are linear, so bicubic keeps them."""
    y, x = (np.arange(length) + 0.5 for length in (height, width))
    return np.stack(
        [np.broadcast_to(x / width, (height, width)), np.broadcast_to((y / height)[:, None], (height, width)),
         np.zeros((height, width))]
    ).astype(np.float32) * 255  # fmt: skip


def as_image(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.transpose(1, 2, 0).round().astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32).transpose(2, 0, 1)


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_image_target_and_map_of_a_ramp_show_the_same_places(kind: str, patch: int) -> None:
    values = ramp(*ODD)
    crops = plan_crops(kind, [ODD], 56, patch, per_image=8, seed=3, scale=scale_of(kind))  # type: ignore[arg-type]
    flips = 0
    for crop in crops:
        assert crop.size[0] % patch == 0
        assert crop.size[1] % patch == 0
        inside = slice(crop.inside[0] - 2), slice(crop.inside[1] - 2)  # the last pixels blend with the border
        seen = pixels(cut_image(as_image(values), crop))
        target = cut_target(values[0], crop, crop.size)
        down = cut_target(values[1], crop, crop.size)
        # Nearest neighbour is off by half a pixel of the original, 255 / 97 of the ramp each; both roundings by half of one.
        trimmed = (slice(2, inside[0].stop), slice(2, inside[1].stop))
        shift = slice(None)
        if crop.flip:
            flips += 1
            pad = crop.size[1] - crop.inside[1]
            shift = slice(pad + 2, -2)
            trimmed = (trimmed[0], shift)
        assert np.abs(seen[0] - target)[trimmed].max() < 0.5 * 255 / 141 * 1.01 + 1.05
        assert np.abs(seen[1] - down)[trimmed].max() < 0.5 * 255 / 97 * 1.01 + 1.05
        grid = crop.size[0] // patch * 4, crop.size[1] // patch * 4
        map_ = cut_map(torch.from_numpy(values), crop, grid).numpy()
        expected = cut_target(values[0], crop, grid)
        coarse = (slice(1, crop.inside[0] * grid[0] // crop.size[0] - 1), slice(1, -1))
        if crop.inside == crop.size:
            assert np.abs(map_[0] - expected)[coarse].max() < 0.5 * 255 / 141 * 1.01 + 0.01
    assert flips == (sum(crop.flip for crop in crops))
    assert (flips > 0) == (kind == "random")


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_sees_what_the_student_sees_four_times_larger(kind: str) -> None:
    image = as_image(ramp(*ODD))
    for crop in plan_crops(kind, [ODD], 56, 14, per_image=3, seed=1, scale=scale_of(kind)):  # type: ignore[arg-type]
        large = cut_image(image, crop, (crop.size[0] * 4, crop.size[1] * 4))
        assert large.size == (crop.size[1] * 4, crop.size[0] * 4)
        reduced = pixels(large.resize((crop.size[1], crop.size[0]), Image.Resampling.BOX))
        difference = np.abs(reduced - pixels(cut_image(image, crop)))[:2]
        if crop.inside == crop.size:
            assert difference[:, 2:-2, 2:-2].max() <= 1.01
        assert np.median(difference) <= 1


def test_a_target_at_its_own_resolution_is_the_crop_itself() -> None:
    labels = np.arange(80 * 120, dtype=np.int64).reshape(80, 120)
    (whole,) = plan_crops("whole", [(80, 120)], 28, 14)
    assert (whole.scaled, whole.box) == ((28, 42), (0, 0, 28, 42))
    np.testing.assert_array_equal(cut_target(labels, whole), labels)
    # 80 -> 40 high, 120 -> 60 wide, centre crop of 40: columns 10 to 50 of 60, that is 20 to 100 of 120.
    (centre,) = plan_crops("centre", [(80, 120)], 40, 4)
    assert (centre.scaled, centre.box) == ((40, 60), (0, 10, 40, 40))
    np.testing.assert_array_equal(cut_target(labels, centre), labels[:, 20:100])
    np.testing.assert_array_equal(cut_target(labels, centre, (40, 40)), labels[1::2, 21:101:2])
    mirrored = Crop(0, centre.scaled, centre.box, flip=True)
    np.testing.assert_array_equal(cut_target(labels, mirrored), labels[:, 20:100][:, ::-1])


def test_sizes_and_places_of_each_kind() -> None:
    def plan(kind: str, side: int | tuple[int, int], patch: int, **options: int) -> list[Crop]:
        return plan_crops(kind, [(100, 150)], side, patch, **options)  # type: ignore[arg-type]

    assert plan("whole", 56, 14)[0].scaled == (56, 84)  # 150 * 0.56 = 84
    assert plan("whole", 56, 16)[0].scaled == (64, 80)  # 3.5 patches go up, 5.25 down
    assert plan("stretch", (28, 70), 14)[0].box == (0, 0, 28, 70)
    assert plan("centre", 56, 14)[0].box == (0, 14, 56, 56)
    slides = plan("slide", 64, 16, stride=32)  # 64 x 96: two windows
    assert [crop.box for crop in slides] == [(0, 0, 64, 64), (0, 32, 64, 64)]
    uneven = plan("slide", 64, 16, stride=48)  # the second would begin at 48; it is moved back to the border
    assert [crop.box[1] for crop in uneven] == [0, 32]
    assert [crop.box[1] for crop in plan("slide", 48, 16)] == [0, 24]  # 48 x 72; stride 32
    assert len(plan("slide", 150, 1, stride=10)) == 9  # 150 x 225: columns 0, 10 to 70, and 75


def test_random_views_depend_on_seed_row_and_number_alone() -> None:
    sizes = [(60, 80), (60, 80)]
    crops = plan_crops("random", sizes, 28, 14, per_image=40, seed=5, scale=(0.5, 2.0))
    assert [crop.row for crop in crops] == [0] * 40 + [1] * 40
    assert crops == plan_crops("random", sizes, 28, 14, per_image=40, seed=5, scale=(0.5, 2.0))
    assert crops != plan_crops("random", sizes, 28, 14, per_image=40, seed=6, scale=(0.5, 2.0))
    assert crops[:3] == plan_crops("random", sizes[:1], 28, 14, per_image=3, seed=5, scale=(0.5, 2.0))
    heights = [crop.scaled[0] for crop in crops]
    assert 14 <= min(heights) < 18
    assert 50 < max(heights) <= 56
    assert 20 < sum(crop.flip for crop in crops) < 60


def test_beyond_the_border_nothing_counts() -> None:
    crop = Crop(0, (20, 20), (0, 0, 28, 28))
    assert crop.inside == (20, 20)
    labels = cut_target(np.ones((40, 40), np.uint8), crop, (28, 28))
    assert (labels[:20, :20] == 1).all()
    assert (labels[20:] == 255).all()
    assert (labels[:, 20:] == 255).all()
    assert cut_target(np.ones((40, 40), np.float32), crop).shape == (56, 56)
    assert cut_target(np.ones((40, 40), bool), crop, (28, 28)).sum() == 400
    image = pixels(cut_image(Image.new("RGB", (40, 40), "white"), crop, (56, 56), fill=(1, 2, 3)))
    assert (image[:, :40, :40] == 255).all()
    assert (image[:, 40:].transpose(1, 2, 0) == [1, 2, 3]).all()


def test_a_mirrored_normal_points_to_the_other_side() -> None:
    normals = np.zeros((3, 4, 4), np.float32)
    normals[0, :, 0], normals[2] = 0.6, -0.8
    crop = Crop(0, (4, 4), (0, 0, 4, 4), flip=True)
    seen = cut_target(normals, crop)
    assert seen[:, 0, 3].tolist() == pytest.approx([-0.6, 0, -0.8])
    assert normals[0, 0, 0] == np.float32(0.6)


def test_a_map_is_cut_at_the_places_of_the_field() -> None:
    map_ = torch.arange(6.0)[None, None].expand(1, 4, 6)
    right = Crop(0, (56, 84), (0, 28, 56, 56))
    assert cut_map(map_, right, (4, 4))[0, 0].tolist() == [2, 3, 4, 5]
    mirrored = Crop(0, (56, 84), (0, 28, 56, 56), flip=True)
    assert cut_map(map_, mirrored, (4, 4))[0, 0].tolist() == [5, 4, 3, 2]
    # On a grid twice as fine: a quarter of a cell beside each centre.
    assert cut_map(map_, right, (8, 8))[0, 0].tolist() == [1.75, 2.25, 2.75, 3.25, 3.75, 4.25, 4.75, 5]


def test_windows_put_together_are_the_whole_again() -> None:
    whole = torch.randn(2, 64, 96)
    crops = plan_crops("slide", [(100, 150)], 64, 16, stride=16)
    assert len(crops) == 3
    cut = [whole[:, f.box[0] : f.box[0] + 64, f.box[1] : f.box[1] + 64] for f in crops]
    torch.testing.assert_close(stitch(cut, crops), whole)
    # Where windows disagree, the mean: the columns 16 to 32 are in the first and the second.
    levels = stitch([torch.full((1, 64, 64), float(n)) for n in range(3)], crops)[0, 0]
    assert [levels[c].item() for c in (0, 16, 32, 64, 80)] == [0, 0.5, 1, 1.5, 2]
