"""Labelled sets: which files belong to them, and what is said of those that are missing or do not match."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from labelled_sets import DOWNLOAD, HEIGHT, WIDTH, fault, first, how, make_root, opened, recipe, save, save_image
from test_disk_faults import without_privileges

from brixel_cli.data.labelled import LabelledSet
from brixel_cli.errors import BrixelError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path)


def test_files_are_found_by_pattern_in_subfolders_too(root: Path) -> None:
    found = opened(root)
    assert found.names == ["images/train/a.png", "images/train/b.png", "images/train/town/c.png"]
    assert len(found) == 3
    assert found.size(2) == (HEIGHT, WIDTH)
    assert opened(root, split="evaluate").names == ["images/val/d.png"]


def test_the_root_is_the_recipes_own_unless_another_is_given(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(root.parent)
    assert len(LabelledSet(recipe(tmp_path, "data.root=set"), "train")) == 3


def test_a_list_gives_order_and_choice(root: Path) -> None:
    (root / "train.txt").write_text("town/c\n\n /a \n")
    found = opened(root, 'data.list_file="{split}.txt"')
    assert found.names == ["images/train/town/c.png", "images/train/a.png"]


def test_a_list_of_several_columns_names_image_and_target(root: Path) -> None:
    (root / "train.txt").write_text("/images/train/b.png /labels/train/a.png 518.8\n")
    changes = ["data.list_file=train.txt", 'data.images="{name}"', 'data.labels.files="{column2}"']
    assert opened(root, *changes).names == ["images/train/b.png"]
    (root / "train.txt").write_text("images/train/b.png\n")
    assert fault(root, *changes) == (
        "ROOT/train.txt, line 1: 2 words are expected, the name and its columns; found 'images/train/b.png'."
    )


def test_a_wildcard_chooses_images_of_a_split(root: Path) -> None:
    assert opened(root, 'data.train.only="*/town/*"').names == ["images/train/town/c.png"]
    (root / "train.txt").write_text("town/c\na\n")
    assert opened(root, 'data.train.only="*/a.png"', "data.list_file=train.txt").names == ["images/train/a.png"]


def test_a_wildcard_stands_for_any_extension(root: Path) -> None:
    save(root / "images/train/e.jpg", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    save(root / "labels/train/e.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    found = opened(root, "data.images=images/{split}/{name}.*")
    assert [Path(name).name for name in found.names] == ["a.png", "b.png", "e.jpg", "c.png"]
    (root / "train.txt").write_text("e\na\n")
    listed = opened(root, "data.images=images/{split}/{name}.*", "data.list_file=train.txt")
    assert listed.names == ["images/train/e.jpg", "images/train/a.png"]


def test_two_placeholders_find_targets_in_folders_beside_the_images(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for scene in ("cup/multiview-0", "cup/wild_set"):
        save_image(root / scene / "images/000.png")
        save(root / scene / "depth/000.png", np.full((HEIGHT, WIDTH), 900, np.uint16))
    changes = ['data.images="{folder}/images/{name}.png"', 'data.depth.files="{folder}/depth/{name}.png"', "task=depth",
               "data.labels=null", 'data.train.only="*/multiview*"']  # fmt: skip
    assert opened(root, *changes).names == ["cup/multiview-0/images/000.png"]
    assert first(root, *changes).depth is not None


def test_hidden_files_are_passed_over(root: Path) -> None:
    save_image(root / "images/train/.hidden.png")
    assert len(opened(root)) == 3


def test_a_missing_folder_says_what_to_download_and_where_to_put_it(root: Path) -> None:
    with pytest.raises(BrixelError) as caught:
        opened(root / "nowhere")
    assert str(caught.value) == (
        f"There is no folder {root}/nowhere for the data set mine.\n{DOWNLOAD}\n"
        f"Put it into {root}/nowhere, or name the folder where it is with --data DIR (--probe-data DIR of brixel benchmark)."
    )


def test_a_folder_without_images_says_what_was_looked_for(root: Path) -> None:
    assert fault(root, "data.train.split=training") == how(
        "No image in ROOT fits images/training/{name}.png, the training images of mine."
    )
    assert fault(root, 'data.train.only="*/village/*"') == how(
        "No image in ROOT fits images/train/{name}.png and */village/*, the train images of mine."
    )


def test_a_missing_list_is_named(root: Path) -> None:
    assert fault(root, 'data.list_file="{split}.txt"') == how(
        "ROOT/train.txt, the list of the train images of mine, cannot be read: No such file or directory."
    )
    (root / "train.txt").write_bytes(b"\xff\xfe")
    assert "cannot be read: not UTF-8." in fault(root, 'data.list_file="{split}.txt"')


def test_an_image_of_the_list_that_is_missing_is_named(root: Path) -> None:
    (root / "train.txt").write_text("a\nx\ny\nz\nw\n")
    assert fault(root, "data.list_file=train.txt") == how(
        "ROOT/train.txt lists 4 images that are not in ROOT:",
        "  line 2, x: there is no images/train/x.png",
        "  line 3, y: there is no images/train/y.png",
        "  line 4, z: there is no images/train/z.png",
        "  and 1 more",
    )


def test_an_empty_list_and_a_name_that_stands_twice_are_faults(root: Path) -> None:
    (root / "train.txt").write_text("\n")
    assert fault(root, "data.list_file=train.txt") == "ROOT/train.txt lists no image."
    (root / "train.txt").write_text("a\nb\na\n")
    assert fault(root, "data.list_file=train.txt") == "ROOT/train.txt, line 3: a stands twice in the list."


def test_a_missing_target_is_named(root: Path) -> None:
    (root / "labels/train/b.png").unlink()
    assert fault(root) == how(
        "1 files are missing for the 3 train images of mine in ROOT:",
        "  images/train/b.png has no labels: labels/train/b.png",
    )


def test_a_target_without_its_image_is_named(root: Path) -> None:
    (root / "images/train/b.png").unlink()
    assert fault(root) == (
        "1 of the 3 files of labels of mine (train) have no image in ROOT:\n  labels/train/b.png\n"
        "Add the images, or take these files away."
    )


def test_a_fingerprint_changes_with_files_task_split_and_description_and_with_nothing_else(root: Path) -> None:
    before = opened(root).fingerprint()
    assert len(before) == 64
    assert opened(root, "size=56", "protocol=jafar").fingerprint() == before
    others = {
        before,
        opened(root, split="evaluate").fingerprint(),
        opened(root, "task=depth").fingerprint(),
        opened(root, "data.labels.ignore=[254, 255]").fingerprint(),
    }
    save(root / "labels/train/b.png", np.ones((HEIGHT, WIDTH), np.uint8))
    others.add(opened(root).fingerprint())
    assert len(others) == 5


def test_a_set_that_was_moved_or_copied_is_the_same_set(root: Path, tmp_path: Path) -> None:
    before = opened(root)
    copy = shutil.copytree(root, tmp_path / "elsewhere")
    for path in copy.rglob("*.png"):
        os.utime(path, (0, 0))
    assert opened(copy).fingerprint() == before.fingerprint()
    assert opened(copy).image_fingerprint() == before.image_fingerprint()
    save(copy / "labels/train/b.png", np.ones((HEIGHT, WIDTH), np.uint8))
    assert (
        opened(copy).image_fingerprint()
        == before.image_fingerprint()
        != opened(root, split="evaluate").image_fingerprint()
    )


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_list_that_is_no_regular_file_is_not_read(root: Path, kind: str) -> None:
    path = root / "train.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    what = "a folder" if kind == "folder" else "a pipe, socket or device, not a file"
    assert fault(root, "data.list_file=train.txt").startswith(
        f"ROOT/train.txt, the list of the train images of mine, cannot be read: {what}.\n"
    )


def test_a_pipe_among_the_images_of_a_list_is_named(root: Path) -> None:
    os.mkfifo(root / "images/train/pipe.png")
    (root / "train.txt").write_text("a\npipe\n")
    assert "line 2, pipe: there is no images/train/pipe.png" in fault(root, "data.list_file=train.txt")


def test_a_folder_that_cannot_be_read_makes_the_set_incomplete(root: Path) -> None:
    (root / "images/train/town").chmod(0)
    described = recipe(root.parent)
    message = f"The folder {root}/images/train/town of the data set cannot be read: permission denied. Allow it."
    with without_privileges(root.parent), pytest.raises(BrixelError, match=message):
        LabelledSet(described, "train", root)
    (root / "images/train/town").chmod(0o755)
