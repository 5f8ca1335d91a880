"""The feature file: allocated whole, filled in place, read with plain h5py, by our reader and by a torch Dataset."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import brixel_cli
from brixel_cli.core.files import check_disk
from brixel_cli.data.feature_file import FeatureDataset, dequantise
from brixel_cli.data.feature_layout import FORMAT, Layout, encode, single_file_names, text_array
from brixel_cli.data.row_store import DONE, FAILED, Column, Store, bytes_needed, create_store
from brixel_cli.errors import BrixelError

SHAPE = (4, 2, 3)


def make_file(path: Path, layout: Layout, **description) -> Store:
    num_rows = len(layout.grids)
    filled = {
        "paths": text_array([f"{row}é.png" for row in range(num_rows)]),
        "reason": text_array([""] * num_rows, 40),
        "grid_row": layout.grid_rows,
        "grid_size": np.array([grid or (0, 0) for grid in layout.grids], np.int32),
        **{name: np.zeros((num_rows, 2), np.int32) for name in ("original_size", "model_size")},
    }
    description = {"storage": layout.storage, **description}
    create_store(path, num_rows, layout.columns, description, filled, {"format": FORMAT})
    return Store(path, writable=True)


def test_one_grid_is_one_dataset_aligned_with_the_paths(tmp_path: Path):
    layout = Layout(((2, 3), None, (2, 3)), 4, "float16")
    store = make_file(tmp_path / "f.h5", layout)
    maps = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float16)
    for row in (0, 2):
        store.write(row, {"features": maps[row]})
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["features"].shape == (3, *SHAPE)
        assert file["features"].chunks is None
        assert file["paths"].asstr()[1] == "1é.png"
        assert file["status"][:].tolist() == [1, 0, 1]
        assert np.array_equal(file["features"][2], maps[2])


def test_mixed_grids_are_a_group(tmp_path: Path):
    layout = Layout(((2, 3), (3, 2), None, (2, 3)), 4, "float16")
    assert layout.grid_rows.tolist() == [0, 0, -1, 1]
    store = make_file(tmp_path / "f.h5", layout)
    store.put("features/2x3", 1, np.full(SHAPE, 7, np.float16))
    store.mark(3, DONE)
    store.put("reason", 2, text_array(["too bad"], 40)[0])
    store.mark(2, FAILED)
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["features/2x3"].shape == (2, *SHAPE)
        assert file["features/3x2"].shape == (1, 4, 3, 2)
    features = brixel_cli.FeatureFile(tmp_path / "f.h5")
    assert features["3é.png"].mean() == 7
    assert features[-1].dtype == np.float32
    assert features.failures == {"2é.png": "too bad"}
    assert features.rows == [3]
    with pytest.raises(BrixelError, match=r"has no features of 2é.png: too bad"):
        features[2]
    with pytest.raises(BrixelError, match="not computed yet; run the same brixel extract again"):
        features[0]
    dataset = brixel_cli.FeatureDataset(tmp_path / "f.h5")
    map_, name = dataset[0]
    assert len(dataset) == 1
    assert (tuple(map_.shape), map_.dtype, name) == (SHAPE, torch.float32, "3é.png")


def test_a_dataset_goes_to_workers_without_its_maps(tmp_path: Path):
    store = make_file(tmp_path / "f.h5", Layout(((40, 40),) * 4, 8, "float32"))
    store.write(2, {"features": np.full((8, 40, 40), 7, np.float32)})
    pickled = pickle.dumps(FeatureDataset(tmp_path / "f.h5"))
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[0][0].mean() == 7


def test_rows_that_will_never_be_filled_take_no_room(tmp_path: Path):
    grids = tuple((64, 64) if row == 5 else None for row in range(40))
    layout = Layout(grids, 64, "float16")
    make_file(tmp_path / "f.h5", layout)
    apparent, real = (tmp_path / "f.h5").stat().st_size, (tmp_path / "f.h5").stat().st_blocks * 512
    assert apparent > 40 * 64 * 64 * 64 * 2
    assert real < 3 * 64 * 64 * 64 * 2
    assert layout.bytes_needed == bytes_needed(0, layout.columns) == 64 * 64 * 64 * 2


def test_a_row_of_another_shape_is_refused(tmp_path: Path):
    create_store(tmp_path / "f.h5", 2, {"x": Column((3,), "float32")}, {})
    with pytest.raises(ValueError, match=r"x: a row has shape \(3,\), not \(1,\)"):
        Store(tmp_path / "f.h5", writable=True).put("x", 0, np.zeros(1))


def test_metadata_is_never_touched_again(tmp_path: Path):
    store = make_file(tmp_path / "f.h5", Layout(((2, 3),) * 3, 4, "float32"))
    before = (tmp_path / "f.h5").read_bytes()
    store.write(1, {"features": np.ones(SHAPE, np.float32)})
    after = (tmp_path / "f.h5").read_bytes()
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1 + 2 * np.prod(SHAPE)  # 1.0 is 00 00 80 3f


def test_what_is_not_ours_is_named(tmp_path: Path):
    with pytest.raises(BrixelError, match=r"No feature file at .*gone.h5. Make one: brixel extract"):
        brixel_cli.FeatureFile(tmp_path / "gone.h5")
    (tmp_path / "text.h5").write_text("text")
    with pytest.raises(BrixelError, match="is not a feature file of brixel, or is damaged"):
        brixel_cli.FeatureFile(tmp_path / "text.h5")
    create_store(tmp_path / "cache.h5", 1, {"x": Column((1,), "int8")}, {})
    with pytest.raises(BrixelError, match=f"is no feature file of format {FORMAT} or brixel-features-2: unmarked"):
        brixel_cli.FeatureFile(tmp_path / "cache.h5")


def test_a_file_that_plain_h5py_has_open_can_be_read(tmp_path: Path):
    make_file(tmp_path / "f.h5", Layout(((2, 3),), 4, "float16"))
    with h5py.File(tmp_path / "f.h5"):
        assert len(brixel_cli.FeatureFile(tmp_path / "f.h5")) == 1


def test_disk_space_is_checked_first(tmp_path: Path):
    with pytest.raises(BrixelError, match=r"set needs 1048576.0 TiB, but .* has .* free. Make room"):
        check_disk(tmp_path / "not" / "yet", 1024**6, "set")
    with pytest.raises(BrixelError, match="Make room"):
        create_store(tmp_path / "f.h5", 1 << 10, {"x": Column((1 << 40,), "float32")}, {})
    assert os.listdir(tmp_path) == []


def test_int8_keeps_the_direction_at_every_location():
    maps = torch.randn(2, 384, 16, 16, generator=torch.Generator().manual_seed(0))
    maps[:, 7] *= 30  # one channel far above the others, as in real backbones
    maps[0, :, 3, 3] = 0
    tensors, finite = encode(maps, "int8", None)
    assert finite == [True, True]
    back = torch.from_numpy(dequantise({name: tensor.numpy() for name, tensor in tensors.items()}))
    cosine = torch.nn.functional.cosine_similarity(back, maps, dim=1)
    assert back[0, :, 3, 3].abs().max() == 0
    assert cosine[1].mean() > 0.999
    assert cosine[1].min() > 0.99


def test_features_that_float16_cannot_hold_are_noticed():
    maps = torch.ones(3, 4, 2, 2)
    maps[1, 0, 0, 0] = 1e6
    maps[2, 0, 0, 0] = torch.nan
    assert encode(maps, "float16", None)[1] == [True, False, False]
    assert encode(maps, "float32", None)[1] == [True, True, False]


def test_single_files_never_share_a_name():
    assert single_file_names(["a.jpg", "s/b.png"], "npy") == ["a.npy", "s/b.npy"]
    assert single_file_names(["a.jpg", "A.png", "b.png"], "npy") == ["a.jpg.npy", "A.png.npy", "b.npy"]
    names = ["a.jpg", "a.png", "a.jpg.png"]
    assert single_file_names(names, "npy") == ["a.jpg.npy", "a.png.npy", "a.jpg.png.npy"]


def test_text_is_cut_at_a_character():
    assert bytes(text_array(["aé"], 2)[0]) == b"a"
