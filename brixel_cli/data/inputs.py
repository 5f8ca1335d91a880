"""The images that `--input` names, as one list of items with their sizes, wherever they lie."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from PIL import Image

from brixel_cli.config.shard import Shard
from brixel_cli.core.identity import text_digest
from brixel_cli.data.fetching import Fetcher
from brixel_cli.data.images import EXTENSIONS, LARGE_PIXELS, Contents, decoded, file_stat, read_size
from brixel_cli.data.members import Member, measured
from brixel_cli.data.parquet import PARQUET_EXTENSION, Parquet
from brixel_cli.data.references import Entry, absolute, common_root, expand, is_compressed_tar, name_of
from brixel_cli.data.remote import PART, Place, RemoteFile, Status, Url, status_of
from brixel_cli.data.tars import TAR_EXTENSION, tar_members
from brixel_cli.data.video import VIDEO_EXTENSIONS, Video
from brixel_cli.errors import BrixelError, UnreachedError, UsageError

SCAN_THREADS = 8
REMOTE_THREADS = 16
"""Of which each waits for a server, and of a tar holds two requests in memory."""
HEADER_BYTES = 1 << 16
"""Of a remote image that are fetched for its size; nearly always all that is needed."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image to be: a file, a member of a tar or parquet file, or a frame of a video.

    Attributes:
        path: of the file, or of the tar, parquet file or video; a URL for a remote one.
        name: path below the common root of all items, with `/name` for a member and `#frame` for a frame; no two
            items share it.
        height, width: in pixels after rotation; 0 where the header cannot be read.
        reason: why it cannot be used; empty for a usable one.
        file_size: in bytes; of a member, its own.
        modified: time of the last change of the file in nanoseconds; 0 where a server does not say.
        frame: 0-based number of the frame in its video; None for an image.
        part: where a member lies in its file; see `Member`.
        version: of a remote file, as of `Status`.
    """

    path: Place
    name: str
    height: int
    width: int
    reason: str
    file_size: int
    modified: int
    frame: int | None = None
    part: tuple[int, int] | None = None
    version: str = ""


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
        passed_over: videos, tars and parquet files in the folders named, which have to be named themselves.
        unreadable: folders below those named that may not be looked into.
        fetcher: of what does not lie in files of its own on this disk.
        split: of all that was named, where the items are those of one shard; None where they are all.
    """

    root: Place
    items: list[Item]
    videos: dict[Path, Video]
    passed_over: list[Path]
    unreadable: list[Path]
    fetcher: Fetcher = field(default_factory=Fetcher)
    split: Split | None = None

    def fetched_ahead(self, items: Sequence[Item]) -> AbstractContextManager[None]:
        """Within, bytes from elsewhere come before they are asked for, in the order of these items."""
        return self.fetcher.ahead([(item.path, item.part, item.file_size) for item in items if item.frame is None])

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
            with decoded(self._source(item), still=True, enough=enough, over=LARGE_PIXELS) as image:
                if item.height * item.width <= LARGE_PIXELS and (image.height, image.width) != (
                    item.height,
                    item.width,
                ):
                    raise BrixelError(
                        f"its header says {item.width}x{item.height} pixels, its contents {image.width}x{image.height}"
                    )
                yield image
            return
        video = self.videos[cast(Path, item.path)]
        for other in self.videos.values():
            if other is not video:
                other.close()  # a process may not have more than so many files open
        yield video.frame(item.frame)

    def _source(self, item: Item) -> Path | Contents:
        if item.part is None and isinstance(item.path, Path):
            return item.path
        data = self.fetcher.contents(item.path, item.part, item.file_size)
        return Contents(str(item.path), io.BytesIO(data))


def find_inputs(
    references: Sequence[str],
    every: int,
    without: Sequence[Path] = (),
    tick: Callable[[int], object] | None = None,
    column: str | None = None,
    allow_urls: bool = False,
    shard: Shard | None = None,
) -> Inputs:
    """Find all items by their headers alone; what cannot be read becomes an item with a reason.

    Args:
        references: see `references.expand`.
        every: which frames of a video are taken: 1 all of them, 10 every tenth.
        without: folders that are passed over: those that our own pictures go to.
        tick: called with the number of items found since the last call.
        column: of the images in parquet files; None: the one that looks like it.
        allow_urls: whether URLs that stand in lists are taken.
        shard: the part of all that is named to be taken; the headers of the others are not read.

    Raises:
        UsageError: a reference names nothing, or nothing at all was found.
        UnreachedError: a server did not answer.
    """
    named = expand(references, allow_urls)
    banned = tuple(f"{absolute(folder)}{os.sep}" for folder in without)
    named.places = [place for place in named.places if isinstance(place, Url) or not place.startswith(banned)]
    if not named.places:
        listed = ", ".join(sorted(EXTENSIONS))
        raise UsageError(f"No images in {', '.join(references)}. Files are taken by extension: {listed}.")
    root, split, taken = common_root(references, named.places), None, set(named.places)
    if shard is not None:
        split = split_of(root, named.places)
        named.places = list(shard.take(named.places))
    places: list[Place] = [Path(place) if isinstance(place, str) else place for place in named.places]
    scan = _Scan(root, column, named.statuses, named.refused)
    videos: dict[Path, Video] = {}
    items: list[Item] = []
    remote = any(isinstance(place, Url) for place in places)
    with ThreadPoolExecutor(REMOTE_THREADS if remote else SCAN_THREADS) as pool:
        for place, found in zip(places, pool.map(scan, places), strict=True):
            found = scan.frames(cast(Path, place), every, videos) if found is None else found
            items += found
            if tick:
                tick(len(found))
    passed_over = [path for path in named.passed_over if str(absolute(path)) not in taken]
    return Inputs(scan.root, _named_once(items), videos, passed_over, named.unreadable, scan.fetcher, split)


