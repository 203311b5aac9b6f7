"""Average precision, mean IoU and right keypoints against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from common.errors import UserError
from eeea_net import scores
from eeea_net.scores import Found, box_precision, confusion, keypoint_precision, mean_iou, right_points

needs_library = pytest.mark.skipif(not scores.installed(), reason="faster-coco-eval is not installed (optional)")
BOX = torch.tensor([[10.0, 10.0, 30.0, 30.0]])


def found(boxes: torch.Tensor, labels: list[int], chances: list[float] | None = None) -> Found:
    return Found(boxes, torch.tensor(labels), None if chances is None else torch.tensor(chances))


@needs_library
def test_one_box_of_iou_two_thirds_counts_up_to_its_overlap() -> None:
    moved = BOX + torch.tensor([0.0, 4.0, 0.0, 4.0])  # overlap 16 x 20 of a union of 24 x 20: 0.667
    measured = box_precision([found(moved, [0], [0.9])], [found(BOX, [0])], ["a"])
    assert measured == pytest.approx({"ap": 0.4, "ap50": 1.0, "ap75": 0.0, "ar": 0.4})  # 0.50, 0.55, 0.60, 0.65 of ten


@needs_library
def test_a_surer_false_box_halves_the_precision_and_a_missed_class_counts_as_nothing() -> None:
    far = BOX + 50
    both = torch.cat([far, BOX])
    measured = box_precision([found(both, [0, 0], [0.9, 0.8])], [found(BOX, [0])], ["a"])
    assert measured["ap50"] == pytest.approx(0.5) and measured["ar"] == 1.0
    truth = found(torch.cat([BOX, far]), [0, 1])
    measured = box_precision([found(BOX, [0], [0.9])], [truth], ["a", "b"])
    assert measured["ap"] == pytest.approx(0.5)  # of the two classes one is found
    assert box_precision([found(BOX, [1], [0.9])], [found(BOX, [0])], ["a", "b"])["ap"] == 0.0


@needs_library
def test_no_box_at_all_is_no_precision() -> None:
    nothing = Found(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    assert box_precision([nothing], [found(BOX, [0])], ["a"]) == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0, "ar": 0.0}


@needs_library
def test_keypoint_similarity_is_that_of_coco() -> None:
    truth = torch.tensor([[[8.0, 8.0, 1.0], [24.0, 24.0, 1.0], [0.0, 0.0, 0.0]]])
    extent = torch.tensor([[20.0, 20.0]])
    exact = keypoint_precision(truth[..., :2], torch.ones(1), truth, extent)
    assert exact == pytest.approx({"ap": 1.0, "ap50": 1.0, "ap75": 1.0, "ar": 1.0})
    # One of two points is d pixels off: the similarity is (1 + exp(-d^2 / (2 area (2 sigma)^2))) / 2; here 0.72, which
    # passes 0.50 to 0.70, five of ten thresholds. The third point is not there and does not count.
    distance = math.sqrt(-2 * 400 * (2 * scores.OKS_SIGMA) ** 2 * math.log(2 * 0.72 - 1))
    off = truth[..., :2] + torch.tensor([[distance, 0.0], [0.0, 0.0], [99.0, 99.0]])
    measured = keypoint_precision(off, torch.ones(1), truth, extent)
    assert measured == pytest.approx({"ap": 0.5, "ap50": 1.0, "ap75": 0.0, "ar": 0.5})


def test_points_within_a_tenth_of_the_box_are_right() -> None:
    truth = torch.tensor([[[8.0, 8.0, 1.0], [24.0, 24.0, 1.0], [0.0, 0.0, 0.0]]])
    guess = truth[..., :2] + torch.tensor([[0.0, 2.0], [2.1, 0.0], [0.0, 0.0]])
    assert right_points(guess, truth, torch.tensor([[20.0, 10.0]])) == 0.5


def test_mean_iou_is_over_the_classes_that_there_are() -> None:
    truth = torch.tensor([[0, 0, 1, 1]])
    counted = confusion(torch.tensor([[0, 1, 1, 1]]), truth, 3)
    assert counted.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert mean_iou(counted) == (pytest.approx((1 / 2 + 2 / 3) / 2), [0.5, pytest.approx(2 / 3), None])


def test_a_missing_library_is_a_sentence_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "installed", lambda: False)
    with pytest.raises(UserError, match="make setup EXTRAS=dev,transfer"):
        scores.check_installed()
