"""Large images in tiles: how they are cut, blended and written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import every_row, make_photograph
from PIL import Image

import brixel_cli
from brixel_cli.config.extract import ExtractOptions
from brixel_cli.core.sampling import covered_part
from brixel_cli.data import images
from brixel_cli.data.resizing import Resizing
from brixel_cli.data.row_store import Column, Store, create_store
from brixel_cli.engines.extracting import tiled_images
from brixel_cli.engines.extracting.extraction import extract, plan_only, rehearse
from brixel_cli.engines.extracting.tiled_images import tile_reader
from brixel_cli.engines.extracting.tiling import Tiling, strips
from brixel_cli.errors import BrixelError, UsageError


def test_tiles_by_hand() -> None:
    # Tiles of 64 px that overlap by 16 at least cover 160 px: (160 - 16) / (64 - 16) = 3 of them, 48 px apart.
    tiling = Tiling(64, 16, 16, 1, trim=0)
    assert tiling.starts(160) == [0, 48, 96]
    assert tiling.starts(64) == [0]
    assert tiling.starts(80) == [0, 16]  # one patch beyond: two tiles that overlap by three patches
    # 176 px: (176 - 16) / 48 = 3.3, so four tiles over (176 - 64) / 16 = 7 patches: at 0, 7/3, 14/3 and 7, rounded down.
    assert tiling.starts(176) == [0, 32, 64, 112]
    # Of 4 locations a tile, neighbours share one: the ramp over one location is (0.5 / 1), for both of them.
    assert [weight.tolist() for weight in tiling.weights(160)] == [[1, 1, 1, 0.5], [0.5, 1, 1, 0.5], [0.5, 1, 1, 1]]
    # Without a quarter of an overlap of 4 locations at each border: 0, 0.25, 0.75, 1 of a ramp over two locations.
    wide = Tiling(128, 64, 16, 1, trim=0.25)
    assert wide.weights(192)[1].tolist() == [0, 0.25, 0.75, 1, 1, 1, 1, 1]
    assert wide.weights(192)[0].tolist() == [1, 1, 1, 1, 1, 0.75, 0.25, 0]


@pytest.mark.parametrize("trim", [0.0, 0.25, 0.4])
@pytest.mark.parametrize("overlap", [16, 32, 64])
@pytest.mark.parametrize("side", range(16, 512, 16))
def test_weights_add_up_to_one_everywhere(side: int, overlap: int, trim: float) -> None:
    tiling = Tiling(128, overlap, 16, 4, trim)
    total = torch.zeros(side // 4)
    for start, weight in zip(tiling.starts(side), tiling.weights(side), strict=True):
        total[start // 4 : start // 4 + len(weight)] += weight
        assert (weight >= 0).all()
    torch.testing.assert_close(total, torch.ones(side // 4))
    gaps = np.diff(tiling.starts(side))
    assert (gaps <= 128 - overlap).all()


@pytest.mark.parametrize("size", [(64, 64), (96, 200), (256, 176), (80, 512)])
def test_a_model_that_sees_single_pixels_gives_the_same_in_tiles(size: tuple[int, int]) -> None:
    image = torch.randint(0, 255, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def model(pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels.float(), 4)

    def read(top: int, left: int, seen: tuple[int, int]) -> torch.Tensor:
        return image[:, top : top + seen[0], left : left + seen[1]]

    found = list(strips(model, read, size, Tiling(64, 16, 8, 2)))
    assert [first for first, _ in found] == list(np.cumsum([0, *(strip.shape[1] for _, strip in found)])[:-1])
    torch.testing.assert_close(torch.cat([strip for _, strip in found], dim=1), model(image[None])[0])
    assert max(strip.shape[1] for _, strip in found) <= 16  # a row of tiles


@pytest.mark.parametrize("fit", ["short", "centre"])
def test_tiles_are_parts_of_the_image_that_the_model_would_see(tmp_path: Path, fit: str) -> None:
    image = Image.open(make_photograph(tmp_path / "a.png", 1, 400, 300)).convert("RGB")
    resizing = Resizing(128, fit, 16)  # type: ignore[arg-type]
    size = resizing.model_size(300, 400)
    whole = resizing.apply(image, size).float()
    read = tile_reader(image, covered_part((300, 400), size, fit), size)
    for top, left in ((0, 0), (64, 48), (64, size[1] - 64)):
        error = (read(top, left, (64, 64)).float() - whole[:, top : top + 64, left : left + 64]).abs()
        assert error.max() <= 3  # of 255 levels
        assert error.mean() < 0.6


@pytest.fixture
def large(tmp_path: Path) -> Path:
    folder = tmp_path / "large"
    folder.mkdir()
    make_photograph(folder / "large.png", 0, 400, 320)
    make_photograph(folder / "small.png", 1, 90, 90)
    make_photograph(folder / "other.png", 2, 320, 320)
    return folder


def tiled(extract_options, large: Path, **changes):
    return extract_options(
        **{"inputs": [str(large)], "res": 160, "tile": 96, "overlap": 32, "dtype": "float32"} | changes
    )


def test_a_large_image_is_near_to_one_pass(extract_options, large: Path, listener, tmp_path: Path) -> None:
    found = brixel_cli.FeatureFile(extract(tiled(extract_options, large), listener).output)
    once = brixel_cli.FeatureFile(
        extract(tiled(extract_options, large, tile=None, output=tmp_path / "once.h5"), listener).output
    )
    assert found["large.png"].shape == once["large.png"].shape == (64, 40, 52)  # 160x208 px, 10x13 patches, 4 times
    cosine = torch.cosine_similarity(*(torch.from_numpy(file["large.png"]) for file in (found, once)), dim=0)
    assert cosine.mean() > 0.9
    assert (found.description["tile"], found.description["overlap"]) == (96, 32)
    assert "tile" not in once.description


@pytest.mark.parametrize("changes", [{}, {"dtype": "int8"}, {"pca": 3}, {"source": "teacher"}, {"fit": "centre"}])
def test_pieces_of_any_size_and_a_second_run_give_the_same_bytes(
    extract_options, large: Path, listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes
) -> None:
    whole = tiled(extract_options, large, **changes)
    rows = every_row(extract(whole, listener).output)
    assert len(rows) == 3
    monkeypatch.setattr(tiled_images, "PIECE_VALUES", 1)
    assert (
        every_row(extract(tiled(extract_options, large, output=tmp_path / "b.h5", **changes), listener).output) == rows
    )
    store = Store(whole.output, writable=["status"])
    store.mark(0, 0)
    store.flush()
    assert extract(whole, listener).num_computed == 1
    assert every_row(whole.output) == rows


def test_a_damaged_image_is_named_and_the_others_computed(extract_options, large: Path, listener) -> None:
    data = (large / "large.png").read_bytes()
    (large / "large.png").write_bytes(data[: len(data) // 2])
    done = extract(tiled(extract_options, large), listener)
    assert list(done.failures) == ["large.png"]
    assert done.num_computed == 2


def test_features_that_are_not_finite_fail_their_image(extract_options, large: Path, listener, monkeypatch) -> None:
    from brixel_cli.engines.models import FeatureExtractor

    kept = FeatureExtractor.maps
    monkeypatch.setattr(FeatureExtractor, "maps", lambda self, pixels: kept(self, pixels) * torch.inf)
    failures = extract(tiled(extract_options, large, dtype="float16"), listener).failures
    assert failures["large.png"].startswith("its features are no finite numbers in float16")


def test_images_of_more_pixels_are_taken_where_they_are_cut(
    extract_options, large: Path, listener, monkeypatch
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)  # large.png has 128,000, other.png 102,400
    whole = plan_only(tiled(extract_options, large, tile=None), listener)
    assert [bool(reason) for reason in whole.reasons] == [True, True, False]
    assert not any(plan_only(tiled(extract_options, large), listener).reasons)
    assert images.MAX_PIXELS == 100_000


def test_other_tiles_do_not_continue_a_file(extract_options, large: Path, listener) -> None:
    extract(tiled(extract_options, large), listener)
    with pytest.raises(UsageError, match=r"--tile: 96 -> 112"):
        extract(tiled(extract_options, large, tile=112), listener)
    with pytest.raises(UsageError, match=r"--tile: 96 -> null"):
        extract(tiled(extract_options, large, tile=None), listener)


def test_a_dry_run_does_not_time_tiles(extract_options, large: Path, listener) -> None:
    estimate = rehearse(plan_only(tiled(extract_options, large), listener), listener)
    assert (estimate.seconds, estimate.how_timed) == (None, "images that are cut into tiles are not timed")


def test_tiles_that_cannot_be(extract_options, large: Path, listener) -> None:
    with pytest.raises(UsageError, match="--tile 96 --overlap 64: a tile must have at least four patches of 16 pixels"):
        plan_only(tiled(extract_options, large, overlap=64), listener)
    with pytest.raises(UsageError, match="--tile must be at least 1, not 0"):
        ExtractOptions(["photos"], tile=0)
    with pytest.raises(UsageError, match="--tile stores the feature map alone, in --format h5"):
        ExtractOptions(["photos"], tile=448, storage="npy")
    with pytest.raises(UsageError, match="--tile stores the feature map alone, in --format h5"):
        ExtractOptions(["photos"], tile=448, layers=(1,))


def test_a_strip_is_written_where_it_belongs(tmp_path: Path) -> None:
    create_store(tmp_path / "f.h5", 2, {"x": Column((2, 4, 3), "float32")}, {})
    store = Store(tmp_path / "f.h5", writable=True)
    expected = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    store.put("x", 1, expected[:, 3:], 3)
    store.put("x", 1, expected[:, :3], 0)
    np.testing.assert_array_equal(store.read("x", [0, 1]), [np.zeros((2, 4, 3)), expected])
    with pytest.raises(ValueError, match="no row 1"):
        store.put("x", 1, expected[:, :2], 3)
    with pytest.raises(ValueError, match="a row has shape"):
        store.put("x", 1, expected[:, :2, :2], 0)


def test_a_full_disk_stops_the_run(extract_options, large: Path, listener, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Store, name: str, row: int, value: np.ndarray, first: int | None = None) -> None:
        raise BrixelError("f.h5 cannot be written: No space left on device")

    monkeypatch.setattr(Store, "put", full)
    with pytest.raises(BrixelError, match="No space left"):
        extract(tiled(extract_options, large), listener)
