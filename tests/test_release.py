"""What stands in several places of a release is the same in all of them."""

from __future__ import annotations

import datetime
import re
import tomllib
from pathlib import Path

import yaml

from brixel_cli import __version__
from brixel_cli.core import heads, student
from brixel_cli.data import feature_layout
from brixel_cli.engines.distilling import cache

ROOT = Path(__file__).parent.parent


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_changelog_and_the_citation_name_the_version() -> None:
    released = re.findall(r"^## \[(\d[^]]*)\] - (\S+)$", text("CHANGELOG.md"), flags=re.M)
    assert released[0][0] == __version__
    dates = [datetime.date.fromisoformat(date) for _, date in released]
    assert dates == sorted(dates, reverse=True)
    citation = yaml.safe_load(text("CITATION.cff"))
    assert (citation["version"], str(citation["date-released"])) == released[0]
    assert citation["license"] == tomllib.loads(text("pyproject.toml"))["project"]["license"]


def test_the_notes_of_upgrading_name_the_formats_that_are_written() -> None:
    notes = text("docs/UPGRADING.md")
    for number in (feature_layout.FORMAT, student.FORMAT, heads.FORMAT):
        assert f"`{number}`" in notes
    assert f"| cache of a training | {cache.CACHE_FORMAT} |" in notes


def test_forms_and_workflows_are_yaml_and_call_what_is_there() -> None:
    for path in (ROOT / ".github").rglob("*.yml"):
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path
    jobs = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    for line in lines:
        word = line.split()[0]
        assert (ROOT / word).is_file() or f"\n{line.split()[1]}:" in text("Makefile"), line
    assert jobs["check"]["strategy"]["matrix"]["python"][0] == "3.11"
    assert "brixel --version --verbose" in text(".github/ISSUE_TEMPLATE/bug.yml")
