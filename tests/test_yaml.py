"""YAML: values without its traps, and hostile files that are refused at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from recipe_texts import LEAST, error_of, least, write

from brixel_cli.config import files as config_files
from brixel_cli.config.files import (
    load_recipe,
)
from brixel_cli.errors import UsageError

# --- values ---


def test_a_number_with_an_exponent_and_no_point_is_a_float(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "name: a\nbackbone: {name: b}\noptim: {steps: 4, lr: 1e-4}\n"))
    assert recipe.optim.lr == 0.0001
    assert isinstance(recipe.optim.lr, float)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.e-4", 1e-4), ("1.0e-4", 1e-4), (".5", 0.5), ("2", 2.0), ("+0.5", 0.5)],
)
def test_every_way_to_write_a_number_is_a_number(tmp_path: Path, text: str, value: float) -> None:
    assert least(tmp_path, f"optim.lr={text}").optim.lr == value


def test_a_leading_zero_is_no_octal_number(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, LEAST + "seed: 010\n")).seed == 10


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "y", "n", "True", "FALSE"])
def test_only_true_and_false_are_booleans(tmp_path: Path, word: str) -> None:
    message = error_of(tmp_path, LEAST + f"run: {{tensorboard: {word}}}\n")
    assert message.endswith(f'mine.yaml has 1 error:\n  run.tensorboard: expected boolean; found "{word}"')


@pytest.mark.parametrize("word", ["no", "on", "1_000x", "2024-01-01", "12:30:45", "0x10", ".inf"])
def test_words_that_other_readers_would_turn_into_values_stay_words(tmp_path: Path, word: str) -> None:
    assert least(tmp_path, f"data.images={word}").data.images == word


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False)])
def test_true_and_false_are_booleans(tmp_path: Path, text: str, value: bool) -> None:
    assert least(tmp_path, f"run.tensorboard={text}").run.tensorboard is value


@pytest.mark.parametrize("text", ["name: a\nname: b\n", "optim: {steps: 3, lr: 1.0, steps: 4}\n"])
def test_a_duplicate_key_is_an_error(tmp_path: Path, text: str) -> None:
    message = error_of(tmp_path, text)
    key = "name" if text.startswith("name") else "steps"
    assert "mine.yaml is not a valid YAML file: " in message
    assert f"the key '{key}' stands twice" in message
    assert "line " in message


def test_a_section_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    assert "the key 'optim' stands twice" in error_of(tmp_path, LEAST + "optim: {lr: 1.0}\n")


@pytest.mark.parametrize("key", ["[a, b]", "{a: b}"])
def test_a_key_that_is_no_word_is_an_error_of_the_file(tmp_path: Path, key: str) -> None:
    assert "is not a valid YAML file" in error_of(tmp_path, LEAST + f"? {key}\n: 3\n")


def test_a_file_may_not_make_python_objects(tmp_path: Path) -> None:
    message = error_of(tmp_path, LEAST + "seed: !!python/object/apply:os.getpid []\n")
    assert "python/object/apply:os.getpid is not allowed here" in message


# --- errors ---


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "it holds more than 100000 values"),
        ("name: &me [*me]", "nested more than 50 levels deep"),
        ("name: " + "[" * 3000 + "]" * 3000, "nested more than 50 levels deep|cannot be read"),
        ("seed: " + "9" * 5000, "a number is too large"),
        ("seed: 100000000000000000000", "a number is too large"),
        ("name: !!binary aGVsbG8=", "the tag tag:yaml.org,2002:binary is not allowed here"),
        ("name: !!set {a}", "the tag tag:yaml.org,2002:set is not allowed here"),
        ("name: !!timestamp 2001-01-01", "the tag tag:yaml.org,2002:timestamp is not allowed here"),
        ("name: !mine x", "the tag !mine is not allowed here"),
        ("name: !!float abc", "cannot be read"),
        ("name: a\n--- \nname: b", "expected a single document"),
    ],
)
def test_hostile_yaml_is_refused_at_once(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(UsageError, match=said):
        load_recipe(str(path))
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text", ["1e400", "-1e400", "1" + "0" * 400 + ".0"])
def test_a_number_beyond_all_range_is_an_error_of_its_key(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="optim.lr"):
        load_recipe("demo", [f"optim.lr={text}"])


def test_anchors_and_merge_keys_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("l1: &base {weight: 2.0}\nedge: {<<: *base, components: 4}\n")
    assert config_files._read(tmp_path / "r.yaml")["edge"] == {"weight": 2.0, "components": 4}
