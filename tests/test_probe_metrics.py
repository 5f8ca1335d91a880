"""Metrics of the probes, against values worked by hand, and against other libraries on random cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchmetrics.functional.regression import mean_absolute_percentage_error, mean_squared_error

from brixel_cli.core.probe_metrics import (
    DepthMeter,
    NormalsMeter,
    SegmentationMeter,
    aligned,
    angles_deg,
    boundary_of,
    mean_and_spread,
)


def labels(*rows: str) -> torch.Tensor:
    """Rows of digits as labels; a dot is ignored."""
    return torch.tensor([[255 if mark == "." else int(mark) for mark in row] for row in rows])


def random_labels(seed: int, num_classes: int, ignore: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Prediction and truth in blocks of several sizes, some ignored, some classes absent."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, num_classes - 1, (7, 8), generator=generator)
    target = target.repeat_interleave(6, 0).repeat_interleave(7, 1)
    prediction = torch.where(torch.rand(target.shape, generator=generator) < 0.2, target.roll(5, 1), target.roll(1, 0))
    target[torch.rand(target.shape, generator=generator) < ignore] = 255
    return prediction, target


# Segmentation


def test_iou_by_hand() -> None:
    # Class 0: 2 right, 1 taken for 1, none wrongly 0: 2/3. Class 1: 1 right, 1 wrongly: 1/2. Class 2 is absent.
    meter = SegmentationMeter(3)
    meter.add(labels("001", "1.0"), labels("000", "1.."))
    figures = meter.compute()
    assert figures["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert figures["pixel_accuracy"] == pytest.approx(3 / 4)
    assert figures["class_iou"][:2] == pytest.approx([2 / 3, 1 / 2])
    assert math.isnan(figures["class_iou"][2])


def test_one_matrix_over_the_set_is_not_the_mean_of_images() -> None:
    meter = SegmentationMeter(2)
    first = meter.add(labels("00"), labels("00"))
    second = meter.add(labels("0011"), labels("0111"))
    assert (first["miou"], second["miou"]) == (1.0, pytest.approx((1 / 2 + 2 / 3) / 2))
    assert meter.compute()["miou"] == pytest.approx((3 / 4 + 2 / 3) / 2)


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    meter = SegmentationMeter(3)
    meter.add(labels("02"), labels("00"))
    assert meter.compute()["miou"] == pytest.approx((1 / 2 + 0) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_segmentation_agrees_with_torchmetrics(seed: int) -> None:
    meter = SegmentationMeter(6)
    pairs = [random_labels(seed * 10 + number, 6) for number in range(3)]
    for prediction, target in pairs:
        meter.add(prediction, target)
    prediction, target = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
    figures = meter.compute()
    jaccard = MulticlassJaccardIndex(6, ignore_index=255)(prediction, target)
    accuracy = MulticlassAccuracy(6, average="micro", ignore_index=255)(prediction, target)
    assert figures["miou"] == pytest.approx(jaccard.item(), abs=1e-6)
    assert figures["pixel_accuracy"] == pytest.approx(accuracy.item(), abs=1e-6)


def reference_boundary_iou(prediction: torch.Tensor, target: torch.Tensor, num_classes: int) -> list[float]:
    """Cheng et al.'s published function, mask by mask: erosions by one pixel, zeros outside the image."""
    height, width = target.shape
    reach = max(round(0.02 * math.sqrt(height**2 + width**2)), 1)

    def boundary(mask: np.ndarray) -> np.ndarray:
        eroded = mask.copy()
        for _ in range(reach):
            padded = np.pad(eroded, 1)
            shifts = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
            eroded = np.logical_and.reduce(shifts)
        return mask & ~eroded

    known = target.numpy() != 255
    values = []
    for label in range(num_classes):
        sides = [boundary((side.numpy() == label) & known) for side in (prediction, target)]
        union = (sides[0] | sides[1]).sum()
        values.append((sides[0] & sides[1]).sum() / union if union else math.nan)
    return values


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("repeat", [1, 3])
def test_boundary_iou_agrees_with_the_published_function(seed: int, repeat: int) -> None:
    pair = random_labels(seed, 5, ignore=0.02)
    prediction, target = (side.repeat_interleave(repeat, 0).repeat_interleave(repeat, 1) for side in pair)
    meter = SegmentationMeter(5)
    meter.add(prediction, target)
    expected = reference_boundary_iou(prediction, target, 5)
    assert meter.compute()["class_boundary_iou"] == pytest.approx(expected, nan_ok=True)
    assert meter.compute()["boundary_iou"] == pytest.approx(np.nanmean(expected))


