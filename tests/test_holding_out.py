"""Which images are held out: a share, the same whatever the order, the folder or what is added later."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from brixel_cli.data.images import ImageFile
from brixel_cli.data.views import hold_out
from brixel_cli.errors import BrixelError


def listed(count: int, prefix: str = "photo") -> list[ImageFile]:
    return [ImageFile(Path(f"{prefix}{number}.jpg"), f"{prefix}{number}.jpg", 100, 100) for number in range(count)]


@pytest.mark.parametrize(
    ("count", "fraction", "most", "held_out"),
    [(40, 0.5, 7, 7), (40, 0.0, 64, 1), (2, 1.0, 64, 1), (5, 1.0, 64, 4), (2, 0.05, 64, 1)],
)
def test_at_least_one_photograph_is_held_out_at_most_so_many_and_never_all(
    count: int, fraction: float, most: int, held_out: int
) -> None:
    everything = listed(count)
    training, kept = hold_out(everything, fraction, most)
    assert len(kept) == held_out
    assert not set(training) & set(kept)
    # What is held out beyond `most` is not trained on either.
    assert (
        Counter(training + kept) == Counter(everything) if held_out < most else len(training + kept) < len(everything)
    )
    assert training == [item for item in everything if item in training]  # in the order they came


def test_about_the_share_asked_for_is_held_out() -> None:
    assert 70 <= len(hold_out(listed(400), 0.25, 400)[1]) <= 130  # 100 +- 30: over three standard deviations


def test_the_split_depends_neither_on_order_nor_on_folder() -> None:
    everything = listed(30)
    moved = [ImageFile(Path("elsewhere") / item.name, item.name, 5, 5) for item in reversed(everything)]
    first = {item.name for item in hold_out(everything, 0.2, 64)[1]}
    assert {item.name for item in hold_out(moved, 0.2, 64)[1]} == first


@pytest.mark.parametrize("added", [1, 10, 40, 200])
def test_a_growing_folder_keeps_its_held_out_photographs(added: int) -> None:
    moved = []
    for name in "abcdefgh":
        before = listed(40, name)
        held_out = {item.name for item in hold_out(before, 0.25, 100)[1]}
        training = {item.name for item in hold_out(before + listed(added, f"new-{name}"), 0.25, 100)[0]}
        moved += sorted(held_out & training)
    assert moved == []


@pytest.mark.parametrize("count", [0, 1])
def test_one_photograph_cannot_be_split(count: int) -> None:
    with pytest.raises(BrixelError) as caught:
        hold_out(listed(count), 0.5, 64)
    assert str(caught.value) == (
        "One image cannot be split into training and held-out ones: add more, or give data.val_images."
    )
