"""The report on the disk: one HTML file that needs nothing else, and Markdown with its pictures beside it."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from brixel_cli.cli.report_blocks import Block, Chart, Commands, Photo, Report, Text
from brixel_cli.cli.report_content import make_report
from brixel_cli.cli.tables import Table
from brixel_cli.core.files import replacing, write_text
from brixel_cli.drawing.charts import STYLE, standalone
from brixel_cli.engines.ablating.results import Ablations
from brixel_cli.engines.benchmarking.results import Results
from brixel_cli.errors import UsageError

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"
FIGURES = "figures"
WEBP_QUALITY = 88

PAGE_STYLE = """
:root { color-scheme: light dark; --ground: #f5f6f8; --card: #ffffff; --ink: #1c2330; --faint: #5d6778;
  --rule: #dfe3ea; --accent: #1769d2; --code: #eef1f5; }
@media (prefers-color-scheme: dark) { :root { --ground: #0f1318; --card: #161b23; --ink: #e6eaf1; --faint: #a3adbd;
  --rule: #2b333f; --accent: #5aa2ff; --code: #1e2530; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1260px; margin: 0 auto; padding: 2.2rem 1.1rem 4rem; }
h1 { font-size: 1.1rem; margin: 0; color: var(--faint); font-weight: 600; letter-spacing: 0.02em; }
h2 { font-size: 1.3rem; margin: 0 0 0.9rem; }
.lead { font-size: 1.22rem; line-height: 1.5; margin: 0.7rem 0 1.4rem; max-width: 54rem; text-wrap: pretty; }
nav { display: flex; flex-wrap: wrap; gap: 0.35rem 1.1rem; margin: 1.4rem 0; font-size: 0.92rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 1.3rem 1.3rem 1.1rem;
  margin: 1.1rem 0; }
.highlights { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 0.8rem; margin: 0; }
.highlights div { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 0.8rem 1rem; }
.highlights dt { font-size: 1.55rem; font-weight: 650; line-height: 1.25; color: var(--accent); }
.highlights dd { margin: 0; font-size: 0.86rem; line-height: 1.35; color: var(--faint); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(310px, 100%), 1fr)); gap: 1.2rem 1.6rem;
  margin: 0 0 1.2rem; align-items: start; }
figure { margin: 0; } figure svg { width: 100%; max-width: 520px; height: auto; display: block; }
figure img { width: 100%; height: auto; border-radius: 6px; display: block; background: #fff; }
figcaption, caption, .note { color: var(--faint); font-size: 0.88rem; }
figcaption { margin-top: 0.3rem; overflow-wrap: anywhere; }
.photos { display: grid; gap: 1.2rem 1.6rem;
  grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); }
.tables { display: flex; flex-wrap: wrap; gap: 0.6rem 1.8rem; align-items: end; margin-bottom: 0.8rem; }
.titled { min-width: min(26rem, 100%); max-width: 100%; } .titled > h3, .titled > ul { width: 0; min-width: 100%; }
.table { overflow-x: auto; margin: 0.9rem 0 0.3rem; }
table { border-collapse: collapse; font-size: 0.86rem; min-width: 100%; font-variant-numeric: tabular-nums; }
table.facts { min-width: 0; }
h3 { font-size: 0.98rem; margin: 0.9rem 0 0.2rem; font-weight: 600; overflow-wrap: anywhere; }
th, td { padding: 0.34rem 0.48rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { color: var(--faint); font-weight: 600; border-bottom-width: 2px; }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--card); }
td.best { font-weight: 700; }
table.facts td { white-space: normal; text-align: left; overflow-wrap: anywhere; }
table.facts td:first-child { color: var(--faint); white-space: nowrap; }
ul.notes { color: var(--faint); font-size: 0.88rem; padding-left: 1.1rem; margin: 0.6rem 0 0.4rem; }
ul.notes li { overflow-wrap: anywhere; }
p { margin: 0.5rem 0; max-width: 52rem; }
pre { background: var(--code); border-radius: 8px; padding: 0.8rem 1rem; overflow-x: auto; font-size: 0.88rem; }
footer { color: var(--faint); font-size: 0.85rem; margin-top: 1.5rem; }
@media print { section { break-inside: avoid-page; } nav { display: none; } }
"""


def write_report(results: Results | None, ablations: Ablations | None, pictures: Path, folder: Path) -> list[Path]:
    """Write report.html, report.md and the folder `figures` of the latter.

    Args:
        results: of a benchmark, or None.
        ablations: or None; one of both is there.
        pictures: folder that the paths of the results' pictures start from.
        folder: of the report; it is made.

    Returns:
        The two files.

    Raises:
        UsageError: the folder cannot be made.
    """
    try:
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--report {folder} cannot be made: {error.strerror}. Name another folder.") from error
    report = make_report(results, ablations, pictures)
    write_text(folder / HTML_NAME, html(report))
    for section in report.sections:
        for block in section.blocks:
            write_figure(block, folder / FIGURES)
    write_text(folder / MARKDOWN_NAME, markdown(report))
    return [folder / HTML_NAME, folder / MARKDOWN_NAME]


# HTML


def html(report: Report) -> str:
    """The whole page; every text in it is escaped, and nothing is fetched from elsewhere."""
    anchors = [_anchor(section.title) for section in report.sections]
    links = "".join(
        f'<a href="#{anchor}">{escape(section.title)}</a>'
        for anchor, section in zip(anchors, report.sections, strict=True)
    )
    highlights = "".join(
        f"<div><dt>{escape(figure)}</dt><dd>{escape(what)}</dd></div>" for figure, what in report.highlights
    )
    sections = "\n".join(
        f'<section id="{anchor}">\n<h2>{escape(section.title)}</h2>\n{_html_blocks(section.blocks)}\n</section>'
        for anchor, section in zip(anchors, report.sections, strict=True)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report.title)}</title>
<style>{PAGE_STYLE}{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(report.title)}</h1>
<p class="lead">{escape(report.lead)}</p>
{f'<dl class="highlights">{highlights}</dl>' if highlights else ""}
<nav>{links}</nav>
{sections}
<footer>{escape(report.created)}</footer>
</main>
</body>
</html>
"""


