"""Losses of the probes, against values worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from brixel_cli.core.probe_losses import (
    EPSILON,
    at_points,
    cosine_loss,
    cross_entropy,
    gradient_term,
    labels_at_points,
    sample_points,
    scale_invariant_log,
    sig_loss,
)


def depths(*logs: float) -> torch.Tensor:
    """Depths whose logarithm, after the constant that the losses add, is as given."""
    return torch.tensor(logs).exp() - EPSILON


def test_cross_entropy_by_hand() -> None:
    # Logits (ln 3, 0): probabilities 3/4 and 1/4. One pixel of each class and one ignored: (-ln 3/4 - ln 1/4) / 2.
    logits = torch.tensor([math.log(3.0), 0.0])[None, :, None].expand(1, 2, 3)
    labels = torch.tensor([[0, 1, 255]], dtype=torch.uint8)
    expected = -(math.log(0.75) + math.log(0.25)) / 2
    assert cross_entropy(logits, labels).item() == pytest.approx(expected)


def test_silog_by_hand() -> None:
    # g = 1, 3 and one invalid pixel: mean 2, variance 1; sqrt(1 + 0.15 * 4).
    prediction, target = depths(1.0, 3.0, 9.0), depths(0.0, 0.0, 0.0)
    valid = torch.tensor([True, True, False])
    assert scale_invariant_log(prediction, target, valid).item() == pytest.approx(math.sqrt(1.6), rel=1e-5)
    assert scale_invariant_log(prediction, target, valid, beta=1.0).item() == pytest.approx(math.sqrt(5), rel=1e-5)
    assert sig_loss(prediction, target, valid).item() == pytest.approx(math.sqrt(1.6), rel=1e-5)
    assert sig_loss(prediction, target, valid, warming_up=True).item() == pytest.approx(math.sqrt(0.6), rel=1e-5)


def test_gradient_term_by_hand() -> None:
    # Log differences 0 1 4 in a row of three: over two pixels |4 - 0| = 4, over 3 valid pixels. Stride 2 leaves two
    # pixels, too few for a difference; the larger strides one.
    prediction, target = depths(0.0, 1.0, 4.0).view(1, 1, 1, 3), depths(0.0, 0.0, 0.0).view(1, 1, 1, 3)
    valid = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    assert gradient_term(prediction, target, valid).item() == pytest.approx(4 / 3, rel=1e-5)
    valid[..., 2] = False
    assert gradient_term(prediction, target, valid).item() == 0


def test_gradient_term_takes_coarser_strides() -> None:
    # A ramp of 1 a pixel over 5 pixels. Stride 1: three differences of 2 over 5; stride 2 (0 2 4): one of 4 over 3.
    prediction, target = depths(0.0, 1.0, 2.0, 3.0, 4.0).view(1, 1, 5, 1), depths(*[0.0] * 5).view(1, 1, 5, 1)
    valid = torch.ones(1, 1, 5, 1, dtype=torch.bool)
    assert gradient_term(prediction, target, valid).item() == pytest.approx(6 / 5 + 4 / 3, rel=1e-5)


def test_cosine_by_hand() -> None:
    # The same direction, the opposite one, a right angle, and an invalid pixel: (0 + 2 + 1) / 3.
    target = torch.tensor([[1.0, 0, 0]] * 3 + [[0, 0, 0]]).T[None]
    prediction = torch.tensor([[5.0, 0, 0], [-1, 0, 0], [0, 3, 0], [1, 1, 1]]).T[None]
    valid = target.square().sum(dim=1, keepdim=True) > 0
    assert cosine_loss(prediction, target, valid).item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["segmentation", "silog", "sig", "gradient", "cosine"])
def test_nothing_valid_is_no_loss_and_no_gradient(name: str) -> None:
    prediction = torch.rand(1, 3, 4, 4, requires_grad=True)
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    depth, zero = prediction[:, :1] + 1, torch.zeros(1, 1, 4, 4)
    loss = {
        "segmentation": lambda: cross_entropy(prediction, torch.full((1, 4, 4), 255)),
        "silog": lambda: scale_invariant_log(depth, zero, nothing),
        "sig": lambda: sig_loss(depth, zero, nothing, warming_up=True),
        "gradient": lambda: gradient_term(depth, zero, nothing),
        "cosine": lambda: cosine_loss(prediction, torch.zeros(1, 3, 4, 4), nothing),
    }[name]()
    loss.backward()
    assert loss.item() == 0
    assert prediction.grad is not None
    assert prediction.grad.abs().max() == 0


def test_a_perfect_prediction_has_finite_gradients() -> None:
    prediction = torch.full((1, 1, 4, 4), 2.0, requires_grad=True)
    valid = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    (sig_loss(prediction, torch.full((1, 1, 4, 4), 2.0), valid) + 0).backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize(("grid", "size"), [((3, 4), (13, 10)), ((8, 8), (5, 6)), ((1, 1), (4, 4))])
def test_points_are_pixels_of_the_resized_map(grid: tuple[int, int], size: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, *grid, requires_grad=True)
    points = sample_points(50, 2, torch.Generator().manual_seed(0))
    whole = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    numbers = labels_at_points([np.arange(size[0] * size[1]).reshape(size)] * 2, points)
    assert numbers.shape == (2, 7, 7)
    expected = whole.flatten(2).gather(2, numbers.flatten(1)[:, None].expand(-1, 3, -1)).unflatten(2, (7, 7))
    found = at_points(maps, points, size)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn(found.shape)
    gradients = [
        torch.autograd.grad((values * weights).sum(), maps, retain_graph=True)[0] for values in (found, expected)
    ]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_points_by_hand() -> None:
    # One location is 2 pixels wide: their centres are at 1, 3 px. Rows 0 and 3 of 4, columns 1 and 2: a quarter of the
    # way from the first to the second location, and three quarters.
    maps = torch.tensor([[[[0.0, 4.0], [10.0, 14.0]]]])
    points = torch.tensor([[[0.0, 0.99], [0.25, 0.5]]])
    assert at_points(maps, points, (4, 4)).tolist() == [[[[1.0, 3.0], [11.0, 13.0]]]]
    labels = np.arange(16).reshape(4, 4)
    assert labels_at_points([labels], points).tolist() == [[[1, 2], [13, 14]]]
    assert labels_at_points([np.stack([labels, -labels])], points).tolist() == [
        [[[1, 2], [13, 14]], [[-1, -2], [-13, -14]]]
    ]


def test_every_pixel_is_as_likely_as_any_other_and_the_generator_decides() -> None:
    # Six rows and columns of ten: strips begin within pixels.
    points = sample_points(36, 2000, torch.Generator().manual_seed(1))
    assert points.shape == (2000, 2, 6)
    assert torch.equal(points.sort(dim=-1).values, points)
    numbers = labels_at_points([np.arange(100).reshape(10, 10)] * 2000, points)
    drawn = torch.bincount(numbers.flatten(), minlength=100) / (2000 * 36)
    assert (drawn * 100 - 1).abs().max() < 0.1  # four standard deviations of a binomial are 0.15
    assert torch.equal(points, sample_points(36, 2000, torch.Generator().manual_seed(1)))
