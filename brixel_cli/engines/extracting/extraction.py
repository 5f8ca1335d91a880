"""Extraction: from a plan to a feature file, row by row, whatever happens on the way."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brixel_cli.config.extract import ExtractOptions
from brixel_cli.core.files import locked
from brixel_cli.core.formatting import human_size
from brixel_cli.core.losses import Basis
from brixel_cli.core.pca import RunningPca
from brixel_cli.data.checksums import ROW_SUMS
from brixel_cli.data.feature_file import FeatureFile
from brixel_cli.data.feature_layout import MapWriter, encode_parts
from brixel_cli.data.grouping import in_batches
from brixel_cli.data.inputs import reason_of
from brixel_cli.data.row_store import DONE, FAILED, MISSING, REASON, Array, Store, create_store
from brixel_cli.data.vector_table import write_table
from brixel_cli.engines.extracting.continuing import check_same, clear_output, describe
from brixel_cli.engines.extracting.parts import (
    ASKED,
    ASKED_FILES,
    Extracted,
    asked_files,
    asked_words,
    completed,
    finish_part,
)
from brixel_cli.engines.extracting.plan import (
    ExtractPlan,
    make_plan,
    reason_text,
)
from brixel_cli.engines.extracting.tiled_images import fill_by_tiles, larger_images, map_strips
from brixel_cli.engines.extracting.uploading import found_there, send
from brixel_cli.engines.extracting.verification import discard_damaged, fetch_again, restore_index
from brixel_cli.engines.memory import check_batch
from brixel_cli.engines.models import FeatureExtractor
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime, call_seconds, share_memory_pools
from brixel_cli.engines.streams import WriteBehind, num_workers, read_ahead
from brixel_cli.errors import BrixelError

PCA_SAMPLE = 64
"""Images on which the components are fitted, evenly spread over the set."""
WRITTEN_AT_ONCE = 1 << 22
"""Bytes, so that they are still in the processor's cache when their checksum is taken."""


@dataclass(frozen=True)
class _Finished:
    """A computed chunk on its way to the disk: rows, and their place in the batch."""

    rows: list[tuple[int, int]]
    tensors: dict[str, Tensor]


def plan_only(options: ExtractOptions, reporter: Reporter) -> ExtractPlan:
    """The plan, without carrying it out; errors as for `extract`."""
    with _quiet_pillow(options):
        return make_plan(options, reporter)


@dataclass(frozen=True)
class Estimate:
    """How long an extraction will take.

    Attributes:
        images_left: still to be computed.
        seconds: for all of them, without the preview; None where no image of the batch can be decoded.
        how_timed: how this was obtained.
    """

    images_left: int
    seconds: float | None
    how_timed: str


def rehearse(plan: ExtractPlan, reporter: Reporter) -> Estimate:
    """Make all checks of `extract`, compute one batch, and estimate the rest from it; nothing is written.

    Raises:
        BrixelError: as `extract`.
    """
    share_memory_pools()
    options = plan.options
    runtime = Runtime(options.device, options.precision)
    with _quiet_pillow(options):
        plan.check_disk()
        model = FeatureExtractor(plan.spec, runtime, reporter, options.batch_size)
        check_batch(model, plan.num_of_size, options.batch_size)
        if plan.store_path.exists() and not options.overwrite:
            store = Store(plan.store_path)
            check_same(plan, model, store, reporter)
            missing = set(np.flatnonzero(store.status == MISSING).tolist())
        else:
            missing = {row for row, size in enumerate(plan.model_sizes) if size is not None}
        rows_of_size = {size: [r for r in rows if r in missing] for size, rows in plan.rows_of_size.items()}
        rows_of_size = {size: rows for size, rows in rows_of_size.items() if rows}
        if not rows_of_size:
            return Estimate(0, 0.0, "nothing is left to be computed")
        if any(plan.is_tiled(row) for row in missing):
            return Estimate(len(missing), None, "images that are cut into tiles are not timed")
        size, rows = max(rows_of_size.items(), key=lambda item: len(item[1]))
        batch = rows[: model.batch_sizes({size: len(rows)}, options.batch_size)[size]]
        loaded: list[Tensor | str] = []
        reading = call_seconds(lambda: loaded.extend(_read_batch(plan, batch, model)), runtime.device)
        if all(isinstance(pixels, str) for pixels in loaded):
            return Estimate(len(missing), None, f"none of the first {len(batch)} images can be decoded")
        pixels = _stack(loaded)
        _parts(plan, model, pixels)  # not timed: the first pass allocates, and on a GPU chooses its kernels
        computing = call_seconds(lambda: encode_parts(_parts(plan, model, pixels), options.dtype, None), runtime.device)
    # On a CPU the threads that read share its cores with the model; a GPU computes meanwhile.
    of_batch = reading + computing if runtime.device.type == "cpu" else max(reading, computing)
    area = sum(height * width * len(rows) for (height, width), rows in rows_of_size.items())
    others = ", other sizes by their area" if len(rows_of_size) > 1 else ""
    return Estimate(
        sum(len(rows) for rows in rows_of_size.values()),
        of_batch / len(batch) * area / (size[0] * size[1]),
        f"one batch of {len(batch)} images of {human_size(size)} pixels was computed{others}",
    )


