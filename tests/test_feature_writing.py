"""How feature files are written: names that are too long, equal bytes for equal rows, and disks that refuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_feature_file import make_file

import brixel_cli
from brixel_cli.core.weights import load_tensors, save_tensors
from brixel_cli.data.columns import Column
from brixel_cli.data.feature_layout import Layout, single_file_names
from brixel_cli.data.row_store import Store, create_store
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.errors import BrixelError


@pytest.mark.parametrize("storage", ["npy", "safetensors"])
def test_a_name_that_is_too_long_is_cut(extract_options, photographs: Path, tmp_path: Path, listener, storage):
    folder = tmp_path / "in"
    folder.mkdir()
    long = ["x" * 250 + ".png", "x" * 250 + ".jpg", "é" * 124 + ".png"]
    for name in long:
        shutil.copy(photographs / "1.png", folder / name)
    chosen = extract_options(inputs=[str(folder)], output=tmp_path / "maps", storage=storage)
    done = extract(chosen, listener)
    assert (done.num_computed, done.failures) == (3, {})
    features = brixel_cli.FeatureFile(done.output)
    assert sorted(features.paths) == sorted(long)
    assert all(features[name].shape == (64, 16, 20) for name in long)
    assert len(set(features.single_files)) == 3
    assert extract(chosen, listener).num_before == 3


def test_only_names_that_are_too_long_are_cut():
    fits = "a" * 251 + ".npy"
    assert single_file_names(["sub/" + "a" * 251 + ".x"], "npy") == ["sub/" + fits]
    (cut,) = single_file_names(["sub/" + "a" * 252 + ".x"], "npy")
    assert len(cut) == len("sub/") + 255
    assert cut.startswith("sub/aaa")
    assert cut.endswith(".npy")


def test_the_same_features_are_the_same_bytes(tmp_path: Path):
    layouts = Layout(((2, 3), (3, 2)), 4, "int8")
    metadata = {key: key * 2 for key in "qwertyuiop"}
    for name in ("a", "b"):
        make_file(tmp_path / f"{name}.h5", layouts)
        save_tensors(tmp_path / f"{name}.safetensors", {"x": torch.arange(3.0), "w": torch.ones(2)}, metadata)
        time.sleep(1.1)  # HDF5 counts seconds
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    data = (tmp_path / "a.safetensors").read_bytes()
    assert data == (tmp_path / "b.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == sorted([*metadata, "checksum"])
    tensors, found = load_tensors(tmp_path / "a.safetensors")
    assert found == metadata
    assert tensors["x"].tolist() == [0, 1, 2]


QUOTA = """
import resource, sys
from pathlib import Path
import numpy as np
from brixel_cli.data.columns import Column
from brixel_cli.data.row_store import create_store
from brixel_cli.errors import BrixelError

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    create_store(Path(sys.argv[1]), 1000, {"x": Column((999,), "float32")}, {}, {"paths": np.zeros(1000, "S400")})
except BrixelError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("most", [100, 5_000, 300_000, 1_500_000, 4_000_000])
def test_a_quota_is_an_error_and_leaves_nothing(tmp_path: Path, most: int):
    command = [sys.executable, "-c", QUOTA, str(tmp_path / "f.h5"), str(most)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert f"{tmp_path / 'f.h5'} cannot be written: " in found.stderr
    assert "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_may_not_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    create_store(tmp_path / "f.h5", 2, {"x": Column((3,), "float32")}, {})
    kept = os.open

    def refused(path, flags, *rest, **more):
        if flags & os.O_WRONLY:
            raise PermissionError(13, "Permission denied")
        return kept(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(BrixelError, match=r"f.h5 cannot be written: Permission denied"):
        Store(tmp_path / "f.h5", writable=True)
