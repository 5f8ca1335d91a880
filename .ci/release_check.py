"""What a release must hold; `make release-check` runs it in a clone, in ten minutes, most of which is installation.

    python .ci/release_check.py [--only-build] [pip arguments, such as --constraint FILE]

Builds sdist and wheel; checks metadata, versions, licences and sizes; installs each in a fresh environment, in a folder
without the clone; and makes features with the student that ships.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LARGEST = 8_000_000
"""Bytes of an archive; the two students take 7 million of them."""
REQUIRED = ("LICENSE", "NOTICE", "brixel_cli/students/SHA256SUMS", "brixel_cli/students/dinov2_vits14.safetensors")
USE = """
import brixel_cli
features = brixel_cli.load_student("dinov2_vits14", backbone_weights="demo/dinov2_vits14.safetensors").features(
    "demo/photos/held_out/chelsea.png", res=112)
assert tuple(features.shape) == (384, 32, 48) and bool(features.isfinite().all()), features.shape
"""


def run(*command: str | Path, where: Path = ROOT) -> str:
    print("$", *command, flush=True)
    done = subprocess.run([str(word) for word in command], cwd=where, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed with {done.returncode}")
    return done.stdout


def archives(folder: Path) -> tuple[Path, Path]:
    """Build sdist and wheel, the wheel out of the sdist."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def check_archives(sdist: Path, wheel: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    source = (ROOT / "brixel_cli" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'__version__ = "(.+)"', source)[1]
    for path in (sdist, wheel):
        assert f"brixel-{version}" in path.name, path.name
        size = path.stat().st_size
        print(f"{path.name}: {size / 1e6:.2f} MB")
        assert size < LARGEST, f"{path.name} has {size:,} bytes; at most {LARGEST:,}"
    with tarfile.open(sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert set(REQUIRED) <= names, set(REQUIRED) - names
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        metadata = opened.read(f"brixel-{version}.dist-info/METADATA").decode()
    for name in REQUIRED:
        assert any(found.endswith(name) for found in names), name
    assert "License-Expression: Apache-2.0" in metadata
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def check_installed(archive: Path, scratch: Path, arguments: list[str], lean: bool) -> None:
    """Install an archive in a fresh environment, and use it where there is no clone.

    Args:
        archive: sdist or wheel.
        scratch: an empty folder; `demo` of it is kept from one archive to the next.
        arguments: of pip.
        lean: without an extra; else with `demo`, which writes the weights.
    """
    environment = scratch / ("lean" if lean else "demo_extra")
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    began = time.perf_counter()
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        *arguments,
        str(archive) if lean else f"{archive}[demo]",
        where=scratch,
    )
    seconds = time.perf_counter() - began
    packages = next(environment.glob("lib/python*/site-packages"))
    size = sum(file.stat().st_size for file in packages.rglob("*") if file.is_file())
    print(f"{archive.name}: installed in {seconds:.0f} s, {size / 1e6:,.0f} MB with all dependencies")
    brixel = environment / "bin" / "brixel"
    print(run(brixel, "--version", "--verbose", where=scratch))
    where = run(python, "-c", "import brixel_cli; print(brixel_cli.__file__)", where=scratch).strip()
    assert Path(where).is_relative_to(environment), where
    if lean:
        installed = {path.name for path in packages.iterdir()}
        assert not installed & {"tensorboard", "matplotlib", "torchmetrics"}
    else:
        run(brixel, "demo", where=scratch)
        training = "--recipe demo --images demo/photos/training --backbone-weights demo/dinov2_vits14.safetensors"
        run(brixel, "distill", *training.split(), "--dry-run", where=scratch)
    run(python, "-c", USE, where=scratch)
    command = "--input demo/photos/held_out --res 112 --backbone-weights demo/dinov2_vits14.safetensors --overwrite"
    run(brixel, "extract", *command.split(), "--page", "features.html", where=scratch)
    assert (scratch / "features.html").is_file()


def main() -> None:
    arguments = [word for word in sys.argv[1:] if word != "--only-build"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    print(f"brixel, {len(project['dependencies'])} dependencies without extras")
    with tempfile.TemporaryDirectory() as scratch:
        sdist, wheel = archives(Path(scratch) / "dist")
        check_archives(sdist, wheel)
        if "--only-build" not in sys.argv:
            (Path(scratch) / "elsewhere").mkdir()
            check_installed(wheel, Path(scratch) / "elsewhere", arguments, lean=False)
            check_installed(sdist, Path(scratch) / "elsewhere", arguments, lean=True)
    print("release-check: all is well")


if __name__ == "__main__":
    main()
