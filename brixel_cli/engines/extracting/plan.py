"""What an extraction will do: sizes, grids and bytes, from headers and the model's description."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from brixel_cli.config.extract import ExtractOptions
from brixel_cli.core.extras import require
from brixel_cli.core.files import check_disk, free_bytes
from brixel_cli.core.formatting import human_bytes, human_size
from brixel_cli.core.identity import files_sha256
from brixel_cli.data.feature_file import FeatureFile
from brixel_cli.data.feature_index import INDEX_NAME, REASON_BYTES
from brixel_cli.data.feature_layout import Layout, text_array
from brixel_cli.data.inputs import Inputs, describe_unreadable, find_inputs, none_usable
from brixel_cli.data.references import KINDS, default_output, describe_passed_over
from brixel_cli.data.remote import Place
from brixel_cli.data.resizing import Resizing, snap
from brixel_cli.data.row_store import CHECKSUM, FAILED, MISSING, REASON, Array, Store, rows_by_size
from brixel_cli.engines.default_student import default_student
from brixel_cli.engines.extracting.parts import check_split, unfinished
from brixel_cli.engines.extracting.tiling import Tiling
from brixel_cli.engines.models import ModelSpec, model_spec
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.streams import warn_of_workers
from brixel_cli.errors import BrixelError, UsageError

DIGEST_LENGTH = 64
CONTACT_SHEET = "contact_sheet.png"


@dataclass(frozen=True)
class ExtractPlan:
    """All that is fixed before the first forward pass.

    Attributes:
        options: as given.
        spec: of the model.
        resizing: what is done to every image.
        inputs: the items, a row each.
        model_sizes: of each row's input; None for rows that cannot be computed.
        reasons: why not; empty for the others.
        num_snapped: images whose size was rounded to the patch.
        most_snapped: by how many pixels at most.
        output: the feature file, or the folder of single files.
    """

    options: ExtractOptions
    spec: ModelSpec
    resizing: Resizing
    inputs: Inputs
    model_sizes: list[tuple[int, int] | None]
    reasons: list[str]
    num_snapped: int
    most_snapped: float
    output: Path

    @cached_property
    def layout(self) -> Layout:
        """Where each row's map goes."""
        grids = tuple(None if size is None else self.spec.grid(size) for size in self.model_sizes)
        channels = self.spec.embed_dim if self.options.pca is None else self.options.pca
        return Layout(
            grids,
            channels,
            self.options.dtype,
            self.options.storage,
            self.options.fields,
            self.options.layers,
            self.spec.embed_dim,
            self.spec.num_registers,
            self._finer,
        )

    @property
    def _finer(self) -> int:
        """Grid of the map over that of the patches."""
        return self.spec.factor if self.spec.source == "student" else 1

    @cached_property
    def tiling(self) -> Tiling | None:
        """How larger inputs are cut into tiles; None: they are not."""
        if self.options.tile is None:
            return None
        patch, enlarge = self.spec.patch_size, self.spec.enlarge
        tile, overlap = (snap(side, patch) * enlarge for side in (self.options.tile, self.options.overlap))
        return Tiling(tile, overlap, patch, self._finer)

    def is_tiled(self, row: int) -> bool:
        """Whether a row's input is cut into tiles."""
        size = self.model_sizes[row]
        return self.tiling is not None and size is not None and self.tiling.cuts(size)

    @cached_property
    def rows_of_size(self) -> dict[tuple[int, int], list[int]]:
        """Rows that will be computed, by the size of their input, in order of first row."""
        sizes = {row: size for row, size in enumerate(self.model_sizes) if size is not None}
        return rows_by_size(sizes, sizes.__getitem__)

    @property
    def num_of_size(self) -> dict[tuple[int, int], int]:
        """How many rows each size has that the model sees at once."""
        counts: dict[tuple[int, int], int] = {}
        for size, rows in self.rows_of_size.items():
            seen = self.tiling.input_size(size) if self.tiling else size
            counts[seen] = counts.get(seen, 0) + len(rows)
        return counts

    @property
    def store_path(self) -> Path:
        """The .h5 file with the status of every row; the feature file itself, unless single files are written.

        The part of a shard has a name of its own until it is complete.
        """
        if self.options.shard is not None and not self.output.exists():
            return unfinished(self.output)
        return self.output if self.options.storage == "h5" else self.output / INDEX_NAME

    @property
    def num_usable(self) -> int:
        """Rows that will be computed."""
        return sum(size is not None for size in self.model_sizes)

    @property
    def bytes_needed(self) -> int:
        """Bytes on the disk, index included."""
        return self.layout.bytes_needed + sum(array.nbytes for array in self.filled([""] * len(self.reasons)).values())

    @property
    def bytes_free(self) -> int:
        """Bytes free where the output goes."""
        return free_bytes(self.output.absolute().parent)

    @property
    def shard(self) -> dict[str, Any]:
        """Which part of what this is, for the description; empty where it is all."""
        shard, split = self.options.shard, self.inputs.split
        if shard is None or split is None:
            return {}
        return {"shard": {"number": shard.number, "count": shard.count} | asdict(split)}

    def check_disk(self) -> None:
        """Whether the output can be made; a file to be continued has its room already, one to be replaced gives it up.

        Raises:
            BrixelError: it does not fit.
            UsageError: `overwrite` would replace a file that is not ours.
        """
        path, needed = self.store_path, self.bytes_needed
        if path.exists() and not self.options.overwrite:
            if self.options.storage == "h5":
                return
            needed = round(self.layout.bytes_needed * float(np.mean(Store(path).status == MISSING)))
        elif path.exists():
            try:
                FeatureFile(path)
            except BrixelError as error:
                raise UsageError(
                    f"{error}\n--overwrite replaces feature files only: name another --output, or delete it yourself."
                ) from error
            needed -= path.stat().st_blocks * 512
        check_disk(self.output.absolute().parent, needed, f"{self.output}")

    def announce(self, reporter: Reporter) -> None:
        """Say what will be computed and stored."""
        warn_of_workers(self.options.workers, "--workers", reporter)
        grids = self.layout.rows_of_grid
        shown = ", ".join(f"{human_size(grid)} ({len(rows)})" for grid, rows in list(grids.items())[:4])
        more = f" and {len(grids) - 4} more" if len(grids) > 4 else ""
        reporter.say(
            f"{len(self.reasons)} images, {len(self.reasons) - self.num_usable} of them unusable; grids {shown}{more}, "
            f"{self.layout.channels} channels, {self.options.dtype}"
        )
        reporter.say(
            f"{self.output}: {human_bytes(self.bytes_needed)} needed, {human_bytes(self.bytes_free)} free on the disk"
        )
        if self.num_snapped:
            reporter.say(
                f"{self.num_snapped} sizes were rounded to multiples of the patch, {self.spec.patch_size} pixels, "
                f"by {self.most_snapped:.1f} pixels at most"
            )
        if self.inputs.unreadable:
            reporter.warn(describe_unreadable(self.inputs.unreadable))
        if self.inputs.passed_over:
            reporter.say(describe_passed_over(self.inputs.passed_over))

    def digests(self, reporter: Reporter) -> list[str]:
        """SHA-256 (hex) of each row's file, of a remote one its version; empty where nothing of it can be used."""
        items = self.inputs.items
        local = [item.path for item in items if isinstance(item.path, Path) and not item.reason]
        paths = list(dict.fromkeys(local))  # a video has many rows, and so has a tar
        with reporter.bar("reading contents", len(paths), unit="file") as bar:
            known: dict[Place, str] = dict(zip(paths, files_sha256(paths, bar.update), strict=True))
        return [known.get(item.path, item.version) for item in items]

    def fetched_ahead(self, rows: Sequence[int]) -> AbstractContextManager[None]:
        """Within, what these rows need from elsewhere comes before it is asked for, in this order."""
        return self.inputs.fetched_ahead([self.inputs.items[row] for row in rows])

    def pixels(self, row: int, resizing: Resizing | None = None) -> Tensor:
        """Pixels (3, H, W), uint8, of a row's image as the model sees it, or resized otherwise.

        Raises:
            BrixelError: it cannot be read; the message starts with the reason.
        """
        item, resizing = self.inputs.items[row], resizing or self.resizing
        size = resizing.model_size(item.height, item.width)
        with self.inputs.decoded(item, size) as image:
            return resizing.apply(image, size)

    def filled(self, digests: Sequence[str]) -> dict[str, Array]:
        """Datasets that are known before the first forward pass, with the SHA-256 of each row's file."""
        items = self.inputs.items
        zero = (0, 0)
        return {
            "paths": text_array([item.name for item in items]),
            "status": np.array([FAILED if reason else MISSING for reason in self.reasons], np.uint8),
            REASON: text_array(self.reasons, REASON_BYTES),
            CHECKSUM: np.zeros(len(items), np.uint32),
            "original_size": np.array([(item.height, item.width) for item in items], np.int32),
            "model_size": np.array([size or zero for size in self.model_sizes], np.int32),
            "grid_size": np.array([grid or zero for grid in self.layout.grids], np.int32),
            "grid_row": self.layout.grid_rows,
            "file_size": np.array([item.file_size for item in items], np.int64),
            "modified": np.array([item.modified for item in items], np.int64),
            "sha256": text_array(digests, DIGEST_LENGTH),
        }

    @property
    def overflow(self) -> str:
        """Why an image fails whose features are no finite numbers as they are stored."""
        hint = "; --dtype float32 may hold them" if self.options.dtype == "float16" else ""
        return f"its features are no finite numbers in {self.options.dtype}{hint}"

    def summary(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "output": str(self.output),
            "images": len(self.reasons),
            "unusable": len(self.reasons) - self.num_usable,
            "grids": {human_size(grid): len(rows) for grid, rows in self.layout.rows_of_grid.items()},
            "channels": self.layout.channels,
            "fields": list(self.options.fields),
            "layers": list(self.options.layers),
            "dtype": self.options.dtype,
            "source": self.spec.source,
            "backbone": self.spec.backbone,
            "patch_size": self.spec.patch_size,
            "snapped": self.num_snapped,
            "most_snapped_px": round(self.most_snapped, 2),
            "bytes_needed": self.bytes_needed,
            "bytes_free": self.bytes_free,
            **self.shard,
        }


