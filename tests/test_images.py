"""Photographs: every format and mode comes out as upright 8-bit RGB, and every bad file with its reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from brixel_cli.data.images import Photograph, Skipped, describe_skipped, load_image, scan_folder
from brixel_cli.errors import BrixelError

ORIENTATION = 0x0112


def solid(mode: str, colour: int | float | tuple[int, ...]) -> Image.Image:
    return Image.new(mode, (12, 8), colour)


def palette(transparent: bool = False) -> Image.Image:
    image = solid("P", 1)
    image.putpalette([0, 0, 0, 10, 20, 200])
    if transparent:
        image.info["transparency"] = 1
    return image


def noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))


def colours(image: Image.Image) -> np.ndarray:
    """The different colours of an image, (N, 3)."""
    assert image.mode == "RGB"
    return np.unique(np.asarray(image).reshape(-1, 3), axis=0)


# Transparency is over white: (value * alpha + 255 * (255 - alpha)) / 255.
# Grey 77 at alpha 128: (77 * 128 + 255 * 127) / 255 = 165.65 -> 166.
# (200, 100, 0) at alpha 51, a fifth: 40 + 204 = 244, 20 + 204 = 224, 0 + 204 = 204.
# YCbCr (76, 85, 255) is red: 76 + 1.402 * 127 = 254, 76 - 0.344 * (85 - 128) - 0.714 * 127 = 0, 76 - 1.772 * 43 = 0.
@pytest.mark.parametrize(
    ("image", "suffix", "opened_as", "expected"),
    [
        (solid("1", 1), "png", "1", (255, 255, 255)),
        (solid("L", 77), "png", "L", (77, 77, 77)),
        (solid("LA", (77, 128)), "png", "LA", (166, 166, 166)),
        (solid("LA", (77, 0)), "png", "LA", (255, 255, 255)),
        (palette(), "png", "P", (10, 20, 200)),
        (palette(transparent=True), "png", "P", (255, 255, 255)),
        (solid("RGB", (1, 2, 3)), "png", "RGB", (1, 2, 3)),
        (solid("RGBA", (200, 100, 0, 51)), "png", "RGBA", (244, 224, 204)),
        (solid("RGBA", (200, 100, 0, 255)), "webp", "RGB", (200, 100, 0)),
        (solid("CMYK", (0, 255, 255, 0)), "tif", "CMYK", (255, 0, 0)),
        (solid("YCbCr", (76, 85, 255)), "tif", "YCbCr", (254, 0, 0)),
        (solid("I;16", 200 * 257), "png", "I;16", (200, 200, 200)),
        (solid("I;16", 200 * 257), "tif", "I;16", (200, 200, 200)),
        (solid("I;16B", 200 * 257), "tif", "I;16B", (200, 200, 200)),
        (solid("I", 200 * 257), "tif", "I", (200, 200, 200)),
        (solid("F", 200.0), "tif", "F", (200, 200, 200)),
    ],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, image: Image.Image, suffix: str, opened_as: str, expected: tuple[int, int, int]
) -> None:
    path = tmp_path / f"photo.{suffix}"
    image.save(path, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as stored:
        assert stored.mode == opened_as  # else this case would not test what it says
    loaded = load_image(path)
    assert loaded.size == (12, 8)
    found = colours(loaded)
    assert len(found) == 1
    np.testing.assert_allclose(found[0].astype(int), expected, atol=1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_sixteen_bit_grey_is_scaled_to_eight_bits(tmp_path: Path, suffix: str, orientation: int) -> None:
    # 65535 / 257 = 255; 51400 / 257 = 200 (by 256 it would be 201); 128 / 257 = 0.498 -> 0; 129 / 257 = 0.502 -> 1.
    values = np.array([[65535, 51400], [128, 129]], np.uint16)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}", exif=exif)
    upright = np.asarray(load_image(tmp_path / f"deep.{suffix}"))[..., 0]
    expected = np.array([[255, 200], [0, 1]])
    np.testing.assert_array_equal(upright, np.rot90(expected, -1) if orientation == 6 else expected)


def test_a_dark_sixteen_bit_photograph_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 200, np.uint16)).save(tmp_path / "dark.png")
    np.testing.assert_array_equal(colours(load_image(tmp_path / "dark.png")), [[1, 1, 1]])  # 200 / 257 = 0.78


# Where the top left quarter of the stored picture belongs, as (bottom, right), and whether the picture is turned.
PLACES = {
    1: (0, 0, 0), 2: (0, 1, 0), 3: (1, 1, 0), 4: (1, 0, 0),
    5: (0, 0, 1), 6: (0, 1, 1), 7: (1, 1, 1), 8: (1, 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", PLACES)
def test_orientation_is_applied_to_the_picture_and_to_its_listed_size(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    bottom, right, turned = PLACES[orientation]
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(tmp_path / f"turned.{suffix}", exif=exif)

    image = load_image(tmp_path / f"turned.{suffix}")
    height, width = (32, 16) if turned else (16, 32)
    assert (image.height, image.width) == (height, width)
    quarters = np.asarray(image.convert("L"), dtype=float).reshape(2, height // 2, 2, width // 2).mean(axis=(1, 3))
    expected = np.zeros((2, 2), bool)
    expected[bottom, right] = True
    np.testing.assert_array_equal(quarters > 128, expected)

    (listed,), skipped = scan_folder(tmp_path, 1)
    assert (listed.height, listed.width) == (height, width)
    assert skipped == []


def truncated(path: Path) -> Path:
    noise().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def test_a_truncated_jpeg_is_an_error_that_names_reason_and_file(tmp_path: Path) -> None:
    path = truncated(tmp_path / "cut.jpg")
    with pytest.raises(BrixelError, match=r"^image file is truncated \(\d+ bytes not processed\): ") as caught:
        load_image(path)
    assert str(caught.value).endswith(f": {path}")


def test_a_truncated_png_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BrixelError, match=r"^image file is truncated"):
        load_image(truncated(tmp_path / "cut.png"))


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty: 0 bytes"), (b"this is no picture", "not an image that Pillow can read")]
)
def test_a_file_that_is_no_image_is_an_error_and_is_skipped(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "text.jpg"
    path.write_bytes(content)
    with pytest.raises(BrixelError) as caught:
        load_image(path)
    assert str(caught.value) == f"{reason}: {path}"
    noise().save(tmp_path / "good.png")
    found, skipped = scan_folder(tmp_path, 1)
    assert [item.name for item in found] == ["good.png"]
    assert skipped == [Skipped("text.jpg", reason)]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BrixelError, match="No such file or directory"):
        load_image(tmp_path / "none.jpg")


def test_a_decompression_bomb_is_an_error_and_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(64).save(tmp_path / "bomb.png")
    noise(8).save(tmp_path / "good.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses from twice as many: 4096 > 2000 > 64
    with pytest.raises(BrixelError, match=r"^too many pixels \(decompression bomb\?\): .*bomb\.png$"):
        load_image(tmp_path / "bomb.png")
    found, skipped = scan_folder(tmp_path, 1)
    assert [item.name for item in found] == ["good.png"]
    assert skipped == [Skipped("bomb.png", "too many pixels (decompression bomb?)")]


def test_photographs_that_are_too_small_are_skipped_by_their_shorter_side(tmp_path: Path) -> None:
    Image.new("RGB", (100, 31)).save(tmp_path / "flat.png")
    Image.new("RGB", (31, 100)).save(tmp_path / "tall.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "just.png")
    found, skipped = scan_folder(tmp_path, 32)
    assert found == [Photograph(tmp_path / "just.png", "just.png", 32, 32)]
    assert skipped == [
        Skipped("flat.png", "too small: 100x31, shorter side under 32"),
        Skipped("tall.png", "too small: 31x100, shorter side under 32"),
    ]


def test_a_folder_is_searched_recursively_in_order_of_names_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.JPG", "a/deep/y.webp", ".hidden.png", ".cache/x.png", "a/.thumbs/w.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no photograph")
        else:
            Image.new("RGB", (30, 20)).save(path)
    (tmp_path / "folder.png").mkdir()
    found, skipped = scan_folder(tmp_path, 1)
    assert [item.name for item in found] == [str(Path("a/deep/y.webp")), str(Path("a/z.JPG")), "b.png"]
    assert found[1] == Photograph(tmp_path / "a" / "z.JPG", str(Path("a/z.JPG")), 20, 30)
    assert skipped == []


def test_a_hidden_folder_that_the_user_names_is_searched(tmp_path: Path) -> None:
    folder = tmp_path / ".photos"
    folder.mkdir()
    Image.new("RGB", (30, 20)).save(folder / "a.png")
    assert [item.name for item in scan_folder(folder, 1)[0]] == ["a.png"]


def test_a_missing_folder_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(BrixelError) as caught:
        scan_folder(tmp_path / "none", 1)
    assert str(caught.value) == f"No folder of images at {tmp_path / 'none'}. Name yours with --images DIR."


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(BrixelError, match=r"^No folder of images at .*a\.png\."):
        scan_folder(tmp_path / "a.png", 1)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BrixelError) as caught:
        scan_folder(tmp_path, 1)
    assert str(caught.value) == (
        f"No usable image in {tmp_path}: 0 skipped, 0 files with other extensions.\n"
        "Name another folder with --images DIR, or lower data.min_side."
    )


def test_a_folder_of_unusable_files_is_an_error_that_shows_the_first_five(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(BrixelError) as caught:
        scan_folder(tmp_path, 1)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"No usable image in {tmp_path}: 7 skipped, 0 files with other extensions."
    assert lines[1:-1] == [*(f"  {number}.jpg: empty: 0 bytes" for number in range(5)), "  and 2 more"]


def test_skipped_files_are_listed_up_to_a_limit() -> None:
    items = [Skipped(f"{number}.jpg", "why") for number in range(12)]
    assert describe_skipped(items[:2]) == "  0.jpg: why\n  1.jpg: why"
    assert describe_skipped(items).splitlines()[9:] == ["  9.jpg: why", "  and 2 more"]
    assert describe_skipped(items[:10]).splitlines()[-1] == "  9.jpg: why"
