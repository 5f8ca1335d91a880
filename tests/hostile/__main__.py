"""Damaged files against the commands that read them: `python -m hostile 2000`, `600s`, or one case again.

Every case has a name, such as `images:17`, from which it can be made again: `python -m hostile images:17`.
A case fails where a command ends with another exit code than 0, 1 or 2, with a traceback, a signal or not at all; where
it ends with 0 and something else than the undamaged file would have given; where it changes a file outside its output,
leaves a partial file or a lock, or prints control characters. The table is Markdown, for docs/SECURITY.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random

from brixel_cli.errors import BrixelError
from hostile import archive_cases, input_cases, sandbox, stored_cases
from hostile.cases import FORGED, Case, Maker
from hostile.world import World

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\ud800-\udfff]")
PRECIOUS = ("txt", "npy", "safetensors", "h5", "png", "yaml", "txt.npy")

KINDS: Mapping[str, Maker] = {
    "feature files, continued": stored_cases.feature_file,
    "feature files, read": stored_cases.feature_reader,
    "run folders": stored_cases.run_folder,
    "probe folders": stored_cases.probe_folder,
    "saved heads": stored_cases.saved_head,
    "students, backbones": stored_cases.student_file,
    "released .pth": stored_cases.released_checkpoint,
    "parts, joined": stored_cases.parts_of_a_file,
    "recipes": input_cases.recipe_file,
    "images": input_cases.image,
    "labelled sets": input_cases.labelled_set,
    "tars, parquet files": archive_cases.archive,
    "text lists": input_cases.text_list,
    "file names": input_cases.file_name,
    "options": input_cases.option,
    "small disks": input_cases.small_disk,
}
"""Each makes a case in a folder that holds an empty `work`, and `outside`, which nothing may touch."""


@dataclass(frozen=True)
class Outcome:
    """How a case went.

    Attributes:
        name: from which it can be made again.
        what: the damage.
        code: exit code of the command, as in `sandbox.Ended`.
        faults: what must not happen and did, with the end of what was printed.
        seconds: of the case.
    """

    name: str
    what: str
    code: int | None
    faults: list[str]
    seconds: float


def run_case(world: World, name: str, place: Path) -> Outcome:
    """Make a case and judge it.

    Args:
        world: what is damaged.
        name: `kind:seed`.
        place: an empty folder.
    """
    began = time.monotonic()
    kind = name.rpartition(":")[0]
    (place / "work").mkdir(parents=True)
    (place / "outside").mkdir()
    for suffix in PRECIOUS:
        for folder in (place / "outside", place):
            (folder / f"precious.{suffix}").write_text("precious")
    case = KINDS[kind](world, Random(name), place)
    before = _snapshot(place, case.output) | _snapshot(world.root, ("cache",))
    does = case.does
    function = sandbox.command(does) if not callable(does) else lambda: _reads(does)
    ended = sandbox.Child(function, place, case.limits).wait()
    faults = list(faults_of(ended))
    if case.again:
        second = sandbox.run(case.again, place)
        if second.code != 0:
            faults.append(f"the second command ends with {second.code}: {second.err[-600:]}")
    if "permission" not in ended.err.lower():
        with suppress(PermissionError):
            faults += _differences(case, ended, place)
    after = _snapshot(place, case.output) | _snapshot(world.root, ("cache",))
    faults += [f"changed outside of the output: {path}" for path in sorted(before.items() ^ after.items())[:2]]
    if ended.code is not None and ended.code >= 0:
        left = [path for path in place.rglob("*") if path.name.endswith((".partial", ".lock"))]
        faults += [f"left behind: {path.relative_to(place)}" for path in left]
    return Outcome(name, case.what, ended.code, faults, time.monotonic() - began)


def _reads(does: object) -> int:
    try:
        does()  # type: ignore[operator]
    except BrixelError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def faults_of(ended: sandbox.Ended) -> Iterator[str]:
    """What is wrong with how a command ended, and with what it printed."""
    tail = ended.err[-600:]
    if ended.code is None:
        yield f"a hang: still there after {ended.seconds:.0f} s: {tail}"
    elif ended.code < 0:
        yield f"signal {-ended.code}: {tail}"
    elif "Traceback (most recent call last)" in ended.err:
        yield f"a traceback: {tail}"
    elif ended.code not in (0, 1, 2):
        yield f"exit code {ended.code}: {tail}"
    elif ended.code and "rror" not in ended.err:
        yield f"exit code {ended.code} without an error: {tail}"
    printed = ended.out + ended.err
    if found := CONTROL.search(printed):
        yield f"control character printed: {printed[max(found.start() - 60, 0) : found.end() + 20]!r}"
    if re.search(f"[\n\r]{FORGED}", printed):
        yield f"a forged line: {printed[:300]!r}"
    if "weights_only=False" in printed:
        yield f"advice to run the file's code: {tail}"


def _differences(case: Case, ended: sandbox.Ended, place: Path) -> Iterator[str]:
    noticed = case.noticed and "warning:" in ended.err
    for check in ([case.check] if ended.code == 0 and not noticed else []) + [case.always]:
        if check is not None:
            checked, wrong = sandbox.ask(check, place)
            if checked.code != 0:
                yield f"what it left cannot be read ({checked.code}): {checked.err[-400:]}"
            elif wrong is not None:
                yield f"a silent difference: {wrong}"


def _snapshot(root: Path, without: Sequence[str]) -> dict[str, str]:
    """Every file and folder but those below some names: kind, mode, and contents."""
    found = {}
    skipped = {root / name for name in without}
    for folder, names, files in os.walk(root):
        at = Path(folder)
        names[:] = [name for name in names if at / name not in skipped]
        for path in (at / name for name in (*names, *files)):
            if path in skipped:
                continue
            status = path.lstat()
            mark = f"{stat.filemode(status.st_mode)} "
            if stat.S_ISREG(status.st_mode):
                mark += hashlib.sha256(path.read_bytes()).hexdigest() if status.st_size < 2**22 else str(status.st_size)
            found[str(path)] = mark
    return found


def names_of(kinds: Sequence[str], start: int) -> Iterator[str]:
    """Names of cases without end, the kinds in turn."""
    seed = start
    while True:
        yield from (f"{kind}:{seed}" for kind in kinds)
        seed += 1


def run(names: Iterator[str], seconds: float, keep: bool = False) -> list[Outcome]:
    """Judge cases until there are no more, or the time is over."""
    began, outcomes = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        world = World(root / "world")
        for number, name in enumerate(names):
            if time.monotonic() - began > seconds:
                break
            outcomes.append(run_case(world, name, place := root / f"case_{number}"))
            if outcomes[-1].faults:
                _say(f"{name}: {outcomes[-1].what}", *outcomes[-1].faults)
            if keep:
                _say(f"kept: {outcomes[-1]}")
                shutil.copytree(root, Path(tempfile.mkdtemp(prefix="kept-")) / "root", symlinks=True, ignore=_pipes)
            shutil.rmtree(place)
    return outcomes


def _say(*lines: str) -> None:
    sys.stderr.write("\n  ".join(lines).encode("utf-8", "backslashreplace").decode() + "\n")
    sys.stderr.flush()


def _pipes(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if not Path(folder, name).is_file() and not Path(folder, name).is_dir()}


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts of each kind, as Markdown."""
    lines = ["| what is damaged | cases | refused | done, nothing differs | faults |", "|---|---:|---:|---:|---:|"]
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        ended = "faults" if outcome.faults else "refused" if outcome.code else "done"
        counts.setdefault(outcome.name.rpartition(":")[0], Counter())[ended] += 1
    counts["all"] = sum(counts.values(), Counter())
    for kind, count in counts.items():
        lines.append(f"| {kind} | {count.total():,} | {count['refused']:,} | {count['done']:,} | {count['faults']:,} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="*", default=["2000"], help="a number of cases, seconds (600s), or names of cases"
    )
    parser.add_argument("--kind", action="append", help="only this kind; can be repeated", choices=list(KINDS))
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    parser.add_argument("--keep", action="store_true", help="keep a copy of the folder of each case")
    options = parser.parse_args()
    first = options.what[0]
    seconds = float(first[:-1]) if re.fullmatch(r"[0-9.]+s", first) else float("inf")
    names = names_of(options.kind or list(KINDS), options.start)
    if ":" in first:
        names = iter(options.what)
    elif seconds == float("inf"):
        names = islice(names, int(first))
    outcomes = run(names, seconds, options.keep)
    if options.json:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
    sys.stdout.write(table(outcomes) + "\n")
    _say(f"{sum(outcome.seconds for outcome in outcomes):,.0f} s, seeds from {options.start}")
    sys.exit(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    main()
