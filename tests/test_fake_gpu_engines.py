"""Extraction, probing and benchmark rows on a GPU that is not there."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import MIXED, backbone_on_gpu, on_gpu, real

from brixel_cli.config.distill import AdapterConfig
from brixel_cli.core.heads import HeadSpec, build_head, enlarge
from brixel_cli.core.losses import Basis
from brixel_cli.core.probe_losses import (
    at_points,
    cosine_loss,
    cross_entropy,
    gradient_term,
    sample_points,
    scale_invariant_log,
    sig_loss,
)
from brixel_cli.core.probe_metrics import DepthMeter, NormalsMeter, SegmentationMeter
from brixel_cli.core.student import Student, build_adapter
from brixel_cli.data.feature_layout import encode
from brixel_cli.data.views import normalise_pixels, reduce_view
from brixel_cli.engines.benchmarking.methods import make_methods

CUDA = torch.device("cuda:0")
HEADS = [
    HeadSpec("segmentation", 64, num_classes=5),
    HeadSpec("depth_normals", 64),
    HeadSpec("depth_normals", 64, kind="readout", batch_norm=False, bins=0),
]


def test_pixels_are_normalised_and_reduced_on_the_gpu(gpu: None) -> None:
    pixels = torch.zeros(2, 3, 64, 64, dtype=torch.uint8).to("cuda")
    images = normalise_pixels(pixels, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    reduced = reduce_view(images, 4)
    assert (images.device, reduced.device, tuple(reduced.shape)) == (CUDA, CUDA, (2, 3, 16, 16))


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("components", [None, 3])
def test_features_are_encoded_on_the_gpu(dtype: str, components: int | None, gpu: None) -> None:
    maps = torch.randn(2, 64, 12, 8, device="cuda")
    basis = Basis(torch.randn(64, 3), torch.randn(64)) if components else None  # as read from the file
    first, finite = encode(maps, dtype, basis)
    again, _ = encode(maps, dtype, basis, first)  # into the memory of the first
    assert {tensor.device for tensor in (*first.values(), *again.values())} == {CUDA}
    assert finite == [True, True]
    assert first["features"].cpu().numpy().shape == (2, components or 64, 12, 8)


@pytest.mark.parametrize("spec", HEADS, ids=["linear", "bins", "readout"])
def test_heads_and_their_outputs(spec: HeadSpec, gpu: None) -> None:
    head = on_gpu(lambda: build_head(spec, seed=0)).train()
    outputs = head(torch.randn(2, 64, 12, 8, device="cuda"))
    for quantity, output in outputs.items():
        assert output.device == CUDA
        assert enlarge(quantity, output, (48, 32)).device == CUDA


def test_a_head_left_on_the_cpu_is_noticed(gpu: None) -> None:
    with pytest.raises(RuntimeError, match=MIXED):
        real(lambda: build_head(HEADS[0], seed=0))(torch.randn(2, 64, 12, 8, device="cuda"))


def test_losses_of_whole_maps(gpu: None) -> None:
    depth, truth = torch.rand(2, 2, 1, 24, 24, device="cuda")
    normals = torch.randn(2, 3, 24, 24, device="cuda")
    losses = [
        cross_entropy(torch.randn(2, 5, 24, 24, device="cuda"), torch.ones(2, 24, 24, device="cuda").byte()),
        scale_invariant_log(depth, truth, truth > 0),
        sig_loss(depth, truth, truth > 0, warming_up=True),
        gradient_term(depth, truth, truth > 0),
        cosine_loss(normals, normals, truth > 0),
    ]
    assert {loss.device for loss in losses} == {CUDA}


def test_points_are_drawn_on_the_cpu_and_taken_where_the_maps_are(gpu: None) -> None:
    points = sample_points(16, 2, torch.Generator())
    values = at_points(torch.randn(2, 5, 12, 8, device="cuda"), points, (48, 32))
    assert (values.device, tuple(values.shape)) == (CUDA, (2, 5, 4, 4))
    assert cross_entropy(values, torch.zeros(2, 4, 4, dtype=torch.uint8, device="cuda")).device == CUDA


def test_meters_take_maps_of_the_gpu(gpu: None) -> None:
    depth = torch.rand(24, 24, device="cuda")
    assert "rmse_m" in real(lambda: DepthMeter(align=True)).add(depth, depth)
    normals = torch.randn(3, 24, 24, device="cuda")
    assert "mean_angle_deg" in NormalsMeter().add(normals, normals)
    labels = torch.ones(24, 24, device="cuda", dtype=torch.int64)
    assert "miou" in SegmentationMeter(5).add(labels, labels)


def test_rows_of_a_benchmark(gpu: None) -> None:
    student = Student(backbone_on_gpu(), on_gpu(lambda: build_adapter(64, 4, AdapterConfig()))).eval()
    with torch.inference_mode():
        for row in make_methods(student, (48, 32), highres=True):
            output = row.call(row.input(2, "cuda"))
            assert (row.kind, output.device, tuple(output.shape)) == (row.kind, CUDA, (2, 64, *row.grid))
