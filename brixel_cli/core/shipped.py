"""Students that come with brixel: adapters in float16, each with its model card, checked by SHA-256 on loading."""

from __future__ import annotations

from pathlib import Path

from brixel_cli.core.identity import file_sha256
from brixel_cli.errors import WeightsError

STUDENTS = Path(__file__).resolve().parent.parent / "students"
SUMS = "SHA256SUMS"
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
