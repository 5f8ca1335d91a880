"""The benchmark: what each way to a map costs and how close it comes to the teacher, row by row."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from brixel_cli.config.base import parse_sizes
from brixel_cli.config.benchmark import BenchmarkOptions
from brixel_cli.core.backbone import check_size
from brixel_cli.core.files import write_text
from brixel_cli.core.formatting import human_bytes
from brixel_cli.core.student import Student
from brixel_cli.engines.benchmarking.baselines import Baseline, load_baseline
from brixel_cli.engines.benchmarking.contenders import Contender, Size, make_contenders
from brixel_cli.engines.benchmarking.counts import count_baselines, count_rows, largest_sizes
from brixel_cli.engines.benchmarking.environment import describe_environment
from brixel_cli.engines.benchmarking.fidelity import draw_examples, measure_fidelity
from brixel_cli.engines.benchmarking.latency import interleaved
from brixel_cli.engines.benchmarking.models import Candidate, Photos, find_candidates, find_photos, load_or_randomise
from brixel_cli.engines.benchmarking.peak_memory import can_measure, peak_in_fresh_process, peak_on_gpu
from brixel_cli.engines.benchmarking.probe_results import ProbeResult
from brixel_cli.engines.benchmarking.results import (
    FILE_NAME,
    TABLE_NAME,
    BudgetRow,
    Environment,
    Model,
    Picture,
    Results,
    Row,
    Settings,
    read_results,
)
from brixel_cli.engines.benchmarking.student_probes import probes_of
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime, call_seconds, free_memory
from brixel_cli.errors import BrixelError, UsageError

MEMORY_MARGIN = 1.2
"""A row is run where the device has this many times what was counted for it."""
TOO_LARGE, TOO_LARGE_TO_LOAD = "not run: needs", "not run: its weights need"


@dataclass
class _Benchmark:
    """A benchmark in progress: what is asked for, and what was found so far."""

    options: BenchmarkOptions
    runtime: Runtime
    environment: Environment
    settings: Settings
    baselines: list[Baseline]
    reporter: Reporter
    folder: Path
    earlier: Results | None
    models: list[Model] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    budget: list[BudgetRow] = field(default_factory=list)
    probes: dict[str, tuple[ProbeResult, ...]] = field(default_factory=dict)

    def results(self) -> Results:
        """All that is known now."""
        return Results(
            command=self.options.command,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            environment=self.environment,
            settings=self.settings,
            models=tuple(self.models),
            rows=tuple(self.rows),
            budget=tuple(self.budget),
            pictures=tuple(self.pictures),
            notes=tuple(_notes(self.rows, self.models)),
            probes=self.probes,
        )

    def save(self) -> None:
        """Write results.json and results.csv."""
        results = self.results()
        write_text(self.folder / FILE_NAME, results.to_json())
        write_text(self.folder / TABLE_NAME, results.to_csv())


def benchmark(options: BenchmarkOptions, reporter: Reporter) -> tuple[Results, list[Path]]:
    """Measure every row of every model and size, and write results.json, results.csv and pictures.

    The same call again takes up what an earlier one measured on this machine, with these settings.

    Args:
        options: as given.
        reporter: hears of stages, warnings and progress.

    Returns:
        The results, and the files that were written.

    Raises:
        BrixelError: something the user can mend; what was measured before stays in the folder.
    """
    work, candidates = _begin(options, reporter)
    sizes = {candidate.name: _sizes(candidate, options) for candidate in candidates}
    counted = {
        (candidate.name, size): count_rows(candidate, size, options.highres, options.batch_size)
        for candidate in candidates
        for size in sizes[candidate.name]
    }
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {work.folder} cannot be made: {error.strerror}.") from error
    for candidate in candidates:
        groups = [(size, counted[candidate.name, size]) for size in sizes[candidate.name]]
        _measure_model(work, candidate, groups)
    if options.budget_bytes is not None:
        work.budget = _answer_budget(work, candidates, options.budget_bytes)
    found = {model.name: tuple(probes_of(model.student_sha256)) for model in work.models if model.student_sha256}
    work.probes = {name: probes for name, probes in found.items() if probes}
    work.save()
    results = work.results()
    files = [work.folder / FILE_NAME, work.folder / TABLE_NAME, *(work.folder / item.path for item in results.pictures)]
    return results, files


def count_only(options: BenchmarkOptions, reporter: Reporter) -> Results:
    """The rows as a benchmark would measure them, with what can be counted; nothing is run or written."""
    work, candidates = _begin(options, reporter)
    for candidate in candidates:
        for size in _sizes(candidate, options):
            work.rows += count_rows(candidate, size, options.highres, options.batch_size)
        work.models.append(candidate.describe(candidate.hollow().backbone, None))
    if options.budget_bytes is not None:
        work.budget = _answer_budget(work, candidates, options.budget_bytes)
    return work.results()


def _begin(options: BenchmarkOptions, reporter: Reporter) -> tuple[_Benchmark, list[Candidate]]:
    runtime = Runtime(options.device, options.precision)
    if runtime.world_size > 1:
        raise UsageError("A benchmark takes one process: leave torchrun out.")
    baselines = [load_baseline(reference) for reference in options.baselines]
    names = ["backbone", "bilinear", "student", "teacher", *(baseline.name for baseline in baselines)]
    if len(set(names)) < len(names):
        raise UsageError(f"--baseline: two rows of one name among {', '.join(names)}; rename the function.")
    settings = Settings(
        highres=options.highres,
        batch_size=options.batch_size,
        compiled=options.compiled,
        seconds=options.seconds,
        max_images=options.max_images,
        baselines=options.baselines,
        budget_bytes=options.budget_bytes,
        baselines_sha256=tuple(baseline.sha256 for baseline in baselines),
    )
    environment = describe_environment(runtime)
    earlier = None
    if not options.overwrite and (options.output / FILE_NAME).is_file():
        with suppress(BrixelError):  # of another version: nothing to take up
            earlier = read_results(options.output)
    if earlier and (earlier.environment != environment or replace(earlier.settings, budget_bytes=None) != replace(
        settings, budget_bytes=None
    )):  # fmt: skip
        reporter.say(f"{options.output}: what is there was measured elsewhere or with other settings: measured anew")
        earlier = None
    candidates = find_candidates(options, runtime.precision, reporter)
    return (
        _Benchmark(options, runtime, environment, settings, baselines, reporter, options.output, earlier),
        candidates,
    )


def _sizes(candidate: Candidate, options: BenchmarkOptions) -> list[Size]:
    patch = candidate.hollow().backbone.patch_size
    sizes = parse_sizes(options.sizes, patch) if options.sizes else [candidate.trained_size or (16 * patch, 16 * patch)]
    for size in sizes:
        check_size(*size, patch)
    return sizes


def _measure_model(work: _Benchmark, candidate: Candidate, groups: Sequence[tuple[Size, list[Row]]]) -> None:
    """Measure one model at all its sizes, and save after each."""
    photos = find_photos(candidate, work.options, work.reporter)
    described = candidate.describe(candidate.hollow().backbone, photos)
    place = len(work.models)
    work.models.append(described)
    student: Student | None = None
    for size, rows in groups:
        if _take_up(work, described, size, len(rows) + len(work.baselines)):
            continue
        work.reporter.say(f"{candidate.name} at {size[0]}x{size[1]} px")
        if student is None and _fits(work, rows[0]):
            candidate, student = load_or_randomise(candidate, work.options, str(work.runtime.device), work.reporter)
            if candidate.weights == "random" and described.weights != "random":
                photos, described = None, candidate.describe(student.backbone, None)
                work.models[place] = described
        if student is None:
            why = f"{TOO_LARGE_TO_LOAD} {human_bytes(rows[0].weights_bytes)}"
            work.rows += [replace(row, note=why) for row in rows]
        else:
            work.rows += _measure_size(work, candidate, student, size, rows, photos)
        work.save()


def _take_up(work: _Benchmark, model: Model, size: Size, num_rows: int) -> bool:
    """Take over the rows of one model and size that an earlier benchmark measured, if it has them all."""
    if work.earlier is None or model not in work.earlier.models:
        return False
    rows = [row for row in work.earlier.rows if (row.model, row.size) == (model.name, size)]
    if len(rows) != num_rows:
        return False
    if any(row.note.startswith((TOO_LARGE, TOO_LARGE_TO_LOAD)) and _fits(work, row) for row in rows):
        return False  # there is more free memory than there was
    work.reporter.say(f"{model.name} at {size[0]}x{size[1]} px: measured before; --overwrite measures anew")
    work.rows += rows
    work.pictures += [item for item in work.earlier.pictures if (item.model, item.size) == (model.name, size)]
    return True


def _measure_size(
    work: _Benchmark, candidate: Candidate, student: Student, size: Size, counted: list[Row], photos: Photos | None
) -> list[Row]:
    """Run the rows of one model and size that fit: time, peak memory, fidelity."""
    device = work.runtime.device
    if work.options.compiled:
        torch.compiler.reset()  # beyond a few compilations of one function torch runs it uncompiled
    contenders = make_contenders(student, size, work.options.highres, work.baselines)
    foreign = [contender for contender in contenders if contender.kind == "baseline"]
    counts = {row.label: row for row in counted}
    for row in count_baselines(candidate, foreign, student.backbone, size, work.options.batch_size):
        counts[row.label] = replace(row, counted_vit_gflop=counted[0].gflop)
    images = {contender.label: contender.input(work.options.batch_size, device) for contender in contenders}
    speed = _seconds_per_gflop(work, contenders[0], counts, images)
    notes = {label: why for label, row in counts.items() if (why := _why_not(work, row, speed))}
    run = [contender for contender in contenders if contender.label not in notes]
    calls = {}
    for contender in run:
        call = torch.compile(contender.call, dynamic=False) if work.options.compiled else contender.call
        calls[contender.label] = partial(call, images[contender.label])
    latencies = interleaved(calls, device, work.options.seconds, work.options.compiled)
    rows = {label: replace(counts[label], latency=latencies.get(label), note=notes.get(label, "")) for label in counts}
    for contender in run:
        rows[contender.label] = _with_memory(work, candidate, contender, rows[contender.label], size, images)
    if photos is not None and any(contender.kind == "bilinear" for contender in run):
        why = _why_no_teacher(work, candidate, size, speed)
        if why:
            rows["student"] = replace(rows["student"], note=rows["student"].note or f"no fidelity: teacher {why}")
        else:
            compared = [row for row in run if row.kind != "student" or candidate.stored is not None]
            rows |= _with_fidelity(work, candidate, student, size, compared, rows, photos)
    return [rows[contender.label] for contender in contenders]


def _with_fidelity(
    work: _Benchmark,
    candidate: Candidate,
    student: Student,
    size: Size,
    compared: Sequence[Contender],
    rows: dict[str, Row],
    photos: Photos,
) -> dict[str, Row]:
    """The rows whose maps are compared with the teacher's, with the figures; some photographs are drawn."""
    views = photos.views(student.backbone, candidate.factor, size)
    found = measure_fidelity(compared, views, student.backbone, work.reporter, f"fidelity, {size[0]}x{size[1]} px")
    ranked = found["student" if "student" in found else "bilinear"].worst_images
    work.pictures += draw_examples(compared, views, student.backbone, ranked, work.folder, candidate.name, size)
    return {label: replace(rows[label], fidelity=fidelity) for label, fidelity in found.items()}


