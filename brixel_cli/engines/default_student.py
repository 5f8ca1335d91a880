"""The student that is meant where none is named: one that comes with brixel, by input size."""

from __future__ import annotations

import math
from pathlib import Path

from brixel_cli.core.backbone import same_model
from brixel_cli.core.shipped import DEFAULT_STUDENT, FILE_NAME, shipped_student, shipped_students
from brixel_cli.core.student import StudentCard, read_card
from brixel_cli.engines.reporting import Reporter
from brixel_cli.errors import UsageError, WeightsError

RUNS = "runs"
"""Where runs go unless --output says otherwise."""
MOST_NAMED = 3


def default_student(backbone: str | None, reporter: Reporter, res: int | None = None) -> str:
    """The student that is meant where none is named: one that comes with brixel, trained at this input size.

    Of several that were trained at this size, the one that was validated nearest to it is taken; of none, the one that
    was trained nearest to it, with a warning. Students trained here are named to the reporter, and never taken unasked:
    what lies under ./runs may be a trial.

    Args:
        backbone: timm name that was asked for.
        reporter: hears which student it is, and why.
        res: shorter side of the input in pixels; None: not known, which means the first student.

    Raises:
        UsageError: the students that come with brixel belong to other backbones.
        WeightsError: what comes with brixel is missing or damaged.
    """
    cards = {name: read_card(shipped_student(name)) for name in dict.fromkeys((DEFAULT_STUDENT, *shipped_students()))}
    found = {name: card for name, card in cards.items() if not backbone or same_model(backbone, card.backbone)}
    trained = _trained_here(backbone)
    if not found:
        example = f", such as {trained[0]}" if trained else ""
        backbones = " and ".join(dict.fromkeys(card.backbone for card in cards.values()))
        raise UsageError(
            f"The student that comes with brixel is of {backbones}, not of {backbone}. Name one with "
            f"--checkpoint{example}, train one with brixel distill, or take the plain maps with --source backbone."
        )
    name = next(iter(found)) if res is None else min(found, key=lambda name: _distance(found[name], res))
    card = found[name]
    why = f", trained at {card.trained_at}" if card.trained_sides else ""
    if res is not None and card.trained_sides and _distance(card, res)[0] > 0:
        reporter.warn(
            f"no student that comes with brixel was trained at {res} px. The nearest is {name}{why}: give a --res "
            "within that, or compare its maps with those of --source backbone"
        )
    others = f"; trained under {RUNS}, for --checkpoint: {', '.join(trained)}" if trained else ""
    reporter.say(f"student: {name}, which comes with brixel{why}{others}")
    return name


def _distance(card: StudentCard, res: int) -> tuple[float, float]:
    """How far an input size is from those of a student's training, and from that of its validation, as log ratios."""
    if not card.trained_sides:
        return math.inf, 0.0
    (least, most), home = card.trained_sides, min(card.student_size, default=res)
    return max(math.log(least / res), math.log(res / most), 0.0), abs(math.log(res / home))


def _trained_here(backbone: str | None) -> list[str]:
    """Run folders of the newest students under ./runs that can be loaded again, of a backbone where one is given."""
    files = [path for path in Path(RUNS).glob(f"*/{FILE_NAME}") if path.is_file()]
    found: list[str] = []
    for student in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            card = read_card(student)
        except WeightsError:
            continue
        if card.backbone_weights != "random" and (backbone is None or same_model(card.backbone, backbone)):
            found.append(str(student.parent))
        if len(found) == MOST_NAMED:
            break
    return found
