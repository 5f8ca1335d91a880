"""Every block of commands in README and docs is run, or says what it needs.

A block stands below a comment: `<!-- run -->`, or `<!-- needs: WHAT -->`. Blocks of a page are run one after another in
a folder with the demo's images, with the weights of `brixel demo` in place of those of the hub; without them, skipped.
"""

from __future__ import annotations

import functools
import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_documentation import PAGES, name
from typer.testing import CliRunner

import brixel_cli
from brixel_cli.app import app

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo"
WEIGHTS = DEMO / "dinov2_vits14.safetensors"
WITHOUT_WEIGHTS = ("--join", "--list-recipes", "--copy-recipe")
"""Options with which a command takes no --backbone-weights."""
BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<mark>(?:(?!-->).)*) -->\n *)?```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S
)


class Block(NamedTuple):
    mark: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [
        Block(item["mark"] or "", item["language"], re.sub(rf"^{item['indent']}", "", item["text"], flags=re.M))
        for item in found
    ]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_run_or_says_what_it_needs(page: Path) -> None:
    for block in blocks(page):
        if block.language in ("yaml", "text"):
            continue
        assert block.mark == "run" or re.fullmatch(r"needs: \S.*", block.mark), f"{name(page)}: {block}"


def test_a_block_without_a_mark_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- x -->\na\n<!-- run -->\n```\none\n```\n\n1. b\n\n    <!-- needs: c -->\n    ```python\n    two\n    ```\n\n```\nthree\n```\n"
    )
    assert blocks(page) == [("run", "", "one\n"), ("needs: c", "python", "two\n"), ("", "", "three\n")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two images in photos/, and Python functions that take the demo's weights."""
    if not WEIGHTS.is_file():
        pytest.skip("needs the weights of the demo: python -m brixel_cli.demo demo")
    (tmp_path / "photos").mkdir()
    shutil.copyfile(DEMO / "photos" / "held_out" / "chelsea.png", tmp_path / "photos" / "cat.png")
    for image in ("flower.jpg", "coffee.png"):
        shutil.copyfile(DEMO / "photos" / "held_out" / image, tmp_path / "photos" / image)
    (tmp_path / "demo").symlink_to(DEMO)
    monkeypatch.chdir(tmp_path)
    for function in ("load_student", "extract"):
        known = functools.partial(getattr(brixel_cli, function), backbone_weights=str(WEIGHTS))
        monkeypatch.setattr(brixel_cli, function, known, raising=False)
    return tmp_path


RUNNABLE = [page for page in PAGES if any(block.mark == "run" for block in blocks(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_the_blocks_of_a_page_run(page: Path, folder: Path) -> None:
    variables: dict[str, Any] = {}
    for block in blocks(page):
        if block.mark != "run":
            continue
        if block.language == "python":
            exec(compile(block.text, name(page), "exec"), variables)
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)[1:]
            if words and not {"--backbone-weights", *WITHOUT_WEIGHTS} & set(words):
                words += ["--backbone-weights", str(WEIGHTS)]
            result = CliRunner().invoke(app, [*words, "--quiet", "--device", "cpu"])
            assert result.exit_code == 0, f"{name(page)}: {line}\n{result.stderr}\n{result.exception}"
    grid = (32, 32 if "--fit centre" in page.read_text(encoding="utf-8") else 48)
    for variable, shape in (("feature_map", (384, *grid)), ("similarity", grid)):
        if hasattr(variables.get(variable), "shape"):
            assert tuple(variables[variable].shape) == shape
