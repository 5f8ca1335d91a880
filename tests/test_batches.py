from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import Listener, make_photograph

from brixel_cli.core.backbone import Backbone, load_backbone
from brixel_cli.data.features import Store
from brixel_cli.data.images import scan_folder
from brixel_cli.data.views import Views, reduce_view
from brixel_cli.engines.batches import OnlineBatches, batch_keys, open_cache
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError
from brixel_cli.recipe import Recipe
from brixel_cli.recipe_files import load_recipe


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return load_backbone("test_vit", "random")


@pytest.fixture
def recipe(tiny_recipe_file: Path) -> Recipe:
    changes = ["views.kind=fixed", "views.per_image=2", "cache.enabled=true", "run.precision=float32"]
    return load_recipe(str(tiny_recipe_file), changes)


def views_of(recipe: Recipe, backbone: Backbone) -> Views:
    found, _ = scan_folder(Path(recipe.data.images), 100)
    return Views(found, recipe.views, recipe.seed, backbone.mean, backbone.std)


def test_an_epoch_takes_every_view_once_and_the_next_in_another_order() -> None:
    keys = [key for batch in batch_keys(10, 0, range(5), 4) for key in batch]
    assert [epoch for epoch, _ in keys] == [0] * 10 + [1] * 10
    assert sorted(number for epoch, number in keys if epoch == 0) == list(range(10))
    assert sorted(number for epoch, number in keys if epoch == 1) == list(range(10))
    assert [n for e, n in keys if e == 0] != [n for e, n in keys if e == 1]
    assert list(batch_keys(10, 1, range(5), 4)) != list(batch_keys(10, 0, range(5), 4))


def test_keys_depend_on_the_step_alone() -> None:
    whole = list(batch_keys(7, 3, range(12), 4))
    assert list(batch_keys(7, 3, range(5, 12), 4)) == whole[5:]


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_a_step_takes_the_same_views_however_they_are_shared_out(accumulate: int, world_size: int) -> None:
    whole = list(batch_keys(11, 0, range(6), 8))
    shares = [list(batch_keys(11, 0, range(6), 8, accumulate, rank, world_size)) for rank in range(world_size)]
    for step in range(6):
        parts = [keys for share in shares for keys in share[step * accumulate : (step + 1) * accumulate]]
        assert sorted(key for part in parts for key in part) == sorted(whole[step])


def test_an_online_batch_is_what_backbone_and_teacher_say(recipe: Recipe, backbone: Backbone) -> None:
    views = views_of(recipe, backbone)
    (batch,) = OnlineBatches(views, backbone, Runtime(recipe.run), workers=0).iterate([[(0, 0), (0, 3)]])
    pixels = torch.stack([views[0, 0].pixels, views[0, 3].pixels])
    images = reduce_view(pixels, 4)
    assert batch.images.shape == (2, 3, 32, 32)
    assert torch.equal(batch.images, images)
    assert torch.equal(batch.targets, backbone.last_map(pixels))
    assert all(torch.equal(*pair) for pair in zip(batch.maps, backbone.intermediate_maps(images), strict=True))
    assert batch.names == ["0.png", "1.png"]


def test_worker_processes_change_nothing(recipe: Recipe, backbone: Backbone) -> None:
    keys = [[(0, 0), (0, 3)], [(1, 2)]]
    here, there = (
        list(OnlineBatches(views_of(recipe, backbone), backbone, Runtime(recipe.run), workers).iterate(keys))
        for workers in (0, 2)
    )
    assert all(torch.equal(one.targets, other.targets) for one, other in zip(here, there, strict=True))


def test_the_cache_holds_what_would_be_computed(
    recipe: Recipe, backbone: Backbone, tmp_path: Path, listener: Listener
) -> None:
    views, runtime = views_of(recipe, backbone), Runtime(recipe.run)
    first, second = open_cache(recipe, tmp_path, backbone, [views, views], runtime, listener)
    keys = [[(0, 5), (7, 2)]]
    (computed,) = OnlineBatches(views, backbone, runtime, 0).iterate(keys)
    for source in (first, second):
        (stored,) = source.iterate(keys)
        torch.testing.assert_close(stored.targets, computed.targets, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(stored.images, computed.images, atol=2e-3, rtol=2e-3)
        assert len(stored.maps) == 4
        torch.testing.assert_close(stored.maps[1], computed.maps[1], atol=2e-3, rtol=2e-3)
        assert stored.names == ["2.png", "1.png"]


def test_the_disk_need_is_announced_before_the_cache_is_filled(
    recipe: Recipe, backbone: Backbone, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = views_of(recipe, backbone)
    open_cache(recipe, tmp_path, backbone, [views], Runtime(recipe.run), listener)
    # A view: image 3*32*32, maps 4*64*2*2, target 64*8*8, two bytes each, 4 bytes for the photograph's number and one
    # of status: 16,389; 16 of them are 262,224 bytes.
    assert listener.said[0].startswith("cache: 16 views need 256.1 KiB on disk, at ")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 10))
    with pytest.raises(BrixelError, match=r"h5 needs 256.1 KiB, but .* has 10 B free. Make room"):
        open_cache(recipe, tmp_path / "other", backbone, [views], Runtime(recipe.run), listener)


def test_an_interrupted_filling_goes_on_where_it_stopped(
    recipe: Recipe, backbone: Backbone, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    views, runtime = views_of(recipe, backbone), Runtime(recipe.run)
    written: list[int] = []
    original = Store.write

    def write(self: Store, row: int, values: object) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(row)
        original(self, row, values)

    monkeypatch.setattr(Store, "write", write)
    with pytest.raises(KeyboardInterrupt):
        open_cache(recipe, tmp_path, backbone, [views], runtime, listener)
    (path,) = (tmp_path / "cache").glob("*.h5")
    assert list(Store(path).missing) == list(range(5, 16))
    rows: list[int] = []
    monkeypatch.setattr(Store, "write", lambda self, row, values: (rows.append(row), original(self, row, values))[0])
    (source,) = open_cache(recipe, tmp_path, backbone, [views], runtime, listener)
    assert rows == list(range(5, 16))
    (computed,) = OnlineBatches(views, backbone, runtime, 0).iterate([[(0, 1), (0, 12)]])
    (stored,) = source.iterate([[(0, 1), (0, 12)]])
    torch.testing.assert_close(stored.targets, computed.targets, atol=2e-3, rtol=2e-3)


def test_a_cache_is_never_read_for_other_views_or_weights(
    recipe: Recipe, backbone: Backbone, tmp_path: Path, listener: Listener
) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(2):
        make_photograph(folder / f"{number}.png", number)

    def fill(recipe: Recipe, backbone: Backbone) -> int:
        found, _ = scan_folder(folder, 100)
        views = Views(found, recipe.views, recipe.seed, backbone.mean, backbone.std)
        open_cache(recipe, tmp_path, backbone, [views], Runtime(recipe.run), listener)
        return len(list((tmp_path / "cache").glob("*.h5")))

    assert fill(recipe, backbone) == 1
    assert fill(recipe, backbone) == 1
    torch.manual_seed(1)
    assert fill(recipe, load_backbone("test_vit", "random")) == 2
    assert fill(recipe.model_copy(update={"seed": 1}), backbone) == 3
    make_photograph(folder / "1.png", 77)
    assert fill(recipe, backbone) == 4
