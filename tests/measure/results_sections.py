"""The sections of the results page: tables, charts and pictures made from result files of brixel."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from portable_commands import distill_command, groups_of, portable, probe_command, side, without_directories

from brixel_cli.cli import tables
from brixel_cli.config.distill import Recipe
from brixel_cli.core.files import replacing
from brixel_cli.core.formatting import human_count, human_percent, human_size
from brixel_cli.core.heads import QUANTITIES
from brixel_cli.core.metric_titles import figure_text, figure_title, gap_text
from brixel_cli.drawing.charts import Line, line_chart
from brixel_cli.drawing.page import Block, Chart, Commands, Photo, Table, Text
from brixel_cli.engines.ablating.results import Ablations
from brixel_cli.engines.benchmarking.curve import Curve
from brixel_cli.engines.benchmarking.probes import ProbeResult, read_probe
from brixel_cli.engines.benchmarking.results import Model, Results, Row, read_json
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.engines.distilling.validation import HeldOut
from brixel_cli.engines.equal_cost import EQUAL_COST
from brixel_cli.engines.probing.folder import ProbeFolder, file_name
from brixel_cli.engines.probing.results import ModelDescription, ProbeResults, Summary
from brixel_cli.errors import BrixelError

FAITHFUL = {"l1": "L1", "cosine": "cosine", "edge": "edge"}
PROBED = {
    "segmentation": ("miou", "boundary_iou"),
    "depth": ("rmse_m", "delta1"),
    "normals": ("mean_angle_deg", "within_11.25"),
}
SOURCES = ("backbone", EQUAL_COST, "student", "teacher")
SIZE_COLUMNS = ("bilinear", "student", "recovered gap")
TUNED_COLUMNS = ("set", "images", "views of each", "updates", "cosine, bilinear", "cosine, student", "recovered gap")
PROBE_COLUMNS = ("set", "figure", *SOURCES, "recovered gap", "seeds", "protocol", "input", "images: training / test")
ABLATION_COLUMNS = ("variant", "changes", "steps", *FAITHFUL.values(), "parameters", "image, ms")
ABSENT = Summary(0, {}, {})
WIDEST, LARGEST = 1400, 200_000
"""Of a picture: pixels and bytes."""


# Cells and pictures


def faithful(values: Mapping[str, float | None]) -> list[str]:
    return ["-" if (value := values.get(name)) is None or math.isnan(value) else f"{value:.4f}" for name in FAITHFUL]


def over(row: Row, backbone: Row) -> list[str]:
    """GFLOP, memory and time of a row over those of the backbone; memory only where both were obtained alike."""
    memory = (row.peak_bytes, backbone.peak_bytes) if row.memory == backbone.memory else (None, None)
    pairs = [(row.gflop, backbone.gflop), memory, (row.seconds, backbone.seconds)]
    return [f"{above / below:,.2f}x" if above and below else "-" for above, below in pairs]


def title_of(model: Model, size: tuple[int, int] | None = None) -> str:
    """Which student it was; the SHA-256 tells whether all sections are about the same."""
    where = f" at {human_size(size)} px" if size else ""
    weights = f" (SHA-256 {model.student_sha256[:12]})" if model.student_sha256 else ""
    return f"{model.name}{weights}{where}: {model.backbone}, adapter {model.adapter}"


def picture(source: Path, name: str, caption: str, folder: Path | None) -> list[Photo]:
    """A copy of a picture for the page, as a JPEG that is neither wide nor large; none where either is missing."""
    if folder is None or not source.is_file():
        return []
    with Image.open(source) as opened:
        image = opened.convert("RGB")
    scale, data = min(WIDEST / image.width, 1.0), b""
    while not data or len(data) > LARGEST:
        size, buffer = (max(round(image.width * scale), 1), max(round(image.height * scale), 1)), io.BytesIO()
        image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=85, optimize=True)
        data, scale = buffer.getvalue(), scale * 0.9
    photo = Photo(name, folder / f"{name}.jpg", caption)
    with replacing(photo.path) as partial:
        partial.write_bytes(data)
    return [photo]


# Sections


def training(folder: RunFolder, recipe: Recipe, figures: Path | None, stage: int = 1) -> list[Block]:
    """How the student was trained, and how close it came to the teacher on held-out images.

    Args:
        folder, recipe: of the run.
        figures: the folder of pictures; None: without any.
        stage: of the training, from 1: tells the pictures of one run from those of another.
    """
    suffix = "" if stage == 1 else f"_{stage}"
    results = results_of(folder)
    best = results["best"]
    held_out = f"{best.num_images} held-out images"
    entries = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    rows = [
        [name, *faithful(getattr(best, kind))]
        for name, kind in (("bilinear backbone", "backbone"), ("student", "student"))
    ]
    rows.append(["recovered gap", *(human_percent(best.recovered_gap[name]) for name in FAITHFUL)])
    blocks: list[Block] = [
        Commands([distill_command(recipe)]),
        Table("", ("", ""), training_facts(folder, recipe, results, entries)),
        Table(f"{held_out}, the best student", ("", *FAITHFUL.values()), rows),
    ]
    if best.domains:
        gaps = [[domain, gap_text(gap.value, gap.spread)] for domain, gap in best.domains.items()]
        blocks.append(Table("Recovered gap in cosine similarity", ("domain", "recovered gap"), gaps))
    curves = {kind: [(float(entry["step"]), entry[kind]["cosine"]) for entry in entries if entry["kind"] == "validation"
                     and entry[kind]["cosine"] is not None] for kind in ("student", "backbone")}  # fmt: skip
    colours = {"student": "blue", "backbone": "grey"}
    lines = [Line(kind, colours[kind], tuple(points)) for kind, points in curves.items() if points]
    if lines:
        chart = line_chart("Cosine similarity to the teacher during training", lines, "updates", "best 1")
        blocks.append(Chart(f"training{suffix}", chart, f"{held_out}. Backbone: its feature map, enlarged bilinearly."))
    caption = "Held-out images: the student's input, and the feature maps of backbone, student and teacher."
    return [*blocks, *picture(folder.picture(best.step), f"training_maps{suffix}", caption, figures)]


def results_of(folder: RunFolder) -> dict[str, Any]:
    """The results of a run that has ended; its best student as a `HeldOut`."""
    if not folder.results.is_file():
        raise BrixelError(f"{folder.results} is missing: give a run that has reached its end.")
    results: dict[str, Any] = json.loads(folder.results.read_text(encoding="utf-8"))
    return {**results, "best": HeldOut.from_json(results["best"])}


def training_facts(
    folder: RunFolder, recipe: Recipe, results: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """What the run was, as (name, value); speed is the median over the updates in the metrics."""
    views, batch, state = recipe.views, recipe.optim.batch_size, folder.load_state()
    speeds = [entry["images_per_second"] for entry in entries if "images_per_second" in entry]
    facts = [
        ["backbone, adapter", f"{recipe.backbone.name}, {recipe.adapter.kind}"],
        *([["images", state[1]["photographs"]]] if state else []),
        ["views of each image", f"{views.per_image} ({views.kind})"],
        ["input of the student", f"{inputs_of(recipe)} px" + ("; validation: the first" if views.other_sizes else "")],
        ["input of the teacher", f"{views.factor} times that"],
        ["updates", f"{results['steps']:,} with batches of {batch}; best validation after {results['best'].step:,}"],
    ]
    if speeds:
        speed = statistics.median(speeds)
        facts.append(["speed, median", f"{speed / batch:.2f} updates/s, {speed:.1f} images/s"])
    return facts


def inputs_of(*recipes: Recipe) -> str:
    """The student's inputs (height x width) in training."""
    views = [(size, recipe.views.factor) for recipe in recipes for size in recipe.views.teacher_sizes]
    return ", ".join(dict.fromkeys(f"{size[0] // factor}x{size[1] // factor}" for size, factor in views))


