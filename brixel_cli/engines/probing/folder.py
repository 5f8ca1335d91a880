"""A probe on disk: figures, heads, loss curves and pictures, valid at every moment.

results.json           protocol, data, sources, every figure of every seed, and the summary
results.csv            the same figures, a line for each source and seed
heads/                 a .safetensors for each source and seed: what `brixel probe --apply` takes
networks/              the same of networks that were trained end to end; *.training: where an unfinished one is
predictions/           predictions of each source and seed, with --save-predictions
images/                the metrics of each evaluated image, a .csv for each source and seed
curves/, curves.png    the loss while training
pictures/              image | truth | predictions | where they differ
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from brixel_cli.config.section import difference_lines, differences
from brixel_cli.core.files import check_files, check_picture, make_folder, refuse_others, write_text
from brixel_cli.core.formatting import csv_text, to_json
from brixel_cli.core.heads import load_head
from brixel_cli.core.weights import load_tensors
from brixel_cli.drawing.page import check_document
from brixel_cli.engines.probing.results import FORMAT, Items, ProbeResults, Run, Settings, SourceDescription, as_dict
from brixel_cli.errors import BrixelError, UsageError

EMPTY = to_json({"format": FORMAT}) + "\n"
"""results.json of a probe without results: while the files of an earlier one are being deleted."""
OWN = (
    ("heads", "*_seed*.safetensors"),
    ("networks", "*_seed*.*"),
    ("curves", "*_seed*.jsonl"),
    ("images", "*_seed*.csv"),
    ("pictures", "*.png"),
)
"""Folders and names of a probe's files."""
PLACES = ("checkpoint", "backbone_weights", "path", "description.backbone_weights", "folders", "supervised.weights")
"""Of a source, where its files are: another place makes no other source."""


