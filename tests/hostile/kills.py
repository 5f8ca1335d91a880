"""Kills at random moments, resumed to the same bits: `python -m hostile.kills`, or with a number of kills of each kind.

A command is killed with SIGKILL, up to three times, and given again until it ends. What it has written must hold the
same as after a run that nobody has disturbed, bit for bit, and no partial file or lock may be left. With two ranks one
of them is killed, or both. The table is Markdown, for docs/SECURITY.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from conftest import TWO_RANKS, make_photograph

from hostile import sandbox
from hostile.world import FORMATS, Inputs, contents_of_features, contents_of_run

COUNTS = {"h5": 100, "npy": 100, "int8": 100, "run": 100, "probe": 100, "ablate": 20, "two ranks": 20}
TITLES = {"h5": "extract, h5", "npy": "extract, npy", "int8": "extract, int8", "run": "distill", "probe": "probe",
          "ablate": "benchmark --ablate", "two ranks": "distill, extract: two ranks of torchrun"}  # fmt: skip
MOST_KILLS = 3
NUM_PHOTOS = 30
PATIENCE = 300.0
"""Seconds after which a command that should have ended counts as one that hangs."""


class Killed(Inputs):
    """Inputs with more images, so that there are more moments."""

    def __init__(self, root: Path):
        super().__init__(root)
        for number in range(len(list(self.photos.iterdir())), NUM_PHOTOS):
            make_photograph(self.photos / f"{number}.png", number, *[(144, 144), (192, 144)][number % 2])
        self.variants = self.root / "mine.yaml"
        self.variants.write_text("base: {}\nl1: {loss.l1.weight: 2.0}\n")

    def command(self, kind: str, output: Path) -> list[str]:
        if kind == "ablate":
            return ["benchmark", "--ablate", str(self.variants), "--recipe", str(self.recipe), "--steps", "3", "--output",
                    str(output)]  # fmt: skip
        return super().command(kind, output)

    def holds(self, kind: str, output: Path) -> Any:
        if kind != "ablate":
            return super().holds(kind, output)
        variants = json.loads((output / "ablations.json").read_text())["variants"]
        runs = {
            folder.parent.name: contents_of_run(folder.parent)
            for folder in (output / "ablations").glob("*/results.json")
        }
        return {
            "variants": [[v[key] for key in ("name", "curve", "bilinear", "recovered_gap")] for v in variants],
            "runs": runs,
        }


@dataclass
class Tally:
    """Kills of a kind that took place, and what was wrong after them."""

    kills: int
    faults: list[str]


def judge(world: Killed, kind: str, output: Path, expected: Any) -> str | None:
    """What differs in an output that has been continued to its end."""
    found = world.holds(kind, output)
    if found != expected:
        parts = [key for key in expected if found.get(key) != expected[key]]
        return f"other {', '.join(parts)}"
    left = [path.name for path in output.parent.rglob("*") if path.name.endswith((".partial", ".lock"))]
    return f"left behind: {', '.join(left)}" if left else None


def kill_command(world: Killed, kind: str, count: int, rng: random.Random, place: Path) -> Tally:
    """Kill a command of one process so many times."""
    name = FORMATS[kind][0] if kind in FORMATS else "out"
    limits = sandbox.Limits(seconds=PATIENCE)
    whole = sandbox.fresh(place / "whole") / name
    ended = sandbox.run(world.command(kind, whole), whole.parent, limits)
    if ended.code != 0:
        raise RuntimeError(f"{kind}: {ended}")
    expected, tally, turn = world.holds(kind, whole), Tally(0, []), 0
    while tally.kills < count:
        output = sandbox.fresh(place / "killed") / name
        moments = []
        for _ in range(min(rng.randint(1, MOST_KILLS), count - tally.kills)):
            child = sandbox.Child(sandbox.command(world.command(kind, output)), output.parent, limits)
            moments.append(rng.uniform(0, ended.seconds))
            time.sleep(moments[-1])
            child.kill()
            tally.kills += child.wait().code == -signal.SIGKILL
        last = sandbox.run(world.command(kind, output), output.parent, limits)
        wrong = judge(world, kind, output, expected) if last.code == 0 else f"ends with {last.code}: {last.err[-500:]}"
        if wrong:
            tally.faults.append(f"{TITLES[kind]}, turn {turn}, killed after {moments} s: {wrong}")
            _say(tally.faults[-1])
        turn += 1
    return tally


def kill_ranks(world: Killed, count: int, rng: random.Random, place: Path) -> Tally:
    """Kill one rank, or both, of commands under torchrun."""
    expected, seconds = {}, {}
    for kind in ("run", "h5"):
        output = sandbox.fresh(place / f"whole_{kind}") / "out.h5"
        began = time.monotonic()
        code, err = _end(_launch(world.command(kind, output), output.parent))
        if code != 0:
            raise RuntimeError(f"{kind} with two ranks: {err}")
        seconds[kind] = time.monotonic() - began
        expected[kind] = contents_of_features(output) if kind == "h5" else contents_of_run(output)
    tally = Tally(0, [])
    while tally.kills < count:
        kind = ("run", "h5")[tally.kills % 2]
        output = sandbox.fresh(place / "killed") / "out.h5"
        process = _launch(world.command(kind, output), output.parent)
        time.sleep(rng.uniform(0.4, 1) * seconds[kind])
        ranks = [
            child for child in psutil.Process(process.pid).children(recursive=True) if "brixel_cli" in child.cmdline()
        ]
        victims = ranks if rng.random() < 0.3 else rng.sample(ranks, min(1, len(ranks)))
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        code, err = _end(process)
        tally.kills += bool(victims) and code != 0
        if code is None:
            tally.faults.append(f"{kind}: the other rank hangs: {err[-500:]}")
            _say(tally.faults[-1])
            continue
        code, err = _end(_launch(world.command(kind, output), output.parent))
        wrong = judge(world, kind, output, expected[kind]) if code == 0 else f"ends with {code}: {err[-500:]}"
        if wrong:
            tally.faults.append(f"{kind} with two ranks: {wrong}")
            _say(tally.faults[-1])
    return tally


def _launch(arguments: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    launcher = [sys.executable, *TWO_RANKS, "-m", "brixel_cli"]
    with (folder / "log").open("w") as log:
        return subprocess.Popen([*launcher, *arguments], stdout=log, stderr=log, text=True, cwd=folder, start_new_session=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def _end(process: subprocess.Popen[str]) -> tuple[int | None, str]:
    """Exit code, None where it hangs, and what was printed."""
    log = Path(f"/proc/{process.pid}/cwd").resolve() / "log" if process.poll() is None else None
    try:
        code: int | None = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        code = None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code, log.read_text(errors="replace") if log else ""


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, help="kills of each kind; default: 100, and 20 of the slow ones")
    parser.add_argument("--kind", action="append", choices=list(COUNTS), help="only this kind; can be repeated")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        world = Killed(Path(folder) / "world")
        sys.stdout.write("| command | kills | resumed to other bits, or not at all | seconds |\n|---|---:|---:|---:|\n")
        for kind in options.kind or COUNTS:
            count, rng, began = options.count or COUNTS[kind], random.Random(f"{options.seed} {kind}"), time.monotonic()
            place = Path(folder) / "place"
            tally = (
                kill_ranks(world, count, rng, place)
                if kind == "two ranks"
                else kill_command(world, kind, count, rng, place)
            )
            failed = failed or bool(tally.faults)
            sys.stdout.write(
                f"| {TITLES[kind]} | {tally.kills} | {len(tally.faults)} | {time.monotonic() - began:,.0f} |\n"
            )
            sys.stdout.flush()
    sys.exit(failed)


if __name__ == "__main__":
    main()
