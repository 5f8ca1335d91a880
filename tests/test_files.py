"""One process at a time writes an output."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from brixel_cli.core import files
from brixel_cli.core.files import locked, open_to_fill, read_npy, write_at
from brixel_cli.errors import BrixelError


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    output = tmp_path / "sub" / "out.h5"
    message = rf"out.h5 is being written by another process \(process {os.getpid()} on \S+, since [0-9-]+ [0-9:]+\)"
    with locked(output):
        with pytest.raises(BrixelError, match=message), locked(output):
            pytest.fail("two hold the lock")
        with locked(tmp_path / "other.h5"):
            assert (tmp_path / "other.h5.lock").exists()
    assert list(output.parent.iterdir()) == []
    with locked(output):
        assert re.match(rf"process {os.getpid()} ", (tmp_path / "sub" / "out.h5.lock").read_text())


HOLDER = """
import sys, time
from pathlib import Path
from brixel_cli.core.files import locked
with locked(Path(sys.argv[1])):
    sys.stdout.write("held\\n")
    sys.stdout.flush()
    time.sleep(60)
"""


def test_a_lock_that_a_killed_process_left_behind_does_not_count(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BrixelError, match=f"process {holder.pid} on"), locked(tmp_path / "out"):
        pytest.fail("two hold the lock")
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / "out.lock").exists()
    with locked(tmp_path / "out"):
        pass
    assert not (tmp_path / "out.lock").exists()


def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", without)
    with locked(tmp_path / "out"):
        pass
    monkeypatch.setattr(files, "fcntl", None)
    with locked(tmp_path / "out"):
        pass


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BrixelError, match="The folder .*file cannot be made"), locked(tmp_path / "file" / "out"):
        pass


def npy(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0, 3), (4,), (2, 3, 5)])
def test_an_npy_file_is_read_as_numpy_reads_it(
    tmp_path: Path, order: Literal["C", "F"], shape: tuple[int, ...]
) -> None:
    values = np.asarray(np.arange(max(1, np.prod(shape))), np.float32)[: int(np.prod(shape))].reshape(
        shape, order=order
    )
    path = npy(tmp_path / "a.npy", values)
    read = read_npy(path)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, np.load(path))


def test_threads_read_npy_files_at_once(tmp_path: Path) -> None:
    paths = [npy(tmp_path / f"{i}.npy", np.full((3, 2), i)) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for turn in range(200):
            values = list(pool.map(read_npy, paths))
            assert [int(v[0, 0]) for v in values] == list(range(8)), turn


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6, 3)})
    with pytest.raises(
        BrixelError, match=r"a\.npy is no \.npy file that can be read: its header says 12000000000000 by"
    ):
        read_npy(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x10\x00{'descr': 1}   \n", b"nothing of the kind"]
)
def test_a_damaged_npy_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(BrixelError, match=r"a\.npy is no \.npy file that can be read: "):
        read_npy(tmp_path / "a.npy")


HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", "{'descr': '<f4', 'fortran_order': False, 'shape': (0, " + "9" * 30 + ")}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 4000 + ", " + "9" * 4000 + ")}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2)}", "{'descr': '|V0', 'fortran_order': False, 'shape': (4,)}",
    "{'descr': '<U1', 'fortran_order': False, 'shape': (4,)}", "{'descr': '<c8', 'fortran_order': False, 'shape': (2,)}",
    "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (2,)}", "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}",
    "{'descr': ('<f4', (2, 2)), 'fortran_order': False, 'shape': (1,)}", "{'descr': '<f4', 'fortran_order': 1, 'shape': (2,)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (2.5,)}", "{'descr': '<f4', 'fortran_order': False, 'shape': 4}",
    "{'descr': None, 'fortran_order': False, 'shape': (2,)}", "{'descr': {}, 'fortran_order': False, 'shape': (2,)}", "{'shape': (2,)}", "[]", "1L", "((((",
    "{" * 3000, "-" * 9000 + "1", "'" * 3 + "open", "\n \n\t x", "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'more': 1}", "\0\0\0", "é\udcff",
)  # fmt: skip


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0), (4, 0), (255, 255)])
@pytest.mark.parametrize("header", HEADERS, ids=lambda text: text[:40])
def test_every_fault_of_a_header_is_an_error(tmp_path: Path, header: str, version: tuple[int, int]) -> None:
    data = header.encode("utf-8", "surrogateescape")
    length = len(data).to_bytes(2 if version == (1, 0) else 4, "little")
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY" + bytes(version) + length + data + bytes(16))
    with pytest.raises(BrixelError, match=r"a\.npy is no \.npy file that can be read: "):
        read_npy(tmp_path / "a.npy")


def test_flipped_bytes_of_a_header_are_errors_or_other_numbers(tmp_path: Path) -> None:
    rng = random.Random(0)
    whole = npy(tmp_path / "a.npy", np.arange(6, dtype=np.float32).reshape(2, 3)).read_bytes()
    refused = 0
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(100)] = rng.randrange(256)
        (tmp_path / "a.npy").write_bytes(damaged)
        try:
            assert read_npy(tmp_path / "a.npy").dtype.kind in "biuf"
        except BrixelError:
            refused += 1
    assert refused > 1000


def test_python_objects_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([{}], object), allow_pickle=True)
    with pytest.raises(BrixelError, match="it holds Python objects"):
        read_npy(path)


FORKING = """
import os, signal, sys, time
from pathlib import Path
from brixel_cli.core.files import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_fork_does_not_hold_the_lock_of_its_parent(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORKING, str(tmp_path / "out")], timeout=60)
    assert (tmp_path / "out.lock").exists()
    with locked(tmp_path / "out"):  # the fork is still there
        pass


