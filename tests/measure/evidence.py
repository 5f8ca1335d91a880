"""One table of evidence from small records: who, what it sees, what a pass costs, fidelity and probes.

    python tests/measure/evidence.py keep DIR RECORD.json --command brixel probe ...     # DIR: output of the command
    python tests/measure/evidence.py table docs/results/records docs/EVIDENCE.md

docs/results/make.sh calls both; `table` also draws docs/results/evidence.svg, cosine against the FLOP of a whole pass. A record is what the table needs of a results.json, with the digest of the protocol: all that
figures depend on besides the row. Records of one column whose digests differ are refused: their rows cannot be compared.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from brixel_cli.cli.console import error_boundary, print_files
from brixel_cli.core.files import make_folder, write_text
from brixel_cli.core.formatting import human_size, printable_lines, to_json
from brixel_cli.core.identity import json_digest
from brixel_cli.core.metric_titles import figure_text, figure_title, gap_text
from brixel_cli.core.probe_metrics import LEADING
from brixel_cli.drawing.charts import SERIES, Line, line_chart
from brixel_cli.drawing.page import Table, markdown_block
from brixel_cli.engines.benchmarking.results import FILE_NAME, Results, read_results
from brixel_cli.engines.benchmarking.results import FORMAT as BENCHMARK
from brixel_cli.engines.probing.folder import ProbeFolder
from brixel_cli.engines.probing.results import ProbeResults, as_dict
from brixel_cli.errors import BrixelError

LEAD = (
    "# Evidence\n\n"
    "One table for each input of the student. Each row is on the same images, with the same heads, seeds and labels as the others of "
    "its column. `sees` is the largest image that the row is given. GFLOP and time are of a whole pass, from pixels to feature map (of "
    "networks that are trained end to end, to the map of their head); the time is over that of the backbone, timed in alternation. `gap`: "
    "(row - backbone) / (teacher - backbone). `+-`: standard error over images, pairs of images or objects (cosine, matching, propagation), "
    "standard deviation over seeds (probes). Upsamplers of others: [PEERS.md](PEERS.md); networks that are trained end to end: "
    "[SUPERVISED.md](SUPERVISED.md); matching and propagation: [LABEL_FREE.md](LABEL_FREE.md).\n\n"
    "The tables are made from `docs/results/records/` by `docs/results/make.sh`, which refuses to put records of different protocols "
    "into one column. `sh docs/results/make.sh measure` makes the records anew.\n"
)
COSINE = "cosine"
FIGURE = Path("results", "evidence.svg")
"""As seen from the page."""
CAPTION = "Cosine similarity to the teacher's map against the cost of a whole pass, at each input of the student."


@dataclass(frozen=True)
class RecordRow:
    """A row of a record; nan where something was not measured.

    Attributes:
        label: who.
        sees: image in pixels, as HEIGHTxWIDTH.
        gflop, seconds: of a whole pass.
        value, spread: of the record's metric.
        gap, gap_spread: recovered.
    """

    label: str
    sees: str
    gflop: float | None
    seconds: float | None
    value: float | None
    spread: float | None
    gap: float | None
    gap_spread: float | None


@dataclass(frozen=True)
class Record:
    """What the table needs of one results.json.

    Attributes:
        column: data set, or `80 photographs`.
        size: input of the student in pixels, as text.
        metric: of the values.
        protocol: its name.
        digest: of all that the figures depend on besides the row.
        detail: images, seeds.
        device: on which it was measured.
        command: that made the results.
        rows: in the order of the command's table.
    """

    column: str
    size: str
    metric: str
    protocol: str
    digest: str
    detail: str
    device: str
    command: str
    rows: tuple[RecordRow, ...]


def keep(folder: Path, command: str) -> Record:
    """The record of an output folder of `brixel probe` or `brixel benchmark`.

    Raises:
        BrixelError: the folder holds neither.
    """
    file = folder / FILE_NAME
    if file.is_file() and f'"{BENCHMARK}"' in file.read_text(encoding="utf-8"):
        return of_benchmark(read_results(folder), command)
    return of_probe(ProbeFolder(folder).read(), command)


def of_probe(results: ProbeResults, command: str) -> Record:
    """The record of a probe's main figure."""
    settings = results.settings
    metric = LEADING[settings.task.partition("_")[0]]
    depends = {key: value for key, value in as_dict(settings).items() if key != "device"}
    rows = []
    for label, entry in results.summary.items():
        cost, source = results.costs.get(label), results.sources[label]
        sees = human_size(cost.input) if cost else next(iter(source.input or {}), "-")
        effort = next((run.effort for run in results.runs if run.source == label), None)
        gflop = cost.gflop if cost else effort.gflop if effort else math.nan
        value, spread = entry.figure(metric)
        gap = results.recovered_gap.get(label, {}).get(metric, math.nan)
        known = results.gap_spread.get(label, {}).get(metric, math.nan)
        numbers = (gflop, cost.seconds if cost else math.nan, value, spread, gap, known)
        rows.append(RecordRow(label, sees, *map(_known, numbers)))
    size = settings.size if isinstance(settings.size, int) else human_size((settings.size[0], settings.size[1]))
    detail = f"{' and '.join(str(split.images) for split in settings.data.values())} images"
    items = max(run.items for run in results.runs)
    detail += (
        f", {items} pairs or objects"
        if items
        else f", {len(results.seeds)} seed{'s' if len(results.seeds) > 1 else ''}"
    )
    return Record(
        settings.recipe, str(size), metric, settings.protocol, json_digest(depends), detail,
        f"{settings.device}, {settings.precision}", command, tuple(rows),
    )  # fmt: skip


