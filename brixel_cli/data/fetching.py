"""Bytes of images that are no files of their own on this disk, fetched before they are asked for, in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from brixel_cli.data.parquet import Parquet
from brixel_cli.data.remote import PART, Place, Url, fetch
from brixel_cli.data.tars import read_part

REQUESTS = 16
"""Threads that wait for servers."""
AHEAD_BYTES = 64 << 20
"""Fetched and not yet asked for, of all images together; a single request may be larger."""
AHEAD_GROUPS = 64
"""Requests ahead, where images are small."""
GAP = 1 << 16
"""Bytes between two members of a tar that are fetched with them rather than by two requests."""
Part = tuple[int, int] | None
Wanted = tuple[Place, Part, int]
"""An image: the file that it lies in, its part of it, and its size in bytes."""


@dataclass(slots=True)
class _Group:
    """Images that come by one request.

    Attributes:
        place: the file.
        parts: of the images, in order.
        num_bytes: that are fetched for them.
        left: of these images not asked for yet.
        coming: their bytes.
    """

    place: Place
    parts: list[Part]
    num_bytes: int
    left: int = 0
    coming: Future[list[bytes]] | None = field(default=None)


class Fetcher:
    """Gives the bytes of members and of remote images, those of a whole list ahead.

    Attributes:
        parquets: the parquet files, by place.
    """

    def __init__(self) -> None:
        self.parquets: dict[Place, Parquet] = {}
        self._lock = threading.Lock()
        self._groups: list[_Group] = []
        self._where: dict[tuple[Place, Part], tuple[int | None, int]] = {}
        self._next = self._bytes_ahead = self._groups_ahead = 0
        self._pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None

    def contents(self, place: Place, part: Part, num_bytes: int) -> bytes:
        """The bytes of an image.

        Args:
            place: the file that it lies in.
            part: of that file; None: all of it.
            num_bytes: of the image.

        Raises:
            BrixelError: they cannot be read; the message is the reason.
            UnreachedError: they did not come.
        """
        with self._lock:
            number, row = self._where.pop((place, part), (None, 0))
            if number is not None:
                self._submit(number)
            group = _Group(place, [part], num_bytes) if number is None else self._groups[number]
            coming = group.coming
        if coming is None or number is None:
            return self._fetch(group)[0]
        try:
            return coming.result()[row]
        finally:
            with self._lock:
                group.left -= 1
                if not group.left:
                    group.coming = None
                    self._bytes_ahead -= group.num_bytes
                    self._groups_ahead -= 1
                    self._submit(number)

    @contextmanager
    def ahead(self, wanted: Sequence[Wanted]) -> Iterator[None]:
        """Fetch these images within, in this order, a bounded number of bytes before they are asked for."""
        self._groups = self._grouped(wanted)
        if not self._groups:
            yield
            return
        # A parquet file is decoded forwards: by one thread, so that the order stays.
        with ThreadPoolExecutor(REQUESTS) as requests, ThreadPoolExecutor(1) as decoder:
            self._pools, self._next, self._bytes_ahead, self._groups_ahead = (requests, decoder), 0, 0, 0
            self._where = {
                (group.place, part): (number, row)
                for number, group in enumerate(self._groups)
                for row, part in enumerate(group.parts)
            }
            try:
                yield
            finally:
                with self._lock:
                    self._pools, self._where = None, {}
                requests.shutdown(wait=False, cancel_futures=True)
                decoder.shutdown(wait=False, cancel_futures=True)

    def _grouped(self, wanted: Sequence[Wanted]) -> list[_Group]:
        groups: list[_Group] = []
        for place, part, num_bytes in wanted:
            is_parquet = place in self.parquets
            if isinstance(place, Path) and not is_parquet:
                continue  # the system reads ahead itself
            last = groups[-1] if groups else None
            if last is None or last.place != place or part is None or not _joins(last, part, num_bytes, is_parquet):
                groups.append(last := _Group(place, [], 0))
            last.parts.append(part)
            last.left += 1
            first = last.parts[0]
            if is_parquet or first is None or part is None:
                last.num_bytes += num_bytes
            else:
                last.num_bytes = sum(part) - first[0]
        return groups

    def _submit(self, number: int) -> None:
        """Have fetched what is asked for now, and after it as much as may be ahead; called with the lock."""
        while self._pools is not None and self._next < len(self._groups):
            room = self._bytes_ahead < AHEAD_BYTES and self._groups_ahead < AHEAD_GROUPS
            if self._next > number + 1 and not room:
                break
            group = self._groups[self._next]
            group.coming = self._pools[group.place in self.parquets].submit(self._fetch, group)
            self._bytes_ahead += group.num_bytes
            self._groups_ahead += 1
            self._next += 1

    def _fetch(self, group: _Group) -> list[bytes]:
        parts = [part for part in group.parts if part is not None]
        if not parts:
            assert isinstance(group.place, Url)
            return [fetch(group.place, 0, group.num_bytes)]
        if group.place in self.parquets:
            return self.parquets[group.place].read(parts[0][0], [row for _, row in parts])
        if isinstance(group.place, Path):
            return [read_part(group.place, *part) for part in parts]
        start = parts[0][0]
        data = fetch(group.place, start, sum(parts[-1]))
        return [data[at - start : at - start + size] for at, size in parts]


def _joins(group: _Group, part: tuple[int, int], num_bytes: int, is_parquet: bool) -> bool:
    """Whether an image comes with those of a group."""
    last = group.parts[-1]
    if last is None:
        return False
    if is_parquet:
        return part[0] == last[0] and part[1] > last[1] and group.num_bytes + num_bytes <= PART
    return 0 <= part[0] - sum(last) <= GAP and sum(part) - group.parts[0][0] <= PART  # type: ignore[index]
