"""The optional packages: which extra of brixel installs them, and the error for those that are not installed."""

from __future__ import annotations

from importlib.util import find_spec

from brixel_cli.errors import UsageError

EXTRAS = {
    "train": ("tensorboard",),
    "probe": ("torchmetrics", "matplotlib"),
    "report": ("matplotlib",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "video": ("av",),
    "remote": ("fsspec", "s3fs"),
    "gcs": ("gcsfs",),
    "parquet": ("pyarrow",),
    "unet": ("segmentation_models_pytorch",),
    "demo": ("onnx", "skimage", "sklearn"),
}
"""The packages that must be there, as they are imported, for each extra of pyproject.toml."""


def require(extra: str, what: str, otherwise: str = "") -> None:
    """Find out before the work begins whether the packages of an extra are installed.

    Args:
        extra: a name in `EXTRAS`.
        what: needs them; begins the message.
        otherwise: how to do without them; ends the message.

    Raises:
        UsageError: some are not installed. The message names the pip command.
    """
    if lacking := missing(extra):
        raise UsageError(f"{what} needs {', '.join(lacking)}, not installed: pip install 'brixel[{extra}]'{otherwise}.")


def missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    return [name for name in EXTRAS[extra] if find_spec(name) is None]
