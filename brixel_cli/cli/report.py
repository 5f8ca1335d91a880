"""`--report` of brixel benchmark: what lies in an output folder, as a page of tables, charts and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from brixel_cli.cli.tables import (
    ablation_tables,
    budget_tables,
    cost_tables,
    fidelity_tables,
    memory_text,
    probe_tables,
)
from brixel_cli.core.formatting import human_bytes, human_seconds, human_size
from brixel_cli.core.metric_titles import FIDELITY_TITLES
from brixel_cli.core.metrics import FIDELITY
from brixel_cli.drawing.charts import SERIES, Bar, Line, bar_chart, line_chart
from brixel_cli.drawing.page import Block, Chart, Commands, File, Page, Photo, Section, Table, Text, write_page
from brixel_cli.engines.ablating import results as ablating
from brixel_cli.engines.ablating.results import Ablations
from brixel_cli.engines.benchmarking import results as benchmarking
from brixel_cli.engines.benchmarking.environment import Environment
from brixel_cli.engines.benchmarking.results import Model, Results, Row
from brixel_cli.errors import UsageError

BEST = {"l1": "best 0", "cosine": "best 1", "edge": "best 0", "spectral": "best 0"}
COLOURS = {"backbone": "grey", "bilinear": "amber", "student": "blue", "teacher": "red", "equal_cost": "green"}
BASELINES = ("violet", "teal", "pink")
"""Colours of baselines, in their order."""
GAP_CAPTION = "0: the bilinearly enlarged backbone map. 100: the teacher."


def report_of(output: Path, folder: Path) -> list[Path]:
    """Write a report of the results and the ablations that are in `output`; returns its files.

    Raises:
        BrixelError: they cannot be read, or the folder cannot be made.
    """
    results = benchmarking.read_results(output) if (output / benchmarking.FILE_NAME).exists() else None
    ablations = ablating.read_ablations(output) if (output / ablating.FILE_NAME).exists() else None
    return write_report(results, ablations, output, folder)


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
    lead, highlights = "", list[tuple[str, str]]()
    found: dict[str, Iterator[Block]] = {}
    if results:
        lead, highlights = _headline(results)
        probes = (table for model in results.models for table in probe_tables(results, model))
        found |= {
            "Cost": _cost(results),
            "Cost against output resolution": _cost_curves(results),
            "Fidelity": _fidelity(results),
            "Probes": probes,
            "Feature maps": _pictures(results, pictures),
        }
    if ablations:
        lead = lead or _ablation_headline(ablations)
        found |= {f"Ablation: {group}": _ablation(ablations, group) for group in ablations.groups()}
    parts = [part for part in (results, ablations) if part]
    environments = [part.environment for part in parts]
    if len(environments) == 2 and environments[0] == environments[1]:
        environments.pop()
    commands = [*([results.command] if results else []), *(ablations.commands if ablations else [])]
    found |= {
        "Environment": (_environment_table(environment) for environment in environments),
        "How it was measured": (Text(text) for text in _methods(results, ablations)),
        "Commands": iter([Commands(commands)]),
    }
    sections = [Section(title, blocks) for title, made in found.items() if (blocks := list(made))]
    created = "; ".join(dict.fromkeys(part.created for part in parts))
    page = Page("brixel benchmark", lead, highlights, sections, created)
    try:
        return write_page(page, folder, "report")
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UsageError(f"--report {folder} cannot be made: {error.strerror}. Name another folder.") from error


def _headline(results: Results) -> tuple[str, list[tuple[str, str]]]:
    """One sentence and a few figures about the first model that was compared with its teacher, or else the first."""
    compared = [row.model for row in results.rows if row.kind == "student" and row.fidelity]
    model = results.model(compared[0]) if compared else results.models[0]
    size = results.main_size(model)
    rows = {row.kind: row for row in results.rows_at(model, size)}
    student, teacher, bilinear = rows["student"], rows.get("teacher"), rows.get("bilinear")
    text = f"At {human_size(size)} px the student of {model.backbone} yields a {human_size(student.grid)} map"
    highlights: list[tuple[str, str]] = []
    if student.seconds is not None:
        time = human_seconds(student.seconds)
        text += f" in {time}"
        highlights.append((time, f"a call of the student, batch of {results.settings.batch_size}"))
    if teacher:
        ratios = results.ratios(student)
        text += f"; its teacher, the same backbone at {human_size(teacher.input_size)} px,"
        text += f" takes {human_seconds(teacher.seconds)}" if teacher.seconds is not None else " was counted only"
        less = {"less time": ratios.faster, "less arithmetic": ratios.less_flop, "less memory": ratios.less_memory}
        known = {what: f"{ratio:.1f}x" for what, ratio in less.items() if ratio}
        text += f": {', '.join(f'{ratio} {what}' for what, ratio in known.items())}" if known else ""
        highlights += [(ratio, f"{what} than the teacher") for what, ratio in known.items()]
    text += "."
    if student.fidelity and bilinear and bilinear.fidelity:
        gap = student.fidelity.recovered_gap.get("cosine")
        mine, plain = f"{student.fidelity.cosine:.3f}", f"{bilinear.fidelity.cosine:.3f}"
        text += (
            f" On {len(student.fidelity.images)} images its map has a mean cosine of {mine} to the teacher's; "
            f"the backbone's own map, enlarged bilinearly, has {plain}"
        )
        if (rival := rows.get("equal_cost")) and rival.fidelity:
            text += f", and at {human_size(rival.input_size)} px, for no more time, {rival.fidelity.cosine:.3f}"
        text += "."
        highlights.append((mine, f"mean cosine to the teacher; bilinear {plain}"))
        if gap is not None:
            highlights.append((f"{gap:.0%}", "recovered gap between bilinear and teacher, in cosine"))
    elif model.weights == "random":
        text += " Weights are random: this is about cost only."
    return text, highlights


def _ablation_headline(ablations: Ablations) -> str:
    done = [item for item in ablations.variants if item.fidelity]
    if not done:
        return f"No variant of {ablations.recipe} has been trained to its end yet."
    best = max(done, key=lambda item: item.fidelity["cosine"] or -1.0)
    return (
        f"Of {len(done)} variants of {ablations.recipe}, {best.name} ({best.group}) comes closest to the teacher in "
        f"cosine: {best.fidelity['cosine']:.4f}, against {best.bilinear['cosine']:.4f} of the bilinear backbone map, "
        f"at {human_seconds(best.latency.median)} an image."
    )


Quantity = Callable[[Row], float | None]
COSTS: dict[str, tuple[str, str, Quantity, Callable[[Row], str]]] = {
    "time": (
        "Time of a call",
        "ms",
        lambda row: row.seconds and row.seconds * 1e3,
        lambda row: human_seconds(row.seconds),
    ),
    "gflop": ("Arithmetic of an image", "GFLOP", lambda row: row.gflop, lambda row: f"{row.gflop:,.1f}"),
    "memory": ("Peak memory above weights", "MiB", lambda row: row.peak_bytes and row.peak_bytes / 2**20, memory_text),
}


def _colours(rows: Sequence[Row]) -> list[str]:
    baselines = list(dict.fromkeys(row.label for row in rows if row.kind == "baseline"))
    return [COLOURS.get(row.kind) or BASELINES[baselines.index(row.label) % len(BASELINES)] for row in rows]


def _cost(results: Results) -> Iterator[Block]:
    """Bars of each model at its main size; then all tables."""
    rows = [row for model in results.models for row in results.rows_at(model, results.main_size(model))]
    several = len(results.models) > 1
    where = "" if several else f", {human_size(rows[0].size)} px"
    captions = {"time": "Median; line: 10 to 90 %.", "gflop": "A multiply-add is 2.", "memory": "Measured."}
    if any(row.memory == "counted" and row.peak_bytes for row in rows):
        captions["memory"] = "c: counted, not measured."
    for key, (title, unit, value, text) in COSTS.items():
        bars = []
        for row, colour in zip(rows, _colours(rows), strict=True):
            if amount := value(row):
                spread = (row.latency.low * 1e3, row.latency.high * 1e3) if row.latency and key == "time" else None
                group = f"{row.model}, {human_size(row.size)} px" if several else ""
                bars.append(Bar(row.label, amount, text(row), colour, spread, group))
        if bars:
            yield Chart(f"cost_{key}", bar_chart(f"{title}, {unit}{where}", bars), captions[key])
    for model in results.models:
        for size in results.sizes(model):
            yield from cost_tables(results, model, size)
    yield from budget_tables(results)
    yield from (Text(note) for note in results.notes)


def _cost_curves(results: Results) -> Iterator[Block]:
    """The same against the side of the map, for models that were measured at several sizes."""
    caption = "Further right at the same height: a finer map at the same cost."
    for number, model in enumerate(results.models):
        for key, (title, unit, value, _) in COSTS.items():
            if lines := _lines(results.curves(model), lambda row: math.prod(row.grid) ** 0.5, value):
                chart = line_chart(f"{title}: {model.name}", lines, "side of the map, locations", unit, True, True)
                yield Chart(f"curve_{key}_{number}", chart, caption)


def _lines(curves: Sequence[Sequence[Row]], x: Callable[[Row], float], y: Quantity) -> list[Line]:
    """A line for each label with two points or more."""
    colours = _colours([rows[0] for rows in curves])
    points = [tuple((x(row), value) for row in rows if (value := y(row))) for rows in curves]
    return [
        Line(rows[0].label, colour, line)
        for rows, colour, line in zip(curves, colours, points, strict=True)
        if len(line) > 1
    ]


def _fidelity(results: Results) -> Iterator[Block]:
    for number, model in enumerate(results.models):
        yield from _fidelity_charts(results, model, number)
        for size in results.sizes(model):
            for table in fidelity_tables(results, model, size):
                yield replace(table, title=table.title and f"{model.name}: {table.title}")


def _fidelity_charts(results: Results, model: Model, number: int) -> Iterator[Chart]:
    """Recovered gaps at the main size, each metric against the input size, and cosines of the single images."""
    size = results.main_size(model)
    where = f"{model.name}, {human_size(size)} px"
    compared = results.compared(model, size)
    colours = _colours([row for row, _ in compared])
    bars = [
        Bar(row.label, gap * 100, f"{gap:.1%}", colour, group=FIDELITY_TITLES[name])
        for name in FIDELITY
        for (row, fidelity), colour in zip(compared, colours, strict=True)
        if row.kind != "bilinear" and (gap := fidelity.recovered_gap.get(name)) is not None
    ]
    if bars:
        yield Chart(f"gap_{number}", bar_chart(f"Recovered gap, %: {where}", bars), GAP_CAPTION)
    for name in FIDELITY:

        def figure(row: Row, name: str = name) -> float | None:
            return getattr(row.fidelity, name) if row.fidelity else None

        if lines := _lines(results.curves(model), lambda row: math.prod(row.size) ** 0.5, figure):
            title = f"Fidelity to the teacher, {FIDELITY_TITLES[name]}: {model.name}"
            chart = line_chart(title, lines, "student input, pixels a side", BEST[name])
            caption = f"Trained at {human_size(model.trained_size)} px." if model.trained_size else ""
            yield Chart(f"fidelity_{name}_{number}", chart, caption)
    lines = [
        Line(row.label, colour, tuple(enumerate(sorted(image.cosine for image in fidelity.images), start=1)))
        for (row, fidelity), colour in zip(compared, colours, strict=True)
    ]
    if lines and len(lines[0].points) > 1:
        title, x_title = f"Cosine of each image: {where}", "images, in the order of their cosine"
        yield Chart(f"photographs_{number}", line_chart(title, lines, x_title, BEST["cosine"]), "")


def _pictures(results: Results, folder: Path) -> Iterator[Block]:
    found = [(picture, folder / picture.path) for picture in results.pictures if (folder / picture.path).is_file()]
    if found:
        yield Text("Colours: the first three principal components of the teacher's map; equal colours, equal features.")
    for number, (picture, path) in enumerate(found):
        compared = results.compared(results.model(picture.model), picture.size)
        last = max(len(fidelity.images) for _, fidelity in compared)
        ranks = {2: "the second worst", last // 2 + 1: "the median", last: "the best", 1: "the worst"}
        rank = ranks.get(picture.rank, f"number {picture.rank} from the worst")
        where = f"{picture.model} at {human_size(picture.size)} px"
        yield Photo(f"maps_{number}", path, f"{picture.image}: {rank} of {last} images in cosine, {where}.")
    for page, where in {
        picture.page: f"{picture.model} at {human_size(picture.size)} px" for picture, _ in found
    }.items():
        if (folder / page).is_file():
            text = f"Look at these features: point at a place and see what is like it, {where}"
            yield File(Path(page).stem, folder / page, text)


def _ablation(ablations: Ablations, group: str) -> Iterator[Block]:
    """Recovered gaps, the course of training, and fidelity against time, of the trained variants; then all tables."""
    variants = [item for item in ablations.groups()[group] if item.fidelity]
    names = list(SERIES)
    coloured = [(item, names[number % len(names)]) for number, item in enumerate(variants)]
    bars = [
        Bar(item.name, gap * 100, f"{gap:.1%}", colour, group=FIDELITY_TITLES[name])
        for name in ("cosine", "edge")
        for item, colour in coloured
        if (gap := item.recovered_gap.get(name)) is not None
    ]
    if bars:
        yield Chart(f"ablation_gap_{group}", bar_chart(f"Recovered gap, %: {group}", bars), GAP_CAPTION)
    lines = []
    for item, colour in coloured:
        points = [(float(point.step), value) for point in item.curve if (value := point.fidelity["cosine"]) is not None]
        lines.append(Line(item.name, colour, tuple(points)))
    if any(len(line.points) > 1 for line in lines):
        chart = line_chart(f"Cosine in the course of training: {group}", lines, "updates", BEST["cosine"])
        yield Chart(f"ablation_steps_{group}", chart, "On the held-out images.")
    if len({item.latency for item in variants}) > 1:
        lines = [
            Line(item.name, colour, ((item.latency.median * 1e3, item.fidelity["cosine"] or 0.0),))
            for item, colour in coloured
        ]
        x_title = "an image through backbone and adapter, ms"
        chart = line_chart(f"Fidelity against time: {group}", lines, x_title, "cosine", joined=False)
        yield Chart(f"ablation_time_{group}", chart, "Better towards the upper left.")
    yield from ablation_tables(ablations, group)


def _environment_table(environment: Environment) -> Table:
    arithmetic = environment.precision + (" (TF32)" if environment.tf32 else "")
    rows = [
        ["device", environment.device],
        ["processor", environment.processor],
        ["threads", str(environment.threads)],
        ["memory", human_bytes(environment.memory_bytes)],
        ["arithmetic", arithmetic],
        ["system", environment.system],
        *([name, number] for name, number in environment.versions.items()),
    ]
    return Table("", ("", ""), rows)


def _methods(results: Results | None, ablations: Ablations | None) -> Iterator[str]:
    if results:
        yield (
            "Time: one call on a batch that is in memory already, without reading or preparing images. The rows of a "
            "model and size are interleaved, one call of each in every round, so that a drift of the machine hits all "
            f"alike. Median, with the 10 % and 90 % quantiles. Batch: {results.settings.batch_size}."
        )
        yield (
            "Arithmetic: every operator is counted on tensors without contents; a multiply-add is 2, attention "
            "included, elementwise operations not."
        )
        kinds = {row.memory for row in results.rows}
        if "measured" in kinds:
            where = "on a CPU of a fresh process, on a GPU of its allocator"
            yield f"Memory, measured: the peak above the loaded weights, {where}."
        if "counted" in kinds:
            yield "Memory, counted (c): most bytes of tensors alive at once beyond weights and input."
    if (results and any(row.fidelity for row in results.rows)) or ablations:
        yield (
            "Fidelity: maps are compared with the teacher's, the same frozen backbone on the large image, over whole "
            "images that the student was not trained on unless others were named. L1: mean absolute difference, "
            "in feature units. Cosine: mean cosine similarity over locations. Edge: squared error of Sobel gradients "
            "in the teacher's first 8 principal components, over the teacher's own gradient energy. Spectral: mean "
            "squared log ratio of high-frequency amplitudes. Recovered gap: (row - bilinear) / (teacher - bilinear)."
        )
    if ablations:
        equal = "as many updates" if ablations.equal == "steps" else "updates for the same time"
        yield (
            f"Ablations: all variants have {equal}, the same images ({ablations.photographs}), the same views in "
            "the same order where the seed is the same, and are measured at the end of the training, not at their "
            "best. Update: median time of one on a batch in memory, the variants interleaved. Training memory: "
            "counted; batch, weights, gradients, moments, average and the largest working set of a pass, without the "
            "spectral term's. One run each: the group seed shows what differs by chance."
        )
