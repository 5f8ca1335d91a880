"""What --input names, odd and damaged images, and how sizes come about."""

from __future__ import annotations

import contextlib
import io
import os
import random
import struct
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import make_photograph, without
from PIL import Image

from brixel_cli.data import images as images_module
from brixel_cli.data.images import decoded, load_image, read_size
from brixel_cli.data.inputs import Inputs, Item, find_inputs
from brixel_cli.data.references import default_output
from brixel_cli.data.resizing import Resizing
from brixel_cli.errors import BrixelError, UsageError


def load(found: Inputs, item: Item) -> Image.Image:
    with found.decoded(item) as image:
        return image


def names(*references: str, **options) -> list[str]:
    return [item.name for item in find_inputs(references, 1, **options).items]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    for name in ("b.png", "a.jpg", "sub/c.webp", "sub/.hidden/d.png", ".e.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_photograph(folder / name, 1, 40, 30)
    (folder / "notes.md").write_text("no image")
    return folder


def test_a_folder_is_searched_recursively_and_sorted(tree: Path):
    assert names(str(tree)) == ["a.jpg", "b.png", "sub/c.webp"]


def test_files_globs_and_lists_name_the_same_images(tree: Path, tmp_path: Path):
    assert names(str(tree / "a.jpg")) == ["a.jpg"]
    assert names(str(tree / "**/*.webp")) == ["c.webp"]
    assert names(str(tree / "a.jpg"), str(tree / "sub")) == ["a.jpg", "sub/c.webp"]
    assert names(str(tree / "a.jpg"), str(tree)) == ["a.jpg", "b.png", "sub/c.webp"]  # named twice, taken once
    listed = tmp_path / "list.txt"
    listed.write_text("# a comment\n\ntree/sub/c.webp\ntree/gone.png\n")
    found = find_inputs([str(listed)], 1)
    assert [(item.name, item.reason) for item in found.items] == [
        ("sub/c.webp", ""),
        ("gone.png", "No such file or directory"),
    ]


def test_no_name_leads_out_of_the_root(tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tree / "sub")
    (tree / "sub" / "list.txt").write_text("c.webp\n../a.jpg\n../sub/c.webp\n")
    found = find_inputs(["list.txt"], 1)
    assert (found.root, [item.name for item in found.items]) == (tree, ["sub/c.webp", "a.jpg"])
    found = find_inputs([".."], 1, without=[Path("../sub")])
    assert (found.root, [item.name for item in found.items]) == (tree, ["a.jpg", "b.png"])
    (tree / "link.png").symlink_to("b.png")
    assert names("../b.png", "../link.png") == ["b.png", "link.png"]  # a link keeps its own name


def test_a_list_names_whatever_it_names(tree: Path):
    """Nothing in it stops the others, or hangs."""
    os.mkfifo(tree / "pipe.jpg")
    (tree / "zero.jpg").symlink_to("/dev/zero")
    (tree / "films.mp4").symlink_to(tree / "pipe.jpg")
    odd = [
        "pipe.jpg",
        "zero.jpg",
        "films.mp4",
        "nul\0.jpg",
        "../nul\0.jpg",
        "~nobody-of-that-name/a.jpg",
        "a" * 300 + ".jpg",
    ]
    (tree / "list.txt").write_text("\n".join(["a.jpg", *odd, "b.png"]))
    items = find_inputs([str(tree / "list.txt")], 1).items
    device = "a pipe, socket or device, not a file"
    nul = "embedded null byte"
    reasons = ["", device, device, device, nul, nul, "No such file or directory", "File name too long", ""]
    assert [item.reason for item in items] == reasons


@pytest.mark.parametrize("name", ["pipe.txt", "pipe.jpg", "pipe.mp4"])
def test_a_pipe_is_no_input(tmp_path: Path, name: str):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match=f"--input .*{name} cannot be read: a pipe, socket or device, not a file."):
        find_inputs([str(tmp_path / name)], 1)


