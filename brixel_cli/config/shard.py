"""Which part of the inputs a process takes, and what its file is called: agreed upon by numbers alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from brixel_cli.errors import UsageError

Entry = TypeVar("Entry")

MOST = 100_000
"""Shards of one output; five digits name them."""
PART = re.compile(r"(?P<stem>.+)\.(?P<number>\d{5,6})-of-(?P<count>\d{5,6})\.h5", re.DOTALL)
UNFINISHED = ".unfinished"
"""Ends the name of a part that has rows to be computed; it is renamed when the last one is settled."""
GROUP = ("RANK", "WORLD_SIZE")
"""Variables of torchrun without which a process works on its own; LOCAL_RANK stays, as it chooses the GPU."""
HELP = "--shard takes the number of the shard, from 1 up, and how many there are: 3/64. Or auto."


@dataclass(frozen=True)
class Shard:
    """One of several parts of the inputs.

    Attributes:
        number: from 1 up.
        count: how many there are.

    Raises:
        UsageError: there is no such shard.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count <= MOST:
            raise UsageError(f"--shard {self}: there is no such shard. {HELP}")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def take(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """The entries of this shard: a run of them, in order; all shards together are all entries.

        Entries are what is opened as a whole (an image, a video, an archive), in the order in which one process would
        take them. Shards differ in length by one at most.

        Raises:
            UsageError: some shards would be empty.
        """
        if self.count > len(entries):
            raise UsageError(
                f"--shard {self}: {len(entries)} inputs cannot be split into {self.count} shards. Give "
                f"{len(entries)} shards at most; an archive or a video is one input."
            )
        first, last = ((self.number - back) * len(entries) // self.count for back in (1, 0))
        return entries[first:last]

    def path(self, output: Path) -> Path:
        """The file of this shard: out.h5 becomes out.00003-of-00064.h5."""
        return output.with_name(f"{output.name.removesuffix('.h5')}.{self.number:05d}-of-{self.count:05d}.h5")


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """What `--shard` means.

    Args:
        text: `3/64`, or `auto`: by the variables that Slurm sets in array jobs and torchrun in its processes. In an
            array whose tasks start torchrun, each process of each task has a shard.
        environment: variables by name.

    Raises:
        UsageError: the text is neither; or, with auto, the variables do not say.
    """
    if text != "auto":
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None:
            raise UsageError(f"--shard {text[:40]} is not understood. {HELP}")
        return Shard(int(found[1]), int(found[2]))
    index, count = 0, 1
    known = False
    for task in (_array_task(environment), _process(environment)):
        if task is not None:
            index, count, known = index * task[1] + task[0], count * task[1], True
    if not known:
        raise UsageError(
            "--shard auto: neither a Slurm array (SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT) nor torchrun (RANK, "
            "WORLD_SIZE) has started this process. Give the shard itself: --shard 3/64."
        )
    return Shard(index + 1, count)


def _array_task(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Number, from 0 up, of this task of a Slurm array, and how many there are; arrays may begin at any number."""
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "MAX", "STEP")]
    if names[0] not in environment:
        return None
    number = _numbers(environment, names[:1])[0]
    step = _numbers(environment, names[4:])[0] if names[4] in environment else 1
    least = _numbers(environment, names[2:3])[0] if names[2] in environment else 0
    count = _numbers(environment, names[1:2])[0]
    most = _numbers(environment, names[3:4])[0] if names[3] in environment else least + (count - 1) * step
    if step < 1 or (most - least) // step + 1 != count or (number - least) % step or not least <= number <= most:
        raise UsageError(
            f"--shard auto: the numbers of this Slurm array, {count} from {least} to {most}, have gaps, so they do "
            "not tell which shard this is. To compute some shards again, submit the whole array again: those that "
            "are complete are passed over. Or give the shard itself: --shard 3/64."
        )
    return (number - least) // step, count


def _process(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Number, from 0 up, of this process of torchrun, and how many there are."""
    if "RANK" not in environment:
        return None
    rank, count = _numbers(environment, ["RANK", "WORLD_SIZE"])
    return rank, count


def _numbers(environment: Mapping[str, str], names: Sequence[str]) -> list[int]:
    values = [environment.get(name, "") for name in names]
    for name, value in zip(names, values, strict=True):
        if not re.fullmatch(r"\d{1,9}", value):
            raise UsageError(f"--shard auto: {name} is {value[:40] or 'not set'}, not a number. Give --shard 3/64.")
    return [int(value) for value in values]


def find_shard(text: str) -> Shard:
    """The shard of this process, as `parse_shard`; with auto it leaves torchrun's group, and works on its own.

    Raises:
        UsageError: see `parse_shard`.
    """
    shard = parse_shard(text, os.environ)
    if text == "auto":
        for name in GROUP:
            os.environ.pop(name, None)
    return shard


@contextmanager
def in_shard(text: str | None) -> Iterator[Shard | None]:
    """As `find_shard`, in a process that does other things too: afterwards it is in its group again.

    Raises:
        UsageError: see `parse_shard`.
    """
    before = {name: os.environ[name] for name in GROUP if name in os.environ}
    try:
        yield find_shard(text) if text is not None else None
    finally:
        os.environ.update(before)
