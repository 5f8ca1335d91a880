"""A page of text, tables, charts and pictures: one HTML file that needs nothing else, and the same as Markdown."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape as html_escape
from itertools import groupby
from pathlib import Path

from PIL import Image

from brixel_cli.core.files import replacing, write_text
from brixel_cli.core.formatting import printable, printable_lines
from brixel_cli.drawing.charts import themed

STYLE = Path(__file__).with_name("style.css")
FIGURES = "figures"
POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
END = "</html>"
WEBP_QUALITY = 88


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Chart:
    """A drawing as SVG; `name` is unique on the page and names its file."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Photo:
    """An image file, shown as it is; `name` as that of a chart."""

    name: str
    path: Path
    caption: str


@dataclass(frozen=True)
class File:
    """A file that is linked to, such as another page; `name` as that of a chart."""

    name: str
    path: Path
    text: str


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: above it; may be empty.
        columns: the first is text, the others are figures. Where all are empty, there is no heading.
        rows: of cells.
        notes: below it.
        best: (row, column) of the cells that are the best of their columns.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    best: frozenset[tuple[int, int]] = frozenset()


Block = Text | Commands | Chart | Photo | File | Table


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: of the page.
        lead: the result in a sentence or two.
        highlights: the few figures that matter most, each with what it means.
        sections: all the rest.
        footer: the last line.
    """

    title: str
    lead: str
    highlights: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    footer: str


def escape(text: str) -> str:
    """A text from outside as HTML."""
    return html_escape(printable(text))


def write_page(page: Page, folder: Path, name: str) -> list[Path]:
    """Write NAME.html, NAME.md and the pictures of the latter, in the folder `figures`; returns the two pages."""
    files = [folder / f"{name}.html", folder / f"{name}.md"]
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    write_text(files[0], html(page))
    for section in page.sections:
        for block in section.blocks:
            write_figure(block, folder / FIGURES)
    write_text(files[1], markdown(page))
    return files


def write_figure(block: Block, folder: Path) -> None:
    """Write the file of a chart or a picture into a folder; other blocks have none."""
    if isinstance(block, Chart):
        write_text(folder / _figure_name(block), printable_lines(block.svg))
    elif isinstance(block, Photo | File):
        with replacing(folder / _figure_name(block)) as partial:
            shutil.copyfile(block.path, partial)


def _figure_name(block: Chart | Photo | File) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", block.name)
    return f"{name}.svg" if isinstance(block, Chart) else f"{name}{block.path.suffix}"


def html(page: Page) -> str:
    """The page as HTML. All texts are escaped, and nothing is fetched from elsewhere."""
    anchors = [re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") for section in page.sections]
    parts = list(zip(anchors, page.sections, strict=True))
    links = "".join(f'<a href="#{anchor}">{escape(section.title)}</a>' for anchor, section in parts)
    figures = "".join(
        f"<div><dt>{escape(figure)}</dt><dd>{escape(what)}</dd></div>" for figure, what in page.highlights
    )
    sections = "\n".join(
        f'<section id="{anchor}">\n<h2>{escape(section.title)}</h2>\n{_html_blocks(section.blocks)}\n</section>'
        for anchor, section in parts
    )
    body = f"""<main>
