"""brixel: sharp dense features from one cheap pass of a vision transformer.

import brixel_cli

student = brixel_cli.load_student("runs/demo")
maps = student(images)  # (B, 3, H, W) normalised -> (B, D, 4h, 4w)
"""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    from brixel_cli.core.student import load_student as load_student

__version__ = "0.1.0"
__all__ = ["__version__", "load_student"]


def __getattr__(name: str) -> object:
    # torch takes seconds to import: `brixel --help` must not wait for it.
    if name == "load_student":
        from brixel_cli.core.student import load_student

        return load_student
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
