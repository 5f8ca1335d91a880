"""Feature maps read at the pixels of their image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_feature_file import make_file

import brixel_cli
from brixel_cli.core import memory, sampling
from brixel_cli.core.sampling import Part, covered_part, read_at
from brixel_cli.data.feature_layout import Layout
from brixel_cli.data.views import centre_view
from brixel_cli.errors import BrixelError, UsageError

RAMP = torch.tensor([[[0.0, 1.0], [10.0, 11.0]], [[5.0, 5.0], [5.0, 5.0]]])
"""Of two channels; the first counts rows by tens and columns by ones, the second is constant."""
WHOLE = Part(0, 0, 8, 8)


def test_points_by_hand() -> None:
    # A location of 4 px; their centres are at 1.5 and 5.5 px. Halfway: 3.5. Beyond the centres the values continue.
    points = [[1.5, 1.5], [3.5, 1.5], [5.5, 3.5], [0, 0], [7, 7], [2.5, 1.5]]
    found = read_at(RAMP, WHOLE, None, points)
    assert found[:, 0].tolist() == pytest.approx([0, 5, 10.5, 0, 11, 2.5], abs=1e-5)
    assert found[:, 1].tolist() == pytest.approx([5] * 6)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (3, 2), (1, 1)])
def test_any_chunk_is_as_torch_resizes_it(monkeypatch: pytest.MonkeyPatch, chunk: int, size: tuple[int, int]) -> None:
    monkeypatch.setattr(sampling, "CHUNK_VALUES", chunk)
    map_ = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(map_[None], size, mode="bilinear", align_corners=False)[0]
    part = Part(0, 0, *size)
    torch.testing.assert_close(read_at(map_, part, None, None), expected)
    pixels = np.stack(np.mgrid[: size[0], : size[1]], axis=-1).reshape(-1, 2)
    at_points = read_at(map_, part, None, pixels).T.reshape(3, *size)
    torch.testing.assert_close(at_points, expected, atol=1e-5, rtol=1e-5)


def test_a_map_of_one_row_is_constant_along_the_height() -> None:
    assert read_at(RAMP[:, :1], WHOLE, (3, 2), None)[0].tolist() == [[0, 1]] * 3


def test_memory_besides_the_result_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = []
    kept = torch.nn.functional.interpolate

    def watched(input_: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        found = kept(input_, *rest, **more)
        largest.append(found.numel())
        return found

    monkeypatch.setattr(torch.nn.functional, "interpolate", watched)
    monkeypatch.setattr(sampling, "CHUNK_VALUES", 1000)
    read_at(RAMP, WHOLE, (200, 100), None)
    assert max(largest) == 1000  # strips of 1000 / (2 * 100) = 5 rows
    assert len(largest) == 40


def test_what_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sampling, "main_memory", lambda: 1000)
    with pytest.raises(BrixelError, match=r"A feature map of 2x20x10 needs about 1.6 KiB of memory, and 1000 B are free. Ask for a smaller"):  # fmt: skip
        read_at(RAMP, WHOLE, (20, 10), None)
    out = np.memmap(tmp_path / "big", np.float32, "w+", shape=(2, 20, 10))
    read_at(RAMP, WHOLE, (20, 10), None, out)
    assert out[0, 0, 0] == 0
    assert out[0, -1, -1] == 11
    with pytest.raises(UsageError, match=r"out must be a float32 array of shape \(2, 20, 10\)"):
        read_at(RAMP, WHOLE, (20, 10), None, out[:, 1:])
    assert memory.main_memory() > 1000


@pytest.mark.parametrize(
    ("size", "points", "message"),
    [
        ((8, 8), [[0, 0]], "Give size or points, not both"),
        ((8,), None, r"size must be \(height, width\) in pixels, not \(8,\)"),
        ((0, 8), None, r"from 1 up, not \(0, 8\)"),
        (None, [1, 2], r"an array \(N, 2\), not \(2,\)"),
        (None, [["a", 2]], r"points must be \[\[y, x\], ...\] in pixels: "),
        (None, [[0, 0], [8, 0]], r"Point 1, \[8.0, 0.0\], lies outside .*: rows 0 to 8 and columns 0 to 8"),
        (None, [[0, float("nan")]], "Point 0"),
    ],
)
def test_what_is_no_size_or_point_is_refused(size: object, points: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_at(RAMP, WHOLE, size, points)  # type: ignore[arg-type]


def test_the_square_in_the_middle_is_where_the_picture_has_it() -> None:
    # 60x100 px cover 30x30 as 30x50; of the columns 10 to 40 are kept: 20 to 80 of the image.
    assert covered_part((60, 100), (30, 30), "centre") == Part(0, 20, 60, 60)
    assert covered_part((60, 100), (30, 50), "short") == Part(0, 0, 60, 100)
    # A picture whose columns count by twos: whatever is read at a column is twice its number.
    picture = Image.fromarray(np.tile(np.arange(0, 200, 2, np.uint8), (60, 1)))
    view = torch.from_numpy(np.asarray(centre_view(picture, (30, 30)), np.float32))
    part = covered_part((60, 100), (30, 30), "centre")
    columns = [22, 40, 40.5, 77]
    read = read_at(view[None], part, None, [[30, column] for column in columns])
    assert read[:, 0].tolist() == pytest.approx([2 * column for column in columns], abs=0.6)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_feature_file_is_read_at_pixels_of_its_image(tmp_path: Path, dtype: str) -> None:
    layout = Layout(((2, 2),), 2, dtype)  # type: ignore[arg-type]
    store = make_file(tmp_path / "f.h5", layout, fit="short")
    values = {"features": RAMP.numpy().astype(dtype)}
    store.write(0, values | ({"scale": np.full((1, 2, 2), 2, np.float32)} if dtype == "int8" else {}))
    with_sizes = brixel_cli.FeatureFile(tmp_path / "f.h5")
    with_sizes.original_size[0] = 8, 8
    with_sizes.model_size[0] = 28, 28
    factor = 2 if dtype == "int8" else 1
    assert with_sizes.at("0é.png", points=[[3.5, 1.5]]).tolist() == [[5 * factor, 5 * factor]]
    assert with_sizes.at(0).shape == (2, 8, 8)
    assert with_sizes.at(0, size=(480, 640))[0, -1, -1] == 11 * factor
    with pytest.raises(KeyError):
        with_sizes.at("gone.png")


@pytest.mark.parametrize("fit", ["short", "centre"])
def test_file_and_student_give_the_same(extract_options, photographs: Path, model, listener, fit: str) -> None:
    from brixel_cli.engines.extracting.extraction import extract

    features = brixel_cli.FeatureFile(extract(extract_options(dtype="float32", fit=fit), listener).output)
    student = brixel_cli.load_student(model[0], backbone_weights=model[1])
    image = photographs / "3.png"  # 160x200 px; the square in the middle begins at column 20
    points = [[0, 20], [80.5, 99], [159, 179]]
    from_student = student.at(image, points=points, res=64, fit=fit)
    assert from_student.shape == (3, 64)
    np.testing.assert_allclose(features.at("3.png", points=points), from_student, atol=1e-4)
    resized = student.at(image, res=64, fit=fit)
    assert resized.shape == (64, 160, 160 if fit == "centre" else 200)
    np.testing.assert_allclose(features.at("3.png"), resized, atol=1e-4)
    if fit == "centre":
        with pytest.raises(UsageError, match="columns 20 to 180"):
            features.at("3.png", points=[[0, 0]])