def make_plan(options: ExtractOptions, reporter: Reporter) -> ExtractPlan:
    """Find the images and work out sizes, grids and bytes; nothing is written, and no weights of the backbone are read.

    Raises:
        UsageError: the options do not go together, or name nothing.
        BrixelError: the checkpoint cannot be read, or no image at all can be used.
    """
    if not options.inputs:
        raise UsageError(f"--input is missing: {KINDS}.")
    spec = model_of(options, reporter)
    if options.storage == "parquet":
        require("parquet", "--format parquet")
    _check_parts(options, spec)
    _check_tiles(options, spec)
    resizing = Resizing(options.res, options.fit, spec.patch_size, spec.enlarge)
    if options.pca is not None and options.pca > spec.embed_dim:
        raise UsageError(f"--pca {options.pca}: the maps of {spec.backbone} have only {spec.embed_dim} channels.")
    suffix = ".h5" if options.storage == "h5" else f"_{options.storage}"
    output = options.output or default_output(options.inputs, suffix)
    output = output if output.name.strip(".") else output.resolve()
    if not output.name:
        raise UsageError(f"--output {output} is the root of all folders: name a file or folder in it.")
    if options.storage == "h5" and output.is_dir():
        raise UsageError(f"--output {output} is a folder; name a file, such as {output / 'features.h5'}.")
    if options.storage != "h5" and output.is_file():
        raise UsageError(f"--output {output} is a file; --format {options.storage} writes a folder.")
    if options.shard is not None:
        check_split(output, options.shard)
        output = options.shard.path(output)
    with reporter.bar("reading headers", total=0, unit="image") as bar:
        inputs = find_inputs(
            options.inputs,
            options.every,
            [preview_folder(output)],
            bar.update,
            options.column,
            options.allow_urls,
            options.shard,
        )
    model_sizes: list[tuple[int, int] | None] = []
    reasons, snaps = [], []
    for item in inputs.items:
        size, reason = None, item.reason
        if not reason:
            try:
                size = resizing.model_size(item.height, item.width)
                snaps.append(resizing.snapped(item.height, item.width))
            except BrixelError as error:
                reason = str(error)
        if reason and options.strict:
            raise BrixelError(
                f"{item.name}: {reason}. Stopped before the first image was computed, because of --strict."
            )
        model_sizes.append(size)
        reasons.append(reason)
    if not any(model_sizes) and options.shard is None:  # a part may be all failures
        raise none_usable({item.name: reason for item, reason in zip(inputs.items, reasons, strict=True)})
    snapped = [snap for snap in snaps if snap > 1e-6]
    return ExtractPlan(
        options, spec, resizing, inputs, model_sizes, reasons, len(snapped), max(snapped, default=0.0), output
    )