def test_a_folder_beside_which_nothing_can_be_written_holds_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    with locked(tmp_path / "out"):
        assert [path.name for path in tmp_path.rglob("*")] == ["out", ".lock"]
        with pytest.raises(BrixelError, match="is being written by another"), locked(tmp_path / "out"):
            pytest.fail("two hold the lock")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_dead_processes_left_half_written_is_cleared_where_the_lock_is_taken(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = files._HOST
    names = {  # whether they stay
        f"out/a.h5.{host}.{gone.pid}.partial": False,
        f"out/deep/b.npy.{host}.{gone.pid}.partial": False,
        f"out.h5.{host}.{gone.pid}.partial": False,
        f"out/c.h5.{host}.{os.getpid()}.partial": True,
        f"out/d.h5.00000000.{gone.pid}.partial": True,  # of another host
        "out/mine.partial": True,
        f"other.h5.{host}.{gone.pid}.partial": True,
    }
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    for output in ("out", "out.h5"):
        with locked(tmp_path / output):
            pass
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_a_kill_while_a_file_is_written_costs_no_room(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom brixel_cli.core.files import locked, replacing\n"
        "with locked(Path('out')), replacing(Path('out') / 'cache.h5') as partial:\n"
        "    partial.parent.mkdir()\n    partial.write_bytes(b'half')\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".partial"]
    with locked(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("positioned", [True, False], ids=["pwrite", "windows"])
def test_threads_fill_one_file_at_their_own_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positioned: bool
) -> None:
    if positioned:
        monkeypatch.setattr(os, "lseek", None)  # would move the position of the other threads
        monkeypatch.setattr(os, "pwrite", lambda file, data, place, write=os.pwrite: write(file, data[:3], place))
    else:
        monkeypatch.delattr(os, "pwrite", raising=False)
        seek, write = os.lseek, os.write
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:3]))  # a disk may take less than all

        def slowly(file: int, place: int, whence: int) -> int:
            found = seek(file, place, whence)
            time.sleep(0.002)  # another thread would move the position here, if it were not locked
            return found

        monkeypatch.setattr(os, "lseek", slowly)
    path = tmp_path / "rows"
    path.write_bytes(b"-" * 100)
    descriptor = open_to_fill(path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: write_at(descriptor, memoryview(b"%d\n" % row * 5), row * 10), range(9)))
    os.close(descriptor)
    assert path.read_bytes() == b"".join(b"%d\n" % row * 5 for row in range(9)) + b"-" * 10