def _seconds_per_gflop(
    work: _Benchmark, backbone: Contender, counts: dict[str, Row], images: dict[str, torch.Tensor]
) -> float:
    """Seconds of a call on a batch, for each GFLOP of one image, by the backbone's row; 0 where that does not fit."""
    row = counts[backbone.label]
    if not _fits(work, row, loaded=True):
        return 0.0
    with torch.inference_mode():
        # The fastest of several: one slow call of a small model must not rule out a large one.
        seconds = min(
            call_seconds(partial(backbone.call, images[backbone.label]), work.runtime.device) for _ in range(4)
        )
    return seconds / (row.gflop or 1)


def _why_not(work: _Benchmark, row: Row, seconds_per_gflop: float) -> str:
    """Why a row is not run: too large for memory, or too slow, judged by the backbone's speed; or nothing."""
    if not _fits(work, row, loaded=True):
        return f"{TOO_LARGE} {human_bytes((row.total_bytes or 0) * MEMORY_MARGIN)} of memory"
    estimate = seconds_per_gflop * (row.gflop or 0)
    if estimate > work.options.seconds:
        return f"not run: about {estimate:.0f} s a call, by its FLOP; --seconds {estimate * 1.2:.0f} runs it"
    return ""


def _why_no_teacher(work: _Benchmark, candidate: Candidate, size: Size, seconds_per_gflop: float) -> str:
    """Why the fidelity, for which the teacher sees photographs one by one, is not measured; or nothing."""
    teacher = count_rows(candidate, size, highres=True, batch_size=1)[-1]
    return _why_not(work, teacher, seconds_per_gflop / work.options.batch_size)


