"""One process at a time writes an output."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from brixel_cli.core import files
from brixel_cli.core.files import locked
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
