"""The tables of a benchmark, as the terminal and the report show them alike; that of images that failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from brixel_cli.cli.console import print_table
from brixel_cli.core.formatting import human_bytes, human_count, human_seconds, human_size
from brixel_cli.core.metric_titles import FIDELITY_TITLES, figure_text, figure_title, gap_text
from brixel_cli.core.metrics import FIDELITY
from brixel_cli.core.probe_metrics import HIGHER_IS_BETTER
from brixel_cli.drawing.page import Table
from brixel_cli.engines.ablating.results import Ablations, VariantResult
from brixel_cli.engines.ablating.variants import Planned, Variant
from brixel_cli.engines.benchmarking.curve import BACKBONE, Curve, quality
from brixel_cli.engines.benchmarking.probes import ProbeResult
from brixel_cli.engines.benchmarking.results import FIGURES, Model, Results, Row
from brixel_cli.engines.latency import Latency

MOST_LISTED = 20
"""Images in the table of those that failed."""
COST_COLUMNS = ("row", "input", "grid", "frozen", "adapter", "GFLOP", "memory", "less FLOP", "less mem.")
TIME_COLUMNS = ("row", "median", "10 %", "90 %", "images/s", "faster")
FIDELITY_COLUMNS = ("row", "L1", "cosine", "5 %", "worst", "edge", "spectral")
GAP_COLUMNS = ("recovered gap", *FIDELITY_TITLES.values())
DOMAINS_TITLE = "Recovered gap in cosine, by folder of images"
GAP_NOTE = "+-: standard error of the mean over images. -: the gap is under two of its standard errors."
CURVE_COLUMNS = ("row", "input", "cosine", "L1", "time", "GFLOP", "recovered gap")
WORTH_COLUMNS = ("worth", "input", "in time", "in FLOP")
WORTH_NOTE = (
    "Worth: the cost at which the plain backbone comes as close to the teacher, over the row's: above 1 the student "
    "pays. -: the backbone's inputs do not reach so far."
)
PROBE_COLUMNS = ("probe", "figure", "backbone", "student", "teacher", "recovered gap")
ABLATION_FIDELITY = ("variant", *FIDELITY_TITLES.values())
ABLATION_COST = ("variant", "adapter", "GFLOP", "image", "update", "updates", "memory")


def show(tables: Iterable[Table]) -> None:
    """Print tables to stdout."""
    for table in tables:
        print_table(table.title, table.columns, table.rows, table.notes)


def show_failures(failures: Mapping[str, str], lacking: str) -> None:
    """Print the first images that failed, with the reasons, and how often which reason occurs; nothing without any.

    Args:
        failures: reason by image.
        lacking: what these images are without.
    """
    if not failures:
        return
    notes = []
    if len(failures) > MOST_LISTED:
        kinds = Counter(reason.split(":")[0].split("(")[0].strip()[:60] for reason in failures.values())
        common = "; ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))
        notes = [f"and {len(failures) - MOST_LISTED} more. In all: {common}."]
    title, listed = f"{len(failures)} images without {lacking}", list(failures.items())[:MOST_LISTED]
    print_table(title, ["image", "reason"], listed, notes, figures=False)


def cost_tables(results: Results, model: Model, size: tuple[int, int]) -> list[Table]:
    """What each row of a model costs at a size (height, width); its time where it was run."""
    rows = results.rows_at(model, size)
    weights = "random weights, on purpose: cost only" if model.weights == "random" else f"weights {model.weights}"
    title = f"{model.name} at {human_size(size)} px: {model.backbone}, {weights}; adapter {model.adapter}, "
    title += model.student or "untrained"
    tables = [Table(title, COST_COLUMNS, [_cost_cells(results, row) for row in rows])]
    timed = [_time_cells(results, row, row.latency) for row in rows if row.latency]
    if timed:
        environment, batch = results.environment, results.settings.batch_size
        compiled = ", compiled" if results.settings.compiled else ""
        title = f"Time of a batch of {batch} on {environment.hardware}, {environment.precision}{compiled}"
        tables.append(Table(title, TIME_COLUMNS, timed))
    return tables


def fidelity_tables(results: Results, model: Model, size: tuple[int, int]) -> list[Table]:
    """How close each row of a model comes to the teacher at a size (height, width); none where nothing was compared."""
    compared = results.compared(model, size)
    if not compared:
        return []
    num_images = len(compared[0][1].images)
    title = f"Fidelity to the teacher at {human_size(size)} px: {num_images} images of {model.images}"
    others = [(row, fidelity) for row, fidelity in compared if row.kind != "bilinear"]
    gaps = [[row.label, *_gap_cells(fidelity.recovered_gap, fidelity.gap_spread)] for row, fidelity in others]
    rows = [[row.label, *(f"{getattr(fidelity, name):.4f}" for name in FIGURES)] for row, fidelity in compared]
    tables = [
        Table(title, FIDELITY_COLUMNS, rows),
        Table("", GAP_COLUMNS, gaps, [GAP_NOTE]),
    ]
    if domains := list(others[-1][1].domains) if others else []:
        rows = [[row.label, *(gap_text(*fidelity.domains[name]) for name in domains)] for row, fidelity in others]
        tables.append(Table(DOMAINS_TITLE, ("row", *domains), rows))
    return tables


def curve_tables(curve: Curve) -> list[Table]:
    """The plain backbone at its inputs and the students at theirs: fidelity, cost, and what cost a student is worth."""
    rows, worth, domains = [], [], []
    for row in (row for members in curve.lines.values() for row in members):
        assert row.fidelity is not None
        named, fidelity = [row.label, human_size(row.input_size)], row.fidelity
        rows.append(
            [
                *named,
                f"{quality(row):.4f}",
                f"{fidelity.mean_over_domains('l1'):.4f}",
                human_seconds(row.seconds),
                "-" if row.gflop is None else f"{row.gflop:,.1f}",
                gap_text(fidelity.recovered_gap["cosine"], fidelity.gap_spread["cosine"]),
            ]
        )
        domains.append([*named, *(gap_text(*gap) for gap in fidelity.domains.values())])
        if row.label != BACKBONE:
            ratios = (curve.worth(row, lambda row: row.seconds), curve.worth(row, lambda row: row.gflop))
            worth.append([*named, *map(_times, ratios)])
    title = f"{curve.backbone} towards {human_size(curve.teacher_size)} px, {curve.num_images} images"
    tables = [Table(title, CURVE_COLUMNS, rows, [GAP_NOTE]), Table("", WORTH_COLUMNS, worth, [WORTH_NOTE])]
    first = curve.rows[0].fidelity
    if first and first.domains:
        tables.append(Table(DOMAINS_TITLE, ("row", "input", *first.domains), domains))
    return tables


def probe_tables(results: Results, model: Model) -> list[Table]:
    """What probes found out about a model's student; none where it was not probed."""
    probes = results.probes.get(model.name, ())
    if not probes:
        return []
    rows = [
        [
            Path(item.folder).name,
            figure_title(item.metric, item.aligned),
            *(_probe_figure(item, source, spread=False) for source in ("backbone", "student", "teacher")),
            gap_text(item.recovered_gap, item.gap_spread),
        ]
        for item in probes
    ]
    return [Table(f"Probes of {model.name}, mean over seeds", PROBE_COLUMNS, rows, _probe_notes(probes))]


