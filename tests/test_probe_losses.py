"""Losses of the probes, against values worked by hand."""

from __future__ import annotations

import math

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
    maps = torch.randn(2, 3, *grid)
    points = sample_points(50, 2, torch.Generator().manual_seed(0))
    whole = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(at_points(maps, points, size), labels_at_points(whole, points), atol=1e-5, rtol=1e-4)
    numbers = torch.arange(size[0] * size[1]).view(1, *size).expand(2, -1, -1)
    chosen = labels_at_points(numbers, points)
    assert chosen.shape == (2, 50)
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < size[0] * size[1]


def test_points_at_the_border_need_no_padding_that_mps_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    real = F.grid_sample

    def as_on_mps(*arguments, padding_mode: str, **named):
        assert padding_mode != "border"
        return real(*arguments, padding_mode=padding_mode, **named)

    monkeypatch.setattr(F, "grid_sample", as_on_mps)
    maps = torch.arange(4.0).view(1, 1, 2, 2)
    corners = torch.tensor([[[0.0, 0.0], [0.0, 0.99], [0.99, 0.0], [0.99, 0.99]]])
    torch.testing.assert_close(at_points(maps, corners, (16, 16)), maps.view(1, 1, 4))


def test_every_pixel_can_be_drawn_and_the_generator_decides() -> None:
    points = sample_points(4000, 1, torch.Generator().manual_seed(1))
    numbers = labels_at_points(torch.arange(12).view(1, 3, 4), points)
    assert torch.bincount(numbers.flatten(), minlength=12).min() > 4000 / 12 / 2
    assert torch.equal(points, sample_points(4000, 1, torch.Generator().manual_seed(1)))
