"""Charts: that lengths, places and ticks are those of the values, and that pages can replace the colours."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from brixel_cli.drawing.charts import SERIES, Bar, Line, bar_chart, line_chart, themed
from brixel_cli.drawing.page import STYLE

BLUE = SERIES["blue"]


def bars(*values: float) -> list[Bar]:
    return [Bar(f"bar {value}", value, f"{value:g} ms", "blue") for value in values]


def extents(svg: str) -> list[tuple[float, float]]:
    """Left and right end of every bar."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: {BLUE}"', svg)
    ends = [[float(x) for x in re.findall(r"[ML] ([\d.]+)", path)] for path in paths]
    return [(min(xs), max(xs)) for xs in ends]


def widths(svg: str) -> list[float]:
    return [right - left for left, right in extents(svg)]


def marks(svg: str) -> list[tuple[float, float]]:
    """The marks of a line, without that of the legend."""
    found = re.findall(rf'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: {BLUE}', svg)
    return [(float(x), float(y)) for x, y in found]


def texts(svg: str) -> list[str]:
    return [text for text in ET.fromstring(svg).itertext() if text.strip()]


def test_bars_start_at_zero_and_are_as_long_as_their_values() -> None:
    svg = bar_chart("time", bars(1, 2, 4))
    one, two, four = widths(svg)
    assert two == pytest.approx(2 * one, abs=0.2)
    assert four == pytest.approx(4 * one, abs=0.2)
    assert "log scale" not in svg
    assert {"bar 1", "2 ms", "4 ms"} <= set(texts(svg))


def test_bars_over_more_than_a_decade_are_logarithmic_and_say_so() -> None:
    svg = bar_chart("time", bars(1, 10, 100))
    one, ten, hundred = widths(svg)
    assert hundred - ten == pytest.approx(ten - one, abs=0.2)  # equal ratios, equal distances
    assert "time, log scale" in svg
    assert {"1", "10", "100"} <= set(texts(svg))  # ticks are plain numbers


def test_bars_below_zero_grow_to_the_left() -> None:
    (left, end), (begin, right) = extents(bar_chart("gap", bars(-1, 3)))
    assert left < end == pytest.approx(begin, abs=0.2)  # both meet at zero
    assert right - begin == pytest.approx(3 * (end - left), abs=0.3)


def test_a_whisker_stays_within_the_chart() -> None:
    svg = bar_chart("time", [Bar("a", 10, "10 ms", "blue", spread=(9, 30))])
    end = max(float(x) for x in re.findall(r"L ([\d.]+)[^\"]*\" [^>]*stroke: #1c2330; stroke-width: 1.2", svg))
    text = float(re.findall(r' x="([\d.]+)"[^>]*>10 ms<', svg)[0])
    assert end < text < float(ET.fromstring(svg).attrib["viewBox"].split()[2])


def test_points_lie_where_their_values_say() -> None:
    svg = line_chart("t", [Line("a", "blue", ((0, 0), (1, 2), (2, 4)))], "x", "y")
    (x0, y0), (x1, y1), (x2, y2) = marks(svg)[:3]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y1  # upwards is smaller in SVG
    points = marks(line_chart("t", [Line("a", "blue", ((1, 1), (10, 10), (100, 100)))], "x", "y", True, True))
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)


def test_a_single_point_and_equal_values_have_a_scale() -> None:
    assert marks(line_chart("t", [Line("a", "blue", ((5, 5),))], "x", "y", True, True, joined=False)) != []
    assert marks(line_chart("t", [Line("a", "blue", ((0, 0), (0, 0)))], "x", "y")) != []


def test_charts_are_the_same_every_time_and_share_no_ids() -> None:
    first, second = (bar_chart(title, bars(1, 2)) for title in ("one", "two"))
    assert bar_chart("one", bars(1, 2)) == first
    ids = [set(re.findall(r'id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_every_colour_is_there_in_light_and_dark_and_texts_are_literal() -> None:
    light, _, dark = STYLE.read_text().partition("@media (prefers-color-scheme: dark)")
    names = ["ink", "faint", "rule", "card", *SERIES]
    assert all(f"--{name}: #" in part for name in names for part in (light, dark))
    assert all(f"--{name}: {colour};" in light for name, colour in SERIES.items())
    svg = line_chart("<b>& $a$", [Line("<i>", "blue", ((1, 1),))], "<x>", "<y>_1")
    assert {"<b>& $a$", "<i>", "<x>", "<y>_1"} <= set(texts(svg))
    assert "var(--blue)" in themed(svg)
    assert not re.search(r"#[0-9a-f]{6}", themed(svg))