def _check_parts(options: ExtractOptions, spec: ModelSpec) -> None:
    """Raise a UsageError where the backbone has not the tokens or blocks that are to be stored."""
    if "cls" in options.fields and not spec.has_cls:
        raise UsageError(f"--fields cls: {spec.backbone} has no class token.")
    if "registers" in options.fields and not spec.num_registers:
        raise UsageError(f"--fields registers: {spec.backbone} has no register tokens.")
    if beyond := [layer for layer in options.layers if not 0 <= layer < spec.depth]:
        raise UsageError(f"--layers {beyond[0]}: the blocks of {spec.backbone} are 0 to {spec.depth - 1}.")


def _check_tiles(options: ExtractOptions, spec: ModelSpec) -> None:
    if options.tile is None:
        return
    tile, overlap = (snap(side, spec.patch_size) for side in (options.tile, options.overlap))
    if 2 * overlap > tile or tile < 4 * spec.patch_size:
        raise UsageError(
            f"--tile {options.tile} --overlap {options.overlap}: a tile must have at least four patches of "
            f"{spec.patch_size} pixels, and twice the overlap."
        )


def preview_folder(output: Path) -> Path:
    """Where the pictures of an output go: beside it."""
    return output.with_name(f"{output.stem if output.suffix == '.h5' else output.name}_preview")


def model_of(options: ExtractOptions, reporter: Reporter) -> ModelSpec:
    """The model that the options name; without a checkpoint, a shipped student for --res. Errors as `model_spec`."""
    checkpoint = options.checkpoint
    if checkpoint is None and (options.source == "student" or not options.backbone):
        checkpoint = default_student(options.backbone, reporter, options.res)
    return model_spec(
        options.source, checkpoint=checkpoint, backbone=options.backbone, weights=options.backbone_weights
    )


def reason_text(store: Store, reason: str) -> Array:
    """A reason as the feature file stores it."""
    row: Array = text_array([reason], store.array(REASON).dtype.itemsize)[0]
    return row
