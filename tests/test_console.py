"""What a person sees: tables in narrow terminals and in pipes."""

from __future__ import annotations

import pytest

from brixel_cli.cli.console import print_table

NAMES = ["backbone, bilinear", "student", "teacher"]
COLUMNS = ["row", "input", "grid", "frozen", "adapter", "GFLOP", "memory", "less FLOP", "less mem."]
ROWS = [[name, "448x448", "128x128", "22.1M", "1.9M", f"1,234.{number}", "120.5 MiB", "11.0x", "16.5x"]
        for number, name in enumerate(NAMES)]  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_wide_table_keeps_names_and_figures(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    print_table("A title", COLUMNS, ROWS, ["A note."])
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= width
    assert "…" not in out
    parts = out.count("┏")
    assert parts == {60: 3, 80: 2, 200: 1}[width]
    for row in ROWS:
        assert sum(line.startswith(f"│ {row[0]} ") for line in out.splitlines()) == parts  # the name is in each part
        assert row[5] in out
    for column in COLUMNS[1:]:
        assert out.count(f" {column} ") == 1
    assert out.count("A title") == out.count("A note.") == 1


def test_a_long_name_is_folded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    print_table("", ["row", "figure"], [["a name of very many words, more than any terminal can take at once", "1"]])
    out = capsys.readouterr().out
    text = " ".join(line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│"))
    assert text == "a name of very many words, more than any terminal can take at once"
