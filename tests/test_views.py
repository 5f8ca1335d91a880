"""Views: what the teacher and the student see of a photograph, the same for the same seed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from brixel_cli.config.distill import ViewConfig
from brixel_cli.data import views
from brixel_cli.data.images import Skipped, decoded, load_image, scan_folder
from brixel_cli.data.views import (
    Views,
    centre_view,
    normalise_pixels,
    random_view,
    reduce_view,
    seed_of,
)
from brixel_cli.errors import BrixelError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def same(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(np.asarray(first), np.asarray(second))


def viewed(image: Image.Image, size: tuple[int, int], config: ViewConfig, seed: int) -> Image.Image:
    return random_view(lambda _: image, (image.height, image.width), size, config, seed)


PLAIN: dict[str, Any] = {"kind": "random", "jitter": [0.0, 0.0, 0.0, 0.0], "grayscale": 0.0, "perspective": 0.0}
"""Random crops, without changes of colour and perspective."""


def views_of(folder: Path, seed: int = 0, **options: object) -> Views:
    return Views(scan_folder(folder, 1)[0], ViewConfig(teacher_size=64, **options), seed)


# --- one view ---


def test_the_released_view_of_a_photograph_that_covers_already_is_its_centre() -> None:
    image = noise(64, 80)
    view = centre_view(image, (64, 64))
    np.testing.assert_array_equal(np.asarray(view), np.asarray(image)[:, 8:72])  # (80 - 64) / 2 = 8 on either side


@pytest.mark.parametrize(
    ("height", "width", "size", "covered", "corner"),
    [
        # Scale = max(target / side): max(50/100, 50/160) = 1/2 -> 50x80; (80 - 50) / 2 = 15 to the left.
        (100, 160, (50, 50), (50, 80), (0, 15)),
        # Portrait: max(50/160, 50/100) = 1/2 -> 80x50; 15 above.
        (160, 100, (50, 50), (80, 50), (15, 0)),
        # Not square: max(32/100, 64/160) = 2/5 -> 40x64; (40 - 32) / 2 = 4 above.
        (100, 160, (32, 64), (40, 64), (4, 0)),
        # Enlarged: max(64/16, 64/24) = 4 -> 64x96; (96 - 64) / 2 = 16 to the left.
        (16, 24, (64, 64), (64, 96), (0, 16)),
    ],
)
def test_the_released_view_covers_then_crops_the_centre(
    height: int, width: int, size: tuple[int, int], covered: tuple[int, int], corner: tuple[int, int]
) -> None:
    image = noise(height, width)
    resized = image.resize((covered[1], covered[0]), Image.Resampling.BICUBIC)
    top, left = corner
    expected = resized.crop((left, top, left + size[1], top + size[0]))
    view = centre_view(image, size)
    assert view.size == (size[1], size[0])
    assert same(view, expected)


@pytest.mark.parametrize("side", [63, 65, 100, 333])
def test_the_released_view_never_falls_short_of_its_size(side: int) -> None:
    # 64 / 63 * 63 and the like must not round to 63; a padded border would be black.
    image = Image.new("RGB", (side, side * 3 // 2), "white")
    np.testing.assert_array_equal(np.asarray(centre_view(image, (64, 64))), 255)


def test_the_same_seed_gives_the_same_random_view_and_leaves_the_global_generator_alone() -> None:
    image, config = noise(90, 120), ViewConfig(kind="random")
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = viewed(image, (32, 48), config, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(8)
    assert same(first, viewed(image, (32, 48), config, seed=3))
    assert first.size == (48, 32)
    assert not same(first, viewed(image, (32, 48), config, seed=4))


def test_about_half_of_the_random_views_are_mirrored_and_none_without_flip() -> None:
    image = noise(90, 120)
    mirrored = 0
    for seed in range(40):
        plain = viewed(image, (32, 32), ViewConfig(**PLAIN, flip=False), seed)
        maybe = viewed(image, (32, 32), ViewConfig(**PLAIN, flip=True), seed)
        if not same(plain, maybe):
            assert same(plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT), maybe)
            mirrored += 1
    assert 10 <= mirrored <= 30  # 20 +- 10 of 40: more than three standard deviations


def test_a_random_view_of_the_whole_area_sees_all_of_a_photograph_of_its_own_shape() -> None:
    # Left black, right white: a crop of a tenth of the area is often of one colour, one of the whole area never.
    image = Image.new("RGB", (120, 120), "black")
    image.paste("white", (60, 0, 120, 120))

    def uniform(scale: list[float]) -> int:
        config = ViewConfig(**PLAIN, scale=scale)
        return sum(len(viewed(image, (16, 16), config, seed).getcolors()) == 1 for seed in range(30))

    assert uniform([1.0, 1.0]) == 0
    assert uniform([0.05, 0.1]) > 5


def changed(image: Image.Image, seed: int = 0, **options: Any) -> np.ndarray:
    """The whole image at its own size, but for the changes that the options ask for."""
    config = ViewConfig.model_validate({**PLAIN, "scale": [1.0, 1.0], "flip": False, **options})
    return np.asarray(viewed(image, (image.height, image.width), config, seed)).astype(int)


def test_brightness_is_one_factor_for_the_whole_view() -> None:
    # Grey 100 times a factor from 0.5 to 1.5; a plain crop leaves it at 100.
    grey = Image.new("RGB", (32, 32), (100, 100, 100))
    seen = [changed(grey, seed, jitter=[0.5, 0.0, 0.0, 0.0]) for seed in range(20)]
    assert all(len(np.unique(view)) == 1 for view in seen)
    values = {int(view.max()) for view in seen}
    assert 50 <= min(values) < 80
    assert 120 < max(values) <= 150
    np.testing.assert_array_equal(changed(grey), 100)


def test_hue_keeps_the_brightest_and_darkest_channel() -> None:
    # Turning the colour circle permutes and blends channels between the least and the largest value, 40 and 200.
    red = Image.new("RGB", (16, 16), (200, 40, 40))
    seen = [changed(red, seed, jitter=[0.0, 0.0, 0.0, 0.5])[0, 0] for seed in range(10)]
    assert all(abs(colour.max() - 200) <= 2 and abs(colour.min() - 40) <= 2 for colour in seen)
    assert len({int(colour.argmax()) for colour in seen}) == 3


def test_a_view_without_colour_has_three_equal_channels() -> None:
    red = Image.new("RGB", (16, 16), (200, 40, 40))
    colours = [changed(red, seed, grayscale=0.5)[0, 0] for seed in range(40)]
    without = [colour for colour in colours if len(set(colour)) == 1]
    assert 10 <= len(without) <= 30  # 20 +- 10 of 40: more than three standard deviations
    assert all(abs(colour[0] - round(0.299 * 200 + 0.587 * 40 + 0.114 * 40)) <= 1 for colour in without)


def test_perspective_moves_the_corners_of_half_of_the_views() -> None:
    white = Image.new("RGB", (64, 64), "white")
    seen = [changed(white, seed, perspective=0.8) for seed in range(40)]
    moved = [view for view in seen if view.min() == 0]  # what is beyond the photograph is black
    assert 10 <= len(moved) <= 30
    assert all(view[28:36, 28:36].min() == 255 for view in moved)  # corners move by up to 0.4 of the side


def test_the_first_fixed_view_is_never_changed(photographs: Path) -> None:
    fixed: dict[str, Any] = {"kind": "fixed", "per_image": 2}
    plain, altered = views_of(photographs, **PLAIN | fixed), views_of(photographs, **fixed)
    assert torch.equal(plain[0, 4].pixels, altered[0, 4].pixels)
    assert not torch.equal(plain[0, 5].pixels, altered[0, 5].pixels)


def test_normalise_by_hand() -> None:
    image = Image.new("RGB", (2, 1), (255, 0, 51))
    # (1 - 0.5) / 0.25 = 2; (0 - 0.4) / 0.2 = -2; (0.2 - 0.1) / 0.5 = 0.2
    pixels = normalise_pixels(tvf.pil_to_tensor(image), (0.5, 0.4, 0.1), (0.25, 0.2, 0.5))
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, torch.tensor([2.0, -2.0, 0.2])[:, None, None].expand(3, 1, 2))


@pytest.mark.parametrize("factor", [2, 4])
def test_the_student_sees_the_antialiased_bicubic_reduction_of_the_teachers_view(factor: int) -> None:
    views = torch.stack([normalise_pixels(tvf.pil_to_tensor(noise(64, 96, seed)), MEAN, STD) for seed in range(2)])
    expected = F.interpolate(views, size=(64 // factor, 96 // factor), mode="bicubic", antialias=True)
    assert torch.equal(reduce_view(views, factor), expected)
    # Not the plain bicubic one, which would alias.
    assert not torch.allclose(expected, F.interpolate(views, size=expected.shape[-2:], mode="bicubic"), atol=0.1)


def test_the_reduction_is_float32_under_autocast_and_of_bfloat16_views() -> None:
    views = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = reduce_view(views, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reduce_view(views, 4), plain)
    assert reduce_view(views.bfloat16(), 4).dtype == torch.float32


# --- large JPEGs ---


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder with one smooth picture of 800x600 pixels, as JPEG."""
    coarse = noise(9, 12).resize((800, 600), Image.Resampling.BICUBIC)
    coarse.save(tmp_path / "large.jpg", quality=95)
    return tmp_path


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ([64, 64], (75, 100)),  # covered by 64x85, of which 600x800 is nine times as many: at an eighth
        ([76, 64], (150, 200)),  # 76x101: seven times
        ([128, 128], (150, 200)),  # 128x171: four times
        ([151, 151], (300, 400)),
        ([128, 300], (300, 400)),  # 225x300: twice, for the width decides
        ([301, 301], (600, 800)),
    ],
)
def test_a_centre_view_is_decoded_at_the_least_size_that_covers_it(
    large: Path, size: list[int], decoded: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch)
    Views(scan_folder(large, 1)[0], ViewConfig(teacher_size=size), 0)[0, 0]
    assert seen == [decoded]


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Height and width of every image that is loaded from now on."""
    seen: list[tuple[int, int]] = []

    @contextmanager
    def load(path: Path, **options: Any) -> Iterator[Image.Image]:
        with decoded(path, **options) as image:
            seen.append((image.height, image.width))
            yield image

    monkeypatch.setattr(views, "decoded", load)
    return seen


@pytest.mark.parametrize(
    ("box", "enough"),
    [
        ((0, 0, 600, 800), (64, 64)),
        ((10, 20, 300, 200), (128, 256)),  # a half of the height is seen, a quarter of the width
        ((0, 0, 64, 64), (600, 800)),
        ((0, 0, 70, 90), (549, 569)),  # 64 * 600 / 70 = 548.6, 64 * 800 / 90 = 568.9
    ],
)
def test_a_random_view_needs_as_many_pixels_as_its_share(
    box: tuple[int, ...], enough: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(size: tuple[int, int]) -> Image.Image:
        asked.append(size)
        return noise(600, 800)

    monkeypatch.setattr(views, "_random_box", lambda *_: box)
    random_view(load, (600, 800), (64, 64), ViewConfig(**PLAIN), 0)
    assert asked == [enough]


def test_views_of_reduced_and_whole_jpegs_are_alike(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    reduced = Views(scan_folder(large, 1)[0], ViewConfig(teacher_size=64, **PLAIN), 0)
    whole = load_image(large / "large.jpg")
    differences = []
    for epoch in range(20):
        expected = np.asarray(viewed(whole, (64, 64), reduced.config, seed_of(0, epoch, 0))).astype(int)
        found = reduced[epoch, 0].pixels.permute(1, 2, 0).numpy()
        differences.append(np.abs(found - expected).mean())
    assert {height for height, _ in seen} == {75, 150, 300}  # crops of 6 % of the area are 147 pixels high
    assert max(differences) < 1.5  # of 255


# --- views of many photographs ---


def test_centre_views_are_the_released_view_in_every_epoch(photographs: Path) -> None:
    views = views_of(photographs)
    expected = tvf.pil_to_tensor(centre_view(load_image(photographs / "3.png"), (64, 64)))
    assert len(views) == 8
    for epoch in (0, 5):
        view = views[epoch, 3]
        assert torch.equal(view.pixels, expected)
        assert (view.name, view.skipped) == ("3.png", ())


def test_fixed_views_begin_with_the_centre_and_are_the_same_in_every_epoch(photographs: Path) -> None:
    views = views_of(photographs, kind="fixed", per_image=3)
    centre = views_of(photographs)
    assert len(views) == 24
    assert [views.image(number).name for number in (0, 4, 23)] == ["0.png", "1.png", "7.png"]
    assert torch.equal(views[0, 6].pixels, centre[0, 2].pixels)
    for number in (6, 7, 8):
        assert views[0, number].name == "2.png"
        assert torch.equal(views[0, number].pixels, views[9, number].pixels)
    assert not torch.equal(views[0, 7].pixels, views[0, 8].pixels)
    assert not torch.equal(views[0, 6].pixels, views[0, 7].pixels)


def test_random_views_differ_by_epoch_and_by_seed_and_repeat(photographs: Path) -> None:
    views, again, other = (views_of(photographs, seed=seed, kind="random") for seed in (0, 0, 1))
    assert torch.equal(views[1, 2].pixels, again[1, 2].pixels)
    assert not torch.equal(views[1, 2].pixels, views[2, 2].pixels)
    assert not torch.equal(views[1, 2].pixels, other[1, 2].pixels)


@pytest.fixture
def damaged(tmp_path: Path, photographs: Path) -> Path:
    """Four photographs, of which 1.png and 3.png turn out to be damaged when they are read."""
    for number in range(4):
        shutil.copyfile(photographs / f"{number}.png", tmp_path / f"{number}.png")
    return tmp_path


def damage(path: Path) -> None:
    path.write_bytes(b"no longer a picture")


def test_a_damaged_photograph_is_replaced_by_the_next_one_and_reported(damaged: Path) -> None:
    views = views_of(damaged)
    damage(damaged / "1.png")
    damage(damaged / "3.png")
    reason = "not an image of a format that brixel reads"
    assert views[0, 0].skipped == ()
    assert (views[0, 1].name, views[0, 1].skipped) == ("2.png", (Skipped("1.png", reason),))
    assert torch.equal(views[0, 1].pixels, views[0, 2].pixels)
    # After the last one comes the first.
    assert (views[0, 3].name, views[0, 3].skipped) == ("0.png", (Skipped("3.png", reason),))


def test_two_damaged_photographs_in_a_row_are_both_reported(damaged: Path) -> None:
    views = views_of(damaged)
    damage(damaged / "1.png")
    damage(damaged / "2.png")
    view = views[0, 1]
    assert view.name == "3.png"
    assert [item.name for item in view.skipped] == ["1.png", "2.png"]


def test_a_set_of_damaged_photographs_is_an_error_that_tells_the_first_reason(damaged: Path) -> None:
    views = views_of(damaged)
    for path in damaged.iterdir():
        damage(path)
    with pytest.raises(BrixelError) as caught:
        _ = views[0, 2]
    assert str(caught.value) == (
        "None of the 4 images can be read; the first: not an image of a format that brixel reads."
    )


# --- seeds ---


def test_seeds_stay_what_they_were() -> None:
    # Of NumPy's SeedSequence, whose output is promised not to change: runs stay repeatable over versions.
    assert seed_of(0, 0, 1) == 4324601099084218337
    assert seed_of(1, 2, 3) == 6498626229777268288


def test_seeds_differ_and_fit_into_63_bits() -> None:
    seeds = [seed_of(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
    assert len(set(seeds)) == 64
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**61