def cost(results: Results) -> list[Block]:
    """Cost of backbone, student and teacher, also relative to the backbone."""
    blocks: list[Block] = []
    for model in results.models:
        for size in results.sizes(model):
            rows = results.rows_at(model, size)
            first, *others = tables.cost_tables(results, model, size)
            first = replace(first, title=title_of(model, size), notes=results.notes)
            ratios = [[row.label, *over(row, rows[0])] for row in rows]  # the backbone's row is the first
            table = Table("Cost relative to the backbone", ("row", "GFLOP", "memory", "time"), ratios)
            blocks += [Commands([portable(results.command)]), first, *others, table]
    versions = ", ".join(f"{name} {number}" for name, number in results.environment.versions.items())
    return [*blocks, Text(f"With {versions}.")]


def fidelity(results: Results) -> list[Block]:
    """How close each feature map is to the teacher's."""
    blocks: list[Block] = []
    for model in results.models:
        for size in results.sizes(model):
            blocks.append(Commands([portable(results.command)]))
            for table in tables.fidelity_tables(results, model, size):
                title = table.title and f"{model.name}: {table.title.removesuffix(f' of {model.images}')}"
                blocks.append(replace(table, title=title))
    return blocks


def curve(path: Path, number: int = 1) -> list[Block]:
    """Fidelity against cost; `number`: of the curve, from 1, tells the pictures of several."""
    found = read_json(path, "curve.json", Curve, "brixel benchmark --curve")
    caption = (
        f"Cosine similarity to the teacher at {human_size(found.teacher_size)} px against the cost of a whole pass."
    )
    chart = Chart("curve" if number == 1 else f"curve_{number}", found.chart(), caption)
    return [Commands([portable(found.command)]), *tables.curve_tables(found), chart]


