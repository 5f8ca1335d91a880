"""README and docs: every command parses, every setting exists, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from reference_pages import pages

from brixel_cli.app import app
from brixel_cli.cli.probe import PREFIXES
from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import load_recipe, shipped_recipes
from brixel_cli.config.labelled import ProbeRecipe
from brixel_cli.config.section import flatten

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "brixel_cli" / "students").glob("*.md")])
PATHS = re.compile(r"`((?:brixel_cli|recipes|tests|docs|cli|config|core|data|drawing|engines|students)/[\w./]*)`")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands_in(text: str) -> list[list[str]]:
    """The `brixel` command lines of a page's code blocks, as words without comments."""
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)).replace("\\\n", " ")
    lines = [re.sub(r"^torchrun .* -m brixel_cli ", "brixel ", line) for line in blocks.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("brixel ")]


COMMANDS = [(name(page), words) for page in PAGES for words in commands_in(page.read_text(encoding="utf-8"))]


def parsed(words: list[str]) -> dict[str, Any]:
    """The values of a command line, which is parsed and not carried out."""
    command = typer.main.get_command(app).commands[words[0]]
    values: dict[str, Any] = command.make_context(words[0], words[1:]).params
    return values


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page}-{shlex.join(words)[:60]}" for page, words in COMMANDS]
)
def test_every_command_line_parses(page: str, words: list[str]) -> None:
    if words[0].startswith("--"):
        group = typer.main.get_command(app)
        names = {option for item in group.params for option in item.opts}
        assert words[0] in names | {"--help"}
        return
    values = parsed(words)
    recipe, settings = values.get("recipe"), list(values.get("set_") or [])
    if recipe and recipe.startswith("recipes/"):
        assert (ROOT / recipe).is_file(), f"{page} names {recipe}"
    stem = Path(recipe or "dinov2_vits").stem
    if words[0] == "distill" and stem in shipped_recipes():
        load_recipe(stem, settings, Recipe)  # an unknown key, or a value out of range, is an error
    if words[0] == "probe" and recipe and stem in shipped_recipes(ProbeRecipe):
        load_recipe(stem, [item for item in settings if not item.startswith(PREFIXES)], ProbeRecipe)


def test_commands_are_found_and_wrong_ones_are_noticed() -> None:
    found = commands_in("```\nbrixel extract --input dir \\\n  --res 448   # why\n```\n`brixel probe` here\n")
    assert found == [["extract", "--input", "dir", "--res", "448"]]
    with pytest.raises(Exception, match="--ress"):
        parsed(["extract", "--ress", "448"])
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    base = page.parent.parent if page.name == "notes.md" else page.parent  # the notes stand in the page above them
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", text):
        linked = base / target if target else page
        assert linked.exists(), f"{name(page)} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ +(.+?) *$", linked.read_text(encoding="utf-8"), flags=re.M)
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{name(page)} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_path_that_is_named_exists(page: Path) -> None:
    for path in PATHS.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists() or (ROOT / "brixel_cli" / path).exists(), f"{name(page)} names {path}"


def test_the_labelled_set_of_the_documentation_loads(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "PROBE.md").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    recipe = load_recipe(str(tmp_path / "mine.yaml"), [], ProbeRecipe)
    assert recipe.data.labels is not None
    assert (recipe.task, recipe.size, recipe.data.labels.classes) == ("segmentation", 112, ["sky", "building", "road"])


def test_the_scenes_of_the_documentation_load(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "LABEL_FREE.md").read_text(encoding="utf-8")
    (tmp_path / "rooms.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    recipe = load_recipe(str(tmp_path / "rooms.yaml"), [], ProbeRecipe)
    assert (recipe.task, recipe.data.poses is not None) == ("matching", True)


@pytest.mark.parametrize("page", ["commands.md", "recipes.md"])
def test_the_reference_is_what_the_code_makes(page: str) -> None:
    made = pages()[page]
    found = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    assert found == made, "stale: python tests/measure/reference_pages.py"


def test_the_reference_says_everything() -> None:
    made = pages()
    for name, command in typer.main.get_command(app).commands.items():
        section = made["commands.md"].partition(f"\n## brixel {name}\n")[2].partition("\n## ")[0]
        shown = [item for item in command.params if not item.hidden]
        assert shown
        for item in shown:
            assert f"| `{item.opts[0] if item.param_type_name == 'option' else item.name.upper()}`" in section
            assert item.help
    for key in flatten(load_recipe("dinov2_vits").model_dump()):
        assert f"| `{key}` |" in made["recipes.md"] or key.startswith("data.held_out")
    assert "| `views.factor` | `2`, `4`, `8` | `4` |" in made["recipes.md"]
    assert "| `data.val_fraction` | number ≥ 0, ≤ 1 | `0.05` |" in made["recipes.md"]
