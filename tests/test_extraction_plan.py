from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from brixel_cli.engines.extracting.plan import newest_student


def test_the_newest_run_is_the_student_where_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name, age in (("old", 200), ("new", 100), ("empty", 0)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if name != "empty":
            student = tmp_path / "runs" / name / "student.safetensors"
            student.touch()
            os.utime(student, (time.time() - age,) * 2)
    assert newest_student() == "runs/new"