def test_a_boundary_by_hand() -> None:
    # Width 1: pixels beside the other label, and those at the image's border.
    found = boundary_of(labels("000011", "000011", "000011", "000011"), 1)
    assert found.int().tolist() == [[1] * 6, [1, 0, 0, 1, 1, 1], [1, 0, 0, 1, 1, 1], [1] * 6]


@pytest.mark.parametrize("size", [(9, 17), (4, 12), (5, 12), (3, 30)])  # width 2: no pixel is inside of 4 rows
def test_a_boundary_is_every_pixel_whose_neighbourhood_is_not_of_one_label(size: tuple[int, int]) -> None:
    numbers = torch.randint(0, 2, size, generator=torch.Generator().manual_seed(0)) * torch.arange(size[1]).gt(5)
    around = F.pad(numbers, (2, 2, 2, 2), value=-1).unfold(0, 5, 1).unfold(1, 5, 1).flatten(2)
    assert torch.equal(boundary_of(numbers, 2), (around != numbers[..., None]).any(dim=-1))


def test_boundary_iou_rewards_sharp_edges() -> None:
    target = torch.zeros(100, 100, dtype=torch.int64)
    target[30:70, 30:70] = 1
    blurred = torch.zeros_like(target)
    blurred[27:73, 27:73] = 1
    sharp, soft = SegmentationMeter(2), SegmentationMeter(2)
    sharp.add(target, target)
    soft.add(blurred, target)
    assert sharp.compute()["boundary_iou"] == 1
    assert soft.compute()["boundary_iou"] < soft.compute()["miou"] - 0.2


def test_an_image_without_labels_counts_nowhere() -> None:
    meter = SegmentationMeter(2)
    own = meter.add(labels("01"), labels(".."))
    assert all(math.isnan(value) for value in own.values())
    meter.add(labels("01"), labels("01"))
    assert meter.compute()["miou"] == 1
    assert all(math.isnan(value) for value in SegmentationMeter(2).compute()["class_iou"])


def test_metrics_leave_their_inputs_alone() -> None:
    prediction, target = random_labels(0, 4)
    depth, truth = torch.rand(4, 5), torch.rand(4, 5)
    normals = torch.randn(3, 4, 5)
    before = [tensor.clone() for tensor in (prediction, target, depth, truth, normals)]
    SegmentationMeter(4).add(prediction, target)
    DepthMeter(align=True).add(depth, truth)
    NormalsMeter().add(normals, normals.roll(1, 1))
    for tensor, copy in zip((prediction, target, depth, truth, normals), before, strict=True):
        assert torch.equal(tensor, copy)


# Depth


def test_depth_by_hand() -> None:
    # Ratios 1, 2 and 1.3; the pixel with truth 0 is out. Squared errors 0, 1, 0.36: RMSE sqrt(1.36 / 3).
    prediction, target = torch.tensor([[1.0, 2.0, 2.6, 9.0]]), torch.tensor([[1.0, 1.0, 2.0, 0.0]])
    figures = DepthMeter().add(prediction, target)
    logs = [0, math.log(2), math.log(1.3)]
    assert figures["rmse_m"] == pytest.approx(math.sqrt(1.36 / 3), rel=1e-6)
    assert figures["abs_rel"] == pytest.approx((0 + 1 + 0.3) / 3, rel=1e-6)
    assert (figures["delta1"], figures["delta2"], figures["delta3"]) == pytest.approx((1 / 3, 2 / 3, 2 / 3))
    assert figures["silog"] == pytest.approx(100 * np.std(logs), rel=1e-5)


def test_errors_are_pooled_and_their_image_means_stand_beside() -> None:
    meter = DepthMeter()
    meter.add(torch.full((1, 3), 3.0), torch.ones(1, 3))  # RMSE 2 on three pixels
    meter.add(torch.ones(1, 1), torch.ones(1, 1))  # 0 on one
    meter.add(torch.ones(1, 1), torch.zeros(1, 1))  # nothing valid
    figures = meter.compute()
    assert figures["rmse_m"] == pytest.approx(math.sqrt(12 / 4))
    assert figures["rmse_m_image_mean"] == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(3))
