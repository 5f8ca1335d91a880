from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Listener, make_photograph, stopped_writing

from brixel_cli.config.distill import Recipe, ViewConfig
from brixel_cli.config.files import load_recipe
from brixel_cli.core.backbone import Backbone, load_backbone
from brixel_cli.core.cost import fake_tensors, hollow
from brixel_cli.data.images import ImageFile, scan_folder
from brixel_cli.data.row_store import Store
from brixel_cli.data.views import Views, normalise_pixels, reduce_view
from brixel_cli.engines.distilling.batches import OnlineBatches, ViewLoader, batch_keys, compute_maps, num_workers
from brixel_cli.engines.distilling.cache import CachedBatches, CacheFile
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError


@pytest.fixture
def recipe(tiny_recipe_file: Path) -> Recipe:
    changes = ["views.kind=fixed", "views.per_image=2", "cache.enabled=true", "run.precision=float32"]
    return load_recipe(str(tiny_recipe_file), changes)


def open_cache(
    recipe: Recipe, folder: Path, backbone: Backbone, parts: list[Views], runtime: Runtime, listener: Listener
) -> list[CachedBatches]:
    return CacheFile(recipe, folder, backbone, parts, runtime, listener).fill()


def views_of(recipe: Recipe, backbone: Backbone) -> Views:
    found, _ = scan_folder(Path(recipe.data.images), 100)
    return Views(found, recipe.views, recipe.seed)


def views_in_name(count: int, seed: int = 0, **config: Any) -> Views:
    """Views of photographs that are not there: enough to say which of them make a batch."""
    photographs = [ImageFile(Path(f"{number}.png"), f"{number}.png", 128, 128) for number in range(count)]
    return Views(photographs, ViewConfig(teacher_size=128, **config), seed)


def test_an_epoch_takes_every_view_once_and_the_next_in_another_order() -> None:
    keys = [key for batch in batch_keys(views_in_name(10), range(5), 4) for key in batch]
    assert [epoch for epoch, _ in keys] == [0] * 10 + [1] * 10
    assert sorted(number for epoch, number in keys if epoch == 0) == list(range(10))
    assert sorted(number for epoch, number in keys if epoch == 1) == list(range(10))
    assert [n for e, n in keys if e == 0] != [n for e, n in keys if e == 1]
    assert list(batch_keys(views_in_name(10, 1), range(5), 4)) != list(batch_keys(views_in_name(10), range(5), 4))


def test_keys_depend_on_the_step_alone() -> None:
    whole = list(batch_keys(views_in_name(7, 3), range(12), 4))
    assert list(batch_keys(views_in_name(7, 3), range(5, 12), 4)) == whole[5:]


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_a_step_takes_the_same_views_however_they_are_shared_out(accumulate: int, world_size: int) -> None:
    views = views_in_name(11)
    whole = list(batch_keys(views, range(6), 8))
    shares = [list(batch_keys(views, range(6), 8, accumulate, rank, world_size)) for rank in range(world_size)]
    for step in range(6):
        parts = [keys for share in shares for keys in share[step * accumulate : (step + 1) * accumulate]]
        assert sorted(key for part in parts for key in part) == sorted(whole[step])


