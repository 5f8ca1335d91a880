"""A run on disk: recipe, weights, training state, metrics and pictures, valid at every moment.

recipe.yaml            the resolved recipe
student.safetensors    the best adapter so far, by held-out cosine: what `load_student` takes
last.safetensors       the adapter of the last checkpoint
state.safetensors      all that resuming needs
metrics.jsonl          a line for each logged step and each validation
tensorboard/           the same for TensorBoard
pictures/              image | backbone | student | teacher, one file a validation
skipped.csv            images left out, with reasons
results.json           the final table
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import dump_recipe, load_recipe, missing_keys
from brixel_cli.config.section import difference_lines, differences
from brixel_cli.core.files import check_files, check_picture, refuse_others, write_text, writing
from brixel_cli.core.formatting import csv_text, to_json
from brixel_cli.core.shipped import FILE_NAME, shipped_students
from brixel_cli.core.student import read_adapter
from brixel_cli.core.weights import load_tensors, save_tensors
from brixel_cli.data.images import Skipped
from brixel_cli.data.row_store import Store
from brixel_cli.errors import UsageError, WeightsError


def resolve_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, so that the run it is written into can be used from any folder."""

    def absolute(path: str | None) -> str | None:
        return path and str(Path(path).expanduser().absolute())

    weights, init = recipe.backbone.weights, recipe.init
    backbone = {} if weights in ("pretrained", "random") else {"weights": absolute(weights)}
    return recipe.model_copy(
        update={
            "backbone": recipe.backbone.model_copy(update=backbone),
            "data": recipe.data.model_copy(
                update={
                    "images": absolute(recipe.data.images),
                    "val_images": absolute(recipe.data.val_images),
                    "held_out": {domain: absolute(folder) for domain, folder in recipe.data.held_out.items()},
                }
            ),
            "cache": recipe.cache.model_copy(update={"directory": absolute(recipe.cache.directory)}),
            "init": absolute(init)
            if init and init not in shipped_students() and Path(init).expanduser().exists()
            else init,
        }
    )


