"""What all four commands do where the disk, the rights or another process are against them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from probe_sets import make_set, recipe_file
from typer.testing import CliRunner

from brixel_cli.app import app
from brixel_cli.core.files import locked
from brixel_cli.engines.benchmarking import benchmarking
from brixel_cli.engines.benchmarking import cost as benchmark_cost
from brixel_cli.engines.benchmarking.cost import PeakMemory

COMMANDS = ("extract", "distill", "probe", "benchmark")
Command = Callable[[str], list[str]]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "out"


@pytest.fixture
def command(
    model: tuple[str, str],
    photographs: Path,
    tiny_recipe_file: Path,
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Command:
    """The arguments of a command that ends well in a second or two."""
    monkeypatch.setattr(benchmarking, "peak_in_fresh_process", lambda *_: PeakMemory(1000, 10))
    monkeypatch.setattr(benchmark_cost, "LARGEST_SIDE", 128)

    def arguments(name: str) -> list[str]:
        if name == "extract":
            return [name, "--input", str(photographs), "--checkpoint", model[0], "--res", "64", "--device", "cpu",
                    "--output", f"{output}.h5"]  # fmt: skip
        if name == "distill":
            return [name, "--recipe", str(tiny_recipe_file), "--output", str(output)]
        if name == "probe":
            return [name, "--recipe", str(recipe_file(make_set(tmp_path / "labelled"))), "--checkpoint", model[0],
                    "--source", "backbone", "--seeds", "1", "--set", "protocol.steps=3", "--set", "protocol.points=64",
                    "--device", "cpu", "--output", str(output)]  # fmt: skip
        return [name, "--checkpoint", model[0], "--images", str(photographs), "--max-images", "1", "--res", "32",
                "--seconds", "0.1", "--device", "cpu", "--output", str(output)]  # fmt: skip

    return arguments


def run(arguments: list[str]) -> tuple[int, str]:
    """Exit code and messages; anything but a message and an exit code fails the test."""
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_one_process_at_a_time_writes_an_output(name: str, command: Command, output: Path) -> None:
    where = output.with_suffix(".h5") if name == "extract" else output
    with locked(where):
        code, errors = run(command(name))
        assert code == 1
        assert f"error: {where} is being written by another process (process " in errors
        assert [path.name for path in output.parent.iterdir()] == [f"{where.name}.lock"]
    assert run(command(name))[0] == 0
    assert not list(output.parent.rglob("*.lock"))
