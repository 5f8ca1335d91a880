"""What a report is made of, whatever it is written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from brixel_cli.cli.tables import Table


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Chart:
    """A drawing; `name` is unique in the report and names its file."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Photo:
    """A picture on the disk."""

    name: str
    path: Path
    caption: str


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    lines: Sequence[str]


Block = Text | Table | Chart | Photo | Commands


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        title: of the page.
        lead: the result in a sentence or two.
        highlights: the few figures that matter most, each with what it means.
        sections: all the rest; none is empty.
        created: when the figures were taken.
    """

    title: str
    lead: str
    highlights: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    created: str
