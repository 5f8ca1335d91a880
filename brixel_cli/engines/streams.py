"""Decode, forward and write at the same time: threads that read ahead, and one that writes behind, both bounded."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

from brixel_cli.engines.reporting import Reporter

Loaded = TypeVar("Loaded")
Job = TypeVar("Job")

CHUNKS_AHEAD = 2
WRITES_BEHIND = 2
POLITENESS = 5
MOST_WORKERS = 8


MOST_PER_CORE = 4


def num_workers(asked: int | None = None) -> int:
    """Threads that decode images: as many as asked for, up to some for each core; None: by the cores."""
    return min(max(torch.get_num_threads(), 2), MOST_WORKERS) if asked is None else min(asked, most_workers())


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_workers(world_size: int = 1) -> int:
    """Workers of each of so many processes; more read nothing faster, and may not fit in memory."""
    return max(MOST_PER_CORE * num_cores() // world_size, 1)


def warn_of_workers(asked: int | None, option: str, reporter: Reporter, world_size: int = 1) -> None:
    """Warn where more workers are asked for than are started."""
    most = most_workers(world_size)
    if asked is not None and asked > most:
        reporter.warn(f"{option} {asked} is too many for {num_cores()} cores: {most} are started")


def yield_to_others() -> None:
    """Lower this thread's priority, so that the forward pass keeps the cores and the thread fills the gaps."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), POLITENESS)


def read_ahead(
    chunks: Iterable[Sequence[Job]], load: Callable[[Job], Loaded], workers: int, polite: bool
) -> Iterator[tuple[Sequence[Job], list[Loaded]]]:
    """Chunks of jobs with their results, in order, a few chunks ahead of whoever takes them.

    Args:
        chunks: jobs that are taken together.
        load: does one job, in a thread.
        workers: number of threads; with one, jobs are done strictly in order.
        polite: whether the threads run at lower priority.
    """
    pool = ThreadPoolExecutor(workers, initializer=yield_to_others if polite else None)
    waiting: deque[tuple[Sequence[Job], list[Future[Loaded]]]] = deque()

    def take() -> tuple[Sequence[Job], list[Loaded]]:
        chunk, futures = waiting.popleft()
        return chunk, [future.result() for future in futures]

    try:
        for chunk in chunks:
            waiting.append((chunk, [pool.submit(load, job) for job in chunk]))
            # Small chunks need more of them ahead, or the threads would idle.
            if len(waiting) > CHUNKS_AHEAD and sum(len(futures) for _, futures in waiting) > workers:
                yield take()
        while waiting:
            yield take()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class WriteBehind(Generic[Job]):
    """Hands jobs to one thread, in order; an error in it is raised at the next `put`, or at the end.

    Args:
        write: does one job.
        polite: whether the thread runs at lower priority.
    """

    def __init__(self, write: Callable[[Job], None], polite: bool):
        self._write = write
        self._jobs: queue.Queue[Job | None] = queue.Queue(WRITES_BEHIND)
        self._error: BaseException | None = None
        self._polite = polite
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)

    def put(self, job: Job) -> None:
        """Have a job written; waits where the writer is behind."""
        if self._error is not None:
            raise self._error
        self._jobs.put(job)

    @contextmanager
    def running(self) -> Iterator[WriteBehind[Job]]:
        """Start the thread; on leaving, wait until all is written, also where something went wrong meanwhile."""
        self._thread.start()
        try:
            yield self
        finally:
            self._jobs.put(None)
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        if self._polite:
            yield_to_others()
        while (job := self._jobs.get()) is not None:
            if self._error is not None:
                continue  # keeps emptying the queue, so that nobody waits for room in it
            try:
                self._write(job)
            except BaseException as error:
                self._error = error
            del job  # a map that has been written must not stay in memory until the next comes
