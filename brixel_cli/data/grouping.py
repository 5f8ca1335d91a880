"""Rows grouped by their size, and taken in batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Size = TypeVar("Size", bound=Hashable)


def positions_within_size(sizes: Sequence[Hashable]) -> list[int]:
    """Each row's position among the rows of its size: its row in the dataset of that size."""
    counts: Counter[Hashable] = Counter()
    positions = []
    for size in sizes:
        positions.append(counts[size])
        counts[size] += 1
    return positions


def batches_of_one_size(rows: Sequence[int], size: Callable[[int], Hashable], at_once: int) -> list[Sequence[int]]:
    """Rows in batches of at most `at_once`, those of a batch of one size; sizes in the order of their first row."""
    return [batch for same in rows_by_size(rows, size).values() for batch in in_batches(same, at_once)]


def rows_by_size(rows: Iterable[int], size: Callable[[int], Size]) -> dict[Size, list[int]]:
    """Rows of each size, the sizes in the order of their first row."""
    of_size: dict[Size, list[int]] = {}
    for row in rows:
        of_size.setdefault(size(row), []).append(row)
    return of_size


def in_batches(rows: Sequence[Item], at_once: int) -> list[Sequence[Item]]:
    """Rows in batches of at most `at_once`."""
    return [rows[at : at + at_once] for at in range(0, len(rows), at_once)]
