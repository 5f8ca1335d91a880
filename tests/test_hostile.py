"""A hundred damaged files and a handful of kills; `make hostile` and `make kills` have thousands and hundreds.

One process judges all cases: what it forks must have no threads. A case that fails is made again by its name:
`OMP_NUM_THREADS=1 PYTHONPATH=.:tests python -m hostile "images:17"`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile.__main__ import KINDS, faults_of
from hostile.sandbox import TRACEBACK, Ended

FEW, SOME = 4, 14
"""Cases of a kind: of those that compute features for seconds, and of the others."""
LONG = ("feature files, continued", "run folders", "probe folders", "images", "labelled sets", "text lists", "file names",
        "small disks", "tars, parquet files")  # fmt: skip
KILLED = ("h5", "npy", "int8", "run", "probe")
KILLS_OF_A_KIND = 1
HERE = Path(__file__).parent


def hostile(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run([sys.executable, "-m", module, *arguments], env=environment, capture_output=True, text=True)


def cases_of(kind: str) -> int:
    return FEW if kind in LONG else SOME


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """How each case went."""
    file = tmp_path_factory.mktemp("hostile") / "outcomes.json"
    names = [f"{kind}:{seed}" for kind in KINDS for seed in range(cases_of(kind))]
    ended = hostile("hostile", *names, "--json", str(file))
    assert file.exists(), ended.stderr
    found: list[dict[str, Any]] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_end_in_an_error_or_change_nothing(kind: str, outcomes: list[dict[str, Any]]) -> None:
    names = [outcome["name"] for outcome in outcomes]
    assert {f"{kind}:{seed}" for seed in range(cases_of(kind))} <= set(names)

    faults = [outcome for outcome in outcomes if outcome["name"].startswith(f"{kind}:") and outcome["faults"]]
    assert not faults, json.dumps(faults, indent=1)


def test_killed_commands_resume_to_the_same_bits() -> None:
    kinds = [part for kind in KILLED for part in ("--kind", kind)]
    ended = hostile("hostile.kills", str(KILLS_OF_A_KIND), *kinds)
    assert ended.returncode == 0, ended.stdout + ended.stderr

    rows = [line.split("|")[2:4] for line in ended.stdout.splitlines()[2:]]
    assert [[int(cell) for cell in row] for row in rows] == [[KILLS_OF_A_KIND, 0]] * len(KILLED)


@pytest.mark.parametrize(
    ("code", "printed", "fault"),
    [
        (0, "", None),
        (1, "error: x.png is no image", None),
        (None, "", "a hang"),
        (-11, "", "signal 11"),
        (TRACEBACK, "Traceback (most recent call last):", "a traceback"),
        (TRACEBACK, "", "exit code 70"),
        (2, "", "exit code 2 without an error"),
        (1, "error: \x1b[31m", "control character"),
        (1, "error: a\nFORGED.png", "a forged line"),
        (1, "error: set weights_only=False", "advice"),
    ],
)
def test_a_case_fails_where_a_command_ends_or_prints_what_it_must_not(
    code: int | None, printed: str, fault: str | None
) -> None:
    found = list(faults_of(Ended(code, "", printed, 1.0)))
    assert len(found) == (fault is not None)
    assert all(text.startswith(str(fault)) for text in found)
