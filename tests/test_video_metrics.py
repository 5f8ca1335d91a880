"""J and F of video object segmentation on small masks, worked by hand; masks that are handed on from frame to frame."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from brixel_cli.core.propagation import hard_mask, propagate, soft_mask
from brixel_cli.core.video_metrics import contour, contour_accuracy, dilated, object_figures, region_similarity


def mask(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """Boxes (top, left, height, width) of a size."""
    found = np.zeros(size, bool)
    for top, left, height, width in boxes:
        found[top : top + height, left : left + width] = True
    return found


# Region similarity


def test_j_is_intersection_over_union() -> None:
    # 2x2 and 2x3 pixels with the same corner: 4 in both, 6 in any.
    assert region_similarity(mask((8, 8), (1, 1, 2, 2)), mask((8, 8), (1, 1, 2, 3))) == 4 / 6
    assert region_similarity(mask((8, 8), (0, 0, 2, 2)), mask((8, 8), (4, 4, 2, 2))) == 0


def test_two_empty_masks_are_alike() -> None:
    empty, some = mask((8, 8)), mask((8, 8), (1, 1, 2, 2))
    assert (region_similarity(empty, empty), contour_accuracy(empty, empty)) == (1, 1)
    assert (region_similarity(some, empty), contour_accuracy(some, empty)) == (0, 0)
    assert (region_similarity(empty, some), contour_accuracy(empty, some)) == (0, 0)


# Contour accuracy


def test_the_contour_of_one_pixel_is_four() -> None:
    # The pixel (2, 2) differs from its lower right neighbour; (2, 1) from its right one, (1, 2) from its lower one,
    # and (1, 1) from its lower right one.
    assert {(int(y), int(x)) for y, x in np.argwhere(contour(mask((5, 5), (2, 2, 1, 1))))} == {
        (1, 1), (1, 2), (2, 1), (2, 2),
    }  # fmt: skip


def test_the_border_of_the_image_is_no_contour() -> None:
    assert not contour(np.ones((5, 5), bool)).any()
    # A lower half: its upper edge alone, seen from the row above.
    assert np.argwhere(contour(mask((4, 3), (2, 0, 2, 3)))).tolist() == [[1, 0], [1, 1], [1, 2]]


def test_a_disc_is_round() -> None:
    # As many whole numbers x, y have x^2 + y^2 <= 8^2: Gauss's circle problem, N(8) = 197.
    found = dilated(mask((40, 40), (20, 20, 1, 1)), 8)
    assert found.sum() == 197
    assert found[12, 20]
    assert not found[13, 14]  # 7^2 + 6^2 = 85
    assert dilated(mask((40, 40), (0, 39, 1, 1)), 1).sum() == 3  # cut off at the corner
    assert not dilated(mask((4, 4)), 2).any()


def test_f_is_worked_out_by_hand() -> None:
    # 10x10 pixels: the tolerance is 0.008 * 14.1 = 0.11, rounded up to 1 pixel. Contours of one pixel are 2x2.
    truth = mask((10, 10), (2, 2, 1, 1))  # columns 1 and 2
    # Columns 3 and 4: column 3 is 1 from column 2, column 4 is 2 away. Half of both contours is matched.
    assert contour_accuracy(mask((10, 10), (2, 4, 1, 1)), truth) == 0.5
    # Columns 4 and 5: none.
    assert contour_accuracy(mask((10, 10), (2, 5, 1, 1)), truth) == 0
    # A second pixel far away: 4 of 8 pixels of the guess are right, all of the truth are found; 2 * 0.5 * 1 / 1.5.
    both = mask((10, 10), (2, 2, 1, 1), (8, 8, 1, 1))
    assert contour_accuracy(both, truth) == pytest.approx(2 / 3)
    assert contour_accuracy(truth, both) == pytest.approx(2 / 3)


def test_the_tolerance_is_that_of_davis() -> None:
    # 854x480 pixels: 0.008 * sqrt(854^2 + 480^2) = 7.84, rounded up to 8.
    truth = mask((480, 854), (100, 100, 200, 300))
    assert contour_accuracy(mask((480, 854), (108, 100, 200, 300)), truth) == 1
    # At 9 pixels, upper and lower edge are lost but for their ends: 300 of about 500 pixels of half the contour.
    assert contour_accuracy(mask((480, 854), (109, 100, 200, 300)), truth) < 0.5


# Figures of an object


def test_mean_recall_and_decay() -> None:
    regions = [1, 1, 0.9, 0.8, 0.4, 0.4, 0.3, 0.2]
    figures = object_figures(regions, [0.5] * 8)
    assert figures["j_mean"] == pytest.approx(5.0 / 8)
    assert figures["j_recall"] == 4 / 8
    # Four parts of the numbers 1 to 8 end at 1, 2.75, 4.5, 6.25, 8, which are rounded to 1, 3, 5, 6, 8: the first is
    # 1, 1, 0.9 with the mean 0.9667, the last 0.4, 0.3, 0.2 with the mean 0.3.
    assert figures["j_decay"] == pytest.approx(2.9 / 3 - 0.3)
    assert (figures["f_mean"], figures["f_recall"], figures["f_decay"]) == (0.5, 0, 0)
    assert figures["jf_mean"] == pytest.approx((0.625 + 0.5) / 2)


def test_a_sequence_of_one_measured_frame_does_not_decay() -> None:
    assert object_figures([0.7], [0.9])["j_decay"] == 0


# Propagation

E1, E2 = [1.0, 0.0], [0.0, 1.0]


def row(*cells: list[float]) -> torch.Tensor:
    """A map (2, 1, w)."""
    return torch.tensor(cells).T[:, None]


def labels(*objects: float) -> torch.Tensor:
    """Soft labels (2, 1, w) of the background and an object."""
    shares = torch.tensor(objects)
    return torch.stack([1 - shares, shares])[:, None]


def test_a_cell_takes_the_label_of_the_most_similar_one_within_the_radius() -> None:
    memory, masks = [row(E1, E1, E2)], [labels(0, 0, 1)]
    # Cell 0 cannot see cell 2, which alone is like it.
    near = propagate(row(E2, E2, E2), memory, masks, radius=1, top=1, temperature=0.1)
    assert near[1, 0].tolist() == [0, 1, 1]
    far = propagate(row(E2, E2, E2), memory, masks, radius=2, top=1, temperature=0.1)
    assert far[1, 0].tolist() == [1, 1, 1]
    assert torch.equal(far.sum(dim=0), torch.ones(1, 3))


def test_the_top_cells_of_all_frames_are_weighed_by_a_softmax() -> None:
    memory, masks = [row(E2), row(E1), row(E1)], [labels(1), labels(0), labels(0.5)]
    # Similarities 1, 0, 0. The two largest at a temperature of 0.5: weights e^2 and e^0.
    found = propagate(row(E2), memory, masks, radius=3, top=2, temperature=0.5)[1, 0, 0]
    weight = math.exp(2) / (math.exp(2) + 1)
    assert min(abs(float(found) - weight), abs(float(found) - weight - 0.5 * (1 - weight))) < 1e-6  # a tie of two
    every = propagate(row(E2), memory, masks, radius=3, top=9, temperature=0.5)[1, 0, 0]
    assert float(every) == pytest.approx((math.exp(2) + 0.5) / (math.exp(2) + 2))


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    features = [torch.nn.functional.normalize(torch.randn(8, 7, 9), dim=0) for _ in range(3)]
    masks = [torch.rand(3, 7, 9) for _ in range(2)]
    whole = propagate(features[0], features[1:], masks, radius=2, top=4, temperature=0.1)
    monkeypatch.setattr("brixel_cli.core.propagation.BLOCK_VALUES", 1)  # a row at a time
    assert torch.allclose(propagate(features[0], features[1:], masks, radius=2, top=4, temperature=0.1), whole)
    # The same, cell by cell.
    for y, x in ((0, 0), (3, 4), (6, 8)):
        seen = [
            (frame, v, u) for frame in range(2) for v in range(7) for u in range(9) if max(abs(v - y), abs(u - x)) <= 2
        ]
        likeness = torch.tensor([float(features[0][:, y, x] @ features[1 + f][:, v, u]) for f, v, u in seen])
        best = likeness.topk(4)
        weights = torch.softmax(best.values / 0.1, dim=0)
        expected = sum(
            w * masks[seen[i][0]][:, seen[i][1], seen[i][2]] for w, i in zip(weights, best.indices, strict=True)
        )
        assert torch.allclose(whole[:, y, x], expected, atol=1e-5)


def test_a_soft_mask_has_shares_and_void_is_background() -> None:
    found = soft_mask(np.array([[1, 0], [0, 255]], np.uint8), 1, (1, 1))
    assert found.flatten().tolist() == [0.75, 0.25]


def test_a_faint_object_is_not_lost() -> None:
    # The background is 1 and 0.8, which is brought to 1 and 0; the object 0 and 0.2, brought to 0 and 1.
    soft = torch.tensor([[[1.0, 0.8]], [[0.0, 0.2]]])
    assert hard_mask(soft, (1, 2)).tolist() == [[0, 1]]
    # An object that is gone stays away.
    assert hard_mask(torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]]), (1, 2)).tolist() == [[0, 0]]