@pytest.mark.parametrize("reference", ["a" * 300, "nul\0.jpg", "~nobody-of-that-name/a.jpg", "no/" * 2000 + "a.jpg"])
def test_odd_references_name_nothing(reference: str):
    with pytest.raises(BrixelError, match=r"Nothing at|File name too long"):
        find_inputs([reference], 1)
    assert default_output([reference], ".h5").suffix == ".h5"


def test_our_own_pictures_are_not_taken_for_inputs(tree: Path):
    assert names(str(tree), without=[tree / "sub"]) == ["a.jpg", "b.png"]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "nowhere",
            "Nothing at nowhere. --input takes a folder, an image, a video, a tar, a parquet file, a quoted glob, a .txt list",
        ),
        ("*.nothing", "The pattern .*nothing matches no file."),
        ("EMPTY", "No images in the folder .*empty. Files are taken by extension: .apng, .avif"),
        ("LIST", "names no images: it wants one path a line"),
    ],
)
def test_a_reference_that_names_nothing_says_so(tmp_path: Path, reference: str, message: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("# nothing\n")
    path = {"EMPTY": str(tmp_path / "empty"), "LIST": str(tmp_path / "list.txt")}.get(reference, reference)
    with pytest.raises(UsageError, match=message):
        find_inputs([path], 1)


def test_videos_in_a_folder_are_passed_over_and_named(tree: Path, tmp_path: Path):
    (tree / "sub" / "film.mp4").write_bytes(b"")
    found = find_inputs([str(tree)], 1)
    assert found.passed_over == [tree / "sub" / "film.mp4"]
    assert "c.webp" not in [item.name for item in found.items]
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mov").write_bytes(b"")
    message = (
        r"No images in the folder .*films, but 1 videos, which are passed over unless they are named: --input .*a.mov"
    )
    with pytest.raises(UsageError, match=message + r" takes its frames \(with PyAV: pip install 'brixel\[video\]'\)"):
        find_inputs([str(tmp_path / "films")], 1)


def test_a_feature_file_is_no_image(tmp_path: Path):
    with h5py.File(tmp_path / "photos.h5", "w") as file:
        file["x"] = [1]
    (item,) = find_inputs([str(tmp_path / "photos.h5")], 1).items
    assert item.reason == "a file of HDF5, such as a feature file of brixel, not an image"


def test_the_output_lies_beside_the_input(tree: Path):
    assert default_output([str(tree)], ".h5") == tree.parent / "tree.h5"
    assert default_output([f"{tree}/"], "_npy") == tree.parent / "tree_npy"
    assert default_output([str(tree / "a.jpg")], ".h5") == tree / "a.h5"
    assert default_output([str(tree / "*.jpg")], ".h5") == tree.parent / "tree.h5"
    assert default_output([str(tree / "a.jpg"), str(tree)], ".h5") == tree / "features.h5"
    assert default_output(["/"], ".h5") == Path("features.h5")  # beside the root there is nothing


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"])
def test_every_mode_is_read_as_rgb(tmp_path: Path, mode: str):
    grey = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (32, 1)))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(np.asarray(grey).astype(np.int32) * 257)
    elif mode == "LAB":
        image = Image.merge("LAB", (grey, Image.new("L", grey.size, 128), Image.new("L", grey.size, 128)))
    elif mode == "P":
        image = grey.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    else:
        image = grey.convert("RGB").convert(mode) if mode not in ("L", "F", "1") else grey.convert(mode)
    path = tmp_path / "image.tif"
    if mode in ("LA", "P", "RGBA"):
        path = path.with_suffix(".png")
    image.save(path)
    assert read_size(path, still=True) == (32, 64)
    loaded = np.asarray(load_image(path, still=True).convert("L")).astype(float)
    assert loaded.shape == (32, 64)
    assert loaded[:, -8:].mean() - loaded[:, :8].mean() > 150
    if mode not in ("1", "P", "LAB"):
        assert np.abs(loaded - np.asarray(grey)).max() <= 3


def test_float_images_from_0_to_1_are_not_black(tmp_path: Path):
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "half.tif")
    assert np.asarray(load_image(tmp_path / "half.tif")).mean() == pytest.approx(128, abs=1)


