"""Batches of images from frameworks: the maps of one process, whoever brings the images."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import Listener
from PIL import Image

import brixel_cli
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.engines.extracting.extractor import Extractor, _loaded
from brixel_cli.errors import UsageError


@pytest.fixture
def settings(model: tuple[str, str]) -> dict[str, object]:
    return {"res": 64, "checkpoint": model[0], "device": "cpu", "precision": "float32", "at_once": 1}


@pytest.fixture
def expected(extract_options, photographs: Path, listener: Listener) -> dict[str, np.ndarray]:
    """What `brixel extract` stores of the photographs, by path."""
    features = brixel_cli.FeatureFile(extract(extract_options(batch_size=1), listener).output)
    return {str(photographs / name): features.stored(name)["features"] for name in features.paths}


def test_a_list_and_a_column_have_the_maps_of_extract(settings, expected: dict[str, np.ndarray]) -> None:
    extractor = brixel_cli.Extractor("photo", **settings)
    paths = list(expected)
    done = extractor({"photo": np.array(paths), "label": np.arange(8)})
    assert list(done) == ["photo", "label", "features", "error"]
    assert done["features"].shape == (8, 64, 16, 20)  # 200x160 px become 80x64: 5x4 tokens, four times that
    assert done["features"].dtype == np.float16
    assert list(done["error"]) == [""] * 8
    for path, feature_map in zip(paths, done["features"], strict=True):
        assert np.array_equal(feature_map, expected[path])
    assert np.array_equal(extractor(paths[:2])["features"], done["features"][:2])


def test_images_may_be_paths_bytes_pictures_and_arrays(settings, photographs: Path) -> None:
    path = photographs / "3.png"
    picture = Image.open(path)
    done = Extractor(**settings)([path, path.read_bytes(), picture, np.asarray(picture)])
    assert list(done["error"]) == [""] * 4
    for feature_map in done["features"][1:]:
        assert np.array_equal(feature_map, done["features"][0])


def test_an_image_that_fails_is_named_and_the_others_are_computed(settings, mixed: Path) -> None:
    (mixed / "bad.png").write_text("no image")
    done = Extractor(**settings)([mixed / "00.png", mixed / "bad.png", mixed / "01.png", 7])
    # 96x96 px become 4x4 tokens; 96x128 px become 64x80 px, 4x5 tokens: four times that.
    assert [feature_map.shape for feature_map in done["features"]] == [
        (64, 16, 16),
        (64, 0, 0),
        (64, 16, 20),
        (64, 0, 0),
    ]
    assert done["error"][0] == done["error"][2] == ""
    assert str(mixed / "bad.png") in done["error"][1]
    assert done["error"][3] == "neither a path, bytes, a PIL image nor an array (H, W, 3) of uint8: int"


def test_an_empty_batch_has_no_maps(settings) -> None:
    done = Extractor(**settings)([])
    assert done["features"].shape == (0, 64, 0, 0)
    assert len(done["error"]) == 0


def test_a_batch_without_the_column_is_refused(settings) -> None:
    with pytest.raises(UsageError, match=r"A batch has the columns image: Extractor\(column=...\) takes one of them"):
        Extractor(**settings)({"image": np.array(["a"])})
    with pytest.raises(UsageError, match="maps of a batch are float16 or float32"):
        Extractor(dtype="int8")


def test_the_model_is_loaded_once_and_not_pickled(settings, photographs: Path) -> None:
    _loaded.cache_clear()
    extractor = Extractor(**settings)
    extractor([photographs / "1.png"])
    data = pickle.dumps(extractor)
    assert len(data) < 3000  # the model has 100 kB
    pickle.loads(data)([photographs / "1.png"])
    Extractor(**settings)([photographs / "2.png"])
    assert _loaded.cache_info().misses == 1


def test_an_executor_of_processes_gives_the_maps_of_one(
    settings, expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    paths = list(expected)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = list(pool.map(Extractor(**settings), [paths[:4], paths[4:]]))
    found = np.concatenate([part["features"] for part in done])
    assert np.array_equal(found, np.stack([expected[path] for path in paths]))


class Dying(Extractor):
    """An extractor whose process is killed, as kill -9 does, at the second batch that any of them takes."""

    def __init__(self, folder: str, **settings):
        super().__init__(**settings)
        self.folder = Path(folder)

    def __call__(self, batch):
        (self.folder / f"{os.getpid()}.{time.monotonic_ns()}").touch()
        mark = self.folder / "killed"
        if len(list(self.folder.iterdir())) >= 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


def test_ray_starts_a_killed_worker_again_and_loses_nothing(
    settings, expected: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'brixel[ray]'")
    ray_data = pytest.importorskip("ray.data")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]))
    folder = tmp_path / "batches"
    folder.mkdir()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("Ray has waited five minutes for its workers"))
    signal.alarm(300)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        rows = ray_data.from_items([{"path": path} for path in expected]).repartition(4)
        done = rows.map_batches(
            Dying, fn_constructor_kwargs={"folder": str(folder)} | settings, concurrency=2, batch_size=2
        ).take_all()
    finally:
        signal.alarm(0)
        ray.shutdown()
    assert (folder / "killed").exists()
    assert sorted(row["path"] for row in done) == sorted(expected)
    for row in done:
        assert row["error"] == ""
        assert np.array_equal(row["features"], expected[row["path"]])
