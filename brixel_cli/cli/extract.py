"""`brixel extract`: options to plan, plan to engine, result to table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from brixel_cli.cli.console import Progress, is_first_process, print_files, print_json, print_table, say
from brixel_cli.config.extract import ExtractOptions
from brixel_cli.core.formatting import human_bytes, human_seconds
from brixel_cli.errors import UNREACHED, BrixelError, UsageError

if TYPE_CHECKING:
    from brixel_cli.engines.extracting.extraction import Estimate
    from brixel_cli.engines.extracting.parts import Extracted
    from brixel_cli.engines.extracting.plan import ExtractPlan

MOST_GRIDS = 20


def run_extract(
    options: ExtractOptions,
    export: Path | None,
    verify: Path | None,
    join: str | None,
    copy: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Carry out `brixel extract` with options as the user gave them; see `app.extract` for what they mean.

    Raises:
        BrixelError: something the user can fix; also, at the end, that some images failed, or are damaged.
    """
    if join is not None:
        if verify is not None or export is not None:
            raise UsageError("--join, --verify and --export each are a command of their own: give one of them.")
        if options.inputs or options.shard is not None or dry_run:
            raise UsageError("--join reads the parts that are there: leave out --input, --shard and --dry-run.")
        _join(options, join, copy, as_json)
        return
    if copy:
        raise UsageError("--copy goes with --join 'OUT.*.h5'.")
    if verify is not None:
        if options.inputs or dry_run or export is not None or options.shard is not None:
            raise UsageError("--verify reads a feature file: leave out --input, --shard, --export and --dry-run.")
        _verify(verify, as_json)
        return
    if export is not None:
        if options.inputs or dry_run or options.shard is not None:
            raise UsageError("--export writes the model, not features: leave out --input, --shard and --dry-run.")
        _export(options, export, as_json)
        return

    # numpy and h5py are slow to import, and torch takes seconds: only now, when there is work for it.
    from brixel_cli.engines.extracting.parts import completed
    from brixel_cli.engines.extracting.uploading import found_there

    find = completed if options.upload is None else found_there
    if not dry_run and (passed := find(options)) is not None:
        say(f"{passed.uploaded or passed.output} is complete")
        _finish(passed, as_json)
        return
    from brixel_cli.engines.extracting.extraction import extract, plan_only, rehearse

    if dry_run:
        plan, estimate = plan_only(options, Progress()), None
        try:
            estimate = rehearse(plan, Progress())
        finally:
            _show_plan(plan, estimate, as_json)
        return
    _finish(extract(options, Progress()), as_json)


def _finish(done: Extracted, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "output": done.uploaded or str(done.output),
                "images": done.num_images,
                "computed": done.num_computed,
                "before": done.num_before,
                "failed": len(done.failures),
                "failures": done.failures,
                "seconds": round(done.seconds, 3),
                "pictures": [str(path) for path in done.pictures],
            }
        )
    else:
        _show_result(done)
    if done.output.exists():
        say(f'read it: brixel_cli.FeatureFile("{done.output}")')
    if done.failures and is_first_process():
        raise BrixelError(
            f"{len(done.failures)} of {done.num_images} images failed; {done.uploaded or done.output} holds the "
            f"others, and the reasons in its dataset reason. {_advice(done.failures)}"
        )


def _advice(failures: dict[str, str]) -> str:
    """What to do about images that failed."""
    unreached = sum(reason.startswith(UNREACHED) for reason in failures.values())
    again = f"The same command tries the {unreached} again that were not fetched. " if unreached else ""
    others = "Replace or remove those files, then give --overwrite." if unreached < len(failures) else ""
    return (again + others).strip()


def _join(options: ExtractOptions, pattern: str, copy: bool, as_json: bool) -> None:
    if options.upload is not None:
        raise UsageError("--join makes a file on this disk, beside the parts: give --output a path.")
    if options.output is None:
        raise UsageError("--join needs the name of the file to be made: --output FILE.h5.")
    from brixel_cli.engines.extracting.joining import join

    done = join(pattern, options.output, copy, options.overwrite, Progress())
    if as_json:
        print_json(asdict(done) | {"output": str(done.output)})
        return
    rows = [
        ["parts", f"{done.num_parts:,}"],
        ["images", f"{done.num_images:,}"],
        ["  failed", f"{done.num_failed:,}"],
        ["size", human_bytes(done.num_bytes)],
    ]
    notes = (
        [] if done.copied else ["The maps stay in the parts: keep them where they are, below the folder of this file."]
    )
    print_table(str(done.output), ["", ""], rows, notes)
    print_files([done.output])