def test_orientation_counts_in_header_and_pixels(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert read_size(tmp_path / "turned.jpg") == (60, 40)
    assert load_image(tmp_path / "turned.jpg").size == (40, 60)


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(tmp_path: Path):
    picture = Image.open(make_photograph(tmp_path / "whole.png", 3, 400, 320)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "whole.jpg", quality=95)
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)

    def size(name: str, *enough: int) -> tuple[int, int]:
        with decoded(tmp_path / name, enough=enough) as image:
            return image.height, image.width

    assert size("whole.jpg", 160, 200) == (160, 200)  # twice as many: at a half
    assert size("whole.jpg", 161, 200) == size("whole.jpg", 160, 201) == (320, 400)
    assert size("whole.jpg", 60, 60) == (80, 100)  # 320 / 60 = 5.3: at a quarter
    assert size("turned.jpg", 200, 160) == (200, 160)
    assert size("turned.jpg", 160, 200) == (400, 320)  # 320 is less than twice 200
    assert size("whole.png", 10, 10) == (320, 400)
    with decoded(tmp_path / "whole.jpg", enough=(160, 200)) as half:
        reduced = picture.resize((200, 160), Image.Resampling.BOX)
    assert np.abs(np.asarray(half).astype(int) - np.asarray(reduced)).mean() < 3


def odd_files(folder: Path) -> dict[str, str]:
    """Files that will not do, with what their reason must say."""
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("red", "green")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("I am a text.")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (900, 20)).save(folder / "strip.png")
    return {
        "moving.gif": "animated, or several pages",
        "moving.webp": "animated, or several pages",
        "empty.png": "empty: 0 bytes",
        "text.jpg": "not an image of a format that brixel reads",
        "dot.png": "too small: 1x1 pixels",
        "strip.png": "too elongated: 900x20 pixels, over 8:1",
    }


def test_odd_files_become_items_with_a_reason(tmp_path: Path):
    reasons = odd_files(tmp_path)
    resizing = Resizing(64, "short", 16)
    for item in find_inputs([str(tmp_path)], 1).items:
        reason = item.reason
        if not reason:
            with pytest.raises(BrixelError) as caught:
                resizing.model_size(item.height, item.width)
            reason = str(caught.value)
        assert reasons[item.name] in reason


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images_module, "MAX_PIXELS", 1000)
    Image.new("RGB", (40, 40)).save(tmp_path / "bomb.png")
    assert "too many pixels (decompression bomb?): 40x40, over 1,000" in find_inputs([str(tmp_path)], 1).items[0].reason


