"""Commands of brixel in forked processes with limits, so that a crash, a hang or a bomb ends one case only.

The process that forks has imported everything and computes nothing: a child starts in a tenth of a second. It must not
set torch's number of threads either, as a pool of threads does not outlive a fork: OMP_NUM_THREADS does.
"""

from __future__ import annotations

import codecs
import concurrent.futures.process  # noqa: F401  # a child without the rights of root may not read it
import fcntl
import json
import multiprocessing.popen_spawn_posix  # the same: a benchmark measures memory in a process of its own
import multiprocessing.synchronize  # noqa: F401
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py  # noqa: F401
import psutil

import brixel_cli.cli.ablation
import brixel_cli.cli.distill
import brixel_cli.cli.extract
import brixel_cli.cli.probe
import brixel_cli.engines.ablating.ablation
import brixel_cli.engines.distilling.distillation
import brixel_cli.engines.distilling.plan
import brixel_cli.engines.extracting.extraction
import brixel_cli.engines.probing.application
import brixel_cli.engines.probing.probing
import brixel_cli.engines.probing.report  # noqa: F401
from brixel_cli.app import app

codecs.lookup("unicode_escape")  # the same: what is imported late
NOBODY = 65534
TRACEBACK = 70
"""Exit code of an exception that no command has caught."""
GIB, PIPE_BYTES = 2**30, 2**20
LOOK = 10.0
"""Seconds in which a child that is no hang computes something."""


@dataclass(frozen=True)
class Limits:
    """What a child may use.

    Attributes:
        seconds: until it is killed, if it computes nothing by then, or of computing: on a busy machine they take longer.
        memory: address space in bytes, beyond what the parent has.
        file_size: bytes that a file may have; None: any number.
        nobody: whether it runs without the rights of root.
    """

    seconds: float = 40.0
    memory: int = 3 * GIB
    file_size: int | None = None
    nobody: bool = False


FREE = Limits()


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: exit code; the negative number of the signal where one ended it; None after the time limit.
        out, err: what it printed.
        seconds: from the fork.
    """

    code: int | None
    out: str
    err: str
    seconds: float


class Child:
    """A function in a process group of its own, its output in files."""

    def __init__(self, function: Callable[[], int | None], folder: Path, limits: Limits = FREE):
        self.limits, self.began = limits, time.monotonic()
        self._pipes = [os.pipe() for _ in range(2)]  # no files, which `file_size` would limit
        self._printed: list[list[bytes]] = [[], []]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(function, folder)
        for reading, writing in self._pipes:
            os.close(writing)
            os.set_blocking(reading, False)
            fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def _become(self, function: Callable[[], int | None], folder: Path) -> None:
        code = TRACEBACK
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, (_, writing) in enumerate(self._pipes, 1):
                os.dup2(writing, number)
            for number, name in ((1, "stdout"), (2, "stderr")):
                setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False))
            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _limit(self.limits)
            try:
                code = function() or 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            threading._shutdown()  # type: ignore[attr-defined]
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def kill(self) -> None:
        """End it and all that it has started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        """Wait until it has ended, or hangs."""
        pid, status, code, pause = 0, 0, None, 0.001
        end, computed = self.began + self.limits.seconds, -1.0
        while pid == 0:
            if time.monotonic() > end:
                before, computed = computed, self._computed()
                if not before < computed < self.limits.seconds:
                    break
                end = time.monotonic() + LOOK
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._read()
            if pid == 0:
                time.sleep(pause := min(pause * 1.5, 0.02))
        if pid:
            code = os.waitstatus_to_exitcode(status)
            self.kill()  # what it has left behind
        else:
            self.kill()
            os.waitpid(self.pid, 0)
        self._read()
        for reading, _ in self._pipes:
            os.close(reading)
        texts = [b"".join(parts).decode("utf-8", "surrogateescape") for parts in self._printed]
        return Ended(code, *texts, time.monotonic() - self.began)

    def _computed(self) -> float:
        """Seconds that it and all that it has started have computed."""
        seconds = 0.0
        with suppress(psutil.Error):
            child = psutil.Process(self.pid)
            for process in (child, *child.children(recursive=True)):
                seconds += sum(process.cpu_times()[:2])
        return seconds

    def _read(self) -> None:
        for (reading, _), parts in zip(self._pipes, self._printed, strict=True):
            with suppress(BlockingIOError):
                while data := os.read(reading, PIPE_BYTES):
                    parts.append(data)


def _limit(limits: Limits) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    seconds = int(limits.seconds) + 5
    for kind, most in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + limits.memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, seconds),
    ):
        allowed = resource.getrlimit(kind)[1]  # within a child the limit cannot be raised
        most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        resource.setrlimit(kind, (most, most))
    if limits.file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_size, limits.file_size))
    if limits.nobody and os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def command(arguments: Sequence[str]) -> Callable[[], int | None]:
    """The command line of brixel, to be run in a child."""

    def run() -> int | None:
        sys.argv = ["brixel", *arguments]
        app(list(arguments), prog_name="brixel")
        return 0

    return run


def run(arguments: Sequence[str], folder: Path, limits: Limits = FREE) -> Ended:
    """A command of brixel in a child, from the folder where it is called."""
    return Child(command(arguments), folder, limits).wait()


def ask(function: Callable[[], Any], folder: Path, limits: Limits = FREE) -> tuple[Ended, Any]:
    """The JSON-able answer of a function in a child; None where there is none."""
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "answer.json"

        def run() -> int:
            answer.write_text(json.dumps(function()))
            return 0

        ended = Child(run, folder, limits).wait()
        return ended, json.loads(answer.read_text()) if ended.code == 0 else None


def fresh(folder: Path) -> Path:
    """An empty folder at this place."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
