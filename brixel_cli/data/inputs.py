"""What `--input` names: folders, files, globs, text lists and videos, as one list of items with their sizes."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from brixel_cli.config.shard import Shard
from brixel_cli.core.identity import text_digest
from brixel_cli.data.images import (
    EXTENSIONS,
    LARGE_PIXELS,
    decoded,
    file_stat,
    files_below,
    is_folder,
    name_below,
    read_size,
)
from brixel_cli.data.video import VIDEO_EXTENSIONS, Video
from brixel_cli.errors import BrixelError, UsageError

LIST_EXTENSIONS = frozenset({".txt", ".lst", ".list"})
SCAN_THREADS = 8


@dataclass(frozen=True)
class Item:
    """One image to be: a file, or a frame of a video.

    Attributes:
        path: of the file.
        name: path below the common root of all items, with `#frame` for a frame; no two items share it.
        height, width: in pixels after rotation; 0 where the header cannot be read.
        reason: why it cannot be used; empty for a usable one.
        file_size: in bytes.
        modified: time of the last change in nanoseconds.
        frame: 0-based number of the frame in its video; None for an image.
    """

    path: Path
    name: str
    height: int
    width: int
    reason: str
    file_size: int
    modified: int
    frame: int | None = None


@dataclass(frozen=True)
class Split:
    """What a shard is one of: the shards of one split have the same.

    Attributes:
        num_inputs: images, videos and archives that were named, for all shards together.
        sha256: over their names, in order.
    """

    num_inputs: int
    sha256: str


@dataclass(frozen=True)
class Inputs:
    """All items, in the order in which they were named.

    Attributes:
        root: the folder that their names start from.
        items: images, and frames of videos.
        videos: by path, those that frames are taken from.
        passed_over: videos in the folders named, of which no frame is taken: a video has to be named itself.
        unreadable: folders below those named that may not be looked into.
        split: of all that was named, where the items are those of one shard; None where they are all.
    """

    root: Path
    items: list[Item]
    videos: dict[Path, Video]
    passed_over: list[Path]
    unreadable: list[Path]
    split: Split | None = None

    @contextmanager
    def decoded(self, item: Item, enough: tuple[int, int] | None = None) -> Iterator[Image.Image]:
        """The item's pixels, upright 8-bit RGB; see `images.decoded`.

        Args:
            item: of these.
            enough: height and width of which more are not needed, where an image is very large.

        Raises:
            BrixelError: it cannot be read; the message starts with the reason.
        """
        if item.frame is None:
            with decoded(item.path, still=True, enough=enough, over=LARGE_PIXELS) as image:
                if item.height * item.width <= LARGE_PIXELS and (image.height, image.width) != (
                    item.height,
                    item.width,
                ):
                    raise BrixelError(
                        f"its header says {item.width}x{item.height} pixels, its contents {image.width}x{image.height}"
                    )
                yield image
            return
        video = self.videos[item.path]
        for other in self.videos.values():
            if other is not video:
                other.close()  # a process may not have more than so many files open
        yield video.frame(item.frame)


def find_inputs(
    references: Sequence[str],
    every: int,
    without: Sequence[Path] = (),
    tick: Callable[[int], object] | None = None,
    shard: Shard | None = None,
) -> Inputs:
    """Find all items by their headers alone; a file that cannot be read becomes an item with a reason.

    Args:
        references: a folder (searched recursively), an image, a video, a glob, or a text file with a path a line.
        every: which frames of a video are taken: 1 all of them, 10 every tenth.
        without: folders that are passed over: those that our own pictures go to.
        tick: called with the number of items found since the last call.
        shard: the part of all that is named to be taken; the headers of the others are not read.

    Raises:
        UsageError: a reference names nothing, or nothing at all was found.
    """
    paths: list[Path] = []
    passed_over: list[Path] = []
    unreadable: list[Path] = []
    for reference in references:
        found, others = _expand(reference, unreadable)
        paths += found
        passed_over += others
    banned = [_absolute(folder) for folder in without]
    paths = [path for path in dict.fromkeys(_absolute(path) for path in paths) if not _below(path, banned)]
    if not paths:
        listed = ", ".join(sorted(EXTENSIONS))
        raise UsageError(f"No images in {', '.join(references)}. Files are taken by extension: {listed}.")
    root = _root(references, paths)
    split = None
    if shard is not None:
        split = split_of(root, paths)
        paths = list(shard.take(paths))
    videos: dict[Path, Video] = {}
    items: list[Item] = []
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        for path, item in zip(paths, pool.map(lambda path: _scan(path, root), paths), strict=True):
            items += _frames(path, root, every, videos) if item is None else [item]
            if tick:
                tick(1)
    passed_over = [path for path in passed_over if _absolute(path) not in videos]
    return Inputs(root, items, videos, passed_over, unreadable, split)


def split_of(root: Path, places: Sequence[Path]) -> Split:
    """What is split into shards: the places below the root, each to be opened as a whole."""
    start = len(str(root))
    return Split(len(places), text_digest("\n".join(str(place)[start:] for place in places)))


def default_output(references: Sequence[str], suffix: str) -> Path:
    """Where features go when the user does not say: beside the input, under its name."""
    first = _path(references[0])
    if not os.path.exists(first) and glob.has_magic(references[0]):
        first = _fixed_part(references[0])
    if len(references) > 1:
        return first.absolute().parent / f"features{suffix}"
    first = first.resolve() if first.name in ("", ".", "..") else first
    if not first.name:
        return Path(f"features{suffix}")
    return first.with_name((first.name if os.path.isdir(first) else first.stem) + suffix)


def _path(text: str) -> Path:
    """A path as the shell understands it: that of a user who is not known stays as it is."""
    return Path(os.path.expanduser(text))


def _expand(reference: str, unreadable: list[Path]) -> tuple[list[Path], list[Path]]:
    """The files that a reference names, and the videos that a folder holds besides; adds to the unreadable folders."""
    path = _path(reference)
    if is_folder(path):
        hidden: list[Path] = []
        files = files_below(path, (*EXTENSIONS, *VIDEO_EXTENSIONS), hidden)
        videos = [file for file in files if file.suffix.lower() in VIDEO_EXTENSIONS]
        found = [file for file in files if file.suffix.lower() not in VIDEO_EXTENSIONS]
        unreadable += hidden
        if not found:
            besides = f", but {describe_videos(videos)}" if videos else "."
            taken = ", ".join(sorted(EXTENSIONS))
            besides += f" Its folder {hidden[0]} cannot be read." if hidden else ""
            raise UsageError(f"No images in the folder {path}{besides} Files are taken by extension: {taken}.")
        return found, videos
    if os.path.lexists(path):
        try:
            file_stat(path)
        except BrixelError as error:
            raise UsageError(f"--input {path} cannot be read: {reason_of(error, path)}.") from error
        return (_read_list(path) if path.suffix.lower() in LIST_EXTENSIONS else [path]), []
    if glob.has_magic(reference):
        matches = [Path(match) for match in sorted(glob.glob(os.path.expanduser(reference), recursive=True))]
        found = [match for match in matches if os.path.isfile(match)]
        if found:
            return found, []
        raise UsageError(f"The pattern {reference} matches no file.")
    raise UsageError(
        f"Nothing at {path}. --input takes a folder, an image, a video, a quoted glob, or a .txt list of paths."
    )


def describe_videos(videos: Sequence[Path]) -> str:
    """How many videos were passed over, and how to take their frames."""
    return (
        f"{len(videos)} videos, which are passed over unless they are named: --input {videos[0]} takes its frames "
        "(with PyAV: pip install 'brixel[video]')."
    )


def describe_unreadable(folders: Sequence[Path]) -> str:
    """The folders that may not be looked into, for a warning."""
    return f"folders that cannot be read, whose images are left out: {', '.join(map(str, folders))}"


def _read_list(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a list of paths, one a line: {error}") from error
    named = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not named:
        raise UsageError(f"{path} names no images: it wants one path a line, relative to its own folder.")
    return [path.parent / _path(line) for line in named]


def _absolute(path: Path) -> Path:
    """Without `..`, which would lead names out of their root; other symbolic links stay as they are."""
    if ".." not in path.parts:
        return path.absolute()
    return Path(os.path.realpath(path)) if os.path.isdir(path) else Path(os.path.realpath(path.parent)) / path.name


def _below(path: Path, folders: Sequence[Path]) -> bool:
    return any(folder in path.parents for folder in folders)


def _fixed_part(pattern: str) -> Path:
    parts = _path(pattern).parts
    fixed = []
    for part in parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed) if fixed else Path.cwd()


def _root(references: Sequence[str], paths: Sequence[Path]) -> Path:
    only = _path(references[0])
    if len(references) == 1 and os.path.isdir(only):
        return _absolute(only)
    return Path(os.path.commonpath([path.parent for path in paths]))


def _scan(path: Path, root: Path) -> Item | None:
    if path.suffix.lower() in VIDEO_EXTENSIONS:
        return None
    height = width = size = modified = 0
    reason = ""
    try:
        status = file_stat(path)
        size, modified = status.st_size, status.st_mtime_ns
        height, width = read_size(path, still=True)
    except BrixelError as error:
        reason = reason_of(error, path)
    return Item(path, name_below(root, path), height, width, reason, size, modified)


def none_usable(failures: Mapping[str, str]) -> BrixelError:
    """The error that no image can be used, with the first reasons by name."""
    listed = "".join(f"\n  {name}: {reason}" for name, reason in list(failures.items())[:5])
    return BrixelError(f"None of the {len(failures)} images found can be used.{listed}\nName others with --input.")


def reason_of(error: BrixelError, path: Path) -> str:
    """The reason alone, without the path that `load_image` adds."""
    return str(error).removesuffix(f": {path}")


def _frames(path: Path, root: Path, every: int, videos: dict[Path, Video]) -> list[Item]:
    name = name_below(root, path)
    try:
        status = file_stat(path)
        videos[path] = video = Video(path)
    except UsageError:
        raise
    except BrixelError as error:
        return [Item(path, name, 0, 0, reason_of(error, path), 0, 0)]
    numbers = range(0, video.num_frames, every)
    digits = len(str(video.num_frames))
    return [
        Item(path, f"{name}#{n:0{digits}d}", video.height, video.width, "", status.st_size, status.st_mtime_ns, n)
        for n in numbers
    ]
