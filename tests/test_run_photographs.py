"""Which photographs a distillation trains on and measures on, and what it says of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Listener, make_photograph, with_changes

from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import load_recipe
from brixel_cli.core.student import read_adapter
from brixel_cli.engines.distilling.distillation import distill
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.engines.distilling.training_images import find_images
from brixel_cli.engines.distilling.validation import HeldOut
from brixel_cli.errors import BrixelError, UsageError


def test_unusable_photographs_are_listed_with_reasons_and_skipped(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(6):
        make_photograph(folder / f"{number}.png", number)
    make_photograph(folder / "small.png", 9, width=40, height=40)
    (folder / "text.jpg").write_text("no image")
    data = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])  # its header is fine: found out when it is read
    recipe = with_changes(tiny_recipe_file, f"data.images={folder}", "data.val_fraction=0.1")
    results = distill(recipe, RunFolder(tmp_path / "run"), listener).results
    listed = (tmp_path / "run" / "skipped.csv").read_text()
    assert 'small.png,"too small: 40x40, shorter side under 128"' in listed
    assert "text.jpg,not an image of a format that brixel reads" in listed
    assert "cut.png,image file is truncated" in listed
    assert results.num_skipped == 3
    assert any("damaged images were replaced" in message for message in listener.warned)


def test_no_photographs_is_an_error(tiny_recipe_file: Path, tmp_path: Path, listener: Listener) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BrixelError, match="No usable image in"):
        distill(
            with_changes(tiny_recipe_file, f"data.images={tmp_path / 'empty'}"), RunFolder(tmp_path / "run"), listener
        )
    with pytest.raises(BrixelError, match=r"No folder of images at .*nowhere. Name yours with --images DIR"):
        distill(with_changes(tiny_recipe_file, "data.images=nowhere"), RunFolder(tmp_path / "run"), listener)
    assert not (tmp_path / "run").exists()


def test_a_held_out_folder_of_its_own(tiny_recipe_file: Path, tmp_path: Path, listener: Listener) -> None:
    folder = tmp_path / "held_out"
    folder.mkdir()
    for number in range(3):
        make_photograph(folder / f"{number}.png", 100 + number)
    recipe = with_changes(tiny_recipe_file, f"data.val_images={folder}", "data.max_val_images=2")
    results = distill(recipe, RunFolder(tmp_path / "run"), listener).results
    assert results.best.num_images == 2
    assert "8 training and 2 held-out" in listener.said[0]


def test_the_photographs_of_a_resumed_run_must_be_the_same(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(6):
        make_photograph(folder / f"{number}.png", number)
    recipe = with_changes(tiny_recipe_file, f"data.images={folder}")
    distill(recipe, RunFolder(tmp_path / "run"), listener)
    make_photograph(folder / "late.png", 50)
    with pytest.raises(UsageError, match=r"The images are not those that .* was begun with: 5 training and 1 held"):
        distill(recipe, RunFolder(tmp_path / "run"), listener, resume=True)


def own_images(tiny_recipe_file: Path, folder: Path, *changes: str) -> Recipe:
    """A recipe on six images of one's own."""
    folder.mkdir()
    for number in range(6):
        make_photograph(folder / f"{number}.png", number)
    return with_changes(tiny_recipe_file, f"data.images={folder}", *changes)


