"""Names from outside on the terminal and the page: no raw control character, no line that looks like one of ours."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import make_photograph
from probe_sets import make_set, recipe_file
from typer.testing import CliRunner, Result

from brixel_cli.app import app
from brixel_cli.cli.console import Progress, error_boundary, print_files, print_notes, print_table, say, warn
from brixel_cli.core.formatting import printable, printable_lines
from brixel_cli.drawing.page import Chart, Commands, Page, Section, Table, Text, html, markdown, write_page
from brixel_cli.errors import BrixelError

FORGED = "error: all is lost"
HOSTILE = f"a\x1b]0;title\x07\x1b[2J\n{FORGED}\r\x9b31m\u202egnp\u2028.\udcff"
FOLDER = HOSTILE.replace("\udcff", "")
"""For recipes, which are UTF-8."""
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def assert_harmless(text: str) -> None:
    assert not RAW.search(text), repr(text)
    assert not [line for line in text.splitlines() if line.startswith(FORGED)]


def test_what_is_unseen_is_written_as_its_escape() -> None:
    assert printable(HOSTILE) == (rf"a\x1b]0;title\x07\x1b[2J\n{FORGED}\r\x9b31m\u202egnp\u2028.\udcff")
    for name in ("plain.jpg", "Übersicht 図\u3000.jpg", "3.45\u202fPM.png", "🐈.png", ""):
        assert printable(name) == name
    assert printable_lines("a\tb\n  c\x1b\nd", "  ") == "a\\tb\n    c\\x1b\n  d"


def test_the_console_prints_nothing_raw(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    warn(HOSTILE)
    Progress().say(HOSTILE)
    with Progress().bar(HOSTILE, 3) as bar:
        bar.update(3)
    print_table(HOSTILE, [HOSTILE, HOSTILE], [[HOSTILE, HOSTILE]], [HOSTILE])
    print_table("", ["", ""], [[HOSTILE, HOSTILE]], figures=False)
    print_notes([HOSTILE])
    print_files([HOSTILE])
    for error in (BrixelError(HOSTILE), PermissionError(errno.EACCES, "Permission denied", HOSTILE)):
        with pytest.raises(SystemExit), error_boundary():
            raise error
    out, err = capsys.readouterr()
    assert_harmless(out)
    assert_harmless(err.replace("\r", "\n"))  # of the bar
    assert err.count(FORGED) == 7
    assert out.count(FORGED) >= 6


def test_a_message_of_several_lines_keeps_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), error_boundary():
        raise BrixelError("Two files:\n  a\n  b\nRemove them.")
    assert capsys.readouterr().err == "error: Two files:\n    a\n    b\n  Remove them.\n"


@pytest.mark.parametrize("kind", [PermissionError, FileNotFoundError, OSError])
def test_what_the_system_refuses_is_an_error_without_traceback(
    kind: type[OSError], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, error_boundary():
        raise kind(errno.EACCES, "Permission denied", "/some/file")
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: /some/file: Permission denied. ")
    with pytest.raises(OSError, match="no file"), error_boundary():  # a bug of ours
        raise OSError("no file")


def test_the_page_shows_nothing_raw(tmp_path: Path) -> None:
    label = HOSTILE.replace("\n", "")  # matplotlib breaks lines
    svg = f"<svg><text>{label}</text>\n</svg>"
    blocks = [
        Text(HOSTILE), Commands([f"brixel {HOSTILE}", f"```{HOSTILE}"]), Chart("chart", svg, HOSTILE),
        Table(HOSTILE, ["", HOSTILE], [[HOSTILE, HOSTILE]], [HOSTILE]),
    ]  # fmt: skip
    page = Page(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE)], [Section(HOSTILE, blocks)], HOSTILE)
    write_page(page, tmp_path, "report")
    for text in (html(page), markdown(page), (tmp_path / "figures" / "chart.svg").read_text()):
        assert_harmless(text)
        assert FORGED in text


# Every command, with images of such names


def hostile_copies(folder: Path, photographs: Path) -> Path:
    """Photographs, one that is damaged, and one that is none, under names with control characters."""
    folder.mkdir()
    for photograph in photographs.iterdir():
        shutil.copyfile(photograph, folder / f"{HOSTILE}{photograph.name}")
    content = (photographs / "1.png").read_bytes()
    (folder / f"{HOSTILE}cut.png").write_bytes(content[: len(content) // 2])
    (folder / f"{HOSTILE}text.jpg").write_text("none")
    return folder


def run_harmlessly(code: int, *arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output + repr(result.exception)
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    assert_harmless(result.stdout)
    assert_harmless(result.stderr.replace("\r", "\n"))  # of the bars
    return result


@pytest.mark.parametrize("more", [["--dry-run"], ["--json"], ["--format", "npy", "--preview"], ["--strict"]])
def test_extract(tmp_path: Path, photographs: Path, model: tuple[str, str], more: list[str]) -> None:
    folder = hostile_copies(tmp_path / HOSTILE, photographs)
    code = 0 if "--dry-run" in more else 1
    shown = run_harmlessly(
        code, "extract", "--input", str(folder), "--res", "64", "--device", "cpu", "--checkpoint", model[0], *more
    )
    if "--json" in more:
        assert HOSTILE in json.loads(shown.stdout)["output"]


def test_distill_and_benchmark(
    tmp_path: Path, photographs: Path, tiny_recipe_file: Path, quick_benchmark: None
) -> None:
    folder, run = hostile_copies(tmp_path / FOLDER, photographs), str(tmp_path / f"{FOLDER}run")
    made = ["--recipe", str(tiny_recipe_file), "--images", str(folder), "--output", run]
    run_harmlessly(0, "distill", *made, "--dry-run")
    run_harmlessly(0, "distill", *made)
    run_harmlessly(2, "distill", *made, "--set", "optim.lr=0.5", "--resume")
    out = tmp_path / "out"
    compared = ["--checkpoint", run, "--images", str(folder), "--seconds", "0.3", "--device", "cpu"]
    run_harmlessly(0, "benchmark", *compared, "--output", str(out), "--report", str(tmp_path / "report"))
    for name in ("report.html", "report.md"):
        text = (tmp_path / "report" / name).read_text()
        assert_harmless(text)
        assert "title" in text


@pytest.mark.parametrize("damage", ["image", "labels", "none"])
def test_probe(tmp_path: Path, damage: str, model: tuple[str, str]) -> None:
    root = make_set(tmp_path / FOLDER)
    for part in ("images", "labels", "depth", "normals"):
        for file in (root / part / "train").iterdir():
            file.rename(file.with_name(HOSTILE + file.name))
    recipe = recipe_file(tmp_path / "set")
    command = [
        "probe", "--recipe", str(recipe), "--data", str(root), "--checkpoint", model[0], "--device", "cpu",
        "--set", "protocol.steps=2", "--set", "protocol.points=64", "--output", str(tmp_path / f"{FOLDER}out"),
    ]  # fmt: skip
    if damage == "labels":
        shutil.copyfile(root / "depth" / "val" / "0.png", root / "labels" / "train" / f"{HOSTILE}0.png")
    elif damage == "image":
        make_photograph(tmp_path / "whole.png", 1, 64, 48)
        (root / "images" / "train" / f"{HOSTILE}0.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    shown = run_harmlessly(0 if damage == "none" else 1, *command)
    assert "title" in shown.stderr + shown.stdout
