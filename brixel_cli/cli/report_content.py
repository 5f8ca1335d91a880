"""What a report says, in order: headline, cost, fidelity, feature maps, ablations, and how it was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from brixel_cli.cli.report_blocks import Block, Commands, Photo, Report, Section, Text
from brixel_cli.cli.report_charts import (
    ablation_charts,
    by_photograph,
    cost_bars,
    cost_curves,
    fidelity_curves,
    gap_bars,
    main_size,
)
from brixel_cli.cli.tables import (
    Table,
    ablation_tables,
    budget_table,
    cost_tables,
    fidelity_tables,
    probe_tables,
    rows_of,
    sizes_of,
)
from brixel_cli.core.formatting import human_bytes, human_seconds, human_size
from brixel_cli.engines.ablating.results import Ablations
from brixel_cli.engines.benchmarking.results import Environment, Results


def make_report(results: Results | None, ablations: Ablations | None, folder: Path) -> Report:
    """Everything that a report of these results says.

    Args:
        results: of the benchmark, or None.
        ablations: or None; one of both is there.
        folder: in which the pictures of `results` are.
    """
    title, lead, highlights = "brixel benchmark", "", list[tuple[str, str]]()
    sections: list[Section] = []
    if results:
        lead, highlights = _headline(results)
        sections += [
            Section("Cost", list(_cost(results))),
            Section("Cost against output resolution", list(cost_curves(results))),
            Section("Fidelity", list(_fidelity(results))),
            Section("Probes", [table for model in results.models for table in probe_tables(results, model)]),
            Section("Feature maps", list(_pictures(results, folder))),
        ]
    if ablations:
        sections += [Section(f"Ablation: {group}", list(_ablation(ablations, group))) for group in ablations.groups()]
        lead = lead or _ablation_headline(ablations)
    environments: list[Environment] = []
    for item in (results, ablations):
        if item and item.environment not in environments:
            environments.append(item.environment)
    commands = [*([results.command] if results else []), *(ablations.commands if ablations else [])]
    sections += [
        Section("Environment", [_environment_table(item) for item in environments]),
        Section("How it was measured", [Text(text) for text in _methods(results, ablations)]),
        Section("Commands", [Commands(commands)]),
    ]
    created = "; ".join(dict.fromkeys(item.created for item in (results, ablations) if item))
    return Report(title, lead, highlights, [section for section in sections if section.blocks], created)


# The headline


def _headline(results: Results) -> tuple[str, list[tuple[str, str]]]:
    """One sentence and a few figures about the first model that was compared with its teacher, or else the first."""
    compared = [row.model for row in results.rows if row.kind == "student" and row.fidelity]
    model = results.model(compared[0]) if compared else results.models[0]
    size = main_size(results, model)
    rows = {row.kind: row for row in rows_of(results, model, size)}
    student, teacher, bilinear = rows["student"], rows.get("teacher"), rows.get("bilinear")
    text = f"At {human_size(size)} px the student of {model.backbone} yields a {human_size(student.grid)} map"
    highlights: list[tuple[str, str]] = []
    if student.seconds is not None:
        text += f" in {human_seconds(student.seconds)}"
        highlights.append(
            (human_seconds(student.seconds), f"a call of the student, batch of {results.settings.batch_size}")
        )
    ratios = results.ratios(student)
    if teacher:
        text += f"; its teacher, the same backbone at {human_size(teacher.input_size)} px,"
        text += f" takes {human_seconds(teacher.seconds)}" if teacher.seconds is not None else " was counted only"
        shares = {"less time": ratios.faster, "less arithmetic": ratios.less_flop, "less memory": ratios.less_memory}
        told = [f"{ratio:.1f}x {what}" for what, ratio in shares.items() if ratio]
        text += f": {', '.join(told)}" if told else ""
        highlights += [(f"{ratio:.1f}x", f"{what} than the teacher") for what, ratio in shares.items() if ratio]
    text += "."
    if student.fidelity and bilinear and bilinear.fidelity:
        closed = student.fidelity.gap_closed.get("cosine")
        mine, plain = f"{student.fidelity.cosine:.3f}", f"{bilinear.fidelity.cosine:.3f}"
        text += (
            f" On {len(student.fidelity.images)} photographs its map has a mean cosine of {mine} to the teacher's; "
            f"the backbone's own map, enlarged bilinearly, has {plain}."
        )
        highlights.append((mine, f"mean cosine to the teacher; bilinear {plain}"))
        if closed is not None:
            highlights.append((f"{closed:.0%}", "of the gap between bilinear and teacher closed, in cosine"))
    elif model.weights == "random":
        text += " Weights are random: this is about cost only."
    return text, highlights


def _ablation_headline(ablations: Ablations) -> str:
    done = [item for item in ablations.variants if item.fidelity]
    if not done:
        return f"No variant of {ablations.recipe} has been trained to its end yet."
    best = max(done, key=lambda item: item.fidelity["cosine"] or -1.0)
    return (
        f"Of {len(done)} variants of {ablations.recipe}, {best.name} ({best.group}) comes closest to the teacher in "
        f"cosine: {best.fidelity['cosine']:.4f}, against {best.bilinear['cosine']:.4f} of the bilinear backbone map, "
        f"at {human_seconds(best.latency.median)} an image."
    )


# Cost


def _cost(results: Results) -> Iterator[Block]:
    yield from cost_bars(results)
    for model in results.models:
        for size in sizes_of(results, model):
            yield from cost_tables(results, model, size)
    budget = budget_table(results)
    if budget:
        yield budget
    yield from (Text(note) for note in results.notes)


# Fidelity


def _fidelity(results: Results) -> Iterator[Block]:
    for number, model in enumerate(results.models):
        yield from gap_bars(results, model, number)
        yield from fidelity_curves(results, model, number)
        yield from by_photograph(results, model, number)
        for size in sizes_of(results, model):
            for table in fidelity_tables(results, model, size):
                yield replace(table, title=table.title and f"{model.name}: {table.title}")


def _pictures(results: Results, folder: Path) -> Iterator[Block]:
    found = [(picture, folder / picture.path) for picture in results.pictures if (folder / picture.path).is_file()]
    if found:
        yield Text("Colours: the first three principal components of the teacher's map; equal colours, equal features.")
    for number, (picture, path) in enumerate(found):
        compared = [row for row in results.rows if (row.model, row.size) == (picture.model, picture.size)]
        last = max(len(row.fidelity.images) for row in compared if row.fidelity)
        places = {2: "the second worst", last // 2 + 1: "the median", last: "the best", 1: "the worst"}
        place = places.get(picture.rank, f"number {picture.rank} from the worst")
        where = f"{picture.model} at {human_size(picture.size)} px"
        yield Photo(f"maps_{number}", path, f"{picture.image}: {place} of {last} photographs in cosine, {where}.")


# Ablations


def _ablation(ablations: Ablations, group: str) -> Iterator[Block]:
    variants = [item for item in ablations.groups()[group] if item.fidelity]
    yield from ablation_charts(group, variants)
    yield from ablation_tables(ablations, group)


# Environment and methods


def _environment_table(environment: Environment) -> Table:
    rows = [
        ["device", environment.device],
        ["processor", environment.processor],
        ["threads", str(environment.threads)],
        ["memory", human_bytes(environment.memory_bytes)],
        ["arithmetic", environment.precision],
        ["system", environment.system],
        *([name, number] for name, number in environment.versions.items()),
    ]
    return Table("", ("", ""), rows)


def _methods(results: Results | None, ablations: Ablations | None) -> Iterator[str]:
    if results:
        yield (
            "Time: one call on a batch that is in memory already, without reading or preparing images. All rows of a "
            "model and size take turns, round by round, so that a drift of the machine hits all alike; the median is "
            f"given, with the 10 % and 90 % quantiles. Batch: {results.settings.batch_size}."
        )
        yield (
            "Arithmetic: every operator is counted on tensors without contents; a multiply-add is 2, attention "
            "included, elementwise operations not."
        )
        kinds = {row.memory for row in results.rows}
        if "measured" in kinds:
            where = "on a CPU of a fresh process, on a GPU of its allocator"
            yield f"Memory, measured: the peak above the loaded weights, {where}."
        if "counted" in kinds:
            yield "Memory, counted (c): most bytes of tensors alive at once beyond weights and input."
    if (results and any(row.fidelity for row in results.rows)) or ablations:
        yield (
            "Fidelity: maps are compared with the teacher's, the same frozen backbone on the large image, over whole "
            "photographs that the student was not trained on unless others were named. L1: mean absolute difference, "
            "in feature units. Cosine: mean cosine similarity over locations. Edge: squared error of Sobel gradients "
            "in the teacher's first 8 principal components, over the teacher's own gradient energy. Spectral: mean "
            "squared log ratio of high-frequency amplitudes. Gap closed: (row - bilinear) / (teacher - bilinear)."
        )
    if ablations:
        equal = "as many updates" if ablations.equal == "steps" else "updates for the same time"
        yield (
            f"Ablations: all variants have {equal}, the same photographs ({ablations.photographs}), the same views in "
            "the same order where the seed is the same, and are measured at the end of the training, not at their "
            "best. Update: median time of one on a batch in memory, all variants taking turns. Training memory: "
            "counted; batch, weights, gradients, moments, average and the largest working set of a pass, without the "
            "spectral term's. One run each: the group seed shows what differs by chance."
        )
