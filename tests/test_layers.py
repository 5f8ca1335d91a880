"""The direction of imports, and who alone may print or import the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import brixel_cli

PACKAGE = Path(brixel_cli.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400
"""Lines of a file."""

# What a module or subpackage may import of the package, besides modules of its own subpackage.
BELOW = {
    "errors": set(),
    "config": {"errors"},
    "core": {"config", "errors"},
    "data": {"core", "config", "errors"},
    "drawing": {"core", "config", "errors"},
    "engines": {"core", "data", "drawing", "config", "errors"},
    "cli": {"engines", "core", "data", "drawing", "config", "errors"},
    "app": {"", "cli", "demo", "config", "errors"},
    "demo": {"cli", "core", "errors"},  # `brixel demo`, and what `make demo` prepares
    "__main__": {"app"},
    "api": {"engines", "core", "data", "config", "errors"},
    "": {"api", "data"},  # the public Python API, in __init__.py
}


def layer(path: Path) -> str:
    """`core` of core/losses.py, `app` of app.py, the empty string of the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at its top, inside functions or for type checking."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide their direction"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def own_layers(path: Path) -> set[str]:
    """Layers of the package that a file imports."""
    parts = [name.split(".") for name in imported(path) if name.split(".")[0] == PACKAGE.name]
    found = {name[1] for name in parts if len(name) > 1 and name[1] in BELOW}
    # `from brixel_cli import __version__` reaches for the package itself.
    return found | ({""} if any(len(name) > 1 and name[1] not in BELOW for name in parts) else set())


def importers(library: str) -> set[str]:
    """Files, as paths inside the package, that import a library."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        if any(name.split(".")[0] == library for name in imported(path))
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    name = layer(path)
    assert name in BELOW, f"{path.name} is new here: say in BELOW what it may import"
    forbidden = own_layers(path) - BELOW[name] - ({name} if path.parent != PACKAGE else set())
    assert forbidden == set(), f"{path.relative_to(PACKAGE)} must not import {sorted(forbidden)}"


# What the engines of one command may import of those of others.
ENGINES = {
    "distilling": set(),
    "extracting": set(),
    "probing": set(),
    "benchmarking": {"distilling", "probing"},
    "ablating": {"benchmarking", "distilling", "probing"},
}


@pytest.mark.parametrize("command", ENGINES)
def test_engines_import_one_way(command: str) -> None:
    folder = PACKAGE / "engines" / command
    names = {name for path in folder.glob("*.py") for name in imported(path)}
    found = {other for other in ENGINES for name in names if name.startswith(f"{PACKAGE.name}.engines.{other}")}
    assert found - {command} == ENGINES[command]


def test_engines_outside_the_packages_serve_all_of_them() -> None:
    shared = {path.stem: imported(path) for path in (PACKAGE / "engines").glob("*.py")}
    assert set(shared) == {
        "__init__",
        "baselines",
        "default_student",
        "equal_cost",
        "latency",
        "memory",
        "models",
        "reporting",
        "runtime",
        "streams",
    }
    packages = tuple(f"{PACKAGE.name}.engines.{command}" for command in ENGINES)
    assert not [name for names in shared.values() for name in names if name.startswith(packages)]


def test_the_root_of_the_package_has_few_files() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 8


def test_the_layers_have_no_cycle() -> None:
    placed: set[str] = set()
    while len(placed) < len(BELOW):
        ready = {name for name in set(BELOW) - placed if BELOW[name] <= placed}
        assert ready, f"a cycle among {sorted(set(BELOW) - placed)}"
        placed |= ready


def test_the_walk_finds_imports_of_every_kind() -> None:
    # The tests above would pass on an empty walk: here is what it has to find.
    assert {"cli", ""} <= own_layers(PACKAGE / "app.py")  # one inside a function, one of the package
    assert {"core", "data", "errors", "config"} <= own_layers(PACKAGE / "engines" / "distilling" / "distillation.py")
    assert "engines" in own_layers(PACKAGE / "cli" / "distill.py")  # inside a function
    assert own_layers(PACKAGE / "__init__.py") == {"api", "data"}
    assert own_layers(PACKAGE / "errors.py") == set()


@pytest.mark.parametrize(
    ("library", "alone"),
    [
        ("timm", "core/backbone.py"),
        ("h5py", "data/row_store.py data/virtual_rows.py"),
        ("yaml", "config/files.py"),
        ("rich", "cli/console.py"),
        ("tqdm", "cli/console.py"),
    ],
)
def test_one_module_alone_imports(library: str, alone: str) -> None:
    assert importers(library) == set(alone.split())


def test_only_the_command_line_imports_typer() -> None:
    assert importers("typer") == {"app.py", "cli/options.py"}


def printing(source: str) -> list[str]:
    """Places where a source prints: calls of print, and any use of the standard streams."""
    places = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id == "print":
            places.append(f"{node.lineno}: print")
        if isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr", "__stdout__", "__stderr__"):
            if isinstance(node.value, ast.Name) and node.value.id == "sys":
                places.append(f"{node.lineno}: sys.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module == "sys":
            places += [f"{node.lineno}: {alias.name}" for alias in node.names if alias.name.startswith("std")]
    return places


def test_only_the_console_prints() -> None:
    found = {path.relative_to(PACKAGE).as_posix(): printing(path.read_text(encoding="utf-8")) for path in MODULES}
    assert found.pop("cli/console.py") != []
    assert {path: places for path, places in found.items() if places} == {}


@pytest.mark.parametrize(
    "source",
    ["print(1)", "import sys\nsys.stdout.write('')", "import sys\nsay(file=sys.stderr)", "from sys import stdout"],
)
def test_every_way_to_print_is_noticed(source: str) -> None:
    assert printing(source) != []


@pytest.mark.parametrize(
    "module",
    ["app", "config.files", *(f"cli.{name}" for name in ("distill", "probe", "benchmark", "ablation"))],
)
def test_the_command_line_starts_without_the_heavy_libraries(module: str) -> None:
    heavy = {"torch", "timm", "h5py", "numpy", "torchmetrics", "matplotlib"}
    code = f"import sys, brixel_cli.{module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_tables_are_printed_without_the_libraries_of_probes_and_charts() -> None:
    code = "import sys, brixel_cli.cli.tables; print(sorted({'torchmetrics', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("path", [*MODULES, *sorted(Path(__file__).parent.rglob("*.py"))], ids=lambda path: path.name)
def test_no_file_is_longer_than_one_reads_at_a_time(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