def _probe_notes(probes: Iterable[ProbeResult]) -> list[str]:
    """Under which rules each probe was made."""
    notes = [
        f"{item.folder}: recipe {item.recipe}, protocol {item.protocol}, {item.seeds} "
        + ("seed." if item.seeds == 1 else "seeds.")
        for item in probes
    ]
    return list(dict.fromkeys(notes))


def _probe_figure(probe: ProbeResult, source: str, spread: bool = True) -> str:
    figure = probe.figures.get(source)
    return figure_text(probe.metric, figure.mean, figure.spread if spread else None) if figure else "-"


def budget_tables(results: Results) -> list[Table]:
    """The answer to --budget; empty where none was given."""
    if not results.budget:
        return []
    rows = [
        [
            f"{answer.model} {answer.label}{', largest' if answer.largest else ''}",
            human_size(answer.size),
            human_bytes(answer.total_bytes) + (" c" if answer.memory == "counted" else ""),
            "yes" if answer.fits else "no",
        ]
        for answer in results.budget
    ]
    budget = human_bytes(results.settings.budget_bytes or 0)
    title = f"Budget of {budget}, weights and peak, without the libraries' own"
    note = "Largest: the largest square student input that fits, by the count (c)."
    return [Table(title, ("row", "student input", "needed", "fits"), rows, [note])]


def ablation_tables(ablations: Ablations, group: str) -> list[Table]:
    """The variants of a group: how faithful they came out, beside the bilinear backbone map, and what they cost."""
    variants = ablations.groups()[group]
    first = next((item for item in variants if item.bilinear), None)
    equal = f"{ablations.budget:,.0f} updates" if ablations.equal == "steps" else human_seconds(ablations.budget)
    images = f"{first.num_images} held-out images" if first else "nothing trained yet"
    bilinear = [["bilinear", *_figures(first.bilinear)]] if first else []
    faithful = bilinear + [_ablation_fidelity(item) for item in variants]
    last, higher, notes = _last_column(variants)
    places = range(1, 5 + len(notes))
    rows = [[*cells, own] for cells, own in zip(faithful, last[1:] if first else last[2:], strict=True)]
    gaps = [[item.name, *_gap_cells(item.recovered_gap, {})] for item in variants if item.recovered_gap]
    tables = [
        Table(
            f"{group}: {ablations.recipe}, {equal} of {ablations.batch_size} images for each; {images}",
            (*ABLATION_FIDELITY, last[0]),
            rows,
            notes,
            best_cells(rows, places, higher),
        ),
        Table("", GAP_COLUMNS, gaps, (), best_cells(gaps, range(1, 5), higher=range(1, 5))),
        Table(
            f"{group}: cost",
            ABLATION_COST,
            [_ablation_cost(item) for item in variants],
            [f"{item.name}: {described(item)}" for item in variants],
        ),
    ]
    return [table for table in tables if table.rows]


