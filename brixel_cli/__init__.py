"""brixel: sharp dense features from one cheap pass of a vision transformer.

import brixel_cli

student = brixel_cli.load_student("dinov2_vits14")
map_ = student.features("cat.jpg", res=448)  # (D, h, w)
maps = student(images)  # (B, 3, H, W) normalised -> (B, D, h, w)

features = brixel_cli.extract("photos", res=448)  # as `brixel extract`, whose file brixel_cli.FeatureFile reads
map_ = features["cat.jpg"]  # (D, h, w), float32
"""

from __future__ import annotations

import importlib
import os
import typing

if typing.TYPE_CHECKING:
    from brixel_cli.api import Extractor as Extractor
    from brixel_cli.api import extract as extract
    from brixel_cli.api import load_student as load_student
    from brixel_cli.data.feature_file import FeatureDataset as FeatureDataset
    from brixel_cli.data.feature_file import FeatureFile as FeatureFile

# Read when torch is imported: what MPS lacks is computed on the CPU.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

__version__ = "0.2.0"
__all__ = ["Extractor", "FeatureDataset", "FeatureFile", "__version__", "extract", "load_student"]

_HOMES = {
    "Extractor": "brixel_cli.api",
    "extract": "brixel_cli.api",
    "load_student": "brixel_cli.api",
    "FeatureFile": "brixel_cli.data.feature_file",
    "FeatureDataset": "brixel_cli.data.feature_file",
}


def __getattr__(name: str) -> object:
    # torch takes seconds to import: `brixel --help` must not wait for it.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
