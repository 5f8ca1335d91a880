"""The benchmark: what each way to a map costs and how close it comes to the teacher, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from brixel_cli.config.benchmark import BenchmarkOptions
from brixel_cli.core.files import locked, make_folder, write_text
from brixel_cli.core.formatting import human_bytes, human_size, now
from brixel_cli.core.memory import is_out_of_memory
from brixel_cli.core.student import Student
from brixel_cli.engines.baselines import load_baseline
from brixel_cli.engines.benchmarking.cost import (
    can_measure,
    count_row,
    count_rows,
    largest_sizes,
    peak_in_fresh_process,
    peak_on_gpu,
)
from brixel_cli.engines.benchmarking.environment import describe_environment
from brixel_cli.engines.benchmarking.fidelity import draw_examples, measure_fidelity
from brixel_cli.engines.benchmarking.methods import Method, enlarged, in_precision, make_methods
from brixel_cli.engines.benchmarking.models import (
    Candidate,
    ImageSet,
    find_candidates,
    find_images_of,
    load_or_randomise,
    sizes_of,
)
from brixel_cli.engines.benchmarking.probes import probes_of
from brixel_cli.engines.benchmarking.results import (
    FILE_NAME,
    TABLE_NAME,
    BudgetRow,
    Model,
    Picture,
    Results,
    Row,
    Settings,
    Size,
    read_results,
)
from brixel_cli.engines.equal_cost import EQUAL_COST, choose_rival, find_rivals
from brixel_cli.engines.latency import interleaved
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import (
    Runtime,
    call_seconds,
    free_memory,
    memory_errors,
    release_cached,
)
from brixel_cli.errors import BrixelError, UsageError

MEMORY_MARGIN = 1.2
"""A row is run where the device has this many times what was counted for it."""
HOPELESS = 10
"""A row is not even tried where its FLOP let expect a call of so many times --seconds."""
TOO_LARGE, TOO_LARGE_TO_LOAD, OUT_OF_MEMORY = "not run: needs", "not run: its weights need", "not run: out of memory"
ADVICE = "Give a smaller --res or --batch-size, or --precision bfloat16"


def benchmark(options: BenchmarkOptions, reporter: Reporter) -> tuple[Results, list[Path]]:
    """Measure every row of every model and size, and write results.json, results.csv and pictures.

    The same call again takes over what an earlier one measured on this machine, with these settings.

    Args:
        options: as given.
        reporter: hears of stages, warnings and progress.

    Returns:
        The results, and the files that were written.

    Raises:
        BrixelError: an error that the user can fix; what was measured before stays in the folder.
    """
    with locked(options.output):
        work = _Benchmark(options, reporter)
        sizes = {candidate.name: sizes_of(candidate, options) for candidate in work.candidates}
        groups = {name: [(size, work.count(name, size)) for size in found] for name, found in sizes.items()}
        make_folder(options.output)
        for candidate in work.candidates:
            work.measure_model(candidate, groups[candidate.name])
        work.answer_budget()
        results = work.save()
    names = [FILE_NAME, TABLE_NAME, *(picture.path for picture in results.pictures)]
    return results, [options.output / name for name in names]


def count_only(options: BenchmarkOptions, reporter: Reporter) -> Results:
    """The rows as a benchmark would measure them, with what can be counted; nothing is run or written."""
    work = _Benchmark(options, reporter)
    for candidate in work.candidates:
        for size in sizes_of(candidate, options):
            work.rows += work.count(candidate.name, size)
        work.models.append(candidate.describe(None))
    work.answer_budget()
    return work.results()


class _Benchmark:
    """A benchmark in progress: what is asked for, and what was found so far."""

    def __init__(self, options: BenchmarkOptions, reporter: Reporter):
        self.options, self.reporter = options, reporter
        self.runtime = Runtime(options.device, options.precision)
        self.device = self.runtime.device
        if self.runtime.world_size > 1:
            raise UsageError("A benchmark takes one process: leave torchrun out.")
        self.baselines = [load_baseline(reference) for reference in options.baselines]
        names = ["backbone", "bilinear", "student", "teacher", *(baseline.name for baseline in self.baselines)]
        if len(set(names)) < len(names):
            raise UsageError(f"--baseline: two rows of one name among {', '.join(names)}; rename the function.")
        self.settings = Settings(
            highres=options.highres,
            batch_size=options.batch_size,
            compiled=options.compiled,
            seconds=options.seconds,
            max_images=options.max_images,
            baselines=options.baselines,
            budget_bytes=options.budget_bytes,
            baselines_sha256=tuple(baseline.sha256 for baseline in self.baselines),
        )
        self.environment = describe_environment(self.runtime)
        self.earlier = self._read_earlier()
        self.candidates = find_candidates(options, reporter)
        self.models: list[Model] = []
        self.rows: list[Row] = []
        self.pictures: list[Picture] = []
        self.budget: list[BudgetRow] = []

    def _read_earlier(self) -> Results | None:
        """What an earlier benchmark measured here, with the same settings."""
        earlier = None
        if not self.options.overwrite and (self.options.output / FILE_NAME).is_file():
            with suppress(BrixelError):  # of another version: nothing to take over
                earlier = read_results(self.options.output)
        if earlier is None:
            return None
        same = replace(earlier.settings, budget_bytes=None) == replace(self.settings, budget_bytes=None)
        if same and earlier.environment == self.environment:
            return earlier
        self.reporter.say(
            f"{self.options.output}: its results are of another machine or other settings: everything is measured anew"
        )
        return None

    def results(self) -> Results:
        """All that is known now."""
        probes = {model.name: tuple(probes_of(model.student_sha256)) for model in self.models if model.student_sha256}
        return Results(
            command=self.options.command,
            created=now(),
            environment=self.environment,
            settings=self.settings,
            models=tuple(self.models),
            rows=tuple(self.rows),
            budget=tuple(self.budget),
            pictures=tuple(self.pictures),
            notes=tuple(_notes(self.rows, self.models)),
            probes={name: found for name, found in probes.items() if found},
        )

    def save(self) -> Results:
        """Write results.json and results.csv."""
        results = self.results()
        write_text(self.options.output / FILE_NAME, results.to_json())
        write_text(self.options.output / TABLE_NAME, results.to_csv())
        return results

    def count(self, name: str, size: Size) -> list[Row]:
        """The counted rows of a model at a size."""
        candidate = next(candidate for candidate in self.candidates if candidate.name == name)
        return count_rows(candidate, size, self.options.highres, self.options.batch_size)

    def measure_model(self, candidate: Candidate, groups: Sequence[tuple[Size, list[Row]]]) -> None:
        """Measure one model at all its sizes, and save after each."""
        image_set = find_images_of(candidate, self.options, self.reporter)
        self.models.append(candidate.describe(image_set))
        student: Student | None = None
        for size, rows in groups:
            if self._take_over(self.models[-1], size, len(rows) + len(self.baselines)):
                continue
            self.reporter.say(f"{candidate.name} at {human_size(size)} px")
            if student is None and self._fits(rows[0]):
                was_random = candidate.random
                candidate, student = load_or_randomise(candidate, self.options, str(self.device), self.reporter)
                if candidate.random and not was_random:
                    image_set = None
                    self.models[-1] = candidate.describe(None)
            if student is None:
                why = f"{TOO_LARGE_TO_LOAD} {human_bytes(rows[0].weights_bytes)}"
                self.rows += [replace(row, note=why) for row in rows]
            else:
                with memory_errors(f"in measuring {candidate.name} at {human_size(size)} px", f"{ADVICE}."):
                    self.rows += self._measure_size(candidate, student, size, rows, image_set)
            self.save()

    def _take_over(self, model: Model, size: Size, num_rows: int) -> bool:
        """Take over the rows of one model and size that an earlier benchmark measured, if it has them all."""
        if self.earlier is None or model not in self.earlier.models:
            return False
        rows = self.earlier.rows_at(model, size)
        lacked_memory = [row for row in rows if row.note.startswith((TOO_LARGE, TOO_LARGE_TO_LOAD))]
        kinds = {row.kind: row for row in rows}
        has_rival = self.options.highres and "student" in kinds and kinds["student"].latency is not None
        if len(rows) != num_rows + has_rival or has_rival != ("equal_cost" in kinds):
            return False
        if any(self._fits(row) for row in lacked_memory):  # there may be more memory by now
            return False
        self.reporter.say(f"{model.name} at {human_size(size)} px: measured before; --overwrite measures anew")
        self.rows += rows
        self.pictures += [item for item in self.earlier.pictures if (item.model, item.size) == (model.name, size)]
        return True

    @torch.inference_mode()
    def _measure_size(
        self, candidate: Candidate, student: Student, size: Size, counted: list[Row], image_set: ImageSet | None
    ) -> list[Row]:
        """Run the rows of one model and size that fit: time, peak memory, fidelity."""
        batch_size = self.options.batch_size
        if self.options.compiled:
            torch.compiler.reset()  # beyond a few compilations of one function torch runs it uncompiled
        made = make_methods(student, size, self.options.highres, self.baselines)
        methods = [in_precision(method, self.runtime) for method in made]
        rows = {row.label: row for row in counted}
        for method in methods:
            if method.kind == "baseline":
                rows[method.label] = count_row(candidate.name, method, student.backbone, size, batch_size)
        images = {method.label: method.input(batch_size, self.device) for method in methods}
        speed, run = 0.0, list[Method]()
        for method in methods:
            row = rows[method.label]
            seconds, note = self._try(row, partial(method.call, images[method.label]), speed)
            rows[method.label] = replace(row, note=note)
            if seconds is not None:
                run.append(method)
                speed = speed or seconds / (row.gflop or 1)
        labels = [method.label for method in run]
        has_rival = self.options.highres and "student" in labels
        sizes = find_rivals(student, size, self.runtime, batch_size) if has_rival else []
        rivals = {own: replace(enlarged(student, own, size), label=f"{EQUAL_COST} {human_size(own)}") for own in sizes}
        timed = [
            in_precision(method, self.runtime, self.options.compiled)
            for method in (*(method for method in made if method.label in labels), *rivals.values())
        ]
        images |= {method.label: method.input(batch_size, self.device) for method in rivals.values()}
        calls = {method.label: partial(method.call, images[method.label]) for method in timed}
        times = interleaved(calls, self.device, self.options.seconds, self.options.compiled)
        for label in labels:
            rows[label] = replace(rows[label], latency=times[label])
        if rivals:
            of_size = {own: times[method.label] for own, method in rivals.items()}
            own = choose_rival(sizes, of_size, times["student"].median)
            rival = in_precision(enlarged(student, own, size), self.runtime)
            counted_row = count_row(candidate.name, rival, student.backbone, size, batch_size)
            rows[rival.label] = replace(counted_row, latency=of_size[own])
            images[rival.label] = images[rivals[own].label]
            methods.insert(-2, rival)  # before student and teacher
            run = [method for method in methods if method in (*run, rival)]
        for method in run:
            call = partial(method.call, images[method.label])
            rows[method.label] = self._with_memory(candidate, rows[method.label], call)
        if image_set is not None and any(method.kind == "bilinear" for method in run):
            compared = [method for method in run if method.kind != "student" or candidate.spec.stored is not None]
            if why := self._why_no_teacher(candidate, student, size, speed):
                rows["student"] = replace(rows["student"], note=rows["student"].note or f"no fidelity: teacher {why}")
            else:
                self._compare(candidate, student, size, compared, rows, image_set)
        return [rows[method.label] for method in methods]

    def _try(self, row: Row, call: Callable[[], object], seconds_per_gflop: float) -> tuple[float | None, str]:
        """The seconds of a call, or why the row is not run: too large for memory, or too slow.

        The fastest of several calls counts, if one is fast: the first one is slower than those that follow.
        """
        if not self._fits(row, loaded=True):
            return None, f"{TOO_LARGE} {human_bytes((row.total_bytes or 0) * MEMORY_MARGIN)} of memory. {ADVICE}"
        limit, seconds = self.options.seconds, seconds_per_gflop * (row.gflop or 0)
        how = "by its FLOP"
        if seconds <= HOPELESS * limit:
            how = "measured"
            try:
                seconds = call_seconds(call, self.device)
                if seconds > limit / 10:  # the first call of a process takes longer
                    seconds = min(seconds, call_seconds(call, self.device))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                release_cached(self.device)
                return None, f"{OUT_OF_MEMORY}. {ADVICE}"
        if seconds > limit:
            return None, f"not run: about {seconds:.0f} s a call, {how}; --seconds {seconds * 1.2:.0f} runs it"
        return seconds, ""

    def _why_no_teacher(self, candidate: Candidate, student: Student, size: Size, seconds_per_gflop: float) -> str:
        """Why the fidelity, for which the teacher sees images one by one, is not measured; or nothing."""
        row = count_rows(candidate, size, highres=True, batch_size=1)[-1]
        images = torch.randn(1, 3, *row.input_size, device=self.device)
        speed = seconds_per_gflop / self.options.batch_size
        return self._try(row, partial(student.backbone.last_map, images), speed)[1]

    def _with_memory(self, candidate: Candidate, row: Row, call: Callable[[], Tensor]) -> Row:
        if not can_measure(self.device):
            return row
        if self.device.type == "cuda":
            peak = peak_on_gpu(call, self.device)
        else:
            found = peak_in_fresh_process(candidate, row, self.options)
            if found is None:
                self.reporter.warn(
                    f"{row.model}, {row.label}: the process that measures its memory was killed: counted"
                )
                return row
            peak = found
        return replace(row, peak_bytes=peak.peak_bytes, kept_bytes=peak.kept_bytes, memory="measured")

    def _compare(
        self,
        candidate: Candidate,
        student: Student,
        size: Size,
        compared: Sequence[Method],
        rows: dict[str, Row],
        image_set: ImageSet,
    ) -> None:
        """Add the fidelity of the rows whose maps are compared with the teacher's; draw some images."""
        views = image_set.views(student.backbone, candidate.spec.factor, size)
        title = f"fidelity, {human_size(size)} px"
        found = measure_fidelity(compared, views, student.backbone, self.reporter, title)
        ranked = found["student" if "student" in found else "bilinear"].worst_images
        folder = self.options.output
        self.pictures += draw_examples(compared, views, student.backbone, ranked, folder, candidate.name, size)
        rows |= {label: replace(rows[label], fidelity=fidelity) for label, fidelity in found.items()}

    def _fits(self, row: Row, loaded: bool = False) -> bool:
        """Whether a row can be run here; on a CPU twice, as its peak is measured in a process of its own."""
        needed, there = (row.total_bytes or 0) * MEMORY_MARGIN, free_memory(self.device)
        if self.device.type == "cuda":
            return needed - loaded * row.weights_bytes * MEMORY_MARGIN <= there
        return needed + (not loaded) * row.weights_bytes <= there

    def answer_budget(self) -> None:
        """Find whether each row fits into the budget, and the largest size at which each student and teacher do."""
        budget = self.options.budget_bytes
        if budget is None:
            return
        self.budget = [
            BudgetRow(row.model, row.label, row.size, row.total_bytes, row.memory, row.total_bytes <= budget, False)
            for row in self.rows
            if row.total_bytes is not None
        ]
        labels = ["student", "teacher"] if self.options.highres else ["student"]
        with self.reporter.bar("largest sizes", len(self.candidates), unit="model") as bar:
            for candidate in self.candidates:
                self.budget += largest_sizes(candidate, labels, budget, self.options.batch_size)
                bar.update(1)


def _notes(rows: Sequence[Row], models: Sequence[Model]) -> list[str]:
    """What is to be read with the table."""
    notes = [
        "Memory is the peak above the weights (c: counted, not measured). Less FLOP, less mem., faster: how many times "
        "less than the teacher. GFLOP: a multiply-add is 2, attention counted."
    ]
    random = [model.name for model in models if model.weights == "random"]
    if random:
        notes.append(f"Random weights, on purpose, as only cost is measured: {', '.join(random)}.")
    unseen = sorted({name for row in rows for name in row.uncounted})
    if unseen:
        notes.append(f"Operators that the counter does not know: {', '.join(unseen)}.")
    return notes + [f"{row.model} {row.label} {human_size(row.size)}: {row.note}" for row in rows if row.note]