def generalisation(results: Results, recipes: Sequence[Recipe]) -> list[Block]:
    """Fidelity at several input sizes; `recipes`: those of the training, whose input sizes are named."""
    blocks: list[Block] = []
    seen = [f"Input sizes in training: {inputs_of(*recipes)} px."] if recipes else []
    for model in results.models:
        rows = []
        for size in results.sizes(model):
            found = {row.kind: row.fidelity for row in results.rows_at(model, size)}
            bilinear, student = found.get("bilinear"), found.get("student")
            cells = [human_size(size), "square" if size[0] == size[1] else "not square"]
            for name in FAITHFUL:
                cells += [f"{getattr(item, name):.4f}" if item else "-" for item in (bilinear, student)]
                cells.append(
                    gap_text(student.recovered_gap.get(name), student.gap_spread.get(name)) if student else "-"
                )
            rows.append(cells)
        notes = [note for note in results.notes if note.startswith(f"{model.name} ")]  # of rows that were not run
        columns = ["input", "shape", *(f"{metric}, {what}" for metric in FAITHFUL.values() for what in SIZE_COLUMNS)]
        title = f"{title_of(model)}; {model.num_images} images"
        blocks += [Commands([portable(results.command)]), Table(title, columns, rows, [*seen, *notes])]
    return blocks


def tuned(stages: Sequence[tuple[RunFolder, Recipe]], probed: Sequence[Path]) -> list[Block]:
    """Fine-tuned students: their runs, named by their folders, and their probes."""
    rows, commands = list[list[str]](), list[str]()
    for folder, recipe in stages:
        results, state = results_of(folder), folder.load_state()
        best = results["best"]
        cosines = [f"{getattr(best, kind)['cosine']:.4f}" for kind in ("backbone", "student")]
        counts = [state[1]["photographs"] if state else "-", str(recipe.views.per_image), f"{results['steps']:,}"]
        rows.append([folder.path.name, *counts, *cosines, human_percent(best.recovered_gap["cosine"])])
        commands.append(distill_command(recipe))
    found: list[Block] = [Commands(list(dict.fromkeys(commands))), Table("", TUNED_COLUMNS, rows)] if rows else []
    return [*found, *(probes(probed, None) if probed else [])]


def probe_rows(results: ProbeResults) -> list[list[str]]:
    """A row for each of the figures that the page shows of a probe's results."""
    settings, summary = results.settings, results.summary
    sources = [summary.get(name, ABSENT) for name in SOURCES]
    recovered, spreads = (gaps.get("student", {}) for gaps in (results.recovered_gap, results.gap_spread))
    images = " / ".join(f"{used.images:,}" for used in settings.data.values())
    seeds = "/".join(dict.fromkeys(str(source.seeds) for source in summary.values()))
    rows = []
    for metric in (metric for quantity in QUANTITIES[settings.task] for metric in PROBED[quantity]):
        figures = [figure_text(metric, source.mean_of(metric), source.spread.get(metric)) for source in sources]
        title = figure_title(metric, settings.protocol_settings.align)
        facts = [seeds, settings.protocol, side(settings.size), images]
        rows.append([settings.recipe, title, *figures, gap_text(recovered.get(metric), spreads.get(metric)), *facts])
    return rows


