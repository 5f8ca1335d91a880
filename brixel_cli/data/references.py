"""What the texts of `--input` name: files on the disk and URLs, before anything of them is read."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from brixel_cli.data.images import EXTENSIONS, extension_of, file_names_below, file_stat, is_folder, name_below
from brixel_cli.data.members import safe_name
from brixel_cli.data.parquet import PARQUET_EXTENSION
from brixel_cli.data.remote import (
    Place,
    Status,
    Url,
    fetch,
    is_folder_url,
    is_url,
    listed,
    status_of,
    to_url,
    without_secrets,
)
from brixel_cli.data.tars import COMPRESSED_TARS, TAR_EXTENSION
from brixel_cli.data.video import VIDEO_EXTENSIONS
from brixel_cli.errors import BrixelError, UnreachedError, UsageError

LIST_EXTENSIONS = frozenset({".txt", ".lst", ".list"})
ARCHIVE_EXTENSIONS = frozenset({TAR_EXTENSION, PARQUET_EXTENSION})
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
MOST_EXPANDED = 1_000_000
"""Names that braces may stand for."""
MOST_LISTED = 1 << 28
"""Bytes of a remote list."""
Entry = str | Url
"""A file that is named: its absolute path, or its URL. There may be a million, and a text is the smallest object."""
_ODD = re.compile(r"^~|//|(^|/)\.\.?(/|$)|/$" if os.sep == "/" else "")
"""Whether a path may be written otherwise than `Path` has it."""
KINDS = "a folder, an image, a video, a tar, a parquet file, a quoted glob, a .txt list of paths, or a URL of these"


@dataclass
class Named:
    """What references name.

    Attributes:
        places: files and URLs, in the order in which they were named.
        statuses: what a server said of a URL when it listed it.
        refused: why a place that a list names is not even looked at.
        passed_over: videos, tars and parquet files in the folders named, which have to be named themselves.
        unreadable: folders below those named that may not be looked into.
    """

    places: list[Entry] = field(default_factory=list)
    statuses: dict[Url, Status] = field(default_factory=dict)
    refused: dict[Entry, str] = field(default_factory=dict)
    passed_over: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)


def expand(references: Sequence[str], allow_urls: bool) -> Named:
    """All files that references name; those on the disk by their absolute paths, none twice.

    Args:
        references: a folder, a file, a glob, names with a range in braces, a list, or a URL.
        allow_urls: whether the URLs that stand in lists are taken too.

    Raises:
        UsageError: a reference names nothing.
        UnreachedError: a server did not answer.
    """
    named = Named()
    for reference in references:
        names = [reference] if not is_url(reference) and os.path.lexists(_path(reference)) else with_braces(reference)
        for name in names:
            if is_url(name):
                _expand_url(to_url(name), named, allow_urls)
            else:
                _expand(name, named, allow_urls, several=len(names) > 1)
    named.places = list(dict.fromkeys(named.places))
    return named


def with_braces(reference: str) -> list[str]:
    """The names that braces stand for: `{000..063}` for numbers of as many digits, `{a,b}` for each of these.

    Raises:
        UsageError: they are more than anybody means.
    """
    found = BRACES.search(reference)
    if found is None:
        return [reference]
    first, last, texts = found.groups()
    if texts is None and abs(int(last) - int(first)) >= MOST_EXPANDED:
        raise _too_many(reference)
    if texts is None:
        step = 1 if int(last) >= int(first) else -1
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        parts = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    else:
        parts = texts.split(",")
    ends = with_braces(reference[found.end() :])
    if len(parts) * len(ends) > MOST_EXPANDED:
        raise _too_many(reference)
    return [reference[: found.start()] + part + end for part in parts for end in ends]


def _too_many(reference: str) -> UsageError:
    return UsageError(f"--input {without_secrets(reference)}: the braces stand for more than {MOST_EXPANDED:,} names.")


def default_output(references: Sequence[str], suffix: str) -> Path:
    """Where features go when the user does not say: beside the input, under its name; of a URL, in this folder."""
    reference, here = references[0], Path.cwd()
    braced = not is_url(reference) and not os.path.lexists(_path(reference)) and BRACES.search(reference)
    if is_url(reference):
        parts = [part for part in re.split(r"[*?\[{]", reference.partition("://")[2])[0].split("/") if part]
        stem = re.sub(r"[^\w.-]", "_", Path(parts[-1] if parts else "").stem).strip("-_.")
        return here / f"{stem if stem and len(references) == 1 else 'features'}{suffix}"
    if braced:
        first = _path(reference[: braced.start()] + "x")
        return first.absolute().with_name((first.name[:-1].strip("-_.") or first.parent.name or "features") + suffix)
    first = _path(reference)
    if not os.path.exists(first) and glob.has_magic(reference):
        first = _fixed_part(reference)
    if len(references) > 1:
        return first.absolute().parent / f"features{suffix}"
    first = first.resolve() if first.name in ("", ".", "..") else first
    if not first.name:
        return Path(f"features{suffix}")
    return first.with_name((first.name if os.path.isdir(first) else first.stem) + suffix)


def common_root(references: Sequence[str], places: Sequence[Entry]) -> Place:
    """The folder that the names of all items start from.

    Raises:
        UsageError: places on the disk and elsewhere have none.
    """
    only = _path(references[0])
    if len(references) == 1 and not is_url(references[0]) and os.path.isdir(only):
        return absolute(only)
    urls = [place for place in places if isinstance(place, Url)]
    paths = places if not urls else [place for place in places if isinstance(place, str)]
    if not urls:
        return Path(os.path.commonpath({os.path.dirname(str(path)) for path in paths}))
    least, most = min(url.parts[:-1] for url in urls), max(url.parts[:-1] for url in urls)
    shared = [part for part, other in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(least, most))]  # noqa: B905
    if paths or not shared:
        first = paths[0] if paths else urls[-1]
        raise UsageError(
            f"--input names both {urls[0]} and {first}: their names have no common start. Give each kind an output "
            "of its own."
        )
    return Url(f"{shared[0]}://{'/'.join(shared[1:])}/")


def name_of(root: Place, place: Place) -> tuple[str, str]:
    """The name of a place below the root, and why it cannot be used, if so."""
    if isinstance(place, Path) and isinstance(root, Path):
        return name_below(root, place), ""
    assert isinstance(place, Url)
    assert isinstance(root, Url)
    return safe_name("/".join(place.parts[len(root.parts) :]))


def absolute(path: Path) -> Path:
    """Without `..`, which would lead names out of their root; other symbolic links stay as they are."""
    if ".." not in path.parts:
        return path.absolute()
    return Path(os.path.realpath(path)) if os.path.isdir(path) else Path(os.path.realpath(path.parent)) / path.name


def _path(text: str) -> Path:
    """A path as the shell understands it: that of a user who is not known stays as it is."""
    return Path(os.path.expanduser(text))


def _fixed_part(pattern: str) -> Path:
    parts = _path(pattern).parts
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    return Path(*fixed) if fixed else Path.cwd()


def _expand(reference: str, named: Named, allow_urls: bool, several: bool) -> None:
    """Add what a reference to the disk names."""
    path = _path(reference)
    if is_folder(path):
        _expand_folder(path, named)
    elif os.path.lexists(path):
        try:
            file_stat(path)
        except BrixelError as error:
            reason = str(error).removesuffix(f": {path}")
            raise UsageError(f"--input {path} cannot be read: {reason}.") from error
        if path.suffix.lower() in LIST_EXTENSIONS:
            _add_lines(path, _lines(path), named, allow_urls)
        else:
            named.places.append(str(absolute(path)))
    elif glob.has_magic(reference):
        matches = [Path(match) for match in sorted(glob.glob(os.path.expanduser(reference), recursive=True))]
        found = [match for match in matches if os.path.isfile(match)]
        if not found:
            raise UsageError(f"The pattern {without_secrets(reference)} matches no file.")
        named.places += [str(absolute(match)) for match in found]
    elif several:
        named.places.append(str(absolute(path)))  # one of a range: a row tells that it is missing
    else:
        raise UsageError(f"Nothing at {without_secrets(str(path))}. --input takes {KINDS}.")


def _expand_folder(path: Path, named: Named) -> None:
    hidden: list[Path] = []
    files = file_names_below(path, (*EXTENSIONS, *VIDEO_EXTENSIONS, *ARCHIVE_EXTENSIONS), hidden)
    found = [file for file in files if extension_of(file) in EXTENSIONS]
    others = [Path(file) for file in files if extension_of(file) not in EXTENSIONS]
    named.unreadable += hidden
    named.passed_over += others
    if not found:
        besides = f", but {describe_passed_over(others)}" if others else "."
        besides += f" Its folder {hidden[0]} cannot be read." if hidden else ""
        taken = ", ".join(sorted(EXTENSIONS))
        raise UsageError(f"No images in the folder {path}{besides} Files are taken by extension: {taken}.")
    start, base = len(str(path)), str(absolute(path))
    named.places += [os.path.join(base, file[start:].lstrip(os.sep)) for file in found]


def _expand_url(url: Url, named: Named, allow_urls: bool) -> None:
    """Add what a URL names: a pattern, a folder, a list, or a file, of which a row tells if it is not there."""
    if url.scheme not in ("http", "https") and glob.has_magic(url.text):
        found = listed(url)
        if not found:
            raise UsageError(f"The pattern {url} matches no file.")
    elif url.suffix.lower() in LIST_EXTENSIONS:
        try:
            size = min(status_of(url).num_bytes, MOST_LISTED)
            text = fetch(url, 0, size).decode("utf-8-sig")
        except (UnreachedError, UnicodeDecodeError) as error:
            raise UsageError(f"{url} cannot be read as a list of paths, one a line: {error}.") from error
        _add_lines(url, text.splitlines(), named, allow_urls)
        return
    elif url.suffix.lower() in (*EXTENSIONS, *ARCHIVE_EXTENSIONS) or not is_folder_url(url):
        named.places.append(url)
        return
    else:
        found = [(file, status) for file, status in listed(url, below=True) if file.suffix.lower() in EXTENSIONS]
        if not found:
            raise UsageError(f"No images below {url}. Files are taken by extension: {', '.join(sorted(EXTENSIONS))}.")
    named.places += [file for file, _ in found]
    named.statuses |= dict(found)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a list of paths, one a line: {error}") from error


def _add_lines(source: Place, lines: Sequence[str], named: Named, allow_urls: bool) -> None:
    """Add what the lines of a list name, relative to its folder; a URL elsewhere only where that is allowed."""
    folder = absolute(source.parent) if isinstance(source, Path) else source.folder
    some = False
    for line in lines:
        entry = line.strip()
        if not entry or entry[0] == "#":
            continue
        some = True
        if not is_url(entry):
            named.places.append(_beside(folder, entry))
            continue
        place = beside = _beside(folder, without_secrets(entry))  # names the row where the URL is refused
        reason = ""
        try:
            place = url = to_url(entry)
            if not allow_urls and not (isinstance(source, Url) and url.parts[:2] == source.parts[:2]):
                place, reason = beside, "a URL in a list, which is fetched only with --allow-urls"
        except UsageError:
            reason = "not a URL that is read"
        if reason:
            named.refused[place] = reason
        named.places.append(place)
    if not some:
        raise UsageError(f"{source} names no images: it wants one path a line, relative to its own folder.")


def _beside(folder: Path | str, entry: str) -> Entry:
    """What a line of a list names: relative to the folder of a list on the disk, or below the URL of a remote one."""
    if isinstance(folder, str):
        return Url(folder + entry)
    if _ODD.search(entry):
        return str(absolute(folder / _path(entry)))
    return entry if entry[0] == "/" else f"{folder}/{entry}"


def describe_passed_over(files: Sequence[Path]) -> str:
    """How many videos, tars and parquet files were passed over, and how to take their frames and images."""
    videos = [file for file in files if file.suffix.lower() in VIDEO_EXTENSIONS]
    archives = [file for file in files if file.suffix.lower() in ARCHIVE_EXTENSIONS]
    said = []
    if videos:
        said.append(
            f"{len(videos)} videos, which are passed over unless they are named: --input {videos[0]} takes its frames "
            "(with PyAV: pip install 'brixel[video]')."
        )
    if archives:
        example = archives[0] if len(archives) == 1 else f"'{archives[0].parent}/*{archives[0].suffix}'"
        said.append(
            f"{len(archives)} tars or parquet files, which are passed over unless they are named: --input {example}."
        )
    return " And ".join(said)


def is_compressed_tar(place: Place) -> bool:
    """Whether a place is called like a compressed tar."""
    return place.name.lower().endswith(COMPRESSED_TARS)
