"""Bar and line charts as SVG: text stays text, colours come from style sheets, so that they do in light and dark."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
.chart { --ink: #1c2330; --faint: #5d6778; --grid: #dfe3ea; --ground: #ffffff;
  font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
.chart text { fill: var(--ink); } .chart .faint { fill: var(--faint); font-size: 11px; }
.chart .title { font-weight: 600; font-size: 13px; }
.chart .grid { stroke: var(--grid); stroke-width: 1; } .chart .whisker { stroke: var(--ink); stroke-width: 1.2; }
.chart .bar { fill: var(--colour); } .chart .mark { fill: var(--colour); stroke: var(--ground); stroke-width: 1; }
.chart .line { fill: none; stroke: var(--colour); stroke-width: 2.2; stroke-linejoin: round; }
.chart .band { fill: var(--colour); opacity: 0.16; }
.backbone { --colour: #8a93a3; } .bilinear { --colour: #b08b3e; } .student { --colour: #1769d2; }
.teacher { --colour: #c2412d; } .baseline { --colour: #7b4fc0; }
.series0 { --colour: #1769d2; } .series1 { --colour: #c2412d; } .series2 { --colour: #1f8a5b; }
.series3 { --colour: #b07a12; } .series4 { --colour: #7b4fc0; } .series5 { --colour: #0f8fa3; }
.series6 { --colour: #c03b83; } .series7 { --colour: #6b7585; }
@media (prefers-color-scheme: dark) {
  .chart { --ink: #e6eaf1; --faint: #a3adbd; --grid: #333b48; --ground: #161b23; }
  .student, .series0 { --colour: #5aa2ff; } .teacher, .series1 { --colour: #f0796a; }
  .backbone, .series7 { --colour: #97a1b2; } .bilinear, .series3 { --colour: #d9b25f; }
  .baseline, .series4 { --colour: #ab8bea; } .series2 { --colour: #4fc08d; }
  .series5 { --colour: #4cc3d6; } .series6 { --colour: #ee7cb8; }
}
"""
NUM_SERIES = 8
LOG_FROM = 12.0
"""Ratio of the largest to the smallest value from which a bar chart is logarithmic."""
CHARACTER = 7.4
"""Width of a character in user units, about, in the widest of the usual fonts."""


@dataclass(frozen=True)
class Bar:
    """A horizontal bar.

    Attributes:
        label: what it is of.
        value: its length.
        text: the value as it is written beside it.
        style: class of its colour, in `STYLE`.
        spread: lowest and highest value, drawn as a whisker; None: none.
        group: a heading above the first bar of each group; empty: none.
    """

    label: str
    value: float
    text: str
    style: str
    spread: tuple[float, float] | None = None
    group: str = ""