<h1>{escape(page.title)}</h1>
<p class="lead">{escape(page.lead)}</p>
{f'<dl class="highlights">{figures}</dl>' if figures else ""}
<nav>{links}</nav>
{sections}
<footer>{escape(page.footer)}</footer>
</main>"""
    return document(page.title, body)


def document(title: str, body: str, head: str = "") -> str:
    """A whole file in the one style of our pages, which may fetch nothing; `body` and `head` are HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE.read_text(encoding="utf-8")}</style>
{head}
</head>
<body>
{body}
</body>
{END}
"""


def check_document(path: Path) -> None:
    """Read a page of ours again; raises a ValueError where it is cut short or no text."""
    if not path.read_text(encoding="utf-8").endswith(f"{END}\n"):
        raise ValueError("it ends too early")


def _html_blocks(blocks: Sequence[Block]) -> str:
    """Blocks one after the other. Neighbouring charts share a grid, and so do pictures and tables."""
    grids = {Chart: "charts", Photo: "photos", Table: "tables"}
    parts = []
    for kind, group in groupby(blocks, type):
        inner = "\n".join(map(_html_block, group))
        parts.append(f'<div class="{grids[kind]}">\n{inner}\n</div>' if kind in grids else inner)
    return "\n".join(parts)


def _html_block(block: Block) -> str:
    match block:
        case Text(text):
            return f'<p class="note">{escape(text)}</p>'
        case File(_, _, text):
            return f'<p><a href="{FIGURES}/{_figure_name(block)}">{escape(text)}</a></p>'
        case Commands(lines):
            return f"<pre>{chr(10).join(map(escape, lines))}</pre>"
        case Chart(_, svg, caption):
            return f"<figure>{themed(printable_lines(svg))}<figcaption>{escape(caption)}</figcaption></figure>"
        case Photo(_, path, caption):
            buffer = io.BytesIO()
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
                image.convert("RGB").save(buffer, format="WEBP", quality=WEBP_QUALITY)
            source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            caption = escape(caption)
            return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
        case Table(title, columns, rows, notes, best):
            head = "".join(f"<th>{escape(column)}</th>" for column in columns)
            body = "".join(
                f"<tr>{''.join(_html_cell(cell, (r, c) in best) for c, cell in enumerate(row))}</tr>"
                for r, row in enumerate(rows)
            )
            table = f"<table><thead><tr>{head}</tr></thead>" if any(columns) else '<table class="facts">'
            above = f"<h3>{escape(title)}</h3>" if title else ""
            below = f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else ""
            table = f'<div class="table">{table}<tbody>{body}</tbody></table></div>'
            return f'<div class="titled">{above}{table}{below}</div>'


def _html_cell(text: str, best: bool) -> str:
    return f'<td class="best">{escape(text)}</td>' if best else f"<td>{escape(text)}</td>"


def markdown(page: Page) -> str:
    """The page as Markdown; its pictures are files in the folder `figures`."""
    lines = [f"# {_plain(page.title)}", "", _plain(page.lead), ""]
    lines += [f"- **{_plain(figure)}** {_plain(what)}" for figure, what in page.highlights]
    for section in page.sections:
        lines += ["", f"## {_plain(section.title)}"]
        for block in section.blocks:
            lines += ["", *markdown_block(block)]
    return "\n".join([*lines, "", _plain(page.footer), ""])


def markdown_block(block: Block, figures: str = FIGURES) -> list[str]:
    """The lines of a block; `figures` is the folder of its picture, as seen from the page."""
    match block:
        case Text(text):
            return [_plain(text)]
        case File(_, _, text):
            return [f"[{_plain(text)}]({figures}/{_figure_name(block)})"]
        case Commands(lines):
            return ["```", *map(printable, lines), "```"]
        case Chart() | Photo():
            caption = _plain(block.caption)
            return [f"![{caption or block.name}]({figures}/{_figure_name(block)})", "", caption]
        case Table(title, columns, rows, notes, best):
            bold = [
                [f"**{_plain(cell)}**" if (r, c) in best else _plain(cell) for c, cell in enumerate(row)]
                for r, row in enumerate(rows)
            ]
            head = [[_plain(column) or " " for column in columns], ["---", *["---:"] * (len(columns) - 1)]]
            above = [f"**{_plain(title)}**", ""] if title else []
            below = ["", *(f"- {_plain(note)}" for note in notes)] if notes else []
            return [*above, *(f"| {' | '.join(row)} |" for row in [*head, *bold]), *below]


def _plain(text: str) -> str:
    """Text in which nothing is read as Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable(text.replace("\n", " ")))