def test_depth_agrees_with_torchmetrics(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(2, 9, 11, generator=generator) * 9 + 0.5
    target[torch.rand(target.shape, generator=generator) < 0.3] = 0
    prediction = target + torch.rand(target.shape, generator=generator) + 0.1
    meter = DepthMeter()
    for guess, truth in zip(prediction, target, strict=True):
        meter.add(guess, truth)
    valid = target > 0
    expected = mean_squared_error(prediction[valid], target[valid], squared=False)
    assert meter.compute()["rmse_m"] == pytest.approx(expected.item(), rel=1e-5)
    expected = mean_absolute_percentage_error(prediction[valid], target[valid])
    assert meter.compute()["abs_rel"] == pytest.approx(expected.item(), rel=1e-5)


def test_alignment_takes_scale_and_shift_away_over_valid_pixels_alone() -> None:
    target = torch.tensor([[1.0, 2.0, 4.0, 0.0]])
    prediction = 3 * target + 7
    prediction[0, 3] = 1000.0
    assert DepthMeter(align=True).add(prediction, target)["rmse_m"] == pytest.approx(0, abs=1e-6)
    assert DepthMeter().add(prediction, target)["rmse_m"] > 5


def test_alignment_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(2))
    design = np.stack([prediction.numpy(), np.ones(50)], axis=1)
    expected = design @ np.linalg.lstsq(design, target.numpy(), rcond=None)[0]
    np.testing.assert_allclose(aligned(prediction, target).numpy(), expected, atol=1e-12)
    constant = torch.full((4,), 2.0)
    assert aligned(constant, torch.tensor([1.0, 2, 3, 6])).tolist() == [3.0] * 4


# Normals


def test_angles_by_hand() -> None:
    truth = torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0]]).T.reshape(3, 1, 5)
    tilted = [[0, math.sin(math.radians(a)), math.cos(math.radians(a))] for a in (0, 10, 20, 90)]
    prediction = torch.tensor([*tilted, [1.0, 0, 0]]).T.reshape(3, 1, 5) * 3
    meter = NormalsMeter()
    own = meter.add(prediction, truth)
    assert own["mean_angle_deg"] == pytest.approx(30, abs=1e-4)
    assert own["median_angle_deg"] == pytest.approx(15, abs=1e-4)
    assert (own["within_11.25"], own["within_22.5"], own["within_30"]) == (0.5, 0.75, 0.75)
    assert meter.compute()["mean_angle_deg"] == pytest.approx(30, abs=1e-4)


def test_the_pooled_median_is_that_of_all_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    meter, angles = NormalsMeter(), []
    for _ in range(3):
        prediction, truth = (torch.randn(3, 15, 17, generator=generator) for _ in range(2))
        meter.add(prediction, truth)
        angles.append(angles_deg(prediction.flatten(1).double(), truth.flatten(1).double()))
    every = torch.cat(angles).numpy()
    assert len(every) % 2 == 1
    assert meter.compute()["median_angle_deg"] == pytest.approx(np.median(every), abs=0.01)
    cosine = np.cos(np.radians(every))
    assert np.abs(cosine).max() <= 1
    assert meter.compute()["within_30"] == pytest.approx((every < 30).mean())


def test_small_angles_are_exact() -> None:
    small = math.radians(0.001)
    first, second = torch.tensor([[0.0], [0], [1]]).double(), torch.tensor([[0.0], [small], [1]]).double()
    assert angles_deg(first, second).item() == pytest.approx(0.001, rel=1e-6)
    assert angles_deg(first, -first).item() == pytest.approx(180)


def test_nothing_valid_gives_no_figures() -> None:
    assert DepthMeter().compute() == NormalsMeter().compute() == {}
    assert all(math.isnan(v) for v in NormalsMeter().add(torch.ones(3, 2, 2), torch.zeros(3, 2, 2)).values())
    assert all(math.isnan(v) for v in DepthMeter().add(torch.ones(2, 2), torch.zeros(2, 2)).values())


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)  # sample deviation: sqrt((1 + 0 + 1) / 2)
    mean, spread = mean_and_spread([4.0])
    assert (mean, math.isnan(spread)) == (4.0, True)
