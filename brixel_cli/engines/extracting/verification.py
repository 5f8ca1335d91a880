"""What an extraction wrote, looked at again: which rows are damaged, and how those of the index are restored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brixel_cli.data.feature_file import FeatureFile
from brixel_cli.data.row_store import DONE, FAILED, MISSING, REASON, STATUS, Store
from brixel_cli.engines.extracting.plan import ExtractPlan, reason_text
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.streams import num_workers, read_ahead
from brixel_cli.errors import UNREACHED, BrixelError


@dataclass(frozen=True)
class Verified:
    """What is left of a feature file.

    Attributes:
        path: of the feature file.
        num_images: its rows.
        num_missing: rows that are not computed yet.
        has_checksums: whether every change can be noticed; else only that a map is there, of its size, and finite.
        damaged: what is wrong, by name of the image.
    """

    path: Path
    num_images: int
    num_missing: int
    has_checksums: bool
    damaged: dict[str, str]


def verify(path: Path, reporter: Reporter) -> Verified:
    """Read every row of a feature file, or every file of a folder of single files.

    Rows that have changed are marked as missing, so that the command that wrote them computes them again.

    Raises:
        BrixelError: the file is missing, or so damaged that no row of it can be told.
    """
    features = FeatureFile(path)
    damaged = damaged_rows(features, range(len(features)), reporter)
    if changed := [row for row in damaged if features.status[row] == DONE]:
        try:
            store = Store(features.path, writable=[STATUS])
            for row in changed:
                store.mark(row, MISSING)
            store.flush()
            if features.description["storage"] == "zarr":
                FeatureFile(features.path).describe_arrays()
        except BrixelError as error:
            reporter.warn(f"the damaged rows stay marked as done, and will not be computed again: {error}")
    return Verified(
        features.path,
        len(features),
        int((features.status == MISSING).sum()),
        features.has_checksums,
        {features.paths[row]: reason for row, reason in damaged.items()},
    )


def damaged_rows(
    features: FeatureFile, rows: Sequence[int], reporter: Reporter, thorough: bool = True
) -> dict[int, str]:
    """What is wrong with each damaged row among these; the whole of every row is read only where this is thorough."""
    found = {}
    if not thorough and not features.single_files:
        return {row: damage for row in rows if (damage := features.damage(row, thorough))}

    def check(row: int) -> str:
        return features.damage(row, thorough)

    with reporter.bar("checking", len(rows), unit="image") as bar:
        for (row,), (damage,) in read_ahead([[row] for row in rows], check, num_workers(), polite=False):
            if damage:
                found[row] = damage
            bar.update(1)
    return found


def restore_index(plan: ExtractPlan, reporter: Reporter) -> None:
    """Write damaged datasets of the index again where the plan has the same values, as their checksums tell."""
    damaged = Store(plan.store_path).damaged
    if damaged:
        store, known = Store(plan.store_path, writable=damaged), plan.filled(plan.digests(reporter))
        restored = [name for name in damaged if name in known and store.restore(name, known[name])]
        store.flush()
        if restored:
            reporter.warn(f"{plan.store_path}: the damaged datasets {', '.join(restored)} were restored")


def fetch_again(plan: ExtractPlan, reporter: Reporter) -> None:
    """Mark rows as missing that failed because their bytes did not come, so that they are tried again."""
    store = Store(plan.store_path)
    failed = np.flatnonzero((store.status == FAILED) & np.char.startswith(store.array(REASON), UNREACHED.encode()))
    unreached = [row for row in failed.tolist() if not plan.reasons[row]]
    if unreached:
        store = Store(plan.store_path, writable=[STATUS])
        for row in unreached:
            store.mark(row, MISSING)
        store.flush()
        reporter.say(f"{len(unreached)} images that were not fetched are tried again")


def discard_damaged(plan: ExtractPlan, store: Store, rows: Sequence[int], reporter: Reporter, thorough: bool) -> None:
    """Have damaged rows among these computed again by marking them as missing, or, without an image, as failed."""
    damaged = damaged_rows(FeatureFile(plan.store_path), rows, reporter, thorough)
    for row in damaged:
        if plan.reasons[row]:
            store.put(REASON, [row], [reason_text(store, plan.reasons[row])])
        store.mark(row, FAILED if plan.reasons[row] else MISSING)
    if damaged:
        row, reason = next(iter(damaged.items()))
        reporter.warn(
            f"{plan.output}: {len(damaged)} damaged images are computed again; {plan.inputs.items[row].name}: {reason}"
        )
