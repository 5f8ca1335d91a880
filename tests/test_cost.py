"""Costs, counted on tensors that hold no numbers: by hand for operators, against the method's table for models."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Listener, with_changes
from PIL import Image
from torch import Tensor, nn

from brixel_cli.config.distill import AdapterConfig
from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.cost import Cost, count_cost, count_parameters, fake_tensors, hollow
from brixel_cli.core.student import build_adapter
from brixel_cli.engines.distilling import plan as plan_of_distilling

FLOAT = 4


def test_a_linear_layer_by_hand() -> None:
    # 4 rows, 8 in, 16 out: 4 * 8 * 16 multiply-adds, 2 FLOP each. Its output: 4 * 16 floats.
    with fake_tensors():
        layer, x = nn.Linear(8, 16), torch.empty(4, 8)
        with torch.no_grad():
            assert count_cost(lambda: layer(x)) == Cost(flop=1024, peak_bytes=4 * 16 * FLOAT, uncounted=())


def test_a_convolution_by_hand() -> None:
    # Output 5 x 6 x 6, each of 3 * 3 * 3 multiply-adds.
    with fake_tensors():
        layer, x = nn.Conv2d(3, 5, 3), torch.empty(1, 3, 8, 8)
        assert count_cost(lambda: layer(x)).flop == 2 * 5 * 6 * 6 * 27


@pytest.mark.parametrize("grad", [False, True])
def test_attention_is_counted_on_the_cpu(grad: bool) -> None:
    # 2 heads, 10 tokens, width 4: queries by keys and weights by values, each 2 * 10 * 10 * 4 multiply-adds.
    with fake_tensors(), torch.set_grad_enabled(grad):
        q, k, v = (torch.empty(1, 2, 10, 4, requires_grad=grad) for _ in range(3))
        assert count_cost(lambda: F.scaled_dot_product_attention(q, k, v)).flop == 2 * 2 * (2 * 10 * 10 * 4)


def test_the_backward_pass_is_counted() -> None:
    # Forward, gradient of the weights, gradient of the input: three products of 4 * 8 * 16.
    with fake_tensors():
        layer, x = nn.Linear(8, 16), torch.empty(4, 8, requires_grad=True)
        assert count_cost(lambda: layer(x).sum().backward()).flop == 3 * 1024


def test_peak_bytes_by_hand() -> None:
    def call() -> Tensor:
        first = x + 1  # 1024 bytes alive
        second = first * 2  # 2048
        del first  # 1024
        third = second.repeat(3)  # 1024 + 3072 = 4096: the peak
        del second  # 3072
        return third[:1] + 1  # a view, and 4 bytes more: 3076

    with fake_tensors():
        x = torch.empty(256)
        assert count_cost(call).peak_bytes == 4096


def test_tensors_that_were_freed_do_not_count() -> None:
    def chain() -> Tensor:
        y = x + 1
        for _ in range(10):
            y = y + 1  # the old and the new one: 2 * 1024
        return y

    with fake_tensors():
        x = torch.empty(256)
        assert count_cost(chain).peak_bytes == 2048


def test_views_and_changes_in_place_take_no_memory() -> None:
    with fake_tensors():
        x = torch.empty(16, 16)
        assert count_cost(lambda: x.view(256).add_(1)[3:]).peak_bytes == 0


def test_operators_whose_arithmetic_is_not_counted_are_named() -> None:
    with fake_tensors():
        x, grid = torch.empty(1, 2, 8, 8), torch.empty(1, 4, 4, 2)
        cost = count_cost(lambda: F.grid_sample(x, grid, align_corners=False))
        assert cost.uncounted == ("aten.grid_sampler_2d",)
        assert cost.flop == 0
        assert count_cost(lambda: x + 1).uncounted == ()


def test_parameters_are_counted_frozen_or_not() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2, bias=False))
    module[0].requires_grad_(False)
    assert count_parameters(module) == 8 * 16 + 16 + 32


def test_counting_holds_no_memory_for_what_it_counts() -> None:
    with fake_tensors():  # 4 TiB, were it real
        x = torch.empty(1024, 1024, 1024, 1024)
        assert count_cost(lambda: x + 1).peak_bytes == 4 * 2**40


# GFLOP of the method's table, a multiply-add as 2, attention included.
@pytest.mark.parametrize(
    ("name", "small", "large"),
    [("vit_small_patch16_dinov3", 12.5, 486.6), ("vit_base_patch16_dinov3", 47.2, 1321.5)],
)
def test_backbones_cost_what_the_methods_table_says(name: str, small: float, large: float) -> None:
    meta = load_backbone(name, "random", device="meta")
    with fake_tensors():
        hollow(meta)
        at_256, at_1024 = torch.empty(1, 3, 256, 256), torch.empty(1, 3, 1024, 1024)
        assert count_cost(lambda: meta.intermediate_maps(at_256)).flop / 1e9 == pytest.approx(small, rel=0.01)
        assert count_cost(lambda: meta.last_map(at_1024)).flop / 1e9 == pytest.approx(large, rel=0.01)


@pytest.mark.parametrize("kind", ["fusion", "deformable"])
def test_a_student_is_cheaper_than_the_released_one_and_dearer_than_its_backbone(kind: str) -> None:
    meta = load_backbone("vit_small_patch16_dinov3", "random", device="meta")
    adapter = build_adapter(meta.embed_dim, 4, AdapterConfig(kind=kind)).to("meta")
    with fake_tensors(), torch.no_grad():
        hollow(meta)
        hollow(adapter)
        images = torch.empty(1, 3, 256, 256)
        cost = count_cost(lambda: adapter(images, meta.intermediate_maps(images)))
    assert 12.5 < cost.flop / 1e9 < 20.4  # GFLOP of the backbone alone and of the released student
    assert ("aten.grid_sampler_2d" in cost.uncounted) == (kind == "deformable")


@pytest.mark.parametrize(("seconds", "limit"), [(0.1, "reading"), (0.0, "device")])
@pytest.mark.parametrize("cache", ["false", "true"])
def test_a_dry_run_says_whether_reading_or_the_networks_limit_the_training(
    tiny_recipe_file: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch, seconds: float, limit: str, cache: str
) -> None:
    def load(path: Path, **_: object) -> AbstractContextManager[Image.Image]:
        time.sleep(seconds)
        return Image.new("RGB", (128, 128))

    monkeypatch.setattr("brixel_cli.data.views.decoded", load)
    monkeypatch.setattr(plan_of_distilling, "READING_SECONDS", 0.2)
    changes = ("views.other_sizes=[64]", "views.kind=fixed", "views.per_image=2", f"cache.enabled={cache}")
    recipe = with_changes(tiny_recipe_file, *changes)
    plan = plan_of_distilling.plan(recipe, listener)
    assert plan.limit == limit
    assert plan.num_workers == 0
    assert plan.reading_seconds == pytest.approx(seconds, abs=0.05)
    assert plan.step_seconds is not None
    assert plan.num_steps == 4
    assert plan.total_seconds is not None
    # Nothing is read ahead: four updates of four views, or each of 12 training and 2 held-out views once.
    read = (14 if cache == "true" else 16) * plan.reading_seconds
    assert plan.total_seconds >= read
    many = with_changes(tiny_recipe_file, *changes, "run.workers=2")
    assert plan_of_distilling.plan(many, listener).num_workers == 2
