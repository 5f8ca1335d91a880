"""The charts of a report: cost as bars and curves, fidelity, ablations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from brixel_cli.cli.report_blocks import Chart
from brixel_cli.cli.tables import memory_text, rows_of, sizes_of
from brixel_cli.core.formatting import human_seconds, human_size
from brixel_cli.core.metrics import FIDELITY
from brixel_cli.drawing.charts import NUM_SERIES, Bar, Line, bar_chart, line_chart
from brixel_cli.engines.ablating.results import VariantResult
from brixel_cli.engines.benchmarking.results import Curve, Fidelity, Kind, Model, Results, Row

TITLES = {"l1": "L1", "cosine": "Cosine", "edge": "Edge error", "spectral": "Spectral error"}
BEST = {"l1": "best 0", "cosine": "best 1", "edge": "best 0", "spectral": "best 0"}


def main_size(results: Results, model: Model) -> tuple[int, int]:
    """The size that stands for a model: that of its training, or else the largest."""
    sizes = sizes_of(results, model)
    if model.trained_size in sizes:
        return model.trained_size
    return max(sizes, key=lambda size: size[0] * size[1])


def cost_bars(results: Results) -> Iterator[Chart]:
    """Time, arithmetic and memory of all rows, each model at its main size."""
    rows = [row for model in results.models for row in rows_of(results, model, main_size(results, model))]
    several = len(results.models) > 1

    def bars(value: Callable[[Row], float | None], text: Callable[[Row], str]) -> list[Bar]:
        found = []
        for row in rows:
            amount = value(row)
            if amount:
                group = f"{row.model}, {human_size(row.size)} px" if several else ""
                found.append(Bar(row.label, amount, text(row), row.kind, group=group))
        return found

    where = "" if several else f", {human_size(rows[0].size)} px"
    times = bars(lambda row: row.seconds and row.seconds * 1e3, lambda row: human_seconds(row.seconds))
    latencies = [row.latency for row in rows if row.latency]
    times = [
        replace(bar, spread=(latency.low * 1e3, latency.high * 1e3))
        for bar, latency in zip(times, latencies, strict=True)
    ]
    if times:
        yield Chart("cost_time", bar_chart(f"Time of a call, ms{where}", times), "Median; whisker: 10 to 90 %.")
    gflop = bars(lambda row: row.gflop, lambda row: f"{row.gflop:,.1f}")
    if gflop:
        yield Chart("cost_gflop", bar_chart(f"Arithmetic of an image, GFLOP{where}", gflop), "A multiply-add is 2.")
    memory = bars(lambda row: row.peak_bytes and row.peak_bytes / 2**20, memory_text)
    if memory:
        chart = bar_chart(f"Peak memory above weights, MiB{where}", memory)
        counted = any(row.peak_bytes and row.memory == "counted" for row in rows)
        yield Chart("cost_memory", chart, "c: counted, not measured." if counted else "Measured.")


def cost_curves(results: Results) -> Iterator[Chart]:
    """The same against the side of the map, for models that were looked at in several sizes."""
    quantities: list[tuple[str, str, str, Callable[[Row], float | None]]] = [
        ("time", "Time of a call", "ms", lambda row: row.seconds and row.seconds * 1e3),
        ("gflop", "Arithmetic of an image", "GFLOP", lambda row: row.gflop),
        ("memory", "Peak memory above weights", "MiB", lambda row: row.peak_bytes and row.peak_bytes / 2**20),
    ]
    curves = results.curves()
    for number, model in enumerate(results.models):
        mine = [curve for curve in curves if curve.model == model.name]
        for key, title, unit, value in quantities:
            lines = _lines(mine, lambda row: math.sqrt(row.grid[0] * row.grid[1]), value)
            if lines:
                yield Chart(
                    f"curve_{key}_{number}",
                    line_chart(f"{title}: {model.name}", lines, "side of the map, locations", unit, True, True),
                    "Further right at the same height: a finer map at the same cost.",
                )


def _lines(curves: Sequence[Curve], x: Callable[[Row], float], y: Callable[[Row], float | None]) -> list[Line]:
    """One line for each curve with two points or more, in the colour of its kind."""
    lines = []
    for curve, style in zip(curves, _styles([curve.kind for curve in curves]), strict=True):
        points = [(x(row), value) for row in curve.rows if (value := y(row))]
        if len(points) > 1:
            lines.append(Line(curve.label, style, tuple(points)))
    return lines


def _styles(kinds: Sequence[Kind]) -> list[str]:
    """Colours by kind; a second baseline and those after it take other colours."""
    further = iter(f"series{number % NUM_SERIES}" for number in (5, 6, 2, 3, 7, 0, 1))
    seen: set[str] = set()
    styles = []
    for kind in kinds:
        styles.append(next(further, "series7") if kind == "baseline" and kind in seen else kind)
        seen.add(kind)
    return styles


def _compared(results: Results, model: Model, size: tuple[int, int]) -> list[tuple[Row, Fidelity]]:
    return [(row, row.fidelity) for row in rows_of(results, model, size) if row.fidelity]


def gap_bars(results: Results, model: Model, number: int) -> Iterator[Chart]:
    """Share of the gap to the teacher that each row closes, at the model's main size."""
    size = main_size(results, model)
    bars = [
        Bar(row.label, share * 100, f"{share:.1%}", row.kind, group=TITLES[name])
        for name in FIDELITY
        for row, fidelity in _compared(results, model, size)
        if row.kind != "bilinear" and (share := fidelity.gap_closed.get(name)) is not None
    ]
    if bars:
        title = f"Share of the gap closed, %: {model.name}, {human_size(size)} px"
        yield Chart(
            f"gap_{number}", bar_chart(title, bars), "0: the bilinearly enlarged backbone map. 100: the teacher."
        )


