"""Whether an output that is there may be continued: begun with the same model, options and images; or is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from brixel_cli.config.section import difference_lines, differences
from brixel_cli.core.formatting import human_size
from brixel_cli.data.feature_file import FeatureFile
from brixel_cli.data.feature_layout import FORMAT, FORMAT_OF_PARTS, PLAIN
from brixel_cli.data.row_store import Store
from brixel_cli.engines.extracting.plan import CONTACT_SHEET, ExtractPlan, preview_folder
from brixel_cli.engines.models import FeatureExtractor
from brixel_cli.engines.reporting import Reporter
from brixel_cli.errors import BrixelError, UsageError

ADVISORY = ("device", "versions", "backbone_weights", "tf32", "num_registers")
"""Differences here can change the last bits at most, or nothing: they are warned of, not refused."""
OF_STUDENT = ("student.adapter", "student.step", "student.released")
"""The SHA-256 of the student covers these."""
OPTIONS = {
    key: f"--{key}"
    for key in ("source", "res", "fit", "dtype", "pca", "fields", "layers", "tile", "overlap", "precision", "backbone")
} | {
    "storage": "--format",
    "student.sha256": "--checkpoint, student.sha256",
}
MOST_NAMED = 3


def describe(plan: ExtractPlan, model: FeatureExtractor) -> dict[str, Any]:
    """What the numbers of a file are; continuing it compares this, but for what is advisory."""
    options = plan.options
    return model.describe() | {
        "res": options.res,
        "fit": options.fit,
        "dtype": options.dtype,
        "pca": options.pca,
        "storage": options.storage,
        **plan.layout.described,
        **plan.shard,
        **({"tile": plan.tiling.tile, "overlap": plan.tiling.overlap} if plan.tiling else {}),
    }


def check_same(plan: ExtractPlan, model: FeatureExtractor, store: Store, reporter: Reporter) -> None:
    """Refuse to continue a file that was begun with another model, other options or other images; names what differs.

    Images are the same where their contents are; in a file without digests, where size and time of change are.

    Raises:
        UsageError: the file differs from what is asked for.
        BrixelError: it is damaged.
    """
    found = store.attributes.get("format", "unmarked")
    if found not in (FORMAT, FORMAT_OF_PARTS):
        known = f"{FORMAT} or {FORMAT_OF_PARTS}"
        raise UsageError(f"{store.path} is of format {found}, not {known}. Name another file with --output.")
    FeatureFile(store.path)  # refuses what is damaged
    absent = PLAIN | {"tile": None, "overlap": None}
    new = absent | describe(plan, model)
    old = {key: store.description.get(key, absent.get(key)) for key in new}
    changed = differences(old, new, ignored=(*ADVISORY, *OF_STUDENT))
    lines = difference_lines({OPTIONS.get(key, key): values for key, values in changed.items()})
    lines += _image_differences(plan, store, reporter, fitted_alike=not {"res", "fit"} & set(changed))
    if lines:
        listed = "\n  ".join(lines)
        raise UsageError(
            f"{plan.output} was begun with something else (in the file -> asked for now):\n  {listed}\n"
            "Give the same command to continue it, --overwrite to begin anew, or another file with --output."
        )
    advisory = {key: description for key, description in new.items() if key in ("device", "versions")}
    for line in difference_lines(differences({key: old[key] for key in advisory}, advisory)):
        reporter.warn(f"{plan.output} was begun with another {line}: the last bits of new rows may differ.")
    asked, kept = plan.options.batch_size, _kept_batch_sizes(plan, store)
    if asked is not None and any(asked != size for size in kept.values()):
        reporter.say(
            f"batches stay composed as the file was begun, {max(kept.values())} images at most, {asked} at once"
        )


def clear_output(plan: ExtractPlan) -> None:
    """Remove what `--overwrite` replaces: our own feature file, what belongs to it, and contact sheet, nothing else."""
    if plan.store_path.exists():
        FeatureFile(plan.store_path).clear()
    (preview_folder(plan.output) / CONTACT_SHEET).unlink(missing_ok=True)


def _kept_batch_sizes(plan: ExtractPlan, store: Store) -> dict[str, int]:
    found = store.description.get("batch_sizes")
    kept = found if isinstance(found, dict) else {}
    sizes = set(map(human_size, plan.rows_of_size))
    counts = [store.description.get("threads"), *(kept.get(size) for size in sizes)]
    if not all(type(count) is int and count > 0 for count in counts):
        raise BrixelError(
            f"{store.path} is damaged: its description has no threads, or no batch sizes for "
            f"{', '.join(sorted(sizes))}. Begin anew with --overwrite."
        )
    return {size: kept[size] for size in sizes}


def _image_differences(plan: ExtractPlan, store: Store, reporter: Reporter, fitted_alike: bool) -> list[str]:
    """What differs in the images, a line each; sizes count only where they were fitted by the same options."""
    old = [bytes(name).decode() for name in store.array("paths")]
    new = [item.name for item in plan.inputs.items]
    if old != new:
        gone, come = sorted(set(old) - set(new)), sorted(set(new) - set(old))
        lines = [f"{len(come)} images are new: {_some(come)}"] if come else []
        lines += [f"{len(gone)} images are gone: {_some(gone)}"] if gone else []
        return lines or ["the images come in another order"]
    after = plan.filled(plan.digests(reporter))
    changed = (store.array("file_size") != after["file_size"]) | (store.array("modified") != after["modified"])
    if "sha256" in store:
        before = store.array("sha256").astype(after["sha256"].dtype)
        known = (before != b"") & (after["sha256"] != b"")
        changed = np.where(known, before != after["sha256"], changed)
    if fitted_alike:
        changed |= (store.array("model_size") != after["model_size"]).any(axis=1)
    rows = np.flatnonzero(changed)
    return [f"{len(rows)} images have changed since: {_some([new[row] for row in rows])}"] if len(rows) else []


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (" ..." if len(names) > MOST_NAMED else "")