def _show_plan(plan: ExtractPlan, estimate: Estimate | None, as_json: bool) -> None:
    from brixel_cli.cli.tables import show_failures

    if as_json:
        print_json(plan.summary() | (asdict(estimate) if estimate else {}))
    else:
        grids = list(plan.layout.rows_of_grid.items())
        rows = [
            ["images found", f"{len(plan.reasons):,}"],
            ["  of them unusable", f"{len(plan.reasons) - plan.num_usable:,}"],
            ["sizes rounded to the patch", f"{plan.num_snapped:,} (by {plan.most_snapped:.1f} px at most)"],
            *([f"grid {h}x{w}", f"{len(images):,}"] for (h, w), images in grids[:MOST_GRIDS]),
            *([["other grids", f"{len(grids) - MOST_GRIDS:,}"]] if len(grids) > MOST_GRIDS else []),
            ["channels", f"{plan.layout.channels:,} {plan.options.dtype}"],
            ["disk needed", human_bytes(plan.bytes_needed)],
            ["disk free", human_bytes(plan.bytes_free)],
        ]
        notes = []
        if estimate:
            rows += [
                ["images to be computed", f"{estimate.images_left:,}"],
                ["time for them, about", human_seconds(estimate.seconds)],
            ]
            notes = [f"Time: {estimate.how_timed}."]
        title = f"{plan.output}: {plan.spec.source} of {plan.spec.backbone}"
        print_table(title, ["", ""], rows, notes)
        failures = {item.name: reason for item, reason in zip(plan.inputs.items, plan.reasons, strict=True) if reason}
        show_failures(failures, "features")
    say("dry run: nothing was written")


def _show_result(done: Extracted) -> None:
    from brixel_cli.cli.tables import show_failures

    rate = done.num_computed / done.seconds if done.seconds > 0 else 0.0
    rows = [
        ["images", f"{done.num_images:,}"],
        ["  computed now", f"{done.num_computed:,}"],
        ["  there before", f"{done.num_before:,}"],
        ["  failed", f"{len(done.failures):,}"],
        ["seconds", f"{done.seconds:,.1f}"],
        ["images per second", f"{rate:,.2f}" if done.num_computed else "-"],
    ]
    print_table(done.uploaded or str(done.output), ["", ""], rows)
    show_failures(done.failures, "features")
    print_files([path for path in (done.output, *done.pictures) if path.exists()])


def _verify(path: Path, as_json: bool) -> None:
    from brixel_cli.cli.tables import show_failures
    from brixel_cli.engines.extracting.verification import verify

    found = verify(path, Progress())
    if as_json:
        print_json(asdict(found) | {"path": str(found.path)})
    else:
        rows = [
            ["images", f"{found.num_images:,}"],
            ["  not computed yet", f"{found.num_missing:,}"],
            ["  damaged", f"{len(found.damaged):,}"],
        ]
        notes = [] if found.has_checksums else ["Without checksums: only missing, cut and non-finite maps are found."]
        print_table(str(found.path), ["", ""], rows, notes)
        show_failures(found.damaged, "intact features")
    if found.damaged:
        raise BrixelError(
            f"{len(found.damaged)} of {found.num_images} images in {path} are damaged. "
            "Give the command that wrote it again: it computes those, and leaves the others as they are."
        )


def _export(options: ExtractOptions, path: Path, as_json: bool) -> None:
    from brixel_cli.engines.extracting.exporting import export

    done = export(options, path, Progress())
    if as_json:
        checked = {"x".join(str(side) for side in size): error for size, error in done.checked.items()}
        print_json({"path": str(done.path), "dynamic": done.dynamic, "checked": checked, "error": done.largest_error})
        return
    rows = [
        [f"{height}x{width}, batch of {batch}", f"{error:.1e}"]
        for (batch, height, width), error in done.checked.items()
    ]
    print_table(
        f"{done.path}: largest difference from PyTorch, by input",
        ["input", "difference"],
        rows,
        [f"Dynamic: {done.dynamic}."],
    )
    print_files([done.path])