@pytest.mark.parametrize(("kind", "per_image"), [("fixed", 3), ("centre", 1), ("random", 1)])
def test_sizes_take_turns_and_a_batch_has_one(kind: str, per_image: int) -> None:
    views = views_in_name(24 // per_image, kind=kind, per_image=per_image, other_sizes=[64, [96, 128]])
    batches = list(batch_keys(views, range(18), 4))
    sizes = [{views.size_number(*key) for key in batch} for batch in batches]
    assert all(len(size) == 1 for size in sizes)
    turns = [[size for one in sizes[at : at + 3] for size in one] for at in range(0, 18, 3)]
    assert all(sorted(turn) == [0, 1, 2] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1  # in an order that changes
    # 24 views, 8 of each size, 4 in a batch: an epoch is six steps, in which every view comes once.
    for epoch in range(3):
        numbers = [number for batch in batches[6 * epoch : 6 * epoch + 6] for _, number in batch]
        assert sorted(numbers) == list(range(24))
    assert list(batch_keys(views, range(7, 18), 4)) == batches[7:]


def test_a_random_view_changes_its_size_from_epoch_to_epoch() -> None:
    views = views_in_name(4, kind="random", other_sizes=[64])
    assert [views.size_number(epoch, 1) for epoch in range(3)] == [1, 0, 1]
    fixed = views_in_name(4, kind="fixed", per_image=2, other_sizes=[64])
    assert [fixed.size_number(epoch, 1) for epoch in range(3)] == [1, 1, 1]


def test_a_cache_holds_views_of_several_sizes(
    tiny_recipe_file: Path, backbone: Backbone, tmp_path: Path, listener: Listener
) -> None:
    recipe = load_recipe(
        str(tiny_recipe_file),
        [
            "views.kind=fixed",
            "views.per_image=2",
            "views.other_sizes=[[64, 128]]",
            "cache.enabled=true",
            "run.precision=float32",
        ],
    )
    views, runtime = views_of(recipe, backbone), Runtime(recipe.run.device, recipe.run.precision)
    held_out = Views(views.images[:2], ViewConfig(teacher_size=128), 0)
    training, other = open_cache(recipe, tmp_path, backbone, [views, held_out], runtime, listener)
    for source, of, keys in [
        (training, views, [(0, 0), (0, 4)]),
        (training, views, [(0, 5), (3, 1)]),
        (other, held_out, [(0, 1)]),
    ]:
        (stored,) = source.iterate([keys])
        (computed,) = OnlineBatches(of, backbone, runtime, 0).iterate([keys])
        assert (
            stored.images.shape
            == computed.images.shape
            == (len(keys), 3, 16 if keys[0][1] % 2 and of is views else 32, 32)
        )
        torch.testing.assert_close(stored.targets.float(), computed.targets, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(stored.maps[2], computed.maps[2], atol=2e-3, rtol=2e-3)
    store = Store(next(tmp_path.glob("cache/*.h5")))
    assert store.array("targets/128x128").shape == (10, 64, 8, 8)
    assert store.array("targets/64x128").shape == (8, 64, 4, 8)


def test_an_online_batch_is_what_backbone_and_teacher_say(recipe: Recipe, backbone: Backbone) -> None:
    views = views_of(recipe, backbone)
    (batch,) = OnlineBatches(views, backbone, Runtime(recipe.run.device, recipe.run.precision), workers=0).iterate(
        [[(0, 0), (0, 3)]]
    )
    pixels = normalise_pixels(torch.stack([views[0, 0].pixels, views[0, 3].pixels]), backbone.mean, backbone.std)
    images = reduce_view(pixels, 4)
    assert batch.images.shape == (2, 3, 32, 32)
    assert torch.equal(batch.images, images)
    assert torch.equal(batch.targets, backbone.last_map(pixels))
    assert all(torch.equal(*pair) for pair in zip(batch.maps, backbone.intermediate_maps(images), strict=True))
    assert batch.names == ["0.png", "1.png"]


def test_worker_processes_change_nothing(recipe: Recipe, backbone: Backbone) -> None:
    keys = [[(0, 0), (0, 3)], [(1, 2)]]
    here, there = (
        list(
            OnlineBatches(
                views_of(recipe, backbone), backbone, Runtime(recipe.run.device, recipe.run.precision), workers
            ).iterate(keys)
        )
        for workers in (0, 2)
    )
    assert all(torch.equal(one.targets, other.targets) for one, other in zip(here, there, strict=True))


def test_views_travel_as_bytes_and_are_normalised_where_the_networks_are(recipe: Recipe, backbone: Backbone) -> None:
    runtime = Runtime("cpu", "float32")
    views = views_of(recipe, backbone)
    source = ViewLoader(views, runtime, workers=2)
    (loaded,) = source.load([[(0, 0), (0, 3)]])
    assert (loaded.pixels.dtype, loaded.pixels.shape) == (torch.uint8, (2, 3, 128, 128))
    # As if each view had been normalised by itself, before it travelled: not a bit differs on the CPU.
    apart = torch.stack([normalise_pixels(views[0, number].pixels, backbone.mean, backbone.std) for number in (0, 3)])
    assert torch.equal(normalise_pixels(loaded.pixels, backbone.mean, backbone.std), apart)
    # The same processes read the next batches too.
    before = [worker.pid for worker in source._loader._iterator._workers]
    assert [batch.names for batch in source.load([[(1, 2)]])] == [["1.png"]]
    assert [worker.pid for worker in source._loader._iterator._workers] == before


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_views_for_a_gpu_are_read_into_pinned_memory(
    recipe: Recipe, backbone: Backbone, device: str, pinned: bool
) -> None:
    runtime = Runtime("cpu")
    runtime.device = torch.device(device)
    assert ViewLoader(views_of(recipe, backbone), runtime, workers=0)._loader.pin_memory is pinned


def test_pixels_that_are_on_the_gpu_are_normalised_and_reduced_there() -> None:
    runtime = Runtime("cpu", "float32")
    runtime.device = torch.device("cuda", 0)
    fake = load_backbone("test_vit", "random", device="meta")
    with fake_tensors():
        hollow(fake, "cuda")
        images, maps, targets = compute_maps(fake, runtime, torch.empty(2, 3, 128, 128, dtype=torch.uint8), 4)
    assert {tensor.device.type for tensor in (images, *maps, targets)} == {"cuda"}
    assert images.shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("device", "cores", "processes", "expected"),
    [("cuda", 8, 1, 7), ("cuda", 64, 1, 16), ("cuda", 64, 8, 7), ("cuda", 1, 1, 1), ("cpu", 8, 1, 2), ("cpu", 1, 1, 1)],
)
def test_workers_are_counted_by_the_cores(
    device: str, cores: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    runtime = Runtime("cpu")
    runtime.device, runtime.world_size = torch.device(device), processes
    assert num_workers(None, runtime) == expected
    assert num_workers(3, runtime) == 3


def test_the_cache_holds_what_would_be_computed(
    recipe: Recipe, backbone: Backbone, tmp_path: Path, listener: Listener
) -> None:
    views, runtime = views_of(recipe, backbone), Runtime(recipe.run.device, recipe.run.precision)
    first, second = open_cache(recipe, tmp_path, backbone, [views, views], runtime, listener)
    keys = [[(0, 5), (7, 2)]]
    (computed,) = OnlineBatches(views, backbone, runtime, 0).iterate(keys)
    for source in (first, second):
        (stored,) = source.iterate(keys)
        torch.testing.assert_close(stored.targets.float(), computed.targets, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(stored.images, computed.images, atol=2e-3, rtol=2e-3)
        assert len(stored.maps) == 4
        torch.testing.assert_close(stored.maps[1], computed.maps[1], atol=2e-3, rtol=2e-3)
        assert stored.names == ["2.png", "1.png"]


def test_the_disk_need_is_announced_before_the_cache_is_filled(
    recipe: Recipe, backbone: Backbone, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = views_of(recipe, backbone)
    open_cache(recipe, tmp_path, backbone, [views], Runtime(recipe.run.device, recipe.run.precision), listener)
    # A view: image 3*32*32, maps 4*64*2*2, target 64*8*8, two bytes each, 4 bytes for the photograph's number, one of
    # status and 8 of a checksum: 16,397; 16 of them are 262,352 bytes.
    assert listener.said[0].startswith("cache: 16 views need 256.2 KiB on disk, at ")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 10))
    with pytest.raises(BrixelError, match=r"h5 needs 256.2 KiB, but .* has 10 B free. Make room"):
        open_cache(
            recipe, tmp_path / "other", backbone, [views], Runtime(recipe.run.device, recipe.run.precision), listener
        )


def test_an_interrupted_filling_goes_on_where_it_stopped(
    recipe: Recipe, backbone: Backbone, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    views, runtime = views_of(recipe, backbone), Runtime(recipe.run.device, recipe.run.precision)
    with stopped_writing(monkeypatch, Store, 5) as written, pytest.raises(KeyboardInterrupt):
        open_cache(recipe, tmp_path, backbone, [views], runtime, listener)
    (path,) = (tmp_path / "cache").glob("*.h5")
    assert list(Store(path).missing) == list(range(len(written), 16))
    with stopped_writing(monkeypatch, Store, 16) as rows:
        (source,) = open_cache(recipe, tmp_path, backbone, [views], runtime, listener)
    assert rows == list(range(len(written), 16))
    (computed,) = OnlineBatches(views, backbone, runtime, 0).iterate([[(0, 1), (0, 12)]])
    (stored,) = source.iterate([[(0, 1), (0, 12)]])
    torch.testing.assert_close(stored.targets.float(), computed.targets, atol=2e-3, rtol=2e-3)


def test_a_cache_is_never_read_for_other_views_or_weights(
    recipe: Recipe, backbone: Backbone, tmp_path: Path, listener: Listener
) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(2):
        make_photograph(folder / f"{number}.png", number)

    def fill(recipe: Recipe, backbone: Backbone) -> int:
        found, _ = scan_folder(folder, 100)
        views = Views(found, recipe.views, recipe.seed)
        open_cache(recipe, tmp_path, backbone, [views], Runtime(recipe.run.device, recipe.run.precision), listener)
        return len(list((tmp_path / "cache").glob("*.h5")))

    assert fill(recipe, backbone) == 1
    assert fill(recipe, backbone) == 1
    torch.manual_seed(1)
    assert fill(recipe, load_backbone("test_vit", "random")) == 2
    assert fill(recipe.model_copy(update={"seed": 1}), backbone) == 3
    make_photograph(folder / "1.png", 77)
    assert fill(recipe, backbone) == 4


def test_a_cache_is_found_again_by_what_the_photographs_hold(
    recipe: Recipe, backbone: Backbone, tmp_path: Path, listener: Listener
) -> None:
    def fill(folder: Path) -> int:
        found, _ = scan_folder(folder, 100)
        views = Views(found, recipe.views, recipe.seed)
        open_cache(recipe, tmp_path, backbone, [views], Runtime(recipe.run.device, recipe.run.precision), listener)
        return len(list((tmp_path / "cache").glob("*.h5")))

    photographs, moved = tmp_path / "photographs", tmp_path / "moved"
    photographs.mkdir()
    for number in range(2):
        make_photograph(photographs / f"{number}.png", number)
    assert fill(photographs) == 1
    photographs.rename(moved)
    for path in moved.iterdir():
        os.utime(path, (0, 0))
    assert fill(moved) == 1


def test_a_photograph_that_has_gone_is_named(
    recipe: Recipe, backbone: Backbone, tmp_path: Path, listener: Listener
) -> None:
    make_photograph(tmp_path / "0.png", 0)
    found, _ = scan_folder(tmp_path, 100)
    views = Views(found, recipe.views, recipe.seed)
    (tmp_path / "0.png").unlink()
    with pytest.raises(BrixelError) as caught:
        open_cache(recipe, tmp_path, backbone, [views], Runtime(recipe.run.device, recipe.run.precision), listener)
    assert str(caught.value) == (
        f"{tmp_path}/0.png cannot be read: No such file or directory. Make it readable, or remove it."
    )


@pytest.mark.parametrize(("value", "largest"), [(1e5, "100000"), (float("nan"), "nan")])
def test_a_target_that_float16_cannot_hold_is_refused_and_its_image_named(
    recipe: Recipe, backbone: Backbone, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch,
    value: float, largest: str,
) -> None:  # fmt: skip
    original = Backbone.last_map

    def last_map(self: Backbone, images: torch.Tensor) -> torch.Tensor:
        maps = original(self, images)
        maps[-1, 0, 0, 0] = value
        return maps

    monkeypatch.setattr(Backbone, "last_map", last_map)
    views, runtime = views_of(recipe, backbone), Runtime(recipe.run.device, recipe.run.precision)
    with pytest.raises(BrixelError) as caught:
        open_cache(recipe, tmp_path, backbone, [views], runtime, listener)
    message = str(caught.value)
    assert message.startswith("1.png: the teacher's feature map cannot be cached")
    assert f"largest value {largest}" in message
    assert "--set cache.enabled=false" in message