def test_no_damage_raises_anything_but_our_own_error(tmp_path: Path):
    rng = random.Random(0)
    whole = Image.open(make_photograph(tmp_path / "whole.png", 3, 64, 48))
    for number in range(120):
        kind = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")[number % 6]
        buffer = io.BytesIO()
        whole.save(buffer, kind)
        data = bytearray(buffer.getvalue())
        if number % 2:
            data = data[: rng.randrange(len(data))]
        else:
            for _ in range(rng.randrange(1, 60)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        path = tmp_path / f"damaged.{kind.lower()}"
        path.write_bytes(data)
        try:
            read_size(path, still=True)
            assert load_image(path, still=True).mode == "RGB"
        except BrixelError as error:
            assert str(error).endswith(f": {path}")  # noqa: PT017


@pytest.mark.parametrize(
    ("fit", "height", "width", "expected"),
    [
        ("short", 300, 400, (112, 154)),
        ("short", 400, 300, (154, 112)),
        ("short", 50, 50, (112, 112)),
        ("centre", 300, 400, (112, 112)),
        ("stretch", 300, 400, (112, 112)),
    ],
)
def test_sizes_are_multiples_of_the_patch(fit, height: int, width: int, expected: tuple[int, int]):
    resizing = Resizing(112, fit, 14)
    assert resizing.model_size(height, width) == expected
    assert Resizing(112, fit, 14, enlarge=4).model_size(height, width) == (expected[0] * 4, expected[1] * 4)
    assert resizing.apply(Image.new("RGB", (width, height))).shape == (3, *expected)


def test_pixels_are_resized_as_pillow_does():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 121, 3), np.uint8))
    pixels = Resizing(56, "short", 14).apply(image).permute(1, 2, 0).numpy().astype(int)
    expected = np.asarray(image.resize((70, 56), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(pixels - expected).max() <= 1
    assert (pixels == expected).mean() > 0.95


def test_snapping_is_measured():
    assert Resizing(112, "short", 14).snapped(300, 400) == pytest.approx(154 - 112 * 4 / 3)
    assert Resizing(112, "short", 14).snapped(112, 112) == 0
    assert Resizing(100, "centre", 16).snapped(300, 300) == pytest.approx(4)


def test_videos_need_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without(monkeypatch, "av")
    (tmp_path / "clip.mp4").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"A video needs av, not installed: pip install 'brixel\[video\]'"):
        find_inputs([str(tmp_path / "clip.mp4")], 1)


def make_video(path: Path, turned: bool = False) -> Path:
    """Ten frames, ever redder, blue at the left; turned, to be shown a quarter clockwise."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(10):
            image = Image.new("RGB", (64, 48), (number * 25, 0, 0))
            image.paste((number * 25, 0, 255), (0, 0, 8, 48))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    if turned:  # the display matrix in the header of the track
        content = bytearray(path.read_bytes())
        matrix = content.find(b"tkhd") + 44
        content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
        path.write_bytes(content)
    return path


def test_no_damage_to_a_video_raises_anything_but_our_own_error(tmp_path: Path):
    path = make_video(tmp_path / "clip.mp4")
    whole = path.read_bytes()
    header = whole.find(b"mp4v")  # in the table of codecs
    damaged = [whole[:-100], whole[: whole.find(b"moov") + 40], whole.replace(b"mp4v", b"zzzz"), whole[: header + 8]]
    chance = random.Random(0)
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(30):
            content[chance.randrange(len(whole))] = chance.randrange(256)
        damaged.append(bytes(content))
    for content in damaged:
        path.write_bytes(content)
        found = find_inputs([str(path)], 1)
        for item in found.items:
            with contextlib.suppress(BrixelError):
                assert item.reason or load(found, item).size


def test_a_playlist_is_no_video(tmp_path: Path):
    make_video(tmp_path / "clip.mp4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    assert find_inputs([str(tmp_path / "list.mp4")], 1).items[0].reason == "not a video that can be read"


def test_videos_of_telephones_are_upright(tmp_path: Path):
    path = make_video(tmp_path / "clip.mp4", turned=True)
    found = find_inputs([str(path)], every=5)
    assert (found.items[0].height, found.items[0].width) == (64, 48)
    pixels = np.asarray(load(found, found.items[1]))
    assert pixels.shape == (64, 48, 3)
    assert pixels[4, :, 2].mean() > 200  # the blue edge, at the left of what is stored, is on top
    assert pixels[12:, :, 2].mean() < 50


def test_only_one_video_is_open(tmp_path: Path):
    path = make_video(tmp_path / "clip.mp4")
    for number in range(3):
        (tmp_path / f"{number}.mp4").symlink_to(path)
    found = find_inputs([str(tmp_path / "?.mp4")], every=4)
    for item in found.items + found.items[::-1]:
        load(found, item)
        assert [video for video in found.videos.values() if video._begun] == [found.videos[item.path]]


def test_video_frames_are_items(tmp_path: Path):
    path = make_video(tmp_path / "clip.mp4")
    found = find_inputs([str(path)], every=4)
    assert [item.name for item in found.items] == ["clip.mp4#00", "clip.mp4#04", "clip.mp4#08"]
    reds = [np.asarray(load(found, item))[..., 0].mean() for item in found.items]
    assert reds == pytest.approx([0, 100, 200], abs=12)
    assert np.asarray(load(found, found.items[0]))[..., 0].mean() == pytest.approx(0, abs=12)  # back to the beginning
    with pytest.raises(BrixelError, match="the video ends before this frame, after 10"):
        found.videos[path].frame(12)
    path.write_bytes(path.read_bytes()[:200])
    assert find_inputs([str(path)], 1).items[0].reason == "not a video that can be read"
