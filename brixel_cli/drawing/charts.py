"""Bar and line charts as SVG, drawn with matplotlib: text stays text, and a page can replace the colours."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, RULE, CARD = "#1c2330", "#5d6778", "#dfe3ea", "#ffffff"
SERIES = {
    "blue": "#1769d2", "red": "#c2412d", "green": "#1f8a5b", "amber": "#b07a12",
    "violet": "#7b4fc0", "teal": "#0f8fa3", "pink": "#c03b83", "grey": "#6b7585",
}  # fmt: skip
"""Colours of bars and lines by name; style.css has them for light and dark pages."""
LOG_FROM = 12.0
"""A bar chart is logarithmic from this ratio of its largest to its smallest value."""
WIDTH = 372 / 72
"""Of a chart, in inches: matplotlib draws 72 units to the inch."""
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "text.color": INK, "font.size": 12,
    "figure.facecolor": CARD, "axes.facecolor": CARD, "axes.labelcolor": FAINT, "axes.labelsize": 11,
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "axes.spines.bottom": False,
    "axes.axisbelow": True, "axes.grid": True, "grid.color": RULE,
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelsize": 11, "ytick.labelsize": 11,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """A horizontal bar.

    Attributes:
        label: of the bar.
        value: its length.
        text: the value as it is written beside it.
        colour: a name in `SERIES`.
        spread: lowest and highest value, drawn as a whisker; None: none.
        group: a heading above the first bar of each group; empty: none.
    """

    label: str
    value: float
    text: str
    colour: str
    spread: tuple[float, float] | None = None
    group: str = ""


@dataclass(frozen=True)
class Line:
    """A line through points (x, y), with a mark at each; `colour` is a name in `SERIES`."""

    label: str
    colour: str
    points: tuple[tuple[float, float], ...]


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars from zero; where the values span more than a decade, on a logarithmic scale."""
    values = [bar.value for bar in bars]
    logarithmic = min(values) > 0 and max(values) / min(values) > LOG_FROM
    groups = len({bar.group for bar in bars} - {""})

    def draw(axes: Axes) -> None:
        place, group, places = 0.0, "", []
        for bar in bars:
            if bar.group != group:
                group = bar.group
                axes.annotate(group, (0, place), (-6, 0), ("axes fraction", "data"), "offset points", color=FAINT,
                              ha="right", va="center")  # fmt: skip
                place += 0.9
            places.append(place)
            axes.barh(place, bar.value, height=0.66, color=SERIES[bar.colour])
            end = max(bar.value, 0.0)
            if bar.spread:
                axes.plot(bar.spread, (place, place), color=INK, linewidth=1.2)
                end = max(bar.spread[1], end)
            axes.annotate(bar.text, (end, place), (5, 0), textcoords="offset points", va="center")
            place += 1
        axes.set_yticks(places, [bar.label for bar in bars])
        axes.tick_params(axis="y", labelcolor=INK, labelsize=12)
        axes.set_ylim(place - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        if logarithmic:
            axes.set_xscale("log")
            axes.set_xlim(left=min(values) / 2)

    return _draw(title + (", log scale" if logarithmic else ""), 0.36 * (len(bars) + 0.9 * groups) + 0.35, draw)


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_title: str,
    y_title: str,
    log_x: bool = False,
    log_y: bool = False,
    joined: bool = True,
    beside: tuple[str, Sequence[Line]] | None = None,
) -> str:
    """Lines over a common axis, with a legend above.

    Args:
        title: of the chart.
        lines: at least one, each with a point at least; on logarithmic axes all values are positive.
        x_title: of the horizontal axis, with its unit.
        y_title: of the vertical axis, with its unit.
        log_x: whether the horizontal axis is logarithmic.
        log_y: whether the vertical axis is logarithmic.
        joined: whether points are joined by lines; else they are only marked, and labelled in place.
        beside: the horizontal axis and the lines of a second panel with the same vertical axis, or None.
    """
    scales = [name for name, is_log in (("x", log_x), ("y", log_y)) if is_log]
    columns = max(42 // (max(len(line.label) for line in lines) + 4), 1)

    def draw(lines: Sequence[Line], x_title: str, axes: Axes) -> None:
        for line in lines:
            xs, ys = zip(*line.points, strict=True)
            style: dict[str, Any] = {"marker": "o", "markersize": 6, "markeredgecolor": CARD}
            axes.plot(xs, ys, "-" if joined else "", color=SERIES[line.colour], label=line.label, **style)
            if not joined:
                axes.annotate(line.label, line.points[0], (7, 0), textcoords="offset points", va="center", color=FAINT)
        axes.set_xlabel(x_title + (f" (log scale: {' and '.join(scales)})" if scales else ""))
        axes.set_ylabel(y_title)
        axes.set_xscale("log" if log_x else "linear")
        axes.set_yscale("log" if log_y else "linear")
        if joined:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, borderaxespad=0.2)

    panels = [partial(draw, lines, x_title)] + ([partial(draw, beside[1], beside[0])] if beside else [])
    return _draw(title, 2.9 + 0.25 * math.ceil(len(lines) / columns), *panels)


def themed(svg: str) -> str:
    """A chart for a page with style.css: its colours become those of the page, which differ in light and dark."""
    for name, colour in {"ink": INK, "faint": FAINT, "rule": RULE, "card": CARD, **SERIES}.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _draw(title: str, height: float, *panels: Callable[[Axes], None]) -> str:
    """An SVG of panels of `height` inches below a title: the same for the same input, without ids that clash."""
    import matplotlib  # slow to import: only where a chart is drawn
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    lines, buffer = textwrap.wrap(title, 46), io.StringIO()
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": title}):
        figure = Figure(figsize=(WIDTH * len(panels), height + 0.25 * len(lines)), layout="constrained")
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=13, fontweight="bold")
        for number, draw in enumerate(panels, start=1):
            draw(figure.add_subplot(1, len(panels), number))
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            if axis.get_scale() == "log":
                low, high = axis.get_view_interval()
                axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high / low > 4 else range(1, 10)))
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", buffer.getvalue())
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|\n(?= *[Lz])", "", svg, flags=re.S)
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"| transform="rotate\(-0 [^"]*"', "", svg)
    return svg[svg.index("<svg") :]