def extract(options: ExtractOptions, reporter: Reporter) -> Extracted:
    """Compute the features of every image that has none yet.

    The composition of every batch is fixed by the list of files alone, and recorded; so a row has the same bytes
    whether the run was interrupted or not, and however many processes share it.

    Raises:
        BrixelError: something the user can fix; an image that fails is none of it, unless `strict`.
    """
    if options.upload is not None and (passed := found_there(options)) is not None:
        return passed
    if (passed := completed(options)) is not None:
        return passed if options.upload is None else send(options, passed, reporter)
    share_memory_pools()
    runtime = Runtime(options.device, options.precision)
    with _quiet_pillow(options):
        plan = make_plan(options, reporter)
        plan.announce(reporter)
        again = "What was computed stays: give the same command again, with torchrun or alone."
        with ExitStack() as stack, runtime.losing_others(again):
            runtime.first_only(lambda: stack.enter_context(locked(plan.output)))
            done = _extract(plan, runtime, reporter)
            return send(options, done, reporter) if options.upload and runtime.is_first else done


def _extract(plan: ExtractPlan, runtime: Runtime, reporter: Reporter) -> Extracted:
    options = plan.options
    runtime.first_only(plan.check_disk)
    model = FeatureExtractor(plan.spec, runtime, reporter, options.batch_size)
    check_batch(model, plan.num_of_size, options.batch_size)
    runtime.first_only(lambda: _open_output(plan, model, reporter))
    store = Store(plan.store_path, writable=[*ROW_SUMS, REASON, *plan.layout.columns])
    settled = [row for row, state in enumerate(store.status) if state != MISSING or plan.reasons[row]]
    runtime.wait()
    # A finished output is looked at only as far as its statuses and headers go: --verify reads the rest.
    interrupted = len(settled) < len(store)
    discard_damaged(plan, store, settled[runtime.rank :: runtime.world_size], reporter, thorough=interrupted)
    runtime.wait()
    status = store.status
    runtime.wait()  # every process has read the same status before the first row is filled
    chunks = [chunk for chunk in plan_chunks(plan, store) if any(status[row] == MISSING for row in chunk)]
    num_before = int(np.sum(status == DONE))
    began = time.perf_counter()
    bar_of_images = reporter.bar("extract", len(status), int(np.sum(status != MISSING)), "image")
    with _threads(int(store.description["threads"])), bar_of_images as bar:
        for count in _compute(plan, model, store, status, chunks[runtime.rank :: runtime.world_size]):
            bar.update(count * runtime.world_size)
    store.flush()
    runtime.wait()
    seconds = time.perf_counter() - began
    features = FeatureFile(plan.store_path)
    pictures: list[Path] = []
    if options.storage == "parquet" and runtime.is_first:
        pictures.append(write_table(features))
    if options.storage == "zarr" and runtime.is_first:
        pictures.append(features.describe_arrays())
    if options.preview and runtime.is_first:
        from brixel_cli.engines.extracting.preview import write_previews

        pictures += write_previews(features, plan, reporter)
    if options.page is not None and runtime.is_first:
        from brixel_cli.engines.extracting.page import write_page

        pictures.append(write_page(features, plan, runtime, reporter))
    if options.shard is not None:
        runtime.wait()  # until every process has opened it under its name so far
        runtime.first_only(lambda: finish_part(plan.output))
    num_done = int(np.sum(features.status == DONE))
    return Extracted(
        plan.output, len(features), num_before, num_done - num_before, features.failures, seconds, pictures
    )


