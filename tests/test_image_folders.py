"""Folders of images: what is listed, in which order, what is skipped, and with which reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Listener
from PIL import Image
from test_disk_faults import without_privileges

from brixel_cli.data.images import ImageFile, Skipped, describe_skipped, scan_folder
from brixel_cli.data.inputs import find_inputs
from brixel_cli.engines.extracting.plan import make_plan
from brixel_cli.errors import BrixelError, UsageError


def test_photographs_that_are_too_small_are_skipped_by_their_shorter_side(tmp_path: Path) -> None:
    Image.new("RGB", (100, 31)).save(tmp_path / "flat.png")
    Image.new("RGB", (31, 100)).save(tmp_path / "tall.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "just.png")
    found, skipped = scan_folder(tmp_path, 32)
    assert found == [ImageFile(tmp_path / "just.png", "just.png", 32, 32)]
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
    assert found[1] == ImageFile(tmp_path / "a" / "z.JPG", str(Path("a/z.JPG")), 20, 30)
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


@pytest.fixture
def closed(photographs: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder of two images, one of them in a folder that may not be looked into."""
    folder = tmp_path / "images"
    (folder / "closed").mkdir(parents=True)
    for name in ("0.png", "closed/1.png"):
        shutil.copy(photographs / "0.png", folder / name)
    (folder / "closed").chmod(0)
    folder.chmod(0o777)
    with without_privileges(tmp_path):
        yield folder
    (folder / "closed").chmod(0o755)


def test_a_folder_that_cannot_be_read_is_reported(closed: Path) -> None:
    found, skipped = scan_folder(closed, 1)
    assert [image.name for image in found] == ["0.png"]
    assert skipped == [Skipped("closed/", "a folder that cannot be read")]


def test_extract_warns_of_a_folder_that_cannot_be_read(closed: Path, extract_options: Callable) -> None:
    listener = Listener()
    make_plan(extract_options(inputs=[str(closed)]), listener).announce(listener)
    assert listener.warned == [f"folders that cannot be read, whose images are left out: {closed / 'closed'}"]
    (closed / "0.png").unlink()
    with pytest.raises(UsageError, match=rf"No images in the folder {closed}\. Its folder {closed}/closed cannot be"):
        find_inputs([str(closed)], 1)
