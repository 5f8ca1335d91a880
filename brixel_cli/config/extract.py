"""Every option of an extraction, typed, with its unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from brixel_cli.config.base import Device, Precision, check_counts, check_device
from brixel_cli.errors import UsageError

Source = Literal["student", "backbone", "teacher"]
Fit = Literal["short", "centre", "stretch"]
Storage = Literal["h5", "npy", "safetensors"]
Number = Literal["float16", "float32", "int8"]


@dataclass(frozen=True)
class ExtractOptions:
    """The options of `brixel extract`, checked at construction; `app.extract` says what each means to the user.

    Raises:
        UsageError: a value is out of range, or two do not go together.
    """

    inputs: Sequence[str]
    res: int = 448
    fit: Fit = "short"
    source: Source = "student"
    checkpoint: str | None = None
    backbone: str | None = None
    backbone_weights: str | None = None
    output: Path | None = None
    storage: Storage = "h5"
    dtype: Number = "float16"
    pca: int | None = None
    device: Device = "auto"
    precision: Precision = "auto"
    batch_size: int | None = None
    workers: int | None = None
    every: int = 1
    column: str | None = None
    allow_urls: bool = False
    strict: bool = False
    overwrite: bool = False
    preview: bool = False
    page: Path | None = None
    page_sources: tuple[str, ...] | None = None
    page_images: int = 12

    def __post_init__(self) -> None:
        check_device(self.device)
        check_counts(
            {
                "--res": self.res,
                "--every": self.every,
                "--batch-size": self.batch_size,
                "--pca": self.pca,
                "--workers": self.workers,
                "--page-images": self.page_images,
            }
        )
        if self.dtype == "int8" and self.storage == "npy":
            raise UsageError(
                "--dtype int8 stores a scale beside the map, which .npy cannot: take --format h5 or safetensors."
            )
        if self.page is not None and self.page.suffix != ".html":
            raise UsageError(f"--page {self.page}: the file must end in .html.")
        if self.page_sources is not None and (
            not set(self.page_sources) <= set(get_args(Source)) or len(set(self.page_sources)) < len(self.page_sources)
        ):
            raise UsageError(
                f"--page-sources {','.join(self.page_sources)}: give some of {', '.join(get_args(Source))}, by commas, "
                "each once."
            )

    @property
    def sources_of_page(self) -> tuple[Source, ...]:
        """Whose maps the page shows."""
        chosen = self.page_sources or dict.fromkeys((self.source, "backbone"))
        return tuple(cast(Source, source) for source in chosen)