def plan_chunks(plan: ExtractPlan, store: Store) -> list[Sequence[int]]:
    """All rows in batches of one model size, by the batch sizes that the file was begun with, in order of first row."""
    at_once = store.description["batch_sizes"]
    batches = (in_batches(rows, int(at_once[human_size(size)])) for size, rows in plan.rows_of_size.items())
    return sorted((batch for some in batches for batch in some), key=lambda batch: batch[0])


def _open_output(plan: ExtractPlan, model: FeatureExtractor, reporter: Reporter) -> None:
    """Create the output, or make sure that the one that is there may be continued."""
    if plan.options.overwrite or not plan.store_path.exists():
        _create(plan, model, reporter)
    else:
        restore_index(plan, reporter)
        check_same(plan, model, Store(plan.store_path), reporter)
        fetch_again(plan, reporter)
    if plan.options.storage == "zarr":
        FeatureFile(plan.store_path).describe_arrays()


def _create(plan: ExtractPlan, model: FeatureExtractor, reporter: Reporter) -> None:
    options = plan.options
    batch_sizes = model.batch_sizes(plan.num_of_size, options.batch_size)
    description = describe(plan, model) | {
        "root": str(plan.inputs.root),
        "threads": torch.get_num_threads(),
        **({ASKED: asked_words(options), ASKED_FILES: asked_files(options)} if options.shard else {}),
        "batch_sizes": {
            human_size(size): 1 if plan.is_tiled(rows[0]) else batch_sizes[size]
            for size, rows in plan.rows_of_size.items()
        },
    }
    filled = plan.filled(plan.digests(reporter))
    if plan.options.pca is not None:
        basis = _fit_pca(plan, model, reporter)
        filled |= {"pca_components": basis.components.numpy(), "pca_mean": basis.mean.numpy()}
    clear_output(plan)  # as late as can be: should the model or the images fail, what is there stays
    create_store(
        plan.store_path,
        len(plan.reasons),
        plan.layout.columns,
        description,
        filled,
        attributes={"format": plan.layout.format},
    )