class RunFolder:
    """The files of one distillation run."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.student = path / FILE_NAME
        self.last = path / "last.safetensors"
        self.state = path / "state.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.pictures = path / "pictures"
        self.skipped = path / "skipped.csv"
        self.results = path / "results.json"

    def picture(self, step: int) -> Path:
        """The picture of the validation after `step`."""
        return self.pictures / f"step_{step:06d}.png"

    def check(self, recipe: Recipe, resume: bool, overwrite: bool = False) -> None:
        """Refuse to overwrite a run or files of others, and to resume a run that was begun with another recipe.

        The folders of the images may be others: what is in them is compared by `check_images`.

        Raises:
            UsageError: the folder holds a run and neither `resume` nor `overwrite` is true, or it differs from the
                recipe, or holds none; or it holds files that are not a run's, as no recipe.yaml is beside them.
        """
        if not resume:
            theirs = [] if self.recipe.exists() else [file for file in self._own() if file.exists()]
            refuse_others(self.path, theirs, f"{self.recipe.name} of a run")
            if self.recipe.exists() and not overwrite:
                raise UsageError(
                    f"{self.path} holds a run already. Continue it with --resume, "
                    "begin anew with --overwrite, or name another folder with --output."
                )
            return
        if not self.recipe.exists():
            raise UsageError(f"{self.path} holds no run to resume: {self.recipe.name} is missing.")
        unknown = missing_keys(str(self.recipe))
        if unknown:
            raise UsageError(
                f"{self.path} was begun with another version of brixel, which had no {', '.join(unknown)}: "
                f"say in {self.recipe} what they shall be, or use another folder."
            )
        ignored = ("run", "cache.directory", "data.images", "data.val_images", "data.held_out")
        changed = differences(load_recipe(str(self.recipe)), recipe, ignored)
        if changed and set(changed) <= {"optim.steps", "optim.epochs"}:
            raise UsageError(
                f"The length of the run in {self.path} cannot be changed ({', '.join(difference_lines(changed))}): its "
                f"learning rate follows from it. Train its student further in another folder: --init {self.path} "
                "--output DIR."
            )
        if changed:
            raise UsageError(
                f"{self.path} was begun with another recipe:\n  " + "\n  ".join(difference_lines(changed)) + "\n"
                "Resume it as it was begun (--resume --output DIR, without --recipe), or use another folder."
            )

    def check_images(self, before: Mapping[str, Any], now: Mapping[str, str]) -> None:
        """Refuse to go on with other images than those of the state, wherever they are.

        Args:
            before: facts of the state; those of older runs know names and sizes only, not contents.
            now: `photographs`, the names and sizes, and `images_sha256`, the digest of the contents.

        Raises:
            UsageError: they are others.
        """
        key = "images_sha256" if "images_sha256" in before else "photographs"
        if before[key] == now[key]:
            return
        what = f"{before['photographs']} then, {now['photographs']} now"
        if before["photographs"] == now["photographs"]:
            what = f"{now['photographs']}, the contents of one or more have changed"
        raise UsageError(
            f"The images are not those that {self.path} was begun with: {what}. Put them back as they were, name the "
            "folder that they are in now with --images DIR, or begin a run in another folder."
        )

    def _own(self) -> list[Path]:
        """Files that a run replaces, but for its recipe."""
        named = [self.state, self.results, self.student, self.last, self.metrics, self.skipped]
        return [*named, *self.pictures.glob("step_*.png"), *self.tensorboard.glob("events.*")]

    def begin(self, recipe: Recipe) -> None:
        """Make the folder and write the resolved recipe, removing what an earlier run left here."""
        # The state goes first: without it, no kill can leave an old run's half to be resumed. The recipe goes last: it
        # says that the others are a run's.
        try:
            self.pictures.mkdir(parents=True, exist_ok=True)
            for file in (*self._own(), self.recipe):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be made into a run folder: {error.strerror}.") from error
        write_text(self.recipe, dump_recipe(recipe))

    def write_skipped(self, skipped: Sequence[Skipped]) -> None:
        """List the images left out; no file where there are none."""
        if skipped:
            write_text(self.skipped, csv_text(["file", "reason"], [(item.name, item.reason) for item in skipped]))

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append a line to the metrics."""
        with writing(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(to_json(entry) + "\n")

    def rewind_metrics(self, step: int) -> int:
        """Drop the lines of steps after `step`, which will be made again, and damaged ones; how many were damaged.

        The last line does not count: a kill can cut it short.
        """
        if not self.metrics.exists():
            return 0
        lines = self.metrics.read_bytes().splitlines()
        read = [_metrics_line(line) for line in lines]
        kept = [line for line in read if line is not None and line[0] <= step]
        write_text(self.metrics, "".join(text + "\n" for _, text in kept))
        return read[:-1].count(None)

    def save_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write all that resuming needs: tensors, and facts such as the step."""
        save_tensors(self.state, tensors, {"facts": to_json(facts)})

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read it back; None where no checkpoint has been written yet.

        Raises:
            WeightsError: it is damaged.
        """
        if not self.state.exists():
            return None
        try:
            tensors, metadata = load_tensors(self.state)
            return tensors, json.loads(metadata["facts"])
        except (WeightsError, KeyError, ValueError) as error:
            raise WeightsError(
                f"{error} The run cannot be resumed from {self.state}: put a copy back, begin the run anew with "
                f"--overwrite, or train its last student further in another folder: --init {self.last} --output DIR."
            ) from error

    def verify(self) -> dict[Path, str]:
        """Read every file of the run again.

        Returns:
            For each file what is wrong with it; an empty text where nothing is.

        Raises:
            UsageError: the folder holds no run.
        """
        if not self.recipe.exists():
            raise UsageError(f"{self.path} holds no run: {self.recipe.name} is missing.")
        needed = [self.student, self.last, self.state, self.metrics] if self.results.exists() else []
        if self.state.exists():
            needed.append(self.last)
        checks: dict[Path, Callable[[Path], object]] = {
            self.recipe: lambda path: load_recipe(str(path)),
            self.student: lambda path: read_adapter(str(path)).build(),
            self.last: lambda path: read_adapter(str(path)).build(),
            self.state: lambda _: self.load_state(),
            self.metrics: _check_metrics,
            self.results: self._check_results,
            **dict.fromkeys(self.pictures.glob("*.png"), check_picture),
            **dict.fromkeys((self.path / "cache").glob("*.h5"), Store),
        }
        return check_files({path: check for path, check in checks.items() if path in needed or path.exists()})

    def _check_results(self, path: Path) -> None:
        best, stored = json.loads(path.read_bytes())["best"], None
        with contextlib.suppress(WeightsError):  # it is told of the state itself
            stored = self.load_state()
        if stored and best != stored[1]["best"]:
            raise ValueError(f"its figures are not those of {self.state.name}")


def _metrics_line(line: bytes) -> tuple[int, str] | None:
    """The step of a line of the metrics, and its text; None where it is damaged."""
    try:
        text = line.decode("utf-8")
        return int(json.loads(text)["step"]), text
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _check_metrics(path: Path) -> None:
    read = [_metrics_line(line) for line in path.read_bytes().splitlines()]
    if None in read:
        raise ValueError(f"line {read.index(None) + 1} cannot be read")
