"""Recipes: read without YAML's traps, every error named at once, written so that they read back equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from recipe_texts import LEAST, error_of, least, write

from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import (
    SHIPPED,
    copy_recipe,
    dump_recipe,
    find_recipe,
    load_recipe,
    recipe_summaries,
    shipped_recipes,
)
from brixel_cli.config.labelled import ProbeRecipe
from brixel_cli.config.section import difference_lines, differences
from brixel_cli.errors import UsageError


def test_all_errors_are_reported_at_once_with_path_expectation_finding_and_nearest_spelling(tmp_path: Path) -> None:
    text = (
        "nmae: typo\n"
        "backbone: {name: test_vit, dtype: bfloat}\n"
        "adapter: {kind: fusoin}\n"
        "optim: {steps: 4.5, lr: fast}\n"
        "run: {log_evry: 3, workers: -1, zzzz: 1}\n"
        "views: {factor: 3}\n"
    )
    head, *lines = error_of(tmp_path, text).splitlines()
    assert head.endswith("mine.yaml has 10 errors:")
    assert set(lines) == {
        "  name: missing; Names the run folder, runs/NAME, unless --output is given.",
        "  nmae: unknown key; did you mean name?",
        "  backbone.dtype: expected 'float32' or 'bfloat16'; found \"bfloat\"; did you mean bfloat16?",
        "  adapter.kind: expected 'fusion' or 'deformable'; found \"fusoin\"; did you mean fusion?",
        "  optim.steps: expected integer; found 4.5",
        '  optim.lr: expected number; found "fast"',
        "  run.log_evry: unknown key; did you mean log_every?",
        "  run.workers: expected greater than or equal to 0; found -1",
        "  run.zzzz: unknown key; known here: device, precision, workers, log_every, validate_every, "
        "checkpoint_every, tensorboard",
        "  views.factor: expected 2, 4 or 8; found 3",
    }


def test_missing_sections_are_named(tmp_path: Path) -> None:
    lines = error_of(tmp_path, "name: a\n").splitlines()
    assert lines[1:] == ["  backbone: missing; required", "  optim: missing; required"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.lr=0", "optim.lr: expected greater than 0; found 0"),
        ("optim.lr=.inf", 'optim.lr: expected number; found ".inf"'),
        ("optim.steps='4'", 'optim.steps: expected integer; found "4"'),
        ("seed=-1", "seed: expected greater than or equal to 0; found -1"),
        ("seed=true", "seed: expected integer; found true"),
        ("name=3", "name: expected string; found 3"),
        ("name=", "name: expected string; found null"),
        ("run=3", "run: expected an object; found 3"),
        ("adapter.fusion.blocks=[1, 2, -1]", "adapter.fusion.blocks.2: expected greater than or equal to 0; found -1"),
        ("adapter.deformable.head_width=6", "adapter.deformable.head_width: expected a multiple of 4; found 6"),
        (
            "views.teacher_size=1000000000",
            "views.teacher_size: expected less than or equal to 65536 or a list; found 1000000000",
        ),
        ("optim.average=1", "optim.average: expected less than 1; found 1"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_what_was_expected(tmp_path: Path, override: str, line: str) -> None:
    assert error_of(tmp_path, LEAST, override).split(" error:\n  ")[1] == line


@pytest.mark.parametrize("epochs", ["1e999", "0", "-1"])
def test_epochs_must_be_a_positive_finite_number(tmp_path: Path, epochs: str) -> None:
    assert "optim.epochs: expected" in error_of(tmp_path, LEAST, "optim.steps=null", f"optim.epochs={epochs}")


@pytest.mark.parametrize("key", ["Seed", "batch-size", "3", "int", "name 2"])
def test_an_unknown_key_of_any_spelling_is_named_as_written(tmp_path: Path, key: str) -> None:
    assert f"\n  {key}: unknown key; " in error_of(tmp_path, LEAST + f'"{key}": 1\n')


def test_an_unknown_key_inside_a_section_is_named_as_written(tmp_path: Path) -> None:
    message = error_of(tmp_path, "name: a\nbackbone: {name: b}\noptim: {steps: 4, batch-size: 3}\n")
    assert "\n  optim.batch-size: unknown key; did you mean batch_size?" in message


@pytest.mark.parametrize("value", ["abc", "[3]", "[448, x]", "-8"])
def test_one_wrong_teacher_size_is_one_error(tmp_path: Path, value: str) -> None:
    message = error_of(tmp_path, LEAST, f"views.teacher_size={value}")
    assert "has 1 error:\n  views.teacher_size" in message


def test_a_file_that_is_no_yaml_is_an_error(tmp_path: Path) -> None:
    message = error_of(tmp_path, "name: [\n")
    assert "mine.yaml is not a valid YAML file: while parsing" in message


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(UsageError, match=r"mine\.yaml is not a valid YAML file: 'utf-8' codec"):
        load_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(("text", "shown"), [("- a\n", '["a"]'), ("", "null"), ("hello\n", '"hello"')])
def test_a_file_without_keys_is_an_error(tmp_path: Path, text: str, shown: str) -> None:
    message = error_of(tmp_path, text)
    assert message.endswith(f"mine.yaml must hold keys and values, such as 'name: mine'; it holds {shown}.")


# --- what must fit together ---


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.epochs=2"], "optim: give exactly one of optim.steps and optim.epochs"),
        (["optim.steps=null"], "optim: give exactly one of optim.steps and optim.epochs"),
        (
            ["optim.batch_size=6", "optim.accumulate=4"],
            "optim: optim.batch_size 6 is not a multiple of accumulate 4",
        ),
        (
            ["cache.enabled=true", "views.kind=random"],
            "the recipe: cache.enabled needs views that stay the same: views.kind centre or fixed, not random",
        ),
        (["views.per_image=3"], "views: views.per_image is 3, but only kind: fixed has more than one view"),
        (
            ["views.per_image=3", "views.kind=random"],
            "views: views.per_image is 3, but only kind: fixed has more than one view",
        ),
        (["views.scale=[0.9, 0.1]"], "views: views.scale must be [least, most]"),
        (
            ["views.jitter=[0.4, 0.4, 0.4, 0.6]"],
            "views: views.jitter: the last value, hue, is at most 0.5, half of the colour circle",
        ),
        (["views.teacher_size=1022"], "the recipe: views.teacher_size 1022 is not a multiple of views.factor 4"),
        (["views.other_sizes=[514]"], "the recipe: views.other_sizes 514 is not a multiple of views.factor 4"),
        (
            ["views.kind=fixed", "views.per_image=4", "views.other_sizes=[512, 768]"],
            "views: views.per_image 4 is not a multiple of the 3 sizes (teacher_size and other_sizes)",
        ),
        (["views.teacher_size=[512, 514]"], "the recipe: views.teacher_size 514 is not a multiple of views.factor 4"),
        (
            ["loss.l1.weight=0", "loss.edge.weight=0", "loss.spectral.weight=0", "loss.cosine.weight=0"],
            "loss: every loss weight is 0: there is nothing to train on",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_an_error(tmp_path: Path, overrides: list[str], expected: str) -> None:
    assert error_of(tmp_path, LEAST, *overrides).endswith(f"mine.yaml with --set applied has 1 error:\n  {expected}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.steps=null", "optim.epochs=0.5"],
        ["optim.batch_size=8", "optim.accumulate=4"],
        ["cache.enabled=true", "views.kind=fixed", "views.per_image=3"],
        ["cache.enabled=true"],
        ["views.scale=[0.5, 0.5]"],
        ["views.teacher_size=1022", "views.factor=2"],
        ["loss.l1.weight=0", "loss.edge.weight=0", "loss.spectral.weight=0", "loss.cosine.weight=0.1"],
    ],
)
def test_the_neighbours_of_those_errors_are_none(tmp_path: Path, overrides: list[str]) -> None:
    assert least(tmp_path, *overrides).name == "least"


def test_sizes_are_height_then_width(tmp_path: Path) -> None:
    recipe = least(tmp_path, "views.teacher_size=[448, 896]")
    assert recipe.views.teacher_hw == (448, 896)
    assert recipe.student_hw == (112, 224)
    assert least(tmp_path, "views.teacher_size=512", "views.factor=8").student_hw == (64, 64)


# --- overrides ---


def test_overrides_reach_into_sections_that_the_file_does_not_name(tmp_path: Path) -> None:
    recipe = least(tmp_path, "adapter.fusion.width=32", "views.teacher_size=[448, 896]", "init=null", "optim.lr=3e-4")
    assert recipe.adapter.fusion.width == 32
    assert recipe.adapter.fusion.fine_width == 64
    assert recipe.views.teacher_size == [448, 896]
    assert recipe.init is None
    assert recipe.optim.lr == 0.0003
    assert recipe.optim.steps == 4


def test_the_last_override_of_a_key_wins(tmp_path: Path) -> None:
    assert least(tmp_path, "seed=1", "seed=2").seed == 2


def test_an_override_may_hold_an_equals_sign(tmp_path: Path) -> None:
    assert least(tmp_path, "data.images=a=b").data.images == "a=b"


def test_an_override_may_replace_a_whole_section(tmp_path: Path) -> None:
    assert least(tmp_path, "optim={epochs: 2}").optim.epochs == 2


def test_an_override_with_an_unknown_key_is_an_error(tmp_path: Path) -> None:
    assert "\n  optim.learning_rate: unknown key; known here: batch_size, " in error_of(
        tmp_path, LEAST, "optim.learning_rate=1.0"
    )
    assert "\n  optim.step: unknown key; did you mean steps?" in error_of(tmp_path, LEAST, "optim.step=1")


@pytest.mark.parametrize("override", ["optim.lr", "=3", " =3", ""])
def test_a_malformed_override_is_an_error_that_shows_an_example(tmp_path: Path, override: str) -> None:
    expected = f"--set takes key.path=value, such as optim.lr=3e-4; got {override!r}."
    assert error_of(tmp_path, LEAST, override) == expected


@pytest.mark.parametrize("override", ["optim.=3", ".seed=3", "optim..lr=3"])
def test_an_override_with_an_empty_part_is_an_error_that_names_the_override(tmp_path: Path, override: str) -> None:
    key = override.partition("=")[0]
    message = error_of(tmp_path, LEAST, override)
    assert f"{key}:" in message or repr(override) in message


def test_a_value_is_no_section(tmp_path: Path) -> None:
    assert error_of(tmp_path, LEAST, "optim.steps.x=3") == "--set optim.steps.x: 'steps' is a value, not a section."


def test_an_override_reaches_into_a_section_left_empty(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, LEAST + "run:\n"), ["run.device=cpu"]).run.device == "cpu"


def test_an_override_that_is_no_yaml_is_an_error(tmp_path: Path) -> None:
    message = error_of(tmp_path, LEAST, "views.teacher_size=[1")
    assert message.startswith("--set views.teacher_size: '[1' is not a YAML value: while parsing a flow sequence")


# --- finding ---


@pytest.mark.parametrize("reference", ["vitl", "vitl.yaml", "recipes/vitl.yaml"])
def test_a_shipped_recipe_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(reference) == SHIPPED / "vitl.yaml"
    assert load_recipe(reference).name == "vitl"


def test_a_file_here_goes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "vitl.yaml").write_text(LEAST)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/vitl.yaml").name == "least"


def test_a_path_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, LEAST)
    assert find_recipe(path) == Path(path)


@pytest.mark.parametrize(
    ("reference", "hint"),
    [("vitll", " Did you mean vitl?"), ("elsewhere/vitl.yaml", " Did you mean vitl?"), ("qqq", "")],
)
def test_an_unknown_recipe_is_an_error_with_a_hint(reference: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_recipe(reference)
    assert str(caught.value) == (
        f"No recipe at {reference}, and brixel ships none of that name.{hint} Shipped: {', '.join(shipped_recipes())}."
    )


@pytest.mark.parametrize("reference", ["", ".", "recipes"])
def test_a_folder_is_no_recipe(reference: str) -> None:
    with pytest.raises(UsageError, match=f"^No recipe at {reference}, and brixel ships none of that name"):
        find_recipe(reference)


def test_the_recipes_of_the_paper_and_the_default_one_are_shipped() -> None:
    assert {"vits", "vitb", "vitl", "vithplus", "dinov2_vits", "demo"} <= set(shipped_recipes())


# --- writing and comparing ---


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_valid_and_says_which_command_runs_it(name: str) -> None:
    text = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
    assert load_recipe(name).name == name
    assert f"brixel distill --recipe recipes/{name}.yaml" in text


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_written_recipe_reads_back_equal(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name)
    text = dump_recipe(recipe)
    assert load_recipe(write(tmp_path, text)) == recipe
    # A plain YAML reader sees the same values: no number has become a string on the way.
    assert yaml.safe_load(text) == recipe.model_dump()


def test_awkward_values_read_back_equal(tmp_path: Path) -> None:
    recipe = least(
        tmp_path, "optim.lr=1e-7", "optim.weight_decay=1e22", "data.images='no'", "init='010'",
        "data.val_images='1e-4'", "cache.directory='null'", "views.teacher_size=[448, 896]",
    )  # fmt: skip
    assert recipe.data.images == "no"
    assert recipe.init == "010"
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe
    assert yaml.safe_load(dump_recipe(recipe))["optim"]["lr"] == 1e-7


def test_a_recipe_does_not_differ_from_itself() -> None:
    assert differences(load_recipe("vitl"), load_recipe("vitl")) == {}


def test_differences_name_the_key_and_both_values(tmp_path: Path) -> None:
    changed = least(tmp_path, "optim.lr=2e-3", "views.teacher_size=[512, 256]", "init=x.pth")
    found = differences(least(tmp_path), changed)
    assert found["optim.lr"] == (0.001, 0.002)
    assert sorted(difference_lines(found)) == [
        'init: null -> "x.pth"',
        "optim.lr: 0.001 -> 0.002",
        "views.teacher_size: 1024 -> [512, 256]",
    ]


def test_differences_pass_over_ignored_keys_and_sections(tmp_path: Path) -> None:
    changed = least(tmp_path, "run.device=cpu", "run.workers=7", "cache.directory=elsewhere", "cache.enabled=true")
    found = differences(least(tmp_path), changed, ignored=("run", "cache.directory"))
    assert found == {"cache.enabled": (False, True)}
    assert "run.device" in differences(least(tmp_path), changed)


def test_differences_of_nested_values_of_a_file() -> None:
    old = {"student": None, "res": 448, "versions": {"torch": "2.1", "timm": "1.0"}}
    new = {"student": {"sha256": "a" * 64}, "res": 448, "versions": {"torch": "2.2", "timm": "1.0"}}
    assert difference_lines(differences(old, new)) == [
        'versions.torch: "2.1" -> "2.2"',
        f'student.sha256: null -> "{"a" * 56}...',
    ]


def test_training_in_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run.precision float16 is for inference; train in bfloat16 or float32"):
        least(tmp_path, "run.precision=float16")


def test_wrong_values_are_reported_as_those_of_the_file_or_of_set(tmp_path: Path) -> None:
    message = error_of(tmp_path, LEAST + "seed: -1\n", "optim.step=1", "views.kind=middle")
    file, option = message.split("\n--set has 2 errors:\n")
    assert file.endswith(
        "mine.yaml with --set applied has 1 error:\n  seed: expected greater than or equal to 0; found -1"
    )
    assert option.splitlines() == [
        "  views.kind: expected 'centre', 'random' or 'fixed'; found \"middle\"",
        "  optim.step: unknown key; did you mean steps?",
    ]


def test_a_recipe_is_copied_and_never_over_a_file(tmp_path: Path) -> None:
    path = copy_recipe("vitl", tmp_path / "my.yaml")
    assert path.read_text() == (SHIPPED / "vitl.yaml").read_text()
    assert load_recipe(str(path)) == load_recipe("vitl")
    assert copy_recipe("camvid", tmp_path, ProbeRecipe) == tmp_path / "camvid.yaml"
    with pytest.raises(UsageError, match="my.yaml is there already, and is not overwritten: name another file"):
        copy_recipe("vits", path)
    with pytest.raises(UsageError, match=r"A recipe is a .yaml file: copy vits to .*mine.yaml, or into a folder"):
        copy_recipe("vits", tmp_path / "mine")
    with pytest.raises(UsageError, match="No recipe at vitx, .* Did you mean vit"):
        copy_recipe("vitx", tmp_path / "x.yaml")
    with pytest.raises(UsageError, match=r"no/x.yaml cannot be written: No such file or directory"):
        copy_recipe("vits", tmp_path / "no" / "x.yaml")


@pytest.mark.parametrize("schema", [Recipe, ProbeRecipe])
def test_every_recipe_has_a_summary(schema: type[Recipe] | type[ProbeRecipe]) -> None:
    summaries = recipe_summaries(schema)
    assert list(summaries) == shipped_recipes(schema)
    assert all(len(text) > 10 and not text.startswith("#") for text in summaries.values())