def _compute(
    plan: ExtractPlan, model: FeatureExtractor, store: Store, status: Array, chunks: Sequence[Sequence[int]]
) -> Iterator[int]:
    """Fill the missing rows of these chunks; yields the number of rows settled, chunk by chunk."""
    polite = model.runtime.device.type == "cpu"
    writer = MapWriter(store, plan.layout)
    basis = _stored_basis(store)
    spare: deque[dict[str, Tensor]] = deque(maxlen=1)

    def load(row: int) -> Tensor | str:
        return "" if status[row] == FAILED or plan.is_tiled(row) else _load(plan, row)

    def write(finished: _Finished) -> None:
        tensors = {name: tensor.cpu() for name, tensor in finished.tensors.items()}
        at_once = max(WRITTEN_AT_ONCE // max(sum(tensor[0].nbytes for tensor in tensors.values()), 1), 1)
        for some in in_batches(finished.rows, at_once):
            planes = {name: [_planes(tensor[place]) for _, place in some] for name, tensor in tensors.items()}
            writer.write([row for row, _ in some], planes)
        spare.append(finished.tensors)

    asked_for = [row for chunk in chunks for row in chunk if status[row] != FAILED]
    with plan.fetched_ahead(asked_for), WriteBehind[_Finished](write, polite).running() as behind:
        for chunk, loaded in read_ahead(chunks, load, _workers(plan), polite):
            missing = {row for row in chunk if status[row] == MISSING}
            for row, pixels in zip(chunk, loaded, strict=True):
                if isinstance(pixels, str) and row in missing and not plan.is_tiled(row):
                    _fail(plan, store, row, pixels)
            if plan.is_tiled(chunk[0]):
                for row in missing:
                    if reason := fill_by_tiles(plan, model, store, row, basis):
                        _fail(plan, store, row, reason)
            elif any(row in missing and not isinstance(pixels, str) for row, pixels in zip(chunk, loaded, strict=True)):
                parts = _parts(plan, model, _stack(loaded))
                tensors, finite = encode_parts(parts, plan.options.dtype, basis, spare.pop() if spare else None)
                rows = []
                for place, row in enumerate(chunk):
                    if row in missing and not isinstance(loaded[place], str):
                        if finite[place]:
                            rows.append((row, place))
                        else:
                            _fail(plan, store, row, plan.overflow)
                behind.put(_Finished(rows, tensors))
            yield len(missing)
    writer.flush()


def _read_batch(plan: ExtractPlan, rows: Sequence[int], model: FeatureExtractor) -> list[Tensor | str]:
    """Pixels of some rows, or the reasons why there are none; read as they are in `_compute`."""
    polite = model.runtime.device.type == "cpu"
    return next(read_ahead([rows], lambda row: _load(plan, row), _workers(plan), polite))[1]


def _load(plan: ExtractPlan, row: int) -> Tensor | str:
    """Pixels (3, H, W), uint8, of a row's input, or the reason why there are none."""
    try:
        return plan.pixels(row)
    except BrixelError as error:
        return reason_of(error, plan.inputs.items[row].path)


def _stack(loaded: Sequence[Tensor | str]) -> Tensor:
    """Pixels (B, 3, H, W); a failed image's place is black, so that the batch keeps its shape."""
    black = torch.zeros_like(next(pixels for pixels in loaded if not isinstance(pixels, str)))
    return torch.stack([black if isinstance(pixels, str) else pixels for pixels in loaded]).contiguous()


def _parts(plan: ExtractPlan, model: FeatureExtractor, pixels: Tensor) -> dict[str, Tensor]:
    """What is stored of these images, by dataset."""
    return model.parts(pixels, plan.options.fields, plan.options.layers)


def _planes(features: Tensor) -> Array:
    """One image's (D, h, w), channel by channel as it is stored; the models compute with channels last. Or its tokens.

    Nothing is changed in tokens, which are (D) or (R, D).
    """
    if features.ndim < 3:
        return np.asarray(features.numpy())
    # Flat, the copy is a plain transpose, for which torch has a faster way.
    flat: Array = features.flatten(1).contiguous().view(features.shape).numpy()
    return flat


def _fail(plan: ExtractPlan, store: Store, row: int, reason: str) -> None:
    store.put(REASON, [row], [reason_text(store, reason)])
    store.mark(row, FAILED)
    if plan.options.strict:
        raise BrixelError(
            f"{plan.inputs.items[row].name}: {reason}. Stopped because of --strict; "
            "what was computed stays, and the same command without --strict goes on."
        )


def _fit_pca(plan: ExtractPlan, model: FeatureExtractor, reporter: Reporter) -> Basis:
    usable = [row for row, size in enumerate(plan.model_sizes) if size is not None]
    sample = [usable[at * len(usable) // min(PCA_SAMPLE, len(usable))] for at in range(min(PCA_SAMPLE, len(usable)))]
    gathered = RunningPca(plan.spec.embed_dim)
    polite = model.runtime.device.type == "cpu"
    whole = [row for row in sample if not plan.is_tiled(row)]
    with plan.fetched_ahead(whole), reporter.bar("principal components", len(sample), unit="image") as bar:
        for _, loaded in read_ahead([[row] for row in whole], lambda row: _load(plan, row), _workers(plan), polite):
            if not isinstance(loaded[0], str):
                gathered.add(model.maps(_stack(loaded))[0])
            bar.update(1)
        for row in sorted(set(sample) - set(whole)):
            with suppress(BrixelError), map_strips(plan, model, row) as strips:
                for _, strip in strips:
                    gathered.add(strip)
            bar.update(1)
    if not gathered.count:
        raise BrixelError(
            f"None of the {len(sample)} images sampled for --pca can be decoded. Name others with --input."
        )
    assert plan.options.pca is not None
    return gathered.basis(plan.options.pca)


def _stored_basis(store: Store) -> Basis | None:
    if "pca_components" not in store:
        return None
    components, mean = (torch.from_numpy(np.array(store.array(f"pca_{part}"))) for part in ("components", "mean"))
    return Basis(components, mean)


def _workers(plan: ExtractPlan) -> int:
    return 1 if plan.inputs.videos else num_workers(plan.options.workers)  # frames come in order


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with as many threads as the file was begun with: on a CPU the last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_pillow(options: ExtractOptions) -> Iterator[None]:
    """Pillow warns about odd files one by one; what matters of it is in the status column."""
    with warnings.catch_warnings(), larger_images(options.tile is not None):
        warnings.filterwarnings("ignore", module="PIL")
        yield