def _html_blocks(blocks: Sequence[Block]) -> str:
    """Blocks one after the other; neighbouring charts share a grid, as do pictures and tables."""
    parts: list[str] = []
    grid = ""
    for block in blocks:
        wanted = {Chart: "charts", Photo: "photos", Table: "tables"}.get(type(block), "")
        if wanted != grid:
            parts += ["</div>"] if grid else []
            parts += [f'<div class="{wanted}">'] if wanted else []
            grid = wanted
        parts.append(_html_block(block))
    return "\n".join([*parts, "</div>"] if grid else parts)


def _html_block(block: Block) -> str:
    match block:
        case Text(text):
            return f'<p class="note">{escape(text)}</p>'
        case Commands(lines):
            return f"<pre>{escape(chr(10).join(lines))}</pre>"
        case Chart(_, svg, caption):
            return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        case Photo(_, path, caption):
            source = f"data:image/webp;base64,{base64.b64encode(_webp(path)).decode()}"
            told = escape(caption)
            return f'<figure><img src="{source}" alt="{told}"><figcaption>{told}</figcaption></figure>'
        case Table():
            return _html_table(block)


def _html_table(table: Table) -> str:
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    has_head = any(table.columns)
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td{_best(table, r, c)}>{escape(cell)}</td>" for c, cell in enumerate(row)) + "</tr>"
        for r, row in enumerate(table.rows)
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return (
        f'<div class="titled">{title}<div class="table"><table{"" if has_head else " class=facts"}>'
        f"{f'<thead><tr>{head}</tr></thead>' if has_head else ''}<tbody>{rows}</tbody></table></div>"
        f"{f'<ul class=notes>{notes}</ul>' if notes else ''}</div>"
    )


def _best(table: Table, row: int, column: int) -> str:
    return " class=best" if (row, column) in table.best else ""


def _webp(path: Path) -> bytes:
    with Image.open(path) as image:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="WEBP", quality=WEBP_QUALITY)
    return buffer.getvalue()


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


# Markdown


def markdown(report: Report) -> str:
    """The same report; its figures are files in the folder `figures`."""
    lines = [f"# {_md(report.title)}", "", _md(report.lead), ""]
    lines += [f"- **{_md(figure)}** {_md(what)}" for figure, what in report.highlights]
    for section in report.sections:
        lines += ["", f"## {_md(section.title)}"]
        for block in section.blocks:
            lines += ["", *markdown_block(block)]
    return "\n".join([*lines, "", _md(report.created), ""])


def markdown_block(block: Block, figures: str = FIGURES) -> list[str]:
    """The lines of a block; `figures` is where its picture lies, as seen from the page."""
    match block:
        case Text(text):
            return [_md(text)]
        case Commands(lines):
            return ["```", *lines, "```"]
        case Chart() | Photo():
            return [f"![{_md(block.caption) or block.name}]({figures}/{_figure_name(block)})", "", _md(block.caption)]
        case Table():
            title = [f"**{_md(block.title)}**", ""] if block.title else []
            head = [_md(column) for column in block.columns] if any(block.columns) else [" "] * len(block.columns)
            cells = [[_md_cell(block, r, c) for c in range(len(row))] for r, row in enumerate(block.rows)]
            rows = [head, ["---", *["---:"] * (len(head) - 1)], *cells]
            table = [f"| {' | '.join(row)} |" for row in rows]
            return [*title, *table, *(["", *(f"- {_md(note)}" for note in block.notes)] if block.notes else [])]


def _md_cell(table: Table, row: int, column: int) -> str:
    text = _md(table.rows[row][column])
    return f"**{text}**" if (row, column) in table.best else text


def _md(text: str) -> str:
    """Text in which nothing is read as Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text.replace("\n", " "))


def write_figure(block: Block, folder: Path) -> None:
    """Write the file of a chart or a picture into a folder; other blocks have none."""
    if isinstance(block, Chart):
        write_text(folder / _figure_name(block), standalone(block.svg))
    elif isinstance(block, Photo):
        with replacing(folder / _figure_name(block)) as partial:
            shutil.copyfile(block.path, partial)


def _figure_name(block: Chart | Photo) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", block.name)
    return f"{name}.svg" if isinstance(block, Chart) else f"{name}{block.path.suffix}"