@dataclass(frozen=True)
class Line:
    """A line through points (x, y), with a mark at each."""

    label: str
    style: str
    points: tuple[tuple[float, float], ...]


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars, from zero, or on a logarithmic scale where the values span more than a decade."""
    values = [bar.value for bar in bars]
    highest = max(*values, *(bar.spread[1] for bar in bars if bar.spread), 0.0)
    logarithmic = min(values) > 0 and max(values) / min(values) > LOG_FROM
    label_width = min(max(len(bar.label) for bar in bars) * CHARACTER + 10, 190)
    text_width = max(len(bar.text) for bar in bars) * CHARACTER + 12
    width, left, step = 372.0, label_width, 26.0
    right = width - text_width
    if logarithmic:
        low, high = 10 ** math.floor(math.log10(min(values)) - 0.3), highest
        place = _scale(low, high, left, right, logarithmic=True)
        ticks = _log_ticks(low, high)
    else:
        low, high = min(0.0, *values), highest
        high = high if high > low else 1.0
        place = _scale(low, high, left, right)
        ticks = _ticks(low, high, 4)
    head, top = _title(title + (", log scale" if logarithmic else ""), width)
    parts, y, group = [], top + 2, ""
    for bar in bars:
        if bar.group != group:
            group = bar.group
            y += 4
            parts.append(f'<text class="faint" x="0" y="{y + 13:.0f}">{escape(group)}</text>')
            y += 20
        start, end = sorted((place(low if logarithmic else 0.0), place(bar.value)))
        parts.append(f'<text x="{label_width - 8:.0f}" y="{y + 15:.0f}" text-anchor="end">{escape(bar.label)}</text>')
        parts.append(
            f'<rect class="bar {bar.style}" x="{start:.1f}" y="{y + 2:.0f}" width="{max(end - start, 1):.1f}" '
            f'height="17" rx="2"><title>{escape(bar.label)}: {escape(bar.text)}</title></rect>'
        )
        at = end
        if bar.spread:
            low_x, high_x = (place(max(value, low)) for value in bar.spread)
            at = max(end, high_x)
            parts.append(f'<path class="whisker" d="M{low_x:.1f} {y + 10.5}H{high_x:.1f}"/>')
        parts.append(f'<text x="{at + 6:.1f}" y="{y + 15:.0f}">{escape(bar.text)}</text>')
        y += step
    grid = "".join(
        f'<path class="grid" d="M{place(tick):.1f} {top:.0f}V{y:.0f}"/>'
        f'<text class="faint" x="{place(tick):.1f}" y="{y + 14:.0f}" text-anchor="middle">{_number(tick)}</text>'
        for tick in ticks
    )
    return _svg(title, width, y + 20, head + grid + "".join(parts))


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_title: str,
    y_title: str,
    log_x: bool = False,
    log_y: bool = False,
    joined: bool = True,
) -> str:
    """Lines over a common axis, with a legend above.

    Args:
        title: of the chart.
        lines: at least one, each with a point at least; on logarithmic axes all values are positive.
        x_title: what the horizontal axis means, with its unit.
        y_title: what the vertical axis means, with its unit.
        log_x: whether the horizontal axis is logarithmic.
        log_y: whether the vertical axis is logarithmic.
        joined: whether points are joined by lines; else they are marked only, and labelled where they are.
    """
    width, left, right = 372.0, 56.0, 364.0
    head, top = _title(title, width)
    legend, top = _legend(lines, width, top) if joined else ("", top + 4)
    bottom = top + 200
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    place_x, x_ticks = _axis(xs, left + 8, right - 8, log_x)
    place_y, y_ticks = _axis(ys, bottom - 8, top + 8, log_y)
    parts = [head, legend]
    for tick in y_ticks:
        y = place_y(tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text class="faint" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        x = place_x(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        parts.append(
            f'<text class="faint" x="{x:.1f}" y="{bottom + 15:.0f}" text-anchor="middle">{_number(tick)}</text>'
        )
    for line in lines:
        points = [(place_x(x), place_y(y)) for x, y in line.points]
        if joined and len(points) > 1:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            parts.append(f'<path class="line {line.style}" d="M{path}"/>')
        for (x, y), (value_x, value_y) in zip(points, line.points, strict=True):
            told = escape(f"{line.label}: {_number(value_x)}, {_number(value_y)}")
            place = f'cx="{x:.1f}" cy="{y:.1f}" r="4"'
            parts.append(f'<circle class="mark {line.style}" {place}><title>{told}</title></circle>')
        if not joined:
            x, y = points[0]
            beyond = x + len(line.label) * CHARACTER > right - 8
            anchor = ' text-anchor="end"' if beyond else ""
            parts.append(
                f'<text class="faint" x="{x + (-8 if beyond else 8):.1f}" y="{y + 4:.1f}"{anchor}>'
                f"{escape(line.label)}</text>"
            )
    scales = [name for name, is_log in (("x", log_x), ("y", log_y)) if is_log]
    note = f" (log scale: {' and '.join(scales)})" if scales else ""
    middle = (left + right) / 2
    parts.append(
        f'<text class="faint" x="{middle}" y="{bottom + 33:.0f}" text-anchor="middle">{escape(x_title + note)}</text>'
    )
    height = (top + bottom) / 2
    parts.append(
        f'<text class="faint" transform="translate(11 {height:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_title)}</text>"
    )
    return _svg(title, width, bottom + 42, "".join(parts))


def standalone(svg: str) -> str:
    """A chart as a file of its own, with its style sheet."""
    head, end, rest = svg.partition(">")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head}{end}<style>{STYLE}</style>{rest}\n'


def _svg(title: str, width: float, height: float, body: str) -> str:
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{body}</svg>'
    )


def _title(title: str, width: float) -> tuple[str, float]:
    """The title in as many lines as it needs, and where what follows begins."""
    lines = textwrap.wrap(title, int(width / (CHARACTER * 1.12)))
    spans = "".join(f'<tspan x="0" y="{15 + 17 * number}">{escape(line)}</tspan>' for number, line in enumerate(lines))
    return f'<text class="title">{spans}</text>', 11.0 + 17 * len(lines)


def _legend(lines: Sequence[Line], width: float, top: float) -> tuple[str, float]:
    """Marks and labels in as many rows as they need, and where what follows begins."""
    parts, x, y = [], 0.0, top + 10
    for line in lines:
        needed = len(line.label) * CHARACTER + 26
        if x and x + needed > width:
            x, y = 0.0, y + 18
        parts.append(f'<circle class="mark {line.style}" cx="{x + 6:.0f}" cy="{y - 4:.0f}" r="5"/>')
        parts.append(f'<text x="{x + 15:.0f}" y="{y:.0f}">{escape(line.label)}</text>')
        x += needed
    return "".join(parts), y + 12


def _axis(
    values: Sequence[float], start: float, end: float, logarithmic: bool
) -> tuple[Callable[[float], float], list[float]]:
    """Where values lie between two places, and ticks among them."""
    low, high = min(values), max(values)
    if logarithmic:
        low, high = (low, high) if high > low else (low / 2, high * 2)
        return _scale(low, high, start, end, logarithmic=True), _log_ticks(low, high)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
    return _scale(low, high, start, end), _ticks(low, high, 5)


def _scale(low: float, high: float, start: float, end: float, logarithmic: bool = False) -> Callable[[float], float]:
    if logarithmic:
        low, high = math.log(low), math.log(high)

    def place(value: float) -> float:
        share = ((math.log(value) if logarithmic else value) - low) / (high - low)
        return start + share * (end - start)

    return place


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two values, at most about so many."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive values; where there are few, their doubles and fives too."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
        ticks = [
            factor * 10.0**decade
            for decade in decades
            for factor in factors
            if low * (1 - 1e-9) <= factor * 10.0**decade <= high * (1 + 1e-9)
        ]
        if len(ticks) >= 3:
            return ticks
    return ticks


def _number(value: float) -> str:
    """A tick: 0.25, 30, 2,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
