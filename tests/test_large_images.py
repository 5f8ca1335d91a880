"""Large images: how many are in work at once, and what is done where memory does not suffice for one."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from conftest import Listener, every_row, make_photograph
from PIL import Image
from probe_sets import make_options

import brixel_cli
from brixel_cli.config.distill import Recipe
from brixel_cli.data import images, inputs, resizing
from brixel_cli.data.images import decoded, room_for
from brixel_cli.data.views import Views
from brixel_cli.engines.distilling.batches import ViewLoader
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.engines.probing import application, features
from brixel_cli.engines.probing.probing import probe
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A JPEG of 800x640 pixels."""
    return make_photograph(tmp_path / "wide.jpg", 1, 800, 640)


def test_large_images_are_not_in_work_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    inside, most = [0], [0]

    def work(num_pixels: int) -> None:
        with room_for(num_pixels):
            inside[0] += num_pixels
            most[0] = max(most[0], inside[0])
            time.sleep(0.002)
            inside[0] -= num_pixels

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [60, 30, 60, 100, 10, 30] * 5))
    assert 60 < most[0] <= 100
    with pytest.raises(ZeroDivisionError), room_for(100):
        raise ZeroDivisionError
    with room_for(1000):  # more than there ever is: alone
        pass


def test_an_image_keeps_its_room_until_it_is_let_go(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 800 * 640)
    inside, most = [0], [0]

    def work(_: int) -> None:
        with decoded(wide):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.005)
            inside[0] -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert most[0] == 1
    with decoded(wide, enough=(80, 80)) as small:  # an eighth of each side: 1 of the 64 shares
        assert small.size == (100, 80)
        with decoded(wide, enough=(80, 80)):
            pass


def _stay(start: float, pipe: Connection) -> None:
    with room_for(100):
        pipe.send(time.monotonic() - start)
        time.sleep(0.3)


def test_worker_processes_share_the_room(monkeypatch: pytest.MonkeyPatch, tiny_recipe: Recipe) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    monkeypatch.setattr(images, "_room", images._room)
    views = Views([], tiny_recipe.views, 0)
    ViewLoader(views, Runtime("cpu"), 2)
    context, start = multiprocessing.get_context("fork"), time.monotonic()
    ends = [context.Pipe() for _ in range(2)]
    workers = [context.Process(target=_stay, args=(start, end[1])) for end in ends]
    for worker in workers:
        worker.start()
    first, second = sorted(end[0].recv() for end in ends)
    for worker in workers:
        worker.join()
    assert second - first > 0.25


def short_of_memory(monkeypatch: pytest.MonkeyPatch, num_pixels: int) -> None:
    """As on a machine whose memory suffices for an image of so many pixels."""
    monkeypatch.setattr(images, "STRIP_PIXELS", 100)
    monkeypatch.setattr(images, "main_memory", lambda: num_pixels * images.BYTES_PER_PIXEL)


def test_an_image_beyond_the_memory_is_an_error_that_says_so(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, 500_000)
    reason = "too large for this machine: 512,000 pixels take 4.9 MiB of memory, and 4.8 MiB are free: "
    with pytest.raises(BrixelError, match=reason), decoded(wide):
        pass
    with decoded(wide, enough=(320, 400)) as half:  # a part of it fits
        assert half.size == (400, 320)
    with pytest.raises(BrixelError, match="too large for this machine"), decoded(wide, enough=(320, 400), over=10**6):
        pass


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_memory_that_runs_out_with_an_image_is_its_failure(wide: Path, error: Exception) -> None:
    with pytest.raises(BrixelError, match="memory ran out with its 512,000 pixels: .*wide.jpg"), decoded(wide):
        raise error
    with pytest.raises(RuntimeError, match="shapes"), decoded(wide):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_extract_lists_an_image_beyond_the_memory_and_goes_on(
    extract_options, mixed: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_photograph(mixed / "huge.png", 1, 400, 300)
    short_of_memory(monkeypatch, 100_000)
    done = extract(extract_options(inputs=[str(mixed)]), listener)
    assert set(done.failures) == {"huge.png"}
    assert done.failures["huge.png"].startswith("too large for this machine: 120,000 pixels take 1.1 MiB of memory")


def pixels_decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sizes (width, height) of what is decoded from now on."""
    sizes: list[tuple[int, int]] = []
    upright: Callable[[Image.Image], Image.Image] = images.upright

    def noting(image: Image.Image) -> Image.Image:
        picture = upright(image)
        sizes.append(picture.size)
        return picture

    monkeypatch.setattr(images, "upright", noting)
    return sizes


def take_for_large(monkeypatch: pytest.MonkeyPatch, num_pixels: int) -> None:
    for module in (images, inputs, resizing, features):
        monkeypatch.setattr(module, "LARGE_PIXELS", num_pixels)


@pytest.mark.parametrize("fit", ["short", "centre", "stretch"])
def test_a_very_large_jpeg_is_extracted_from_a_part_of_its_size(
    fit: str, extract_options, wide: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = pixels_decoded(monkeypatch)
    whole = extract(extract_options(inputs=[str(wide)], fit=fit), listener)
    assert sizes == [(800, 640)]
    take_for_large(monkeypatch, 500_000)
    part = extract(extract_options(inputs=[str(wide)], fit=fit, output=tmp_path / "part.h5"), listener)
    assert sizes[1:] == [(100, 80)]  # the smallest that has the 64x80 pixels of the model's input
    expected, found = (brixel_cli.FeatureFile(done.output)["wide.jpg"] for done in (whole, part))
    assert found.shape == expected.shape
    cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(expected), torch.from_numpy(found), dim=0)
    assert cosine.mean() > 0.98
    assert every_row(whole.output) != every_row(part.output)


def test_a_probe_decodes_a_very_large_jpeg_at_a_part_of_its_size(
    root: Path, tmp_path: Path, model: tuple[str, str], listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_for_large(monkeypatch, 0)
    asked: list[tuple[int, int] | None] = []
    real = features.decoded

    def noting(path: Path, enough: tuple[int, int], over: int):
        assert over == 0
        asked.append(enough)
        return real(path, enough=enough, over=over)

    monkeypatch.setattr(features, "decoded", noting)
    probe(make_options(root, tmp_path / "out", checkpoints=[model[0]], sources=["student"]), listener)
    assert asked
    assert all(enough is not None and max(enough) < 200 for enough in asked)


def test_a_prediction_beyond_the_memory_is_that_images_failure(
    root: Path, tmp_path: Path, model: tuple[str, str], listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    from brixel_cli.config.probe import ApplyOptions

    probe(make_options(root, tmp_path / "out", checkpoints=[model[0]], sources=["student"]), listener)
    head = next((tmp_path / "out" / "heads").iterdir())
    photos = tmp_path / "photos"
    photos.mkdir()
    make_photograph(photos / "good.png", 1, 64, 48)
    make_photograph(photos / "huge.png", 1, 400, 300)
    monkeypatch.setattr(application, "free_memory", lambda device: 1_000_000)
    done = application.apply_head(ApplyOptions(head, [str(photos)], tmp_path / "predicted", device="cpu"), listener)
    assert done.num_written == 1
    assert done.failures["huge.png"].startswith("a prediction of 400x300 pixels needs about 1.4 MiB of memory")
