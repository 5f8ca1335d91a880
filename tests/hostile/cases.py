"""Cases: a damaged file, the command that reads it, and what must hold afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from hostile.sandbox import Limits
from hostile.world import World

Check = Callable[[], str | None]
FORGED = "FORGED"
"""A line that begins with it comes from the name of a file."""


@dataclass(frozen=True)
class Case:
    """One damaged file and what is done with it.

    Attributes:
        what: the damage, in words.
        does: arguments of brixel, or a function that raises a BrixelError where it refuses.
        check: what is wrong afterwards, where the command has ended with 0; None: nothing.
        always: the same, however the command has ended.
        output: what the command may change, below the folder of the case.
        limits: of the command.
        noticed: whether a warning on stderr makes a difference no silent one.
        again: arguments of a second command, without limits, that must end with 0 before `always` is asked.
    """

    what: str
    does: Sequence[str] | Callable[[], None]
    check: Check | None = None
    always: Check | None = None
    output: tuple[str, ...] = ("work/out",)
    limits: Limits = field(default_factory=Limits)
    noticed: bool = False
    again: Sequence[str] = ()


Maker = Callable[[World, Random, Path], Case]


def holds_the_same(world: World, kind: str, output: Path, without: Sequence[str] = ()) -> Check:
    """Whether an output holds what the undamaged one does."""

    def check() -> str | None:
        found, expected = world.holds(kind, output), world.expected[kind]
        parts = [key for key in expected if found.get(key) != expected[key] and key not in without]
        return f"{output.name} holds other {', '.join(parts)}" if parts else None

    return check