class ProbeFolder:
    """The files of one probe."""

    def __init__(self, path: Path):
        self.path = path
        self.results = path / "results.json"
        self.table = path / "results.csv"
        self.curves = path / "curves.png"
        self.pictures = path / "pictures"
        self.page = path / "features.html"

    def head(self, label: str, seed: int) -> Path:
        """The head of a source and seed."""
        return self.path / "heads" / f"{file_name(label)}_seed{seed}.safetensors"

    def network(self, label: str, seed: int) -> Path:
        """The network of a source that is trained end to end, and seed."""
        return self.path / "networks" / f"{file_name(label)}_seed{seed}.safetensors"

    def predictions(self, label: str, seed: int) -> Path:
        """The predictions of a source and seed."""
        return self.path / "predictions" / f"{file_name(label)}_seed{seed}"

    def curve(self, label: str, seed: int) -> Path:
        """The loss curve of a source and seed."""
        return self.path / "curves" / f"{file_name(label)}_seed{seed}.jsonl"

    def images(self, label: str, seed: int) -> Path:
        """The metrics of each image, of a source and seed."""
        return self.path / "images" / f"{file_name(label)}_seed{seed}.csv"

    def begin(self, settings: Settings, sources: Mapping[str, SourceDescription], overwrite: bool) -> list[Run]:
        """Make the folder, or continue what is there.

        Args:
            settings: all that every figure depends on; what was begun with others is not continued.
            sources: by label, what each source is.
            overwrite: begin anew over a probe that is there.

        Returns:
            The rows of earlier runs whose files are whole, a row for each source and seed.

        Raises:
            UsageError: the folder holds a probe with other settings, or of another source of the same name; or files
                that brixel may not delete, as no results.json says that they are a probe's.
            BrixelError: its results cannot be read, or the folder cannot be made.
        """
        if overwrite or not self.results.exists():
            self._check_own()
        if self._is_empty() or (overwrite and self.results.exists()):
            self._clear()
        earlier = self.earlier()
        if earlier is not None:
            changed = difference_lines(differences(as_dict(earlier.settings), as_dict(settings)))
            for label, source in sources.items():
                if label in earlier.sources:
                    found = differences(as_dict(earlier.sources[label]), as_dict(source), PLACES)
                    changed += [f"{label}: {line}" for line in difference_lines(found)]
            if changed:
                raise UsageError(
                    f"{self.path} holds a probe that was begun with something else:\n  " + "\n  ".join(changed) + "\n"
                    "Give --overwrite to begin anew, or another folder with --output."
                )
        for folder in ("heads", "curves", "images", "pictures"):
            make_folder(self.path / folder)
        if earlier is None:
            write_text(self.results, EMPTY)  # from now on, what stands here is this probe's
            return []
        whole = [run for run in earlier.runs if not any(check_files(self._checks(run, earlier)).values())]
        for run in earlier.runs:
            if run.items and run not in whole:  # else a run that is made again would go on from what is damaged
                self.images(run.source, run.seed).unlink(missing_ok=True)
        return whole

    def _checks(self, run: Run, results: ProbeResults) -> dict[Path, Callable[[Path], object]]:
        """What reads each file of a source and seed."""
        label, seed = run.source, run.seed
        if run.items:
            return {self.images(label, seed): lambda _: self._check_items(run)}

        def check_curve(_: Path) -> None:
            points = self.read_curve(label, seed)
            if any(type(point[key]) not in (int, float) for point in points for key in ("step", "loss")):
                raise ValueError("a point of it is no step with a loss")
            if points[-1]["loss"] != run.final_loss:
                raise ValueError("it does not end with the loss of results.json")

        def check_images(_: Path) -> None:
            found, expected = len(self.read_images(label, seed)), results.settings.data["evaluate"].images
            if found != expected:
                raise ValueError(f"it holds {found} images, not {expected}")

        checks: dict[Path, Callable[[Path], object]] = {self.images(label, seed): check_images}
        kind = results.sources[label].kind
        if kind not in ("predictions", "transfer"):  # for which nothing was trained
            checks[self.curve(label, seed)] = check_curve
            network = kind in ("finetuned", "unet")
            checks |= {self.network(label, seed): load_tensors} if network else {self.head(label, seed): load_head}
        return checks

    def _check_items(self, run: Run) -> None:
        items = self.read_items(run.source).values()
        for name in run.errors:
            if not items or fmean(item[name] for item in items) != run.figures[name]:
                raise ValueError("it does not hold the figures of results.json")

    def damaged_pictures(self) -> bool:
        """Whether one of the pictures or the page is damaged, or there are no curves."""
        return any(check_files(self._drawn()).values())

    def _drawn(self) -> dict[Path, Callable[[Path], object]]:
        """What reads each picture, and the page."""
        pages = [self.page] if self.page.exists() else []  # some protocols and earlier versions have none
        curves = [self.curves] if any((self.path / "curves").glob("*.jsonl")) else []
        pictures = [*curves, *self.pictures.glob("*.png")]
        return {**dict.fromkeys(pictures, check_picture), **dict.fromkeys(pages, check_document)}

    def verify(self) -> dict[Path, str]:
        """Read every file of the probe again.

        Returns:
            For each file what is wrong with it; an empty text where nothing is.

        Raises:
            BrixelError: the folder holds no probe, or its results cannot be read.
        """
        if not self.results.exists():
            raise UsageError(f"{self.path} holds no probe: {self.results.name} is missing.")
        results = self.read()
        checks: dict[Path, Callable[[Path], object]] = {
            self.results: lambda _: None,
            self.table: lambda path: self._check_table(path, results),
        }
        for run in results.runs:
            checks |= self._checks(run, results)
        return check_files(checks | self._drawn())

    @staticmethod
    def _check_table(path: Path, results: ProbeResults) -> None:
        if path.read_text(encoding="utf-8") != _table(results):
            raise ValueError("it does not hold the figures of results.json")

    def earlier(self) -> ProbeResults | None:
        """The results as written, None where there are none yet; raises as `read`."""
        return self.read() if self.results.exists() and not self._is_empty() else None

    def read(self) -> ProbeResults:
        """The results as written.

        Raises:
            BrixelError: they cannot be read, or are of another format.
        """
        try:
            return ProbeResults.from_json(self.results.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise BrixelError(f"{self.results} cannot be read: {error}. Give --overwrite to begin anew.") from error

    def write(self, results: ProbeResults) -> None:
        """Write results.json and results.csv."""
        write_text(self.results, results.to_json())
        write_text(self.table, _table(results))

    def write_run(self, label: str, seed: int, curve: Sequence[Mapping[str, float]], names: Sequence[str],
                  images: Sequence[Mapping[str, float]]) -> None:  # fmt: skip
        """Write the loss curve, if anything was trained, and the metrics of each image, of a source and seed."""
        if curve:
            write_text(self.curve(label, seed), "".join(to_json(point) + "\n" for point in curve))
        metrics = list(dict.fromkeys(name for image in images for name in image))
        rows = [[name, *(image.get(metric) for metric in metrics)] for name, image in zip(names, images, strict=True)]
        write_text(self.images(label, seed), csv_text(["image", *metrics], rows))

    def read_curve(self, label: str, seed: int) -> list[dict[str, float]]:
        """The loss curve of a source and seed; empty where there is none."""
        path = self.curve(label, seed)
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def read_images(self, label: str, seed: int) -> list[dict[str, float]]:
        """The metrics of each image, of a source and seed."""
        with open(self.images(label, seed), encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return [{key: float(value or "nan") for key, value in row.items() if key != "image"} for row in rows]

    def read_items(self, label: str) -> Items:
        """The figures of the pairs or objects of a source, as many as there are; of a damaged file none."""
        try:
            with open(self.images(label, 0), encoding="utf-8", newline="") as file:
                return {
                    row.pop("image"): {name: float(value) for name, value in row.items()}
                    for row in csv.DictReader(file)
                }
        except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error):
            return {}

    def _is_empty(self) -> bool:
        """Whether there is a results.json without results."""
        try:
            return self.results.read_bytes() == EMPTY.encode()
        except OSError:
            return False

    def _check_own(self) -> None:
        """Raise a UsageError where files that a probe would replace are not a probe's."""
        if self.results.exists():
            try:
                content = json.loads(self.results.read_bytes())
            except (OSError, ValueError, RecursionError):  # damaged: it may have been a probe's
                return
            theirs = [] if isinstance(content, dict) and content.get("format") == FORMAT else [self.results]
        else:
            theirs = [file for file in (self.table, self.curves, self.page, *self._own()) if file.exists()]
        refuse_others(self.path, sorted(theirs), "results.json of a probe")

    def _own(self) -> list[Path]:
        """Files below the folder that have a name as those of a probe."""
        return [file for folder, pattern in OWN for file in (self.path / folder).glob(pattern)]

    def _clear(self) -> None:
        # The results go first: without them, no kill can leave half of an old probe to be continued.
        write_text(self.results, EMPTY)
        for file in (self.table, self.curves, self.page, *self._own()):
            file.unlink(missing_ok=True)


def _table(results: ProbeResults) -> str:
    """The figures as CSV, a line for each source and seed."""
    numbers = [
        {name: value for name, value in run.figures.items() if not isinstance(value, list)} for run in results.runs
    ]
    names = list(dict.fromkeys(name for figures in numbers for name in figures))
    rows = [
        [run.source, run.seed, *(figures.get(name) for name in names)]
        for run, figures in zip(results.runs, numbers, strict=True)
    ]
    return csv_text(["source", "seed", *names], rows)


def file_name(label: str) -> str:
    """A source's label as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", label)