def split_of(root: Place, places: Sequence[Entry]) -> Split:
    """What is split into shards: the places below the root, each to be opened as a whole."""
    start = len(str(root))
    return Split(len(places), text_digest("\n".join(str(place)[start:] for place in places)))


def describe_unreadable(folders: Sequence[Path]) -> str:
    """The folders that may not be looked into, for a warning."""
    return f"folders that cannot be read, whose images are left out: {', '.join(map(str, folders))}"


def none_usable(failures: Mapping[str, str]) -> BrixelError:
    """The error that no image can be used, with the first reasons by name."""
    listed = "".join(f"\n  {name}: {reason}" for name, reason in list(failures.items())[:5])
    return BrixelError(f"None of the {len(failures)} images found can be used.{listed}\nName others with --input.")


def reason_of(error: BrixelError, path: Place) -> str:
    """The reason alone, without the path that `load_image` adds."""
    return str(error).removesuffix(f": {path}")


def _named_once(items: list[Item]) -> list[Item]:
    """Items of which no two share a name: of remote ones, different URLs can come to one."""
    seen: dict[str, int] = {}
    for row, item in enumerate(items):
        count = seen[item.name] = seen.get(item.name, 0) + 1
        if count > 1:
            items[row] = Item(item.path, f"{item.name}#{count}", 0, 0, "an earlier image has the same name", 0, 0)
    return items


class _Scan:
    """Looks into one place after another; called by several threads.

    Args:
        root: that names start from.
        column: of the images in parquet files.
        statuses: of URLs, as far as they are known.
        refused: places that are not looked into, with the reasons.
    """

    def __init__(self, root: Place, column: str | None, statuses: Mapping[Url, Status], refused: Mapping[Entry, str]):
        self.root, self.fetcher = root, Fetcher()
        self._column, self._statuses, self._refused = column, statuses, refused

    def __call__(self, place: Place) -> list[Item] | None:
        """The items of a place: one image, or those of an archive; None for a video."""
        name, reason = name_of(self.root, place)
        suffix = place.suffix.lower()
        if suffix in VIDEO_EXTENSIONS and isinstance(place, Url):
            reason = "a video has to be on this disk"
        if reason := reason or self._refused.get(str(place) if isinstance(place, Path) else place, ""):
            return [Item(place, name, 0, 0, reason, 0, 0)]
        if suffix in VIDEO_EXTENSIONS:
            return None
        status = Status(0, 0, "")
        try:
            status = self._status(place)
            if suffix in (TAR_EXTENSION, PARQUET_EXTENSION) or is_compressed_tar(place):
                return self._archive(place, name, status, is_tar=suffix != PARQUET_EXTENSION)
            if isinstance(place, Path):
                height, width = read_size(place, still=True)
                return [Item(place, name, height, width, "", status.num_bytes, status.modified)]
            with closing(RemoteFile(place, status.num_bytes, HEADER_BYTES)) as file:
                found = measured("", (0, 0), cast(BinaryIO, file), status.num_bytes)
            return [_item(place, name, status, found, part=None)]
        except UsageError:
            raise
        except UnreachedError as error:
            if not error.missing:
                raise UnreachedError(
                    f"{str(error).partition(': ')[2]}: {place}. Give the same command again"
                ) from error
            reason = str(error)
        except BrixelError as error:
            reason = reason_of(error, place)
        return [Item(place, name, 0, 0, reason, status.num_bytes, status.modified, version=status.version)]

    def frames(self, path: Path, every: int, videos: dict[Path, Video]) -> list[Item]:
        """The frames of a video that are taken."""
        name, _ = name_of(self.root, path)
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

    def _status(self, place: Place) -> Status:
        if isinstance(place, Url):
            return self._statuses.get(place) or status_of(place)
        status = file_stat(place)
        return Status(status.st_size, status.st_mtime_ns, "")

    def _archive(self, place: Place, name: str, status: Status, is_tar: bool) -> list[Item]:
        def open_file() -> BinaryIO:
            if isinstance(place, Path):
                return place.open("rb")
            return cast(BinaryIO, RemoteFile(place, status.num_bytes, PART, ahead=True))

        if is_tar:
            with closing(open_file()) as file:
                members = list(tar_members(file, status.num_bytes))
        else:
            try:
                parquet = self.fetcher.parquets[place] = Parquet(open_file, self._column)
            except UsageError as error:
                raise UsageError(f"--input {place}: {error}") from error
            members = list(parquet.members())
        if not members:
            raise BrixelError("no images in it")
        return [_item(place, f"{name}/{member.name}", status, member, member.part) for member in members]


def _item(place: Place, name: str, status: Status, found: Member, part: tuple[int, int] | None) -> Item:
    return Item(
        place, name, found.height, found.width, found.reason, found.num_bytes, status.modified, None, part,
        status.version,
    )  # fmt: skip
