"""The feature store: whole from the start, readable by plain h5py at every moment, robust against kills."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from brixel_cli.core import files
from brixel_cli.core.files import check_disk
from brixel_cli.core.formatting import human_bytes
from brixel_cli.data import row_store as features
from brixel_cli.data.columns import Column, bytes_needed
from brixel_cli.data.row_store import Store, create_store
from brixel_cli.errors import BrixelError

COLUMNS = {"maps": Column((4, 3, 2), "float16"), "scale": Column((), "float32"), "number": Column((2,), "int64")}

FILL = """
import sys, time
from pathlib import Path
import numpy as np
from brixel_cli.data.row_store import Store

store = Store(Path(sys.argv[1]), writable=True)
for row in range(int(sys.argv[2]), len(store), int(sys.argv[3])):
    values = np.full((4, 3, 2), row, np.float16)
    store.write([row], {"maps": [values], "scale": [np.float32(row / 2)], "number": [np.array([row, -row])]})
    print(row, flush=True)
    time.sleep(float(sys.argv[4]))
"""


def rows_of(*numbers: int) -> dict[str, list[np.ndarray]]:
    return {
        "maps": [np.full((4, 3, 2), number, np.float16) for number in numbers],
        "scale": [np.asarray(number / 2, np.float32) for number in numbers],
        "number": [np.array([number, -number]) for number in numbers],
    }


def filling(path: Path, first: int, step: int, pause: float) -> subprocess.Popen[str]:
    """A process of its own that fills every `step`-th row from `first` on."""
    command = [sys.executable, "-c", FILL, str(path), str(first), str(step), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "features.h5"
    create_store(path, 6, COLUMNS, {"what": "maps", "size": [4, 3]})
    return path


def test_a_new_file_opens_with_plain_h5py_and_is_contiguous_and_allocated(path: Path) -> None:
    with h5py.File(path, "r") as file:
        assert set(file) == {"maps", "scale", "number", "status"}
        assert {name: (dataset.shape, dataset.dtype.name) for name, dataset in file.items()} == {
            "maps": ((6, 4, 3, 2), "float16"),
            "scale": ((6,), "float32"),
            "number": ((6, 2), "int64"),
            "status": ((6,), "uint8"),
        }
        for dataset in file.values():
            assert dataset.chunks is None
            assert dataset.compression is None
            assert dataset.id.get_offset() is not None
            assert dataset.id.get_storage_size() == dataset.nbytes
        assert file["status"][:].tolist() == [0] * 6
    # All blocks are there: filling the file cannot run out of disk.
    assert path.stat().st_blocks * 512 >= bytes_needed(6, COLUMNS)


def test_a_new_file_misses_all_rows_and_keeps_its_description(path: Path) -> None:
    store = Store(path)
    assert len(store) == 6
    assert store.missing.tolist() == [0, 1, 2, 3, 4, 5]
    assert store.description == {"what": "maps", "size": [4, 3]}


def test_rows_written_are_read_back_by_us_and_by_h5py(path: Path) -> None:
    store = Store(path, writable=True)
    store.write([4, 1], rows_of(4, 1))
    for reader in (store, Store(path)):
        assert reader.missing.tolist() == [0, 2, 3, 5]
        maps = reader.read("maps", [4, 1, 4])
        assert maps.dtype == np.float16
        np.testing.assert_array_equal(maps[:, 0, 0, 0], [4, 1, 4])
        np.testing.assert_array_equal(reader.read("number", [1]), [[1, -1]])
        np.testing.assert_array_equal(reader.read("scale", [1, 4]), [0.5, 2.0])
    with h5py.File(path, "r") as file:
        np.testing.assert_array_equal(file["maps"][4], rows_of(4)["maps"][0])
        assert file["status"][:].tolist() == [0, 1, 0, 0, 1, 0]


def test_rows_read_are_copies(path: Path) -> None:
    store = Store(path, writable=True)
    store.write([0], rows_of(1))
    read = store.read("maps", [0])
    store.write([0], rows_of(2))
    np.testing.assert_array_equal(read, 1)
    read[:] = 9
    np.testing.assert_array_equal(store.read("maps", [0]), 2)


def test_writing_rows_leaves_the_rest_of_the_file_alone(path: Path) -> None:
    before = path.read_bytes()
    store = Store(path, writable=True)
    store.write([2], rows_of(2))
    with h5py.File(path, "r") as file:
        places = {name: (dataset.id.get_offset(), dataset.nbytes // 6) for name, dataset in file.items()}
    after = path.read_bytes()
    assert len(after) == len(before)
    touched = {byte for offset, size in places.values() for byte in range(offset + 2 * size, offset + 3 * size)}
    changed = {number for number, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}
    assert changed
    assert changed <= touched


def test_rows_are_written_whole_where_the_system_takes_them_in_parts(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def in_parts(file: int, pieces: list[memoryview], place: int) -> int:
        sizes.append(len(pieces))
        return os.pwrite(file, b"".join(pieces)[:50], place)

    monkeypatch.setattr(os, "pwritev", in_parts)
    monkeypatch.setattr(files, "MOST_PIECES", 2)
    store = Store(path, writable=True)
    store.write([0, 1, 2, 4], rows_of(1, 2, 3, 4))
    # A row of maps has 48 bytes: 50 bytes of rows 0 and 1, what is left of row 1, then row 2, and then row 4.
    assert sizes[:4] == [2, 1, 1, 1]
    np.testing.assert_array_equal(store.read("maps", range(6))[:, 1, 1, 1], [1, 2, 3, 0, 4, 0])
    np.testing.assert_array_equal(store.read("number", [2, 4]), [[3, -3], [4, -4]])
    assert store.missing.tolist() == [3, 5]


def test_a_store_opened_for_reading_cannot_be_written(path: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        Store(path).write([0], rows_of(0))
    assert len(Store(path).missing) == 6


def test_creation_leaves_no_partial_file(path: Path) -> None:
    assert [item.name for item in path.parent.iterdir()] == ["features.h5"]


def test_a_file_appears_under_its_name_only_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "features.h5"
    path.write_bytes(b"an older file")
    seen = []

    def allocate(descriptor: int, offset: int, size: int) -> None:
        seen.append(path.read_bytes())

    monkeypatch.setattr(os, "posix_fallocate", allocate, raising=False)
    create_store(path, 6, COLUMNS, {})
    assert set(seen) == {b"an older file"}
    assert len(Store(path)) == 6


def test_a_disk_that_is_too_full_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A row: 4 * 3 * 2 * 2 + 4 + 2 * 8 + 1 for the status = 69 bytes; 1000 rows = 69,000 bytes = 67.4 KiB.
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2048))
    with pytest.raises(BrixelError) as caught:
        create_store(tmp_path / "features.h5", 1000, COLUMNS, {})
    assert str(caught.value) == (
        f"features.h5 needs 67.4 KiB, but {tmp_path} has 2.0 KiB free. "
        "Make room, choose another folder, or ask for less."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", allocate, raising=False)
    with pytest.raises(BrixelError) as caught:
        create_store(tmp_path / "features.h5", 1000, COLUMNS, {})
    path = tmp_path / "features.h5"
    assert (
        str(caught.value)
        == f"{path} cannot be written: No space left on device. What was finished stays: make room or "
        "choose another folder, and give the same command again."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_disk_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(h5py, "File", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(BrixelError, match=r"f.h5 cannot be written: Read-only file system\. "):
        create_store(tmp_path / "f.h5", 10, COLUMNS, {})


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(BrixelError, match="taken"):
        create_store(tmp_path / "taken" / "features.h5", 1, COLUMNS, {})


def test_the_disk_of_a_folder_to_come_is_that_of_its_nearest_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def usage(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=100)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_disk(tmp_path / "a" / "b", 100, "It")
    assert asked == [tmp_path]
    with pytest.raises(BrixelError, match=r"^It needs 101 B, but .* has 100 B free"):
        check_disk(tmp_path / "a" / "b", 101, "It")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (2**30, "1.0 GiB"), (2**41, "2.0 TiB")],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_bytes_of_a_file_by_hand() -> None:
    assert {name: column.row_bytes for name, column in COLUMNS.items()} == {"maps": 48, "scale": 4, "number": 16}
    assert bytes_needed(10, COLUMNS) == 10 * (48 + 4 + 16 + 1)


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut"])
def test_a_damaged_file_is_an_error_that_names_it(path: Path, damage: str) -> None:
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "text": b"hello" * 999, "cut": content[: len(content) // 2]}[damage])
    with pytest.raises(BrixelError) as caught:
        Store(path)
    assert str(caught.value).startswith(f"{path} is not a feature file of brixel, or is damaged: ")


def test_a_foreign_hdf5_file_is_an_error(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["status"] = np.zeros(3)
    with pytest.raises(BrixelError, match=r"other\.h5 is not a feature file of brixel, or is damaged: "):
        Store(tmp_path / "other.h5")


def test_two_processes_fill_disjoint_rows_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "features.h5"
    create_store(path, 64, COLUMNS, {})
    processes = [filling(path, first, 2, 0.001) for first in (0, 1)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
    store = Store(path)
    assert store.missing.tolist() == []
    np.testing.assert_array_equal(store.read("maps", range(64))[:, 1, 2, 1], range(64))
    np.testing.assert_array_equal(store.read("number", range(64))[:, 1], [-number for number in range(64)])


def test_a_kill_in_mid_fill_leaves_a_file_that_opens_and_can_be_filled_on(tmp_path: Path) -> None:
    path = tmp_path / "features.h5"
    create_store(path, 1000, COLUMNS, {})
    process = filling(path, 0, 1, 0.005)
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    with h5py.File(path, "r") as file:  # while it is being filled
        assert file["status"][:].sum() >= 5
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    process.stdout.close()

    with h5py.File(path, "r") as file:
        done = np.flatnonzero(file["status"][:])
        assert 5 <= len(done) < 1000
        np.testing.assert_array_equal(file["maps"][: len(done), 0, 0, 0], done)
        np.testing.assert_array_equal(file["number"][: len(done), 0], done)
    store = Store(path, writable=True)
    assert store.missing.tolist() == list(range(len(done), 1000))
    store.write([int(store.missing[0])], rows_of(7))
    assert store.missing.tolist() == list(range(len(done) + 1, 1000))


def test_only_what_is_needed_is_imported_to_write_rows() -> None:
    # Workers that only fill rows should not wait for torch.
    code = f"import sys; import {features.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
