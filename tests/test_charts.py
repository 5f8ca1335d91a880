"""Charts: that lengths, places and ticks are those of the values, by hand."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from brixel_cli.drawing.charts import (
    STYLE,
    Bar,
    Line,
    _log_ticks,
    _ticks,
    bar_chart,
    line_chart,
    standalone,
)


def bars(*values: float) -> list[Bar]:
    return [Bar(f"bar {value}", value, f"{value:g}", "student") for value in values]


def widths(svg: str) -> list[float]:
    return [float(width) for width in re.findall(r'<rect class="bar \w+" [^>]*width="([0-9.]+)"', svg)]


def marks(svg: str) -> list[tuple[float, float]]:
    return [
        (float(x), float(y)) for x, y in re.findall(r'<circle class="mark \w+" cx="([\d.]+)" cy="([\d.]+)" r="4"', svg)
    ]


def test_bars_start_at_zero_and_are_as_long_as_their_values() -> None:
    svg = bar_chart("time", bars(1, 2, 4))
    one, two, four = widths(svg)
    assert two == pytest.approx(2 * one, abs=0.2)
    assert four == pytest.approx(4 * one, abs=0.2)
    assert "log scale" not in svg


def test_bars_over_more_than_a_decade_are_logarithmic_and_say_so() -> None:
    svg = bar_chart("time", bars(1, 10, 100))
    one, ten, hundred = widths(svg)
    assert hundred - ten == pytest.approx(ten - one, abs=0.2)  # equal ratios, equal distances
    assert "time, log scale" in svg


def test_bars_below_zero_grow_to_the_left() -> None:
    svg = bar_chart("share", bars(-1, 3))
    left = [float(x) for x in re.findall(r'<rect class="bar \w+" x="([0-9.]+)"', svg)]
    assert left[0] < left[1]
    assert left[0] + widths(svg)[0] == pytest.approx(left[1], abs=0.2)  # both meet at zero
    assert widths(svg)[1] == pytest.approx(3 * widths(svg)[0], abs=0.3)


def test_a_whisker_stays_within_the_chart() -> None:
    svg = bar_chart("time", [Bar("a", 10, "10 ms", "student", spread=(9, 30))])
    end = float(re.findall(r'class="whisker" d="M[0-9.]+ [0-9.]+H([0-9.]+)"', svg)[0])
    text = float(re.findall(r'<text x="([0-9.]+)" y="\d+">10 ms<', svg)[0])
    assert end < text < float(ET.fromstring(svg).attrib["viewBox"].split()[2])


def test_points_lie_where_their_values_say() -> None:
    (x0, y0), (x1, y1), (x2, y2) = marks(line_chart("t", [Line("a", "student", ((0, 0), (1, 2), (2, 4)))], "x", "y"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y1  # upwards is smaller in SVG
    points = marks(line_chart("t", [Line("a", "student", ((1, 1), (10, 10), (100, 100)))], "x", "y", True, True))
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)


def test_a_single_point_and_equal_values_have_a_scale() -> None:
    assert marks(line_chart("t", [Line("a", "student", ((5, 5),))], "x", "y", True, True, joined=False)) != []
    assert marks(line_chart("t", [Line("a", "student", ((0, 0), (0, 0)))], "x", "y")) != []


def test_ticks_are_round() -> None:
    assert _ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert _ticks(0.81, 0.88, 5) == pytest.approx([0.82, 0.84, 0.86, 0.88])
    assert _log_ticks(1, 1000) == [1, 10, 100, 1000]
    assert _log_ticks(2, 60) == [3, 10, 30]  # one power of ten only: threes too
    assert _log_ticks(6, 9) == [6, 7, 8, 9]


def test_every_colour_is_there_in_light_and_dark_and_text_is_escaped() -> None:
    light, _, dark = STYLE.partition("@media (prefers-color-scheme: dark)")
    names = ["backbone", "bilinear", "student", "teacher", "baseline", *(f"series{number}" for number in range(8))]
    assert all(re.search(rf"\.{name}\b", part) for name in names for part in (light, dark))
    svg = line_chart("<b>&", [Line("<i>", "student", ((1, 1),))], "<x>", "<y>")
    texts = "".join(ET.fromstring(standalone(svg).partition("\n")[2]).itertext())
    assert all(part in texts for part in ("<b>&", "<i>", "<x>", "<y>"))
