"""What all four commands do where the disk, the rights or another process are against them."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from conftest import TINY
from probe_sets import make_set, recipe_file
from typer.testing import CliRunner

from brixel_cli.app import app
from brixel_cli.core.files import locked
from brixel_cli.drawing.curves import draw_curves
from brixel_cli.engines.benchmarking import benchmarking
from brixel_cli.engines.benchmarking import cost as benchmark_cost
from brixel_cli.engines.benchmarking.cost import PeakMemory
from brixel_cli.errors import BrixelError

COMMANDS = ("extract", "distill", "probe", "benchmark")
Command = Callable[[str], list[str]]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "out"


@pytest.fixture
def inputs(photographs: Path, tmp_path: Path) -> Path:
    """Photographs, and a labelled set."""
    make_set(tmp_path / "inputs" / "labelled")
    shutil.copytree(photographs, tmp_path / "inputs" / "photographs")
    return tmp_path / "inputs"


@pytest.fixture
def command(
    model: tuple[str, str], inputs: Path, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """The arguments of a command that ends well in a second or two."""
    monkeypatch.setattr(benchmarking, "peak_in_fresh_process", lambda *_: PeakMemory(1000, 10))
    monkeypatch.setattr(benchmark_cost, "LARGEST_SIDE", 128)

    photographs = inputs / "photographs"
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY.replace("PHOTOS", str(photographs)))

    def arguments(name: str) -> list[str]:
        if name == "extract":
            return [name, "--input", str(photographs), "--checkpoint", model[0], "--res", "64", "--device", "cpu",
                    "--output", f"{output}.h5"]  # fmt: skip
        if name == "distill":
            return [name, "--recipe", str(recipe), "--output", str(output)]
        if name == "probe":
            return [name, "--recipe", str(recipe_file(inputs / "labelled")), "--checkpoint", model[0],
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


@contextmanager
def without_privileges(tmp_path: Path) -> Iterator[None]:
    """As somebody for whom rights count, where the tests are run by root."""
    if os.geteuid():
        yield
        return
    for folder in (tmp_path, *tmp_path.parents, *tmp_path.parent.iterdir()):
        if folder.stat().st_mode & 0o055 != 0o055:
            folder.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def quota(tmp_path: Path) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def full_disk(tmp_path: Path) -> Iterator[None]:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "pwritev", "posix_fallocate"):
            patch.setattr(os, name, full)
        yield


@contextmanager
def read_only(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs").chmod(0o555)
    with without_privileges(tmp_path):
        yield
    (tmp_path / "outputs").chmod(0o755)


@contextmanager
def unreadable(tmp_path: Path) -> Iterator[None]:
    files = [path for path in (tmp_path / "inputs").rglob("*") if path.is_file()]
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs").chmod(0o777)
    for path in files:
        path.chmod(0)
    with without_privileges(tmp_path):
        yield
    for path in files:
        path.chmod(0o644)


@contextmanager
def vanished(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "inputs").rename(tmp_path / "elsewhere")
    yield
    (tmp_path / "elsewhere").rename(tmp_path / "inputs")


@pytest.mark.parametrize("fault", [quota, full_disk, read_only, unreadable, vanished])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_fault_of_the_disk_is_an_error_and_the_same_command_goes_on(
    name: str, fault: Callable[[Path], AbstractContextManager[None]], command: Command, tmp_path: Path
) -> None:
    arguments = command(name)
    inputs = {path: path.read_bytes() for path in (tmp_path / "inputs").rglob("*") if path.is_file()}
    with fault(tmp_path):
        code, errors = run(arguments)
    assert code in (1, 2), errors
    assert "error: " in errors
    assert "Traceback" not in errors
    left = [path.suffix for path in (tmp_path / "outputs").rglob("*")] if (tmp_path / "outputs").exists() else []
    assert not {".partial", ".lock"} & set(left)
    begun = (tmp_path / "outputs" / "out" / "recipe.yaml").exists()
    overwritten = ["--overwrite"] if name == "extract" and (tmp_path / "outputs" / "out.h5").exists() else []
    code, errors = run([*arguments, *(["--resume"] if begun else []), *overwritten])
    assert (code, errors if code else "") == (0, "")
    assert {path: path.read_bytes() for path in inputs} == inputs


@pytest.mark.parametrize("fault", [quota, full_disk])
def test_curves_that_do_not_fit_on_the_disk_are_an_error(
    fault: Callable[[Path], AbstractContextManager[None]], tmp_path: Path
) -> None:
    points = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    with fault(tmp_path), pytest.raises(BrixelError, match=r"curves\.png cannot be written: .*make room"):
        draw_curves(tmp_path / "curves.png", {"student": [points]})
    assert not list(tmp_path.iterdir())
    draw_curves(tmp_path / "curves.png", {"student": [points]})
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
