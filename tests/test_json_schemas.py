"""What `--json` prints is what its published schema says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from json_schemas import FOLDER, TYPES, schemas
from printed_json import checked
from probe_sets import options_of, probed, segmentation
from test_benchmark_report import make_ablations
from typer.testing import CliRunner

from brixel_cli import demo
from brixel_cli.app import app
from brixel_cli.core.formatting import to_json


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--json", "--quiet"])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_schemas_are_what_the_types_make() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: pip install jsonschema")
    made = schemas()
    assert {path.name for path in FOLDER.glob("*.json")} == set(made) == {f"{name}.json" for name in TYPES}
    for name, text in made.items():
        found = (FOLDER / name).read_text(encoding="utf-8")
        assert found == text, "stale: python tests/measure/json_schemas.py"
        jsonschema.Draft202012Validator.check_schema(json.loads(text))


def test_every_schema_is_checked_by_a_test_and_is_in_the_documentation() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert set(TYPES) == set(re.findall(r'checked\(\s*"([\w-]+)"', tests))
    page = (FOLDER.parent / "reference" / "json.md").read_text(encoding="utf-8")
    assert set(TYPES) == set(re.findall(r"\(\.\./schemas/([\w-]+)\.json\)", page))


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "weights.safetensors", tmp_path / "training", tmp_path / "held_out"]
    monkeypatch.setattr(demo, "prepare", lambda folder: files)
    value = checked("demo", printed("demo", str(tmp_path)))
    assert value["files"] == [value["weights"], value["training"], value["held_out"]]


def test_a_probe() -> None:
    options = options_of("camvid", seeds=2)
    results = probed(
        options,
        {"backbone": segmentation(0.5, 0.25), "student": segmentation(0.75, float("nan"))},
        "student.safetensors",
    )
    line = to_json({**json.loads(results.to_json()), "files": ["results.json"]})
    assert "null" in line
    checked("probe", line)


def test_an_ablation() -> None:
    checked("benchmark-ablate", to_json({**json.loads(make_ablations().to_json()), "files": []}))