def of_benchmark(results: Results, command: str) -> Record:
    """The record of the fidelity of a benchmark's first model at its main size."""
    model = results.models[0]
    size = results.main_size(model)
    depends = {
        "backbone": model.backbone, "weights": model.weights_sha256, "images": model.images_sha256, "size": size,
        "factor": model.factor, "metric": COSINE, "precision": results.environment.precision,
    }  # fmt: skip
    bilinear = next((row.fidelity for row in results.rows_at(model, size) if row.kind == "bilinear"), None)
    number, environment, rows = len(bilinear.images) if bilinear else 0, results.environment, []
    for row in results.rows_at(model, size):
        if row.kind == "bilinear":
            continue
        fidelity = bilinear if row.kind == "backbone" else row.fidelity
        gap = fidelity.recovered_gap[COSINE] if fidelity and row.kind != "backbone" else None
        spread = fidelity.gap_spread.get(COSINE) if fidelity and row.kind != "backbone" else None
        value = 1.0 if row.kind == "teacher" else fidelity.cosine if fidelity else None
        rows.append(RecordRow(row.label, human_size(row.input_size), row.gflop, row.seconds, value, None, gap, spread))
    return Record(
        f"{number} photographs", str(min(size)), COSINE, f"fidelity towards {model.factor * min(size)} px",
        json_digest(depends), f"{number} images", f"{environment.hardware}, {environment.precision}", command, tuple(rows),
    )  # fmt: skip


def read_record(path: Path) -> Record:
    """A record as written.

    Raises:
        BrixelError: it cannot be read, or is something else.
    """
    try:
        return TypeAdapter(Record).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise BrixelError(f"{path} is no record. Make it again with docs/results/make.sh.") from error


def merged(records: Mapping[Path, Record]) -> dict[tuple[str, str], Record]:
    """One record for each size and column, by (size, column): rows of several records of one protocol stand together.

    Raises:
        BrixelError: two records of one column were made by different protocols, or have different figures of one row.
    """
    found: dict[tuple[str, str], tuple[Path, Record]] = {}
    for path, record in records.items():
        key = record.size, f"{record.column}, {record.metric}"
        if key not in found:
            found[key] = path, record
            continue
        first, earlier = found[key]
        if earlier.digest != record.digest:
            raise BrixelError(
                f"{first.name} and {path.name} are both of {record.column} at {record.size} px, but their protocols differ "
                f"({earlier.protocol}, digest {earlier.digest[:12]}; {record.protocol}, digest {record.digest[:12]}): their "
                "rows cannot stand in one column. Measure both with one protocol, or remove one."
            )
        rows = {row.label: row for row in earlier.rows}
        for row in record.rows:
            if rows.setdefault(row.label, row).value != row.value:
                raise BrixelError(f"{first.name} and {path.name} have different figures of {row.label}: remove one.")
        detail = earlier.detail
        if record.detail != detail:
            detail = f"{earlier.detail} ({first.stem}), {record.detail} ({path.stem})"
        found[key] = first, replace(earlier, rows=tuple(rows.values()), detail=detail)
    return {key: record for key, (_, record) in found.items()}