def probes(folders: Sequence[Path], figures: Path | None) -> list[Block]:
    """Probes on labelled sets, all in one table; `figures`: the folder of pictures."""
    commands, rows, photos, students = list[str](), list[list[str]](), list[Photo](), list[str]()
    for folder in map(ProbeFolder, folders):
        results = folder.read()
        if sum(source.kind == "student" for source in results.sources.values()) > 1:
            raise BrixelError(f"{folder.path} has several students: the page has one.")
        settings, student = results.settings, results.sources.get("student")
        commands.append(probe_command(results))
        rows += probe_rows(results)
        if isinstance(student, ModelDescription):
            students.append(f"SHA-256 {str(student.student_sha256)[:12]}, step {student.student_step}")
        name = file_name(f"{settings.recipe}_{settings.protocol_settings.name}_{side(settings.size)}")
        name += f"_{len(photos)}" if any(photo.name == name for photo in photos) else ""
        median = folder.pictures / f"{QUANTITIES[settings.task][0]}_median.png"
        caption = f"{settings.recipe}, the median image: predictions above, truth and errors below."
        photos += picture(median, name, caption, figures)
    main = [figure for folder in folders for figure in read_probe(folder)]
    remarks = [f"Mean and standard deviation over seeds. Student: {'; '.join(dict.fromkeys(students)) or '-'}."]
    shares = [figure.recovered_gap for figure in main if figure.recovered_gap is not None]
    if shares:
        remarks.append(f"Mean recovered gap: {human_percent(statistics.mean(shares))}, over {names_of(main, True)}.")
    if len(shares) < len(main):
        remarks.append(f"Not in the mean, because there is no gap or a source is missing: {names_of(main, False)}.")
    return [Commands(commands), Table("", PROBE_COLUMNS, rows), Text(" ".join(remarks)), *photos]


def names_of(figures: Sequence[ProbeResult], known: bool) -> str:
    """Main figures whose recovered gap is known, or is not."""
    names = [(figure.recipe, figure_title(figure.metric, figure.aligned), figure.recovered_gap) for figure in figures]
    return ", ".join(f"{recipe} {title}" for recipe, title, share in names if (share is not None) is known)


def ablations(results: Ablations) -> list[Block]:
    """The ablations: one table for each group of variants."""
    if waiting := [f"{item.group}, {item.name}" for item in results.variants if not (item.fidelity or item.failed)]:
        raise BrixelError(f"Not trained yet: {'; '.join(waiting)}. Give an ablation that has reached its end.")
    blocks: list[Block] = []
    cosine = ABLATION_COLUMNS.index("cosine")
    for group, variants in results.groups().items():
        bilinear = next((item.bilinear for item in variants if item.bilinear), None)
        rows = [["bilinear", "-", "-", *faithful(bilinear), "-", "-"]] if bilinear else []
        rows += [[item.name, without_directories(tables.described(item)), f"{item.steps:,}", *faithful(item.fidelity),
                  human_count(item.num_parameters), f"{item.latency.median * 1e3:,.1f}"] for item in variants]  # fmt: skip
        best = {cell for row, _ in tables.best_cells(rows, [cosine], [cosine]) for cell in ((row, 0), (row, cosine))}
        title = tables.ablation_tables(results, group)[0].title
        asked = [command for command in results.commands if group in groups_of(command)]
        commands = [portable(command) for command in asked or results.commands]
        blocks += [Commands(commands), Table(title, ABLATION_COLUMNS, rows, (), frozenset(best))]
    where = results.environment.hardware
    remark = f"Bold: best cosine similarity. One run of each variant, after its last update; {results.photographs} images; {where}."
    return [*blocks, Text(remark)]
