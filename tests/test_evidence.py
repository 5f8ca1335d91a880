"""The table of evidence: records of results, and that rows of different protocols are never put into one column."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from evidence import Record, RecordRow, keep, main, merged, of_probe, page, read_record
from probe_sets import options_of, probed, segmentation
from test_benchmark_results import FIDELITY as MEASURED
from test_benchmark_results import results as benchmark_results  # noqa: F401 (a fixture)
from test_benchmark_results import row
from test_documentation import parsed

from brixel_cli.core.formatting import to_json
from brixel_cli.engines.benchmarking.results import Results
from brixel_cli.engines.probing.folder import ProbeFolder
from brixel_cli.engines.probing.network_results import Effort
from brixel_cli.engines.probing.results import PassCost
from brixel_cli.errors import BrixelError

FIDELITY = Record(
    "80 photographs", "112", "cosine", "fidelity towards 448 px", "aa" * 32, "80 images", "CPU, float32", "brixel benchmark A",
    (
        RecordRow("backbone", "112x112", 2.9, 0.05, 0.8, None, None, None),
        RecordRow("jafar", "448x448", 99.5, 2.0, 0.75, None, -0.25, 0.02),
        RecordRow("student", "112x112", 3.3, 0.06, 0.9, None, 0.5, 0.02),
        RecordRow("teacher", "448x448", 63.4, 1.0, 1.0, None, None, None),
    ),
)  # fmt: skip


def written(folder: Path, *overrides: str, **figures: list[float]) -> Path:
    """The output folder of a probe of CamVid."""
    results = probed(
        options_of("camvid", *overrides), {label: segmentation(*values) for label, values in figures.items()}
    )
    costs = {label: PassCost((112, 154), 4.0, 0.05, 0.04, 0.06) for label in figures}
    folder.mkdir()
    ProbeFolder(folder).write(replace(results, costs=costs))
    return folder


def test_a_record_of_a_probe_has_its_main_figure_gap_and_cost(tmp_path: Path) -> None:
    folder = written(tmp_path / "out", backbone=[0.3, 0.32], student=[0.38, 0.4], teacher=[0.5, 0.52])
    record = keep(folder, "brixel probe B")
    assert (record.column, record.metric, record.command) == ("camvid", "miou", "brixel probe B")
    student = next(row for row in record.rows if row.label == "student")
    assert (student.sees, student.gflop, student.seconds) == ("112x154", 4.0, 0.05)
    assert student.value == pytest.approx(0.39)
    assert student.gap == pytest.approx((0.39 - 0.31) / (0.51 - 0.31))  # 0.4
    again = keep(written(tmp_path / "again", student=[0.1, 0.2]), "")
    assert again.digest == record.digest  # other rows, same protocol
    changed = keep(written(tmp_path / "changed", "protocol.steps=7", student=[0.1, 0.2]), "")
    assert changed.digest != record.digest


def test_a_record_of_a_task_without_heads_says_over_how_many_objects_it_is() -> None:
    results = probed(options_of("davis2016"), {"student": [{"jf_mean": 0.741}]})
    data = {"evaluate": results.settings.data["evaluate"]}
    results = replace(results, settings=replace(results.settings, data=data), runs=[replace(results.runs[0], items=7)])
    record = of_probe(results, "")
    assert (record.metric, record.rows[0].value, record.detail) == ("jf_mean", 0.741, "233 images, 7 pairs or objects")


def test_a_network_that_was_trained_end_to_end_has_gflop_but_no_time_beside_the_others() -> None:
    results = probed(options_of("camvid"), {"finetuned": segmentation(0.4)})
    effort = Effort(367, 22_000_000, 100, 80, 2.9, 0.1)
    (row,) = of_probe(replace(results, runs=[replace(results.runs[0], effort=effort)]), "").rows
    assert (row.gflop, row.seconds) == (2.9, None)


def test_a_record_of_a_benchmark_has_the_cosine_of_each_row_and_the_gap(
    benchmark_results: Results,  # noqa: F811
    tmp_path: Path,
) -> None:
    student = replace(MEASURED, cosine=0.8, recovered_gap={"cosine": 0.4}, gap_spread={"cosine": 0.1})
    rows = (
        row("backbone", 32, 0.25, 1.0, 50), row("bilinear", 32, 0.25, 1.0, 50, MEASURED),
        row("student", 32, 0.5, 2.0, 100, student), row("teacher", 32, 4.0, 32.0, 900),
    )  # fmt: skip
    (tmp_path / "results.json").write_text(replace(benchmark_results, rows=rows).to_json())
    record = keep(tmp_path, "brixel benchmark A")
    assert (record.column, record.size, record.metric) == ("2 photographs", "32", "cosine")
    assert record.rows == (
        RecordRow("backbone", "32x32", 1.0, 0.25, 0.65, None, None, None),
        RecordRow("student", "32x32", 2.0, 0.5, 0.8, None, 0.4, 0.1),
        RecordRow("teacher", "32x32", 32.0, 4.0, 1.0, None, None, None),
    )


def test_rows_of_two_records_of_one_protocol_stand_together(tmp_path: Path) -> None:
    first = keep(written(tmp_path / "a", backbone=[0.3, 0.3], teacher=[0.5, 0.5]), "a")
    second = keep(written(tmp_path / "b", student=[0.4, 0.4]), "b")
    (record,) = merged({Path("a.json"): first, Path("b.json"): second}).values()
    assert [row.label for row in record.rows] == ["backbone", "teacher", "student"]
    assert record.detail == first.detail  # two seeds each
    fewer = keep(written(tmp_path / "c", student=[0.3]), "c")
    (record,) = merged({Path("a.json"): first, Path("c.json"): fewer}).values()
    assert record.detail == "1367 and 233 images, 2 seeds (a), 1367 and 233 images, 1 seed (c)"


def test_records_of_different_protocols_are_refused(tmp_path: Path) -> None:
    first = keep(written(tmp_path / "a", backbone=[0.3, 0.3]), "a")
    second = keep(written(tmp_path / "b", "protocol.steps=7", student=[0.4, 0.4]), "b")
    with pytest.raises(
        BrixelError, match=r"a.json and b.json are both of camvid at \d+ px, but their protocols differ"
    ):
        merged({Path("a.json"): first, Path("b.json"): second})
    with pytest.raises(BrixelError, match="a.json and c.json have different figures of backbone: remove one"):
        merged({Path("a.json"): first, Path("c.json"): keep(written(tmp_path / "c", backbone=[0.2, 0.2]), "c")})


def test_the_page_has_a_row_for_each_source_with_times_over_the_backbone() -> None:
    camvid = Record(
        "camvid", "112", "miou", "quick", "bb" * 32, "367 and 233 images, 2 seeds", "cpu, float32", "brixel probe B",
        (RecordRow("student", "112x154", 4.0, 0.1, 0.374, 0.001, 0.37, 0.03),),
    )  # fmt: skip
    text = page({Path("fidelity_112.json"): FIDELITY, Path("camvid_112.json"): camvid})
    lines = text.splitlines()
    assert "| who | sees | GFLOP | time | 80 photographs, cosine | gap | camvid, mIoU (%) | gap |" in lines
    assert "| jafar | 448x448 | 99.5 | 40.0x | 0.750 | -25 +- 2 % | - | - |" in lines  # 2.0 s over 0.05 s
    assert "| student | 112x112 | 3.3 | 1.2x | 0.900 | 50 +- 2 % | 37.40 +- 0.10 | 37 +- 3 % |" in lines
    assert text.endswith("```\nbrixel benchmark A\nbrixel probe B\n```\n")


def test_the_command_keeps_a_record_and_writes_the_page(tmp_path: Path) -> None:
    folder, records = written(tmp_path / "out", backbone=[0.3], teacher=[0.5]), tmp_path / "records"
    records.mkdir()
    main(["keep", str(folder), str(records / "camvid.json"), "--command", "brixel", "probe", "--set", "data=*"])
    assert read_record(records / "camvid.json") == keep(folder, "brixel probe --set 'data=*'")
    main(["table", str(records), str(tmp_path / "page.md")])
    assert "| backbone | 112x154 | 4.0 | 1.0x | 30.00 | - |" in (tmp_path / "page.md").read_text()


def test_the_figure_has_a_point_for_each_row_whose_cosine_was_measured(tmp_path: Path) -> None:
    records = tmp_path / "records"
    records.mkdir()
    (records / "fidelity.json").write_text(to_json(asdict(FIDELITY)))
    main(["table", str(records), str(tmp_path / "page.md")])
    assert "](results/evidence.svg)" in (tmp_path / "page.md").read_text()
    svg = (tmp_path / "results" / "evidence.svg").read_text()
    assert all(
        f">{label}<" in svg for label in ("backbone", "jafar", "student", "teacher", "GFLOP, whole pass (log scale: x)")
    )


def test_a_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"column": 1}))
    with pytest.raises(BrixelError, match=r"x.json is no record. Make it again with docs/results/make.sh."):
        read_record(tmp_path / "x.json")


DOCS = Path(__file__).parent.parent / "docs"


def shipped_commands() -> dict[str, str]:
    """The commands of docs/results/make.sh, by the name of their record."""
    text = (DOCS / "results" / "make.sh").read_text(encoding="utf-8").replace("$jafar", "docs/peers/jafar.py")
    return dict(re.findall(r"^ +record (\w+) (brixel .*)$", text, flags=re.M))


def test_the_commands_of_the_script_parse() -> None:
    assert len(shipped_commands()) > 3
    for command in shipped_commands().values():
        given = parsed(shlex.split(command)[1:])
        assert given["baseline"] or given["source"]


def test_the_shipped_page_is_what_the_shipped_records_make() -> None:
    records = {path: read_record(path) for path in sorted((DOCS / "results" / "records").glob("*.json"))}
    assert {path.stem: record.command for path, record in records.items()}.items() <= shipped_commands().items()
    shipped = DOCS / "EVIDENCE.md"
    assert (shipped.read_text(encoding="utf-8") if shipped.exists() else None) == (page(records) if records else None)
