"""Whether a feature file that is there may be continued: begun with the same model, sizes and files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from brixel_cli.data.feature_file import FORMAT, FeatureFile
from brixel_cli.data.row_store import Array, Store
from brixel_cli.engines.extracting.plan import ExtractPlan, preview_folder
from brixel_cli.engines.models import FeatureExtractor
from brixel_cli.engines.reporting import Reporter
from brixel_cli.errors import UsageError

ADVISORY = ("device", "versions", "backbone_weights")
"""Differences here can change the last bits at most, or nothing: they are told, not refused."""
MOST_NAMED = 3


def describe(plan: ExtractPlan, model: FeatureExtractor) -> dict[str, Any]:
    """What the numbers of a file are; resuming compares it, but for the device and the versions."""
    options = plan.options
    return model.describe() | {
        "res": options.res,
        "fit": options.fit,
        "dtype": options.dtype,
        "pca": options.pca,
        "storage": options.storage,
    }


def check_same(plan: ExtractPlan, model: FeatureExtractor, store: Store, reporter: Reporter) -> None:
    """Refuse to continue a file that was begun with something else, naming what.

    Raises:
        UsageError: the file differs from what is asked for.
    """
    found = store.attributes.get("format", "unmarked")
    if found != FORMAT:
        raise UsageError(f"{store.path} is of format {found}, not {FORMAT}. Name another file with --output.")
    wanted = describe(plan, model)
    differences = _differences(store.description, {k: v for k, v in wanted.items() if k not in ADVISORY})
    differences += _content_differences(plan, store)
    if differences:
        listed = "\n  ".join(differences)
        raise UsageError(
            f"{plan.output} was begun with something else:\n  {listed}\n"
            "Give the same command to continue it, --overwrite to begin anew, or another file with --output."
        )
    for difference in _differences(store.description, {k: wanted[k] for k in ("device", "versions")}):
        reporter.warn(f"{plan.output} was begun with another {difference}: the last bits of new rows may differ.")
    asked, kept = plan.options.batch_size, store.description["batch_sizes"]
    if asked is not None and any(asked != size for size in kept.values()):
        reporter.say(
            f"batches stay composed as the file was begun, {max(kept.values())} images at most, {asked} at once"
        )


def clear_output(plan: ExtractPlan) -> None:
    """Remove what `--overwrite` replaces: our own feature file, single files and contact sheet, nothing else."""
    if plan.store_path.exists():
        for file in FeatureFile(plan.store_path).single_files:
            file.unlink(missing_ok=True)
        plan.store_path.unlink()
    (preview_folder(plan.output) / "contact_sheet.png").unlink(missing_ok=True)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: file has x, asked for y`, for each key of `new` that differs."""
    lines = []
    for key, value in new.items():
        before = old.get(key)
        if before == value:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            parts = [part for part in value if before.get(part) != value[part]]
            lines += [f"{key}.{part}: file {_short(before.get(part))}, now {_short(value[part])}" for part in parts]
        else:
            lines.append(f"{key}: file {_short(before)}, now {_short(value)}")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("sha256", value)  # of a student, where there is none on the other side
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:16]}..."


def _content_differences(plan: ExtractPlan, store: Store) -> list[str]:
    before, after = store.array("paths"), plan.filled()
    old, new = [bytes(name).decode() for name in before], [bytes(name).decode() for name in after["paths"]]
    if old != new:
        gone, come = sorted(set(old) - set(new)), sorted(set(new) - set(old))
        lines = [f"{len(come)} images are new: {_some(come)}"] if come else []
        lines += [f"{len(gone)} images are gone: {_some(gone)}"] if gone else []
        return lines or ["the images come in another order"]
    changed = _rows(store.array("file_size") != after["file_size"]) | _rows(
        store.array("modified") != after["modified"]
    )
    changed |= _rows((store.array("model_size") != after["model_size"]).any(axis=1))
    if changed:
        return [f"{len(changed)} images have changed since: {_some([new[row] for row in sorted(changed)])}"]
    return []


def _rows(mask: Array) -> set[int]:
    return {int(row) for row in np.flatnonzero(mask)}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (" ..." if len(names) > MOST_NAMED else "")