def _with_memory(
    work: _Benchmark, candidate: Candidate, contender: Contender, row: Row, size: Size, images: dict[str, torch.Tensor]
) -> Row:
    device = work.runtime.device
    if not can_measure(device):
        return row
    if device.type == "cuda":
        peak = peak_on_gpu(lambda: contender.call(images[contender.label]), device)
    else:
        found = peak_in_fresh_process(candidate, size, contender.label, work.options.batch_size, work.options.baselines)
        if found is None:
            work.reporter.warn(f"{row.model}, {row.label}: the process that measures its memory was killed: counted")
            return row
        peak = found
    return replace(row, peak_bytes=peak.peak_bytes, kept_bytes=peak.kept_bytes, memory="measured")


def _fits(work: _Benchmark, row: Row, loaded: bool = False) -> bool:
    """Whether a row can be run here; on a CPU twice, as its peak is measured in a process of its own."""
    device = work.runtime.device
    if device.type == "cuda":
        return ((row.total_bytes or 0) - loaded * row.weights_bytes) * MEMORY_MARGIN <= free_memory(device)
    return (row.total_bytes or 0) * MEMORY_MARGIN + (not loaded) * row.weights_bytes <= free_memory(device)


def _answer_budget(work: _Benchmark, candidates: Sequence[Candidate], budget_bytes: int) -> list[BudgetRow]:
    """Whether each row fits into the budget, and the largest size at which each model's student and teacher do."""
    answers = [
        BudgetRow(row.model, row.label, row.size, row.total_bytes, row.memory, row.total_bytes <= budget_bytes, False)
        for row in work.rows
        if row.total_bytes is not None
    ]
    labels = ["student", "teacher"] if work.options.highres else ["student"]
    with work.reporter.bar("largest sizes", len(candidates), unit="model") as bar:
        for candidate in candidates:
            answers += largest_sizes(candidate, labels, budget_bytes, work.options.batch_size)
            bar.update(1)
    return answers


def _notes(rows: Sequence[Row], models: Sequence[Model]) -> list[str]:
    """What is to be read with the table."""
    notes = [
        "Memory is the peak above the weights (c: counted, not measured); less FLOP, less memory, faster: how many "
        "times, beside the teacher."
    ]
    random = [model.name for model in models if model.weights == "random"]
    if random:
        notes.append(f"Random weights, on purpose, as only cost is measured: {', '.join(random)}.")
    deviations = [
        abs(row.counted_vit_gflop / row.formula_gflop - 1)
        for row in rows
        if row.formula_gflop and row.counted_vit_gflop
    ]
    if deviations:
        notes.append(
            "GFLOP: a multiply-add is 2, attention counted. The count of the transformers differs from the closed "
            f"formula by {max(deviations):.2%} at most."
        )
    unseen = sorted({name for row in rows for name in row.uncounted})
    if unseen:
        notes.append(f"Operators that the counter did not see: {', '.join(unseen)}.")
    counted = [f"{row.model} {row.label} {row.size[0]}x{row.size[1]}: {row.note}" for row in rows if row.note]
    return notes + counted
