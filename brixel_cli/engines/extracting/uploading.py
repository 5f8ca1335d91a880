"""Outputs in an object store: filled on this disk, and copied there when every row is settled.

Beside the copy lies a small file, `.done`, which is written last: it says which command computed the copy, and how it
ended. So a job on another machine passes over what is complete, without fetching it.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

from brixel_cli.config.extract import ExtractOptions
from brixel_cli.data.remote import Url, fetch, put, status_of, to_url
from brixel_cli.engines.extracting.parts import Extracted, asked_files, asked_words
from brixel_cli.engines.reporting import Reporter
from brixel_cli.errors import UNREACHED, BrixelError, UnreachedError, UsageError

DONE_ENDING = ".done"


def found_there(options: ExtractOptions) -> Extracted | None:
    """What the store has of the output, where it is complete and the same command has computed it; else None.

    Raises:
        UsageError: another command has computed it.
        BrixelError: the store does not answer.
    """
    if options.overwrite:
        return None
    path, url = _places(options)
    done = Url(url.text + DONE_ENDING)
    try:
        found = json.loads(fetch(done, 0, status_of(done).num_bytes))
        asked, files, images, computed, failures = (
            found[key] for key in ("asked", "files", "images", "computed", "failures")
        )
    except UnreachedError as error:
        if error.missing:
            return None
        raise BrixelError(f"{done} cannot be read: {error}. Give the same command again.") from error
    except (ValueError, KeyError, TypeError):
        return None
    if (asked, files) != (asked_words(options), asked_files(options)):
        command = f"brixel extract {shlex.join(map(str, asked))}"
        raise UsageError(
            f"{url} was computed with other options or another model: {command}. Give --overwrite to replace it, or "
            "another --output."
        )
    return Extracted(path, int(images), int(computed), 0, dict(failures), 0.0, [], str(url))


def send(options: ExtractOptions, done: Extracted, reporter: Reporter) -> Extracted:
    """Copy what was computed to the store, unless rows of it are to be tried again.

    Raises:
        BrixelError: the store does not take it; the file on this disk stays.
    """
    path, url = _places(options)
    if any(reason.startswith(UNREACHED) for reason in done.failures.values()):
        reporter.warn(f"{path} is not copied to {url} before the images that were not fetched were tried again.")
        return done
    reporter.say(f"copying {path} to {url}")
    num_done = done.num_before + done.num_computed
    asked = {"asked": asked_words(options), "files": asked_files(options)}
    ended = asked | {"images": done.num_images, "computed": num_done, "failures": done.failures}
    try:
        put(path, url)
        put(json.dumps(ended, indent=1).encode(), Url(url.text + DONE_ENDING))
    except UnreachedError as error:
        raise BrixelError(
            f"{path} is complete, but was not copied to {url}: {error}. Give the same command again to copy it."
        ) from error
    return replace(done, uploaded=str(url))


def _places(options: ExtractOptions) -> tuple[Path, Url]:
    """The output, or its part, on this disk and in the store."""
    assert options.output is not None
    assert options.upload is not None
    path = options.output if options.shard is None else options.shard.path(options.output)
    return path, Url(to_url(options.upload, "--output").folder + path.name)
