"""Photographs: every format and mode comes out as upright 8-bit RGB, and every bad file with its reason."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import brixel_cli.data.images as images_module
from brixel_cli.data.images import (
    EXTENSIONS,
    FORMATS,
    Skipped,
    load_image,
    read_size,
    scan_folder,
    upright,
)
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
        # Else this case would not test what it says. Pillow before 12 opens a TIFF in YCbCr as RGB.
        assert stored.mode in {opened_as, "RGB" if opened_as == "YCbCr" else opened_as}
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
    ("content", "reason"),
    [(b"", "empty: 0 bytes"), (b"this is no picture", "not an image of a format that brixel reads")],
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


POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 64 64
%%EndComments
showpage
"""


@pytest.mark.parametrize("content", [POSTSCRIPT, b"\xd7\xcd\xc6\x9a" + bytes(60), b"SIMPLE  =" + b" " * 80])
def test_a_format_that_is_not_promised_is_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    def ghostscript(*_: object, **__: object) -> object:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", ghostscript)
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for read in (load_image, read_size):
        with pytest.raises(BrixelError, match=r"^not an image of a format that brixel reads: .*photo\.jpg$"):
            read(path)


def test_every_extension_is_of_a_format_that_is_read() -> None:
    Image.init()
    other_names = {".j2c", ".mpo"}  # .mpo is opened as a JPEG
    assert {Image.EXTENSION[end] for end in EXTENSIONS if end not in other_names} == set(FORMATS)


@pytest.mark.parametrize(
    "name", ["frames.mpo", "raw.pfm", "icon.ico", "shot.qoi", "scan.jp2", "old.pcx", "a.tga", "b.dds"]
)
def test_rarer_formats_are_read(tmp_path: Path, name: str) -> None:
    image = Image.new("F", (32, 32), 7) if name.endswith("pfm") else Image.new("RGB", (32, 32), "red")
    image.save(tmp_path / name)
    assert load_image(tmp_path / name).size == (32, 32)
    assert read_size(tmp_path / name) == (32, 32)


def turned_noise(path: Path, orientation: object) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    noise(64).crop((0, 0, 60, 40)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [0, *range(1, 12), 65535])
def test_header_and_pixels_agree_on_every_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = turned_noise(tmp_path / f"photo.{suffix}", orientation)
    expected = (60, 40) if 5 <= orientation <= 8 else (40, 60)
    assert read_size(path) == expected
    image = load_image(path)
    assert (image.height, image.width) == expected
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(upright(opened)), np.asarray(image))
    (found,), _ = scan_folder(tmp_path, 1)
    assert (found.height, found.width) == expected
    again = tmp_path / "again.png"
    image.save(again)
    assert read_size(again) == expected  # the orientation is not applied a second time


def test_an_orientation_of_another_type_changes_nothing(tmp_path: Path) -> None:
    path = turned_noise(tmp_path / "photo.jpg", 6)
    content = path.read_bytes()
    entry = content.index(bytes.fromhex("0112 0003 00000001"))
    for kind in range(13):
        path.write_bytes(content[: entry + 2] + bytes([0, kind]) + content[entry + 4 :])
        assert read_size(path) == load_image(path).size[::-1], kind


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_an_orientation_in_xmp_counts_in_header_and_pixels(tmp_path: Path, suffix: str) -> None:
    xmp = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    path, info = tmp_path / f"photo.{suffix}", PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    noise(64).crop((0, 0, 60, 40)).save(
        path, **({"pnginfo": info} if suffix == "png" else {"tiffinfo": {700: xmp.encode()}})
    )
    assert read_size(path) == (60, 40)
    assert load_image(path).size == (40, 60)


def test_exif_behind_the_pixels_of_a_png_changes_nothing(tmp_path: Path) -> None:
    path = turned_noise(tmp_path / "photo.png", 6)
    content = path.read_bytes()
    at = content.index(b"eXIf") - 4
    chunk = content[at : at + 12 + int.from_bytes(content[at : at + 4], "big")]
    end = content.index(b"IEND") - 4
    path.write_bytes(content[:at] + content[at + len(chunk) : end] + chunk + content[end:])
    assert read_size(path) == (40, 60)
    assert load_image(path).size == (60, 40)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "I;16B", "F"])
def test_an_image_is_converted_strip_by_strip_to_the_same_pixels(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 256, (40, 50, 4), np.uint8)
    values[:20] = 0  # the first strips are dark: only the whole image tells 8 bits from 16
    if mode in ("I", "F", "I;16", "I;16B"):
        kind = {"I": np.int32, "F": np.float32, "I;16": "<u2", "I;16B": ">u2"}[mode]
        image = Image.fromarray((values[..., 0].astype(int) * 257).astype(kind))
    elif mode in ("P", "PA"):
        image = Image.fromarray(values[..., :3]).quantize(16).convert(mode)
        image.info["transparency"] = 3
    elif mode == "LAB":
        image = Image.merge("LAB", [Image.fromarray(values[..., band]) for band in range(3)])
    else:
        image = Image.fromarray(values, "RGBA").convert(mode)
    assert image.mode == mode
    whole = np.asarray(upright(image))
    monkeypatch.setattr(images_module, "STRIP_PIXELS", 333)
    assert np.array_equal(np.asarray(upright(image)), whole)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nul", "long", "loop"])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path = tmp_path / {"nul": "a\0.jpg", "long": "a" * 300 + ".jpg"}[kind]
    reasons = {
        "nul": r"(\w+: )?embedded null (byte|character in path)",
        "long": "File name too long",
        "folder": "a folder",
    }
    reason = {"loop": "Too many levels of symbolic links"} | reasons
    with pytest.raises(BrixelError, match=f"^{reason.get(kind, 'a pipe, socket or device, not a file')}: "):
        load_image(path)


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> object:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BrixelError, match=r"^The folder .* cannot be read: Permission denied\."):
        scan_folder(tmp_path, 1)
    with pytest.raises(BrixelError, match=r"^The folder .* cannot be read: File name too long\."):
        scan_folder(tmp_path / ("a" * 300), 1)


def test_a_file_that_may_not_be_looked_at_is_skipped_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(8).save(tmp_path / "good.png")
    noise(8).save(tmp_path / "secret.png")
    stat = Path.stat

    def refuse(self: Path, **options: bool) -> os.stat_result:
        if self.name == "secret.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    found, skipped = scan_folder(tmp_path, 1)
    assert [item.name for item in found] == ["good.png"]
    assert skipped == [Skipped("secret.png", "Permission denied")]


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