def test_an_image_edited_in_place_is_noticed_when_a_run_is_resumed(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    recipe = own_images(tiny_recipe_file, tmp_path / "mine")
    distill(recipe, RunFolder(tmp_path / "run"), listener)
    make_photograph(tmp_path / "mine" / "2.png", 99)
    with pytest.raises(
        UsageError, match=r"The images are not those .*: 5 training and 1 held-out \(\w+\), the contents"
    ):
        distill(recipe, RunFolder(tmp_path / "run"), listener, resume=True)


def test_a_run_whose_images_have_moved_goes_on_with_the_new_folder(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    first = distill(own_images(tiny_recipe_file, tmp_path / "mine"), RunFolder(tmp_path / "run"), listener)
    (tmp_path / "mine").rename(tmp_path / "moved")
    stored = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    with pytest.raises(BrixelError, match=r"No folder of .* at .*mine. Name yours with --images DIR"):
        distill(stored, RunFolder(tmp_path / "run"), listener, resume=True)
    moved = load_recipe(str(tmp_path / "run" / "recipe.yaml"), [f"data.images={tmp_path / 'moved'}"])
    assert distill(moved, RunFolder(tmp_path / "run"), listener, resume=True).results == first.results
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")).data.images == str(tmp_path / "moved")
    make_photograph(tmp_path / "moved" / "2.png", 99)
    with pytest.raises(UsageError, match=r"The images are not those that .* was begun with"):
        distill(moved, RunFolder(tmp_path / "run"), listener, resume=True)


def test_a_run_of_an_older_brixel_knows_its_images_by_name_and_size(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    recipe, run = own_images(tiny_recipe_file, tmp_path / "mine"), RunFolder(tmp_path / "run")
    first = distill(recipe, run, listener)
    tensors, facts = run.load_state()
    del facts["images_sha256"]
    run.save_state(tensors, facts)
    assert distill(recipe, run, listener, resume=True).results == first.results
    run.save_state(tensors, facts)
    make_photograph(tmp_path / "mine" / "2.png", 2, width=300, height=300)
    with pytest.raises(UsageError, match="The images are not those that"):
        distill(recipe, run, listener, resume=True)


def test_held_out_photographs_are_never_trained_on(tiny_recipe_file: Path, tmp_path: Path, listener: Listener) -> None:
    (tmp_path / "all" / "val").mkdir(parents=True)
    for number in range(5):
        make_photograph(tmp_path / "all" / f"{number}.png", number)
    for number in range(2):
        make_photograph(tmp_path / "all" / "val" / f"{number}.png", 20 + number)
    recipe = with_changes(
        tiny_recipe_file, f"data.images={tmp_path / 'all'}", f"data.val_images={tmp_path / 'all' / 'val'}"
    )
    distill(recipe, RunFolder(tmp_path / "run"), listener)
    assert "5 training and 2 held-out images" in listener.said[0]
    same = with_changes(tiny_recipe_file, f"data.images={tmp_path / 'all'}", f"data.val_images={tmp_path / 'all'}")
    with pytest.raises(BrixelError, match="All images in data.images .* are held out by data.val_images"):
        distill(same, RunFolder(tmp_path / "other"), listener)


@pytest.mark.parametrize("cached", ["true", "false"])
def test_damaged_photographs_are_told_again_after_resuming(
    tiny_recipe_file: Path, tmp_path: Path, cached: str, listener: Listener
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(6):
        make_photograph(folder / f"{number}.png", number)
    data = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(data[: len(data) // 2])
    recipe = with_changes(tiny_recipe_file, f"data.images={folder}", f"cache.enabled={cached}")
    first = distill(recipe, RunFolder(tmp_path / "run"), listener)
    assert first.results.num_skipped == 1
    listed = (tmp_path / "run" / "skipped.csv").read_text()
    assert "3.png,image file is truncated" in listed
    again = distill(recipe, RunFolder(tmp_path / "run"), Listener(), resume=True)
    assert again.results == first.results
    assert (tmp_path / "run" / "skipped.csv").read_text() == listed


def test_a_damaged_held_out_photograph_does_not_count(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    folder = tmp_path / "held_out"
    folder.mkdir()
    for number in range(3):
        make_photograph(folder / f"{number}.png", 30 + number)
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(data[: len(data) // 2])
    recipe = with_changes(tiny_recipe_file, f"data.val_images={folder}")
    assert distill(recipe, RunFolder(tmp_path / "run"), listener).results.best.num_images == 2
    for number in (0, 2):
        (folder / f"{number}.png").write_bytes((folder / "1.png").read_bytes())
    with pytest.raises(BrixelError, match=r"None of the 3 .*images can be read"):
        distill(recipe, RunFolder(tmp_path / "other"), listener)


def test_held_out_images_of_several_domains_are_measured_by_domain(
    tiny_recipe_file: Path, tmp_path: Path, listener: Listener
) -> None:
    folders = {name: tmp_path / "all" / name for name in ("street", "rooms")}
    for start, (name, count) in enumerate((("street", 3), ("rooms", 2), ("", 4))):
        (tmp_path / "all" / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            make_photograph(tmp_path / "all" / name / f"{number}.png", 10 * start + number)
    changes = [f"data.images={tmp_path / 'all'}", *(f"data.held_out.{name}={path}" for name, path in folders.items())]
    recipe = with_changes(tiny_recipe_file, *changes)
    assert recipe.data.held_out == {name: str(path) for name, path in folders.items()}
    images = find_images(recipe)
    assert [image.name for image in images.held_out] == [
        "street/0.png", "street/1.png", "street/2.png", "rooms/0.png", "rooms/1.png",
    ]  # fmt: skip
    assert len(images.training) == 4  # none of those that are held out
    few = find_images(with_changes(tiny_recipe_file, *changes, "data.max_val_images=3"))
    assert [image.name for image in few.held_out] == ["street/0.png", "street/1.png", "rooms/0.png"]
    run = RunFolder(tmp_path / "run")
    best = distill(recipe, run, listener).results.best
    assert best.num_images == 5
    assert list(best.domains) == ["street", "rooms", "mean"]
    found = [best.domains[name].value for name in ("street", "rooms")]
    assert best.main_gap == best.domains["mean"].value == pytest.approx(sum(found) / 2)
    assert all(spread >= 0 for spread in best.gap_spread.values())
    assert HeldOut.from_json(json.loads(run.results.read_text())["best"]) == best
    assert read_adapter(str(run.path)).card.recovered_gap == {"32": pytest.approx(best.main_gap, abs=1e-4)}
    # Their folders may move; other images are others.
    (tmp_path / "all" / "street").rename(tmp_path / "moved")
    moved = with_changes(tiny_recipe_file, *changes, f"data.held_out.street={tmp_path / 'moved'}")
    assert distill(moved, run, listener, resume=True).results.best == best
    with pytest.raises(UsageError, match=r"data.held_out names the held-out images by domain, data.val_images all"):
        with_changes(tiny_recipe_file, *changes, f"data.val_images={tmp_path}")
    everything = with_changes(
        tiny_recipe_file, f"data.images={folders['rooms']}", f"data.held_out.a={folders['rooms']}"
    )
    with pytest.raises(BrixelError, match=r"All images in data.images .* are held out by data.held_out"):
        find_images(everything)