def fidelity_curves(results: Results, model: Model, number: int) -> Iterator[Chart]:
    """Each metric against the student's input, where a model was compared at several sizes."""
    curves = [
        curve for curve in results.curves() if curve.model == model.name and any(row.fidelity for row in curve.rows)
    ]
    for name in FIDELITY:

        def figure(row: Row, name: str = name) -> float | None:
            return getattr(row.fidelity, name) if row.fidelity else None

        lines = _lines(curves, lambda row: math.sqrt(row.size[0] * row.size[1]), figure)
        if lines:
            title = f"{TITLES[name]} to the teacher: {model.name}"
            yield Chart(
                f"fidelity_{name}_{number}",
                line_chart(title, lines, "student input, pixels a side", BEST[name]),
                f"Trained at {human_size(model.trained_size)} px." if model.trained_size else "",
            )


def by_photograph(results: Results, model: Model, number: int) -> Iterator[Chart]:
    """Cosine of the single photographs, sorted."""
    size = main_size(results, model)
    compared = _compared(results, model, size)
    styles = _styles([row.kind for row, _ in compared])
    lines = [
        Line(row.label, style, tuple(enumerate(sorted(image.cosine for image in fidelity.images), start=1)))
        for (row, fidelity), style in zip(compared, styles, strict=True)
    ]
    if lines and len(lines[0].points) > 1:
        title = f"Cosine, photograph by photograph: {model.name}, {human_size(size)} px"
        chart = line_chart(title, lines, "photographs, each line by its own order, worst first", BEST["cosine"])
        yield Chart(f"photographs_{number}", chart, "How far the mean speaks for the single photograph.")


def ablation_charts(group: str, variants: Sequence[VariantResult]) -> Iterator[Chart]:
    """Gap closed, the course of training, and fidelity against time, of the trained variants of a group."""
    styled = [(item, f"series{number % NUM_SERIES}") for number, item in enumerate(variants)]
    bars = [
        Bar(item.name, share * 100, f"{share:.1%}", style, group=TITLES[name])
        for name in ("cosine", "edge")
        for item, style in styled
        if (share := item.gap_closed.get(name)) is not None
    ]
    if bars:
        caption = "0: the bilinearly enlarged backbone map. 100: the teacher."
        yield Chart(f"ablation_gap_{group}", bar_chart(f"Share of the gap closed, %: {group}", bars), caption)
    lines = []
    for item, style in styled:
        points = [(float(point.step), value) for point in item.curve if (value := point.fidelity["cosine"]) is not None]
        lines.append(Line(item.name, style, tuple(points)))
    if any(len(line.points) > 1 for line in lines):
        chart = line_chart(f"Cosine in the course of training: {group}", lines, "updates", BEST["cosine"])
        yield Chart(f"ablation_steps_{group}", chart, "On the held-out photographs.")
    if len({item.latency for item in variants}) > 1:
        points_of = [
            Line(item.name, style, ((item.latency.median * 1e3, item.fidelity["cosine"] or 0.0),))
            for item, style in styled
        ]
        chart = line_chart(
            f"Fidelity against time: {group}",
            points_of,
            "an image through backbone and adapter, ms",
            "cosine",
            joined=False,
        )
        yield Chart(f"ablation_time_{group}", chart, "Better towards the upper left.")
