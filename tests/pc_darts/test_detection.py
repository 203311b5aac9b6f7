"""The SSDLite-style detector: boxes, matching, losses, average precision, and that it learns."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from pc_darts.config import FinalConfig
from pc_darts.detection import (
    Detector,
    Scenes,
    average_precision,
    corners,
    decode,
    default_boxes,
    detection_loss,
    encode,
    evaluate_detector,
    iou,
    match,
    suppress,
    train_detector,
)
from pc_darts.model import FinalNetwork
from tests.pc_darts.tiny_run import CELL


def detector(size: int = 32) -> Detector:
    torch.manual_seed(0)
    return Detector(FinalNetwork(CELL, FinalConfig(4, 3, classes=8)), 8, size)


def test_offsets_are_undone_and_default_boxes_cover_the_picture() -> None:
    defaults = default_boxes([4, 2, 1])
    assert defaults.shape == ((16 + 4 + 1) * 6, 4)
    boxes = torch.rand(len(defaults), 4) * 0.3
    boxes[:, 2:] += 0.4
    torch.testing.assert_close(decode(encode(boxes, defaults), defaults), boxes, atol=1e-5, rtol=1e-4)
    assert torch.equal(defaults[:6, :2].unique(dim=0), torch.tensor([[0.125, 0.125]]))


def test_overlap_of_known_boxes() -> None:
    a = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    b = torch.tensor([[0.5, 0.0, 1.5, 1.0], [2.0, 2.0, 3.0, 3.0]])
    torch.testing.assert_close(iou(a, b), torch.tensor([[1 / 3, 0.0], [0.0, 0.0]]))


def test_every_object_is_matched_even_when_no_box_fits_well() -> None:
    defaults = default_boxes([4, 2, 1])
    tiny = torch.tensor([[0.10, 0.10, 0.14, 0.14], [0.5, 0.5, 0.9, 0.9]])
    labels, offsets = match(tiny, torch.tensor([2, 5]), defaults)
    assert {3, 6} <= set(labels.tolist())
    chosen = int(torch.nonzero(labels == 3)[0])
    torch.testing.assert_close(decode(offsets, defaults)[chosen], tiny[0], atol=1e-5, rtol=1e-4)
    empty, _ = match(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), defaults)
    assert not empty.any()


def test_loss_counts_three_hard_negatives_a_positive() -> None:
    labels = torch.zeros(1, 20, dtype=torch.long)
    labels[0, 0] = 1
    logits = torch.zeros(1, 20, 3)
    offsets = torch.zeros(1, 20, 4)
    loss = detection_loss(logits, offsets, labels, offsets)
    torch.testing.assert_close(loss, torch.tensor(3.0).log() * 4)


def test_suppression_keeps_the_best_of_overlapping_boxes() -> None:
    boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0.9], [2, 2, 3, 3.0]])
    assert suppress(boxes, torch.tensor([0.5, 0.9, 0.1])).tolist() == [1, 2]


def test_average_precision_of_perfect_wrong_and_half_right_detections() -> None:
    box = torch.tensor([[0.1, 0.1, 0.5, 0.5]])
    other = torch.tensor([[0.6, 0.6, 0.9, 0.9]])
    truth = [(box, torch.tensor([0])), (other, torch.tensor([0]))]
    right = [(box, torch.tensor([0.9]), torch.tensor([0])), (other, torch.tensor([0.8]), torch.tensor([0]))]
    assert average_precision(right, truth, 8) == pytest.approx(1.0)
    wrong = [(other, torch.tensor([0.9]), torch.tensor([0])), (box, torch.tensor([0.8]), torch.tensor([0]))]
    assert average_precision(wrong, truth, 8) == 0
    assert average_precision([right[0], wrong[1]], truth, 8) == pytest.approx(0.5)
    twice = torch.cat([box, box])
    double = (twice, torch.tensor([0.9, 0.8]), torch.tensor([0, 0]))
    assert average_precision([double], truth[:1], 8) == pytest.approx(1.0)


def test_heads_answer_for_every_default_box_and_drop_the_auxiliary_head() -> None:
    net = detector()
    logits, offsets = net(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, len(net.defaults_A4), 9) and offsets.shape == (2, len(net.defaults_A4), 4)
    torch.testing.assert_close(corners(net.defaults_A4).mean(1), net.defaults_A4[:, :2].mean(1))
    assert net.sides == [16, 8, 4] and net.backbone.auxiliary_head is None
    with pytest.raises(UserError, match="at least one reduction cell"):
        Detector._levels([32, 32])


def test_detector_learns_on_a_few_scenes() -> None:
    scenes = Scenes.draw("train", 16, 32)
    net = detector()
    losses = train_detector(net, scenes, 12, 8, 0)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    found = evaluate_detector(net, scenes)
    assert set(found) == {"ap", "ap50", "ap75"} and 0 <= found["ap"] <= found["ap50"] <= 1
