"""The package as a user installs it: from a wheel, used in another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_built_wheel_works_in_another_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("brixel-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = archive.namelist()
    assert not [name for name in names if name.startswith("tests/")]
    assert any(name.endswith("NOTICE") for name in names)
    assert {
        f"brixel_cli/recipes/{path.relative_to(ROOT / 'recipes')}" for path in ROOT.glob("recipes/**/*.yaml")
    } <= set(names)
    assert {f"brixel_cli/students/{path.name}" for path in ROOT.glob("brixel_cli/students/*")} <= set(names)
    assert "brixel_cli/students/SHA256SUMS" in names
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    where = "import brixel_cli; print(brixel_cli.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path / "empty", env=environment, capture_output=True, text=True
    )
    assert found.stdout.startswith(str(tmp_path / "site"))
    command = [sys.executable, "-m", "brixel_cli", "distill", "--recipe", "recipes/vitl.yaml", "--dry-run", "--json",
               "--set", "backbone.name=test_vit", "--set", "views.teacher_size=128"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"num_steps": 20000' in done.stdout
    assert list((tmp_path / "empty").iterdir()) == []
