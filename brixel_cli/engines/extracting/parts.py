"""The parts of an output that shards write: what is known of one without torch, and how an extraction ended."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from brixel_cli.config.extract import ExtractOptions
from brixel_cli.config.shard import PART, UNFINISHED, Shard
from brixel_cli.core.files import writing
from brixel_cli.core.hub import HUB
from brixel_cli.core.identity import files_sha256, json_digest, library_versions
from brixel_cli.core.shipped import locate, shipped_students
from brixel_cli.data.remote import is_url, without_secrets
from brixel_cli.data.row_store import DONE, FAILED, REASON, Store, num_open
from brixel_cli.errors import UNREACHED, BrixelError, UsageError

ASKED = "asked"
"""Key of a part's description: the words of the command that computes it, without output and shard."""
ASKED_FILES = "asked_files"
"""Key of a part's description: digests of the files of the model that these words name."""
_NOT_ASKED = {"output", "upload", "shard", "device", "workers", "strict", "overwrite", "preview"}
"""Options that are a matter of the machine, or of one run; those of the page are others."""
_WORDS = {"inputs": "--input", "storage": "--format"}


@dataclass(frozen=True)
class Extracted:
    """How an extraction ended.

    Attributes:
        output: the feature file, or the folder of single files.
        num_images: rows of the file.
        num_before: rows that were finished by an earlier run.
        failures: images without features, with the reasons.
        seconds: from the first image to the last.
        num_computed: images that this run computed, on all processes.
        pictures: what `preview` and `page` wrote.
        uploaded: the URL that the output was copied to; empty: it was not.
    """

    output: Path
    num_images: int
    num_before: int
    num_computed: int
    failures: dict[str, str]
    seconds: float
    pictures: list[Path]
    uploaded: str = ""


def unfinished(part: Path) -> Path:
    """The file of a part for as long as it has rows to be computed."""
    return part.with_name(part.name + UNFINISHED)


def finish_part(part: Path) -> None:
    """Give a part whose rows are all settled its name, in one step.

    Raises:
        BrixelError: the disk refuses it.
    """
    with writing(part), suppress(FileNotFoundError):  # it has its name where a part that was damaged was repaired
        os.replace(unfinished(part), part)


def asked_words(options: ExtractOptions) -> list[str]:
    """The words of the command line that ask for the same rows, with absolute paths; no secrets of URLs."""
    words: list[str] = []
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in _NOT_ASKED or field.name.startswith("page") or value in (None, field.default):
            continue
        option = _WORDS.get(field.name, f"--{field.name.replace('_', '-')}")
        if field.name == "inputs":
            words += [word for reference in value for word in (option, _absolute(str(reference)))]
        elif value is True:
            words.append(option)
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [option, _absolute(text) if os.path.exists(text) else without_secrets(text)]
    return words


def _absolute(reference: str) -> str:
    return without_secrets(reference) if is_url(reference) else os.path.abspath(os.path.expanduser(reference))


def asked_files(options: ExtractOptions) -> list[str]:
    """SHA-256 of the student and of the backbone's weights, where the options name files; none is downloaded.

    Raises:
        BrixelError: a file is not there.
    """
    student, weights = options.checkpoint, options.backbone_weights
    files = [locate(student)] if student and not student.startswith(HUB) else []
    files += [Path(weights).expanduser()] if weights not in (None, "pretrained", "random") else []
    return [json_digest(shipped_students()), *files_sha256(files)]


def completed(options: ExtractOptions) -> Extracted | None:
    """The part that these options ask for, where it is complete and the same command has written it; else None.

    The images are not looked at again, only the files of the model and the versions of what computes. Neither torch nor
    the model is loaded. A student on the hub is taken to be the same.
    """
    if options.shard is None or options.output is None or options.overwrite:
        return None
    path = options.shard.path(options.output)
    if not path.is_file():
        return None
    try:
        store, files = Store(path), asked_files(options)
    except BrixelError:
        return None  # what is to be done about it, the extraction says
    if (store.description.get("versions"), store.description.get(ASKED_FILES)) != (library_versions(), files):
        return None
    status = store.status
    if store.description.get(ASKED) != asked_words(options) or store.damaged or num_open(status):
        return None
    reasons, paths = store.array(REASON), store.array("paths")
    unreached = np.char.startswith(reasons, UNREACHED.encode()) & (store.array("model_size")[:, 0] > 0)
    if (unreached & (status == FAILED)).any():
        return None  # these are tried again
    failures = {
        bytes(paths[row]).decode(): bytes(reasons[row]).decode(errors="replace")
        for row in (status == FAILED).nonzero()[0]
    }
    return Extracted(path, len(status), int((status == DONE).sum()), 0, failures, 0.0, [])


def check_split(output: Path, shard: Shard) -> None:
    """Raise a UsageError where parts of another split of the same output are there: they could never be joined."""
    stem = PART.fullmatch(shard.path(output).name)
    assert stem is not None
    folder = output.parent
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        found = PART.fullmatch(name.removesuffix(UNFINISHED))
        if found and found["stem"] == stem["stem"] and int(found["count"]) != shard.count:
            raise UsageError(
                f"--shard {shard}: {folder / name} is of a split in {int(found['count'])} shards. Give that number, "
                "name another --output, or delete those parts."
            )
