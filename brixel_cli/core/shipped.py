"""Where a student is: among those that come with brixel, in a run folder, in a file or on the hub.

Those that come with brixel are adapters in float16, each with its model card, and are checked by SHA-256 on loading.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from brixel_cli.core.hub import HUB, download
from brixel_cli.core.identity import file_sha256
from brixel_cli.errors import WeightsError

STUDENTS = Path(__file__).resolve().parent.parent / "students"
SUMS = "SHA256SUMS"
FILE_NAME = "student.safetensors"
"""Of a run's student."""
DEFAULT_STUDENT = "dinov2_vits14"
"""What is meant where no student is named and none was trained."""


def shipped_students() -> dict[str, str]:
    """Name and SHA-256 of each student that comes with brixel.

    Raises:
        WeightsError: their list is missing.
    """
    try:
        lines = (STUDENTS / SUMS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise WeightsError(f"{STUDENTS / SUMS}, which comes with brixel, is missing: install brixel again.") from error
    return {Path(file).stem: digest for digest, file in (line.split() for line in lines if line.strip())}


def shipped_student(name: str) -> Path:
    """The file of a student that comes with brixel.

    Raises:
        WeightsError: it is missing, or not the file that was shipped.
    """
    path = STUDENTS / f"{name}.safetensors"
    if not path.is_file():
        raise WeightsError(f"{path}, which comes with brixel, is missing: install brixel again.")
    found, expected = file_sha256(path), shipped_students()[name]
    if found != expected:
        raise WeightsError(
            f"{path} is not the file that came with brixel: SHA-256 {found[:16]}..., expected "
            f"{expected[:16]}.... Install brixel again."
        )
    return path


def locate(reference: str) -> Path:
    """The file of a student that is named as for `--checkpoint`; one on the hub is downloaded.

    Raises:
        WeightsError: there is none, or it cannot be downloaded.
    """
    if reference.startswith(HUB):
        return download(reference, FILE_NAME)
    path = Path(reference).expanduser()
    if path.name == reference and reference in shipped_students():
        return shipped_student(reference)
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            raise WeightsError(f"{path} holds no {FILE_NAME}: no validation has taken place in that run yet.")
        return path / FILE_NAME
    if path.is_file():
        return path
    # Never a question to the hub: a mistyped path must not become a download.
    raise WeightsError(
        f"No file or folder at {reference}.{_nearest(path)} A student is a run folder, a .safetensors of brixel, a "
        f"released .pth, {HUB}user/name, or one that comes with brixel: {', '.join(shipped_students())}."
    )


def _nearest(path: Path) -> str:
    """The question whether a student of a similar name was meant; empty where there is none."""
    beside = [
        other
        for other in (path.parent.iterdir() if path.parent.is_dir() else ())
        if (other / FILE_NAME).is_file() or other.suffix in (".safetensors", ".pth", ".pt")
    ]
    known = {name: name for name in shipped_students()} | {other.name: str(other) for other in beside}
    close = difflib.get_close_matches(path.name, known, n=1)
    return f" Did you mean {known[close[0]]}?" if close else ""
