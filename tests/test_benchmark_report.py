"""The report: that every section and figure is in it, that it needs no network, and that it escapes what it is given."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from brixel_cli.cli.report import write_report
from brixel_cli.engines.ablating.results import Ablations, Point, VariantResult
from brixel_cli.engines.benchmarking.environment import Environment
from brixel_cli.engines.benchmarking.results import (
    BudgetRow,
    Fidelity,
    ImageFidelity,
    Model,
    Picture,
    Results,
    Row,
    Settings,
)
from brixel_cli.engines.latency import Latency
from brixel_cli.errors import UsageError

NASTY = '<img src="http://example.org/x.png"> & | `*'
ENVIRONMENT = Environment("cpu", "A CPU & Co", 2, 8 * 2**30, "float32", "Linux x86_64", {"brixel": "0.1.0"})
METRICS = ("l1", "cosine", "edge", "spectral")


def fidelity(cosine: float, num_images: int = 4) -> Fidelity:
    spread = [cosine + 0.02 * (number - (num_images - 1) / 2) for number in range(num_images)]
    images = tuple(ImageFidelity(f"{n}.png", 1 - c, c, c - 0.1, 1.1 - c, 0.1) for n, c in enumerate(spread))
    shares = {"l1": 0.2, "cosine": (cosine - 0.8) / 0.2, "edge": 0.3, "spectral": None}
    return Fidelity(1 - cosine, cosine, cosine - 0.1, spread[0], 1.1 - cosine, 0.1, shares, images)


def rows_of(model: str, side: int, compared: bool = True) -> list[Row]:
    size, grid = (side, side), (side // 14, side // 14)
    fine, large = (4 * grid[0], 4 * grid[1]), (4 * side, 4 * side)
    scale = (side / 112) ** 2

    def row(kind, input_size, grid, seconds, gflop, mib, found):
        latency = Latency(seconds * scale, seconds * scale * 0.9, seconds * scale * 1.2, 30)
        return Row(
            model, kind, kind, size, input_size, grid, 22_000_000, 1_600_000 if kind == "student" else 0, gflop * scale,
            (), 88_000_000, int(mib * scale * 2**20), memory="measured", latency=latency,
            fidelity=found if compared else None,
        )  # fmt: skip

    return [
        row("backbone", size, grid, 0.021, 2.9, 9, None),
        row("bilinear", size, fine, 0.022, 2.9, 10, fidelity(0.80)),
        row("student", size, fine, 0.029, 4.4, 22, fidelity(0.88 - abs(side - 112) / 1000)),
        row("teacher", large, fine, 0.42, 63.4, 180, None),
    ]


def make_results(
    folder: Path, name: str = "vits", sides: tuple[int, ...] = (84, 112, 168), compared: bool = True
) -> Results:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (900, 250), "teal").save(folder / "pictures" / "a.png")
    model = Model(
        name, "vit_small_patch14_dinov2.lvd142m", "w.pth" if compared else "random", None, "", "fusion", "float32",
        384, 14, 4, (112, 112), f"photos of {name}" if compared else None, 4,
    )  # fmt: skip
    return Results(
        command=f"brixel benchmark --models {name}",
        created="2026-01-01T00:00:00+00:00",
        environment=ENVIRONMENT,
        settings=Settings(True, 1, False, 20.0, 64, (), None),
        models=(model,),
        rows=tuple(row for side in sides for row in rows_of(name, side, compared)),
        budget=(BudgetRow(name, "student", (112, 112), 10**8, "measured", True, False),),
        pictures=(Picture(name, (112, 112), f"{name}.png", 1, "pictures/a.png"),) if compared else (),
        notes=("A note.",),
    )


def variant(group: str, name: str, cosine: float, **more: object) -> VariantResult:
    curve = tuple(Point(10 * n, dict.fromkeys(METRICS, cosine - 0.01 * (4 - n))) for n in range(1, 5))
    shares = {"l1": 0.1, "cosine": (cosine - 0.8) / 0.2, "edge": -0.05, "spectral": None}
    latency = Latency(cosine / 30, 0.02, 0.04, 20)
    made = VariantResult(
        group, name, {"seed": 1}, f"ablations/{name}", 1_600_000, 4.4, latency, 40, 0.6, 10**8, curve,
        dict.fromkeys(METRICS, 0.8), shares, 3,
    )  # fmt: skip
    return dataclasses.replace(made, **more)


def make_ablations(name: str = "l1") -> Ablations:
    failed = variant(
        "losses", "released", 0.8, curve=(), bilinear={}, recovered_gap={}, failed="3 updates were refused"
    )
    return Ablations(
        ("brixel benchmark --ablate losses,adapter",), "today", "demo", "abcdef", "vit_small", (112, 112), (448, 448), 16, "steps", 40,
        ENVIRONMENT, "13 training and 3 held-out (abc)",
        (variant("losses", name, 0.84), variant("losses", "all", 0.86), failed, variant("adapter", "deformable", 0.85)),
    )  # fmt: skip


@pytest.fixture
def report(tmp_path: Path) -> Path:
    results = make_results(tmp_path / "results")
    write_report(results, make_ablations(), tmp_path / "results", tmp_path / "report")
    return tmp_path / "report"


class Page(HTMLParser):
    """Headings, and every place that could fetch something."""

    def __init__(self, text: str):
        super().__init__()
        self.headings: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.references += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


SECTIONS = [
    "Cost", "Cost against output resolution", "Fidelity", "Feature maps", "Ablation: losses", "Ablation: adapter",
    "Environment", "How it was measured", "Commands",
]  # fmt: skip
CHARTS = [
    "cost_time", "cost_gflop", "cost_memory", "curve_time_0", "curve_gflop_0", "curve_memory_0", "gap_0",
    "fidelity_l1_0", "fidelity_cosine_0", "fidelity_edge_0", "fidelity_spectral_0", "photographs_0",
    "ablation_gap_losses", "ablation_steps_losses", "ablation_time_losses", "ablation_gap_adapter",
    "ablation_steps_adapter",
]  # fmt: skip


def test_the_page_has_every_section_and_figure(report: Path) -> None:
    text = (report / "report.html").read_text()
    page = Page(text)
    assert page.headings == SECTIONS
    assert page.tags.count("svg") == len(CHARTS)
    assert page.tags.count("img") == 1
    told = " ".join(page.text)
    for figure in (
        "14.5x",
        "14.4x",
        "0.880",
        "40%",
        "29.0 ms",
        "A CPU & Co",
        "brixel benchmark --models vits",
        "A note.",
    ):
        assert figure in told  # 0.42 / 0.029 s, 63.4 / 4.4 GFLOP, (0.88 - 0.8) / 0.2 of the gap
    assert "At 112x112 px the student" in told  # the size of its training
    for name in ("l1", "released", "deformable", "3 updates were refused"):
        assert name in told


def test_nothing_is_fetched_from_elsewhere(report: Path) -> None:
    text = (report / "report.html").read_text()
    page = Page(text)
    assert all(reference.startswith(("#", "data:image/webp;base64,")) for reference in page.references)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    # The names of XML namespaces are all that looks like an address.
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_links_within_the_page_lead_somewhere(report: Path) -> None:
    text = (report / "report.html").read_text()
    links = re.findall(r'<a href="#([^"]+)"', text)
    assert len(links) == len(set(links)) == len(SECTIONS)
    assert all(f'id="{link}"' in text for link in links)


def test_markdown_names_files_that_exist(report: Path) -> None:
    text = (report / "report.md").read_text()
    named = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert sorted(named) == sorted([*(f"figures/{name}.svg" for name in CHARTS), "figures/maps_0.png"])
    assert all((report / name).is_file() for name in named)
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == SECTIONS
    assert "```\nbrixel benchmark --models vits\nbrixel benchmark --ablate losses,adapter\n```" in text
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.M)]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_charts_are_well_formed_and_stand_alone(report: Path) -> None:
    for path in (report / "figures").glob("*.svg"):
        root = ET.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in path.read_text()  # the colours are its own
        assert "nan" not in path.read_text()


def test_names_that_users_give_are_escaped(tmp_path: Path) -> None:
    results, ablations = make_results(tmp_path, NASTY), make_ablations(NASTY)
    write_report(results, ablations, tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    page = Page(text)
    assert page.headings == SECTIONS
    assert page.tags.count("img") == 1  # the picture, none of the names
    assert NASTY in " ".join(page.text)
    for path in (tmp_path / "report" / "figures").glob("*.svg"):
        ET.parse(path)
    lines = (tmp_path / "report" / "report.md").read_text().replace("\n```\n", "\n").splitlines()
    assert not [line for line in lines if "<img" in line.replace("\\<img", "") and not line.startswith("brixel")]
    tables = [line for line in lines if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {3, 5, 6, 7, 8, 10}


def test_the_best_figures_of_an_ablation_stand_out(report: Path) -> None:
    # L1 of l1 is 0.84, of all 0.86, of the bilinear map 0.8: the lowest is best; of cosines the highest.
    text = (report / "report.html").read_text()
    rows = re.findall(r"<tr><td>(bilinear|l1|all)</td>(.*?)</tr>", text[text.index('id="ablation-losses"') :])[:3]
    best = {name: re.findall(r'<td class="best">([^<]*)<', cells) for name, cells in rows}
    assert best == {"bilinear": ["0.8000"] * 3, "l1": [], "all": ["0.8600"]}
    row = next(line for line in (report / "report.md").read_text().splitlines() if line.startswith("| all | 0."))
    assert re.findall(r"\*\*([^*]+)\*\*", row) == ["0.8600"]


def test_cost_alone_ablations_alone_and_a_single_size(tmp_path: Path) -> None:
    results = make_results(tmp_path, sides=(112,), compared=False)
    write_report(results, None, tmp_path, tmp_path / "cost")
    page = Page((tmp_path / "cost" / "report.html").read_text())
    assert page.headings == ["Cost", "Environment", "How it was measured", "Commands"]
    assert "Weights are random: this is about cost only." in " ".join(page.text)
    write_report(None, make_ablations(), tmp_path, tmp_path / "ablations")
    page = Page((tmp_path / "ablations" / "report.html").read_text())
    assert page.headings == SECTIONS[4:]
    assert "all (losses) comes closest to the teacher" in " ".join(page.text)


def test_rows_that_were_not_run_leave_no_bar(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    rows = tuple(
        dataclasses.replace(row, latency=None, peak_bytes=None, note="not run") if row.kind == "teacher" else row
        for row in results.rows
    )
    write_report(dataclasses.replace(results, rows=rows), None, tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "figures" / "cost_time.svg").read_text()
    assert "student" in text
    assert ">teacher<" not in text
    assert "teacher" in (tmp_path / "report" / "figures" / "cost_gflop.svg").read_text()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--report .*file/report cannot be made: .*Name another folder"):
        write_report(None, make_ablations(), tmp_path, tmp_path / "file" / "report")
