"""What `--json` prints is what its published schema says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from json_schemas import FOLDER, TYPES, schemas
from probe_sets import options_of, probed, segmentation
from test_benchmark_report import make_ablations
from typer.testing import CliRunner

from brixel_cli.app import app
from brixel_cli.core.formatting import to_json

jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: pip install jsonschema")


def check(name: str, printed: str) -> dict[str, Any]:
    """Validate a line of JSON; what lacks any one of the required keys must not pass."""
    value = json.loads(printed)
    schema = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(value)
    for key in schema["required"]:
        assert not validator.is_valid({other: item for other, item in value.items() if other != key})
    return value


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--json", "--quiet"])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_schemas_are_what_the_types_make() -> None:
    made = schemas()
    assert {path.name for path in FOLDER.glob("*.json")} == set(made) == {f"{name}.json" for name in TYPES}
    for name, text in made.items():
        found = (FOLDER / name).read_text(encoding="utf-8")
        assert found == text, "stale: python tests/measure/json_schemas.py"
        jsonschema.Draft202012Validator.check_schema(json.loads(text))


def test_a_training(run: Path) -> None:
    check("distill", printed("distill", "--resume", "--output", str(run)))
    check("distill-verify", printed("distill", "--verify", str(run)))


def test_a_training_that_is_only_planned(tiny_recipe_file: Path) -> None:
    check("distill-dry-run", printed("distill", "--recipe", str(tiny_recipe_file), "--dry-run"))


def test_an_extraction(model: tuple[str, str], photographs: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "x.h5")
    command = [
        "extract",
        "--input",
        str(photographs),
        "--res",
        "32",
        "--checkpoint",
        model[0],
        "--device",
        "cpu",
        "--output",
        output,
    ]
    value = check("extract", printed(*command))
    assert (value["images"], value["output"]) == (8, output)


def test_a_benchmark(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check("benchmark", printed("benchmark", "--checkpoint", str(run), "--dry-run"))


def test_a_probe() -> None:
    options = options_of("camvid", seeds=2)
    results = probed(
        options,
        {"backbone": segmentation(0.5, 0.25), "student": segmentation(0.75, float("nan"))},
        "student.safetensors",
    )
    line = to_json({**json.loads(results.to_json()), "files": ["results.json"]})
    assert "null" in line
    check("probe", line)


def test_an_ablation() -> None:
    check("benchmark-ablate", to_json({**json.loads(make_ablations().to_json()), "files": []}))