def page(records: Mapping[Path, Record]) -> str:
    """The page of all records: a table for each size, then the commands."""
    columns = merged(records)
    text = [LEAD, f"![{CAPTION}]({FIGURE.as_posix()})\n\n{CAPTION}\n"] if chart(records) else [LEAD]
    for size in sorted({size for size, _ in columns}, key=lambda size: int(size.split("x")[0])):
        mine = [record for (own, _), record in columns.items() if own == size]
        mine.sort(key=lambda record: record.metric != COSINE)
        text.append(f"\n## Student's input {size} px\n")
        text += markdown_block(_table(mine))
        text.append("")
        text += [f"- {_title(record)}: {record.protocol}; {record.detail}; {record.device}." for record in mine]
    text.append("\n## Commands\n\n<!-- needs: photographs, labelled sets, a clone of JAFAR, hours -->\n```")
    text += dict.fromkeys(record.command for record in records.values())
    return "\n".join([*text, "```"]) + "\n"


def chart(records: Mapping[Path, Record]) -> str | None:
    """Cosine against the GFLOP of a whole pass as SVG: a line for each row, over the student's inputs; None without any."""
    fidelity = [record for record in records.values() if record.metric == COSINE]
    lines: dict[str, dict[float, float]] = {}
    for record in fidelity:
        for row in record.rows:
            if record.column == fidelity[0].column and row.gflop and row.value is not None:
                lines.setdefault(row.label, {})[row.gflop] = row.value
    colours = itertools.cycle(SERIES)
    drawn = [Line(label, next(colours), tuple(sorted(points.items()))) for label, points in lines.items()]
    return line_chart("Quality against cost", drawn, "GFLOP, whole pass", COSINE, log_x=True) if drawn else None


def _table(records: Sequence[Record]) -> Table:
    labels = list(dict.fromkeys(row.label for record in records for row in record.rows))
    labels.sort(key=lambda label: label == "teacher")
    titles = ["who", "sees", "GFLOP", "time"]
    for record in records:
        titles += [_title(record), "gap"]
    cells = []
    for label in labels:
        rows = [next((row for row in record.rows if row.label == label), None) for record in records]
        costs = next(((record, row) for record, row in zip(records, rows, strict=True) if row and row.gflop), None)
        line = [label, *(_cost(*costs) if costs else ["-", "-", "-"])]
        for record, row in zip(records, rows, strict=True):
            if row is None:
                line += ["-", "-"]
            elif record.metric == COSINE:
                line += ["-" if row.value is None else f"{row.value:.3f}", gap_text(row.gap, row.gap_spread)]
            else:
                line += [figure_text(record.metric, row.value, row.spread), gap_text(row.gap, row.gap_spread)]
        cells.append(line)
    return Table("", titles, cells)


def _cost(record: Record, row: RecordRow) -> list[str]:
    """What a row sees, its GFLOP, and its time over that of the backbone in the same record."""
    backbone = next((other.seconds for other in record.rows if other.label == "backbone"), None)
    times = f"{row.seconds / backbone:.1f}x" if row.seconds and backbone else "-"
    return [row.sees, "-" if row.gflop is None else f"{row.gflop:,.1f}", times]


def _title(record: Record) -> str:
    return f"{record.column}, {COSINE if record.metric == COSINE else figure_title(record.metric, False)}"


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def main(arguments: Sequence[str] | None = None) -> None:
    """Keep a record, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    one = commands.add_parser("keep")
    one.add_argument("folder", type=Path)
    one.add_argument("record", type=Path)
    one.add_argument("--command", required=True, nargs=argparse.REMAINDER)
    table = commands.add_parser("table")
    table.add_argument("records", type=Path)
    table.add_argument("page", type=Path)
    given = parser.parse_args(arguments)
    with error_boundary():
        if given.what == "keep":
            write_text(given.record, to_json(asdict(keep(given.folder, shlex.join(given.command))), indent=1) + "\n")
            print_files([given.record])
            return
        paths = sorted(given.records.glob("*.json"))
        records = {path: read_record(path) for path in paths}
        write_text(given.page, page(records))
        if drawn := chart(records):
            make_folder((given.page.parent / FIGURE).parent)
            write_text(given.page.parent / FIGURE, printable_lines(drawn))
        print_files([given.page])


if __name__ == "__main__":
    main()