def _last_column(variants: Sequence[VariantResult]) -> tuple[list[str], Sequence[int], list[str]]:
    """Of the table of fidelity: title, the bilinear row's cell and the variants'; columns where more is better; notes.

    The probe's figure where variants were probed, else the time of an image, which the table of cost has in any case.
    """
    probe = next((item.probe for item in variants if item.probe), None)
    if probe is None:
        return ["image", "-", *(human_seconds(item.latency.median) for item in variants)], (2,), []
    title, plain = figure_title(probe.metric, probe.aligned), _probe_figure(probe, "backbone")
    cells = [_probe_figure(item.probe, "student") if item.probe else "-" for item in variants]
    notes = [
        f"{title}: probe {probe.recipe}, protocol {probe.protocol}, mean and standard deviation over {probe.seeds} "
        "seeds; in the row bilinear that of the plain backbone."
    ]
    return [title, plain, *cells], (2, 5) if probe.metric in HIGHER_IS_BETTER else (2,), notes


def best_cells(
    rows: Sequence[Sequence[str]], columns: Sequence[int], higher: Sequence[int]
) -> frozenset[tuple[int, int]]:
    """(row, column) of the best of some columns, the highest of `higher`; all where several are written alike."""
    best = set()
    for column in columns:
        cells = {number: row[column].partition(" +- ")[0].rstrip("%") for number, row in enumerate(rows)}
        figures = {number: float(cell) for number, cell in cells.items() if cell not in ("-", "failed")}
        if len(figures) > 1:
            wanted = max(figures.values()) if column in higher else min(figures.values())
            best |= {(number, column) for number, figure in figures.items() if figure == wanted}
    return frozenset(best)


def plan_table(group: str, planned: Sequence[Planned]) -> Table:
    """What would be trained for a group."""
    rows = [
        [
            item.variant.name,
            human_count(item.counts.num_live),
            f"{item.counts.adapter.flop * item.recipe.optim.accumulate / 1e9:,.1f}",
            human_bytes(item.counts.training_bytes),
        ]
        for item in planned
    ]
    changes = [f"{item.variant.name}: {item.variant.described}" for item in planned]
    return Table(group, ("variant", "adapter", "GFLOP an update", "memory"), rows, changes)


def described(item: VariantResult) -> str:
    """What a variant changes, and why it failed."""
    return Variant(item.name, item.changes).described + (f"; failed: {item.failed}" if item.failed else "")


def _cost_cells(results: Results, row: Row) -> list[str]:
    ratios = results.ratios(row)
    return [
        row.label,
        human_size(row.input_size),
        human_size(row.grid),
        human_count(row.frozen_parameters),
        human_count(row.adapter_parameters),
        "-" if row.gflop is None else f"{row.gflop:,.1f}",
        memory_text(row),
        *(_times(ratio) for ratio in (ratios.less_flop, ratios.less_memory)),
    ]


def memory_text(row: Row) -> str:
    """Peak memory for people; c marks what was counted."""
    if row.peak_bytes is None:
        return "-"
    return human_bytes(row.peak_bytes) + (" c" if row.memory == "counted" else "")


def _time_cells(results: Results, row: Row, latency: Latency) -> list[str]:
    per_second = results.images_per_second(row)
    compiled = latency.compile_seconds
    return [
        row.label if compiled is None else f"{row.label} (compiled in {compiled:.1f} s)",
        *(human_seconds(value) for value in (latency.median, latency.low, latency.high)),
        "-" if per_second is None else f"{per_second:,.2f}",
        _times(results.ratios(row).faster),
    ]


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:,.1f}x"


def _ablation_fidelity(item: VariantResult) -> list[str]:
    empty = ["failed" if item.failed else "-", *["-"] * (len(FIDELITY) - 1)]
    return [
        item.name,
        *(_figures(item.fidelity) if item.fidelity else empty),
    ]


def _ablation_cost(item: VariantResult) -> list[str]:
    return [
        item.name,
        human_count(item.num_parameters),
        f"{item.gflop:,.1f}",
        human_seconds(item.latency.median),
        human_seconds(item.update_seconds),
        f"{item.steps:,}",
        human_bytes(item.training_bytes),
    ]


def _figures(fidelity: Mapping[str, float | None]) -> list[str]:
    values = [fidelity.get(name) for name in FIDELITY]
    return ["-" if value is None else f"{value:.4f}" for value in values]


def _gap_cells(gaps: Mapping[str, float | None], spreads: Mapping[str, float | None]) -> list[str]:
    return [gap_text(gaps.get(name), spreads.get(name)) for name in FIDELITY]
