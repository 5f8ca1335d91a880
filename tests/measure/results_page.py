"""Write the results page, docs/RESULTS.md, from result files of brixel's own commands. No figure in it is set by hand.

    python tests/measure/results_page.py --distill RUN --benchmark DIR --curves DIR --sizes DIR --probes DIR DIR \
        --ablations DIR --tuned-runs RUN RUN --tuned-probes DIR DIR

Several --distill runs are stages of a training, first to last, or trainings of several students; those of the first student
come first. Several --benchmark outputs are of several students, or of one at two batch sizes. Runs of fine-tuned students are
named by their folders. A section whose input is not given is left out. --no-photographs leaves out all pictures that show
images, which may not be free to publish. Pictures are written to results/ beside the page. Remarks are kept by hand in
results/notes.md: the text under `## Probes` there is put below the tables of that section.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from results_sections import ablations, cost, curve, fidelity, generalisation, probes, training, tuned

from brixel_cli.cli.console import error_boundary, print_files, warn
from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import load_recipe, missing_keys
from brixel_cli.core.files import write_text
from brixel_cli.drawing.page import Block, Chart, Commands, Photo, Section, markdown_block, write_figure
from brixel_cli.engines.ablating.results import read_ablations
from brixel_cli.engines.benchmarking.results import read_results
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.errors import BrixelError

LEAD = (
    "Results of the students that come with brixel: their training, their cost, how close their feature maps are to the "
    "teacher's, and what they are worth on labelled data. All figures were measured on a CPU. `tests/measure/results_page.py` takes every figure "
    "in a table from the result files of the command above it; the remarks are written by hand, in `results/notes.md`. Recovered "
    "gap: (student - backbone) / (teacher - backbone). How each figure is measured: [BENCHMARK.md](BENCHMARK.md), "
    "[PROBE.md](PROBE.md)."
)
NEEDS = "<!-- needs: the images or labelled sets of this section, minutes to hours -->"
"""Before each block of commands: what runs the documentation leaves these out."""
SECTIONS = (
    "Training", "Cost", "Quality against cost", "Fidelity", "Generalisation over input sizes", "Probes", "Fine-tuning", "Ablations",
)  # fmt: skip


def read_notes(path: Path) -> dict[str, str]:
    """The text of the notes, by the heading of its section."""
    parts = re.split(r"^## +(.+?) *$", path.read_text(encoding="utf-8") if path.is_file() else "", flags=re.M)
    notes = dict(zip(parts[1::2], (text.strip("\n") for text in parts[2::2]), strict=True))
    for title in notes.keys() - set(SECTIONS):
        warn(f"{path}: no section is called {title}; there are: {', '.join(SECTIONS)}.")
    return notes


def page(sections: Sequence[Section], notes: Mapping[str, str], figures: str) -> str:
    """The page: in each section the tables, then the notes as they stand, then charts and pictures."""
    lines = ["# Results", "", LEAD]
    for section in sections:
        drawn = [block for block in section.blocks if isinstance(block, Chart | Photo)]
        lines += ["", f"## {section.title}"]
        for block in section.blocks:
            mark = [NEEDS] if isinstance(block, Commands) else []
            lines += [] if block in drawn else ["", *mark, *markdown_block(block)]
        lines += ["", notes[section.title]] if notes.get(section.title) else []
        for block in drawn:
            lines += ["", *markdown_block(block, figures)]
    return "\n".join([*lines, ""])


def read_runs(paths: Sequence[Path]) -> list[tuple[RunFolder, Recipe]]:
    """Run folders with their recipes."""
    runs = [RunFolder(path) for path in paths]
    for run in runs:
        if unknown := missing_keys(str(run.recipe)):
            raise BrixelError(f"{run.recipe} is of another version of brixel: it lacks {', '.join(unknown)}.")
    return [(run, load_recipe(str(run.recipe))) for run in runs]


def write_page(given: argparse.Namespace) -> list[Path]:
    """Write the page and its pictures; returns the files."""
    figures = given.output.parent / "results"
    figures.mkdir(parents=True, exist_ok=True)
    photos = None if given.no_photographs else figures
    stages, tunings = read_runs(given.distill), read_runs(given.tuned_runs)
    measured = [read_results(path) for path in given.benchmark]
    first_training = [recipe for _, recipe in stages if recipe.name == stages[0][1].name]
    found: list[list[Block]] = [
        [block for number, stage in enumerate(stages, 1) for block in training(*stage, photos, number)],
        [block for results in measured for block in cost(results)],
        [block for number, path in enumerate(given.curves, 1) for block in curve(path, number)],
        [block for results in measured if any(row.fidelity for row in results.rows) for block in fidelity(results)],
        generalisation(read_results(given.sizes), first_training) if given.sizes else [],
        probes(given.probes, photos) if given.probes else [],
        tuned(tunings, given.tuned_probes),
        [block for path in given.ablations for block in ablations(read_ablations(path))],
    ]
    sections = [Section(title, blocks) for title, blocks in zip(SECTIONS, found, strict=True) if blocks]
    files = [given.output]
    for block in (block for section in sections for block in section.blocks):
        if isinstance(block, Chart):
            write_figure(block, figures)
            files.append(figures / f"{block.name}.svg")
        files += [block.path] if isinstance(block, Photo) else []
    write_text(given.output, page(sections, read_notes(figures / "notes.md"), figures.name))
    return files


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distill", type=Path, nargs="+", default=[], help="run folders of brixel distill")
    parser.add_argument(
        "--benchmark",
        type=Path,
        nargs="+",
        default=[],
        help="outputs of brixel benchmark at the input size of the training",
    )
    parser.add_argument("--curves", type=Path, nargs="+", default=[], help="outputs of brixel benchmark --curve")
    parser.add_argument("--sizes", type=Path, help="output of brixel benchmark at several --res")
    parser.add_argument("--probes", type=Path, nargs="+", default=[], help="outputs of brixel probe")
    parser.add_argument("--tuned-runs", type=Path, nargs="+", default=[], help="run folders of fine-tuned students")
    parser.add_argument(
        "--tuned-probes", type=Path, nargs="+", default=[], help="outputs of brixel probe of fine-tuned students"
    )
    parser.add_argument("--ablations", type=Path, nargs="+", default=[], help="outputs of brixel benchmark --ablate")
    parser.add_argument("--no-photographs", action="store_true", help="leave out pictures that show images")
    parser.add_argument("--output", type=Path, default=Path("docs/RESULTS.md"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with error_boundary():
        print_files(write_page(parse()))
