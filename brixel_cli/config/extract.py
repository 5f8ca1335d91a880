"""Every option of an extraction, typed, with its unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from brixel_cli.config.base import Device, Precision, check_counts, check_device
from brixel_cli.config.shard import Shard
from brixel_cli.errors import UsageError

Source = Literal["student", "backbone", "teacher"]
Fit = Literal["short", "centre", "stretch"]
Storage = Literal["h5", "npy", "safetensors", "parquet", "zarr"]
SINGLE_FILES: tuple[Storage, ...] = ("npy", "safetensors")
"""Formats with a file for each image."""
Number = Literal["float16", "float32", "int8"]
OVERLAP = 64
"""Of tiles in pixels, unless the user says otherwise."""
Field = Literal["map", "cls", "registers", "pooled"]


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
    upload: str | None = None
    storage: Storage = "h5"
    dtype: Number = "float16"
    pca: int | None = None
    fields: tuple[Field, ...] = ("map",)
    layers: tuple[int, ...] = ()
    tile: int | None = None
    overlap: int = OVERLAP
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
    shard: Shard | None = None

    def __post_init__(self) -> None:
        check_device(self.device)
        check_counts(
            {
                "--res": self.res,
                "--every": self.every,
                "--batch-size": self.batch_size,
                "--pca": self.pca,
                "--tile": self.tile,
                "--overlap": self.overlap,
                "--workers": self.workers,
                "--page-images": self.page_images,
            }
        )
        if self.dtype == "int8" and self.storage == "npy":
            raise UsageError(
                "--dtype int8 stores a scale beside the map, which .npy cannot: take --format h5 or safetensors."
            )
        whole = {"--pca": self.pca, "--preview": self.preview, "--page": self.page}
        if self.shard is not None and (given := [name for name, value in whole.items() if value]):
            raise UsageError(f"{', '.join(given)} take the whole set, and --shard a part of it: leave them out.")
        if self.shard is not None and self.storage != "h5":
            raise UsageError(f"--shard writes a part as an .h5 file: leave out --format {self.storage}.")
        if self.upload is not None and self.storage != "h5":
            raise UsageError(f"--output of a URL is an .h5 file: leave out --format {self.storage}.")
        self._check_fields()
        if self.page is not None and self.page.suffix != ".html":
            raise UsageError(f"--page {self.page}: the file must end in .html.")
        if self.page_sources is not None and (
            not set(self.page_sources) <= set(get_args(Source)) or len(set(self.page_sources)) < len(self.page_sources)
        ):
            raise UsageError(
                f"--page-sources {','.join(self.page_sources)}: give some of {', '.join(get_args(Source))}, by commas, "
                "each once."
            )

    def _check_fields(self) -> None:
        asked = f"--fields {','.join(map(str, self.fields))}"
        if not set(self.fields) <= set(get_args(Field)) or len(set(self.fields)) < len(self.fields):
            raise UsageError(f"{asked}: give some of {', '.join(get_args(Field))}, by commas, each once.")
        if not self.fields and not self.layers:
            raise UsageError("--fields names nothing, and there are no --layers: nothing would be stored.")
        if len(set(self.layers)) < len(self.layers):
            raise UsageError(f"--layers {','.join(map(str, self.layers))}: give each block once.")
        if self.storage == "npy" and (self.fields != ("map",) or self.layers):
            raise UsageError(
                "--format npy stores the feature map alone: take --format h5 or safetensors for other --fields and "
                "for --layers."
            )
        if "map" not in self.fields and (self.preview or self.page):
            raise UsageError(f"--preview and --page show feature maps: add map to {asked}.")
        if self.storage == "parquet" and ("map" in self.fields or self.layers):
            raise UsageError("--format parquet is for vectors: name them, as in --fields cls,pooled, without --layers.")
        if self.tile is not None and (self.storage != "h5" or self.fields != ("map",) or self.layers):
            raise UsageError(
                "--tile stores the feature map alone, in --format h5: leave out other --fields, --layers and --format."
            )
        if self.pca is not None and not {"map", "pooled"} & set(self.fields):
            raise UsageError(f"--pca is of the feature map and of pooled, and {asked} names neither.")

    @property
    def sources_of_page(self) -> tuple[Source, ...]:
        """Whose maps the page shows."""
        chosen = self.page_sources or dict.fromkeys((self.source, "backbone"))
        return tuple(cast(Source, source) for source in chosen)
