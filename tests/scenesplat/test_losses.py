"""Losses and the zero-shot protocol."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from scenesplat import losses, protocol
from scenesplat.config import LossConfig
from scenesplat.model import PointTransformer
from scenesplat.self_supervision import Head, distillation_loss, follow, per_cloud
from tests.scenesplat.golden_cases import tiny_network


def test_of_unit_vectors_the_l2_loss_is_twice_the_cosine_loss() -> None:
    a, b = F.normalize(torch.randn(2, 50, 8), dim=2)
    torch.testing.assert_close(losses.l2_loss(a, b), 2 * losses.cosine_loss(a, b))


def test_a_class_below_the_least_number_takes_no_part_in_the_contrastive_loss() -> None:
    segment = torch.tensor([0] * 99 + [1] * 100 + [-1] * 200)
    classes, halves = losses.halves_of(segment, torch.arange)
    assert classes == [1] and [len(half) for half in halves[0]] == [50, 50]


def test_the_contrastive_loss_is_smallest_where_classes_are_apart() -> None:
    segment = torch.tensor([0, 1]).repeat_interleave(100)
    _, halves = losses.halves_of(segment, torch.arange)
    apart = F.one_hot(segment, 4).float()
    assert losses.contrastive_loss(apart, halves) < 0.01
    mixed = F.normalize(torch.ones(200, 4), dim=1)
    assert losses.contrastive_loss(mixed, halves) == pytest.approx(0.6931, abs=1e-3)


def test_a_batch_without_a_target_has_no_loss_and_no_gradient() -> None:
    empty = torch.zeros(0, 8, requires_grad=True)
    found = losses.language_losses(empty, empty, torch.zeros(0, dtype=torch.long), LossConfig(), 1.0, torch.arange)
    assert float(found["loss"].detach()) == 0.0


def test_of_nothing_each_loss_is_zero() -> None:
    none = torch.zeros(0, 8)
    for reduction in ("mean", "sum"):
        assert losses.cosine_loss(none, none, reduction) == losses.l2_loss(none, none, reduction) == 0
    assert losses.lovasz_loss(none, torch.zeros(0, dtype=torch.long)) == 0
    assert losses.contrastive_loss(none, []) == 0


def test_a_schedule_is_any_share_of_the_training() -> None:
    assert losses.is_active("last_12.5", 0.88) and not losses.is_active("last_12.5", 0.875)
    assert not losses.is_active("last_0", 1.0) and losses.is_active("last_100", 0.01)


def test_lovasz_of_a_perfect_answer_is_nothing_and_of_a_wrong_one_all() -> None:
    segment = torch.tensor([0, 1, 2, 2])
    assert losses.lovasz_loss(F.one_hot(segment, 3).float(), segment) == 0
    assert losses.lovasz_loss(F.one_hot((segment + 1) % 3, 3).float(), segment) == 1


def test_votes_go_to_the_lowest_class_in_a_tie_and_points_without_a_vote_have_none() -> None:
    places = torch.tensor([[0.0, 0, 0], [0, 0, 1], [9, 0, 0], [9, 0, 1]])
    labels = torch.tensor([3, 1, -1, 2])
    asked = torch.tensor([[0.0, 0, 0.4], [9, 0, 0.4]])
    assert protocol.neighbour_vote(labels, places, asked, 4, k=2).tolist() == [1, 2]
    valid = torch.tensor([True, False, True, False])
    assert protocol.neighbour_vote(labels, places, asked, 4, k=1, valid_N=valid).tolist() == [3, -1]
    nobody = torch.zeros(4, dtype=torch.bool)
    assert protocol.neighbour_vote(labels, places, asked, 4, valid_N=nobody).tolist() == [-1, -1]
    assert protocol.neighbour_vote(labels, places, places, 4, valid_N=nobody).tolist() == labels.tolist()


def test_any_number_may_stand_for_no_class() -> None:
    places, asked = torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 0, 2]]), torch.tensor([[0.0, 0, 0.4], [0, 0, 9]])
    labels = torch.tensor([1, 255, 255])
    assert protocol.neighbour_vote(labels, places, asked, 3, k=2, ignored=255).tolist() == [1, 255]
    voted = protocol.instance_vote(torch.tensor([1, 255, 255, 2]), torch.tensor([0, 0, 0, 255]), ignored=255)
    assert voted.tolist() == [255, 255, 255, 2]
    counts = protocol.Counts.of(torch.tensor([0, 255, 1]), torch.tensor([0, 0, 255]), 2, ignored=255)
    assert counts.target_K.tolist() == [2, 0] and counts.union_K.tolist() == [2, 0]
    alone = torch.full((3,), -1)
    assert protocol.instance_vote(labels, alone).tolist() == labels.tolist()


def test_an_instance_takes_its_majority() -> None:
    labels, instance = torch.tensor([2, 2, 5, 5, 4, 1]), torch.tensor([0, 0, 0, 1, 1, -1])
    assert protocol.instance_vote(labels, instance).tolist() == [2, 2, 2, 4, 4, 1]


def test_the_two_sets_of_metrics_differ_where_an_absent_class_is_predicted() -> None:
    counts = protocol.Counts.of(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1]), 3)
    assert counts.metrics()["miou"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert counts.metrics(present_only=True)["miou"] == pytest.approx((1 + 0.5) / 2)
    assert counts.metrics(excluded=[0])["f_miou"] == pytest.approx(0.25)
    twice = counts + counts
    assert twice.metrics() == counts.metrics() and int(twice.target_K.sum()) == 8


def test_the_released_threshold_on_a_sigmoid_of_a_cosine_never_triggers() -> None:
    features = F.normalize(torch.randn(200, 8), dim=1)
    texts = F.normalize(torch.randn(5, 8), dim=1)
    assert torch.equal(protocol.classify(features, texts, 0.1), (features @ texts.t()).argmax(1))


def test_the_teacher_follows_all_but_its_own_mask_token_and_batch_statistics() -> None:
    options = tiny_network(mask_token=True)
    student, teacher = PointTransformer(options), PointTransformer(options)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        for value in student.state_dict().values():
            value.add_(1)
    follow(teacher, student, 0.75)
    weight, token = "enc.enc0.block0.attn.qkv.weight", "mask_token"
    mine, theirs = student.state_dict(), teacher.state_dict()
    torch.testing.assert_close(theirs[weight], 0.75 * before[weight] + 0.25 * mine[weight])
    for name in (token, "embedding.stem.norm.running_mean"):
        assert torch.equal(theirs[name], before[name])


@pytest.mark.parametrize(("layers", "norm", "bias", "length"), [(1, False, True, True), (2, True, False, False)])
def test_a_head_is_its_layers_one_after_the_other(layers: int, norm: bool, bias: bool, length: bool) -> None:
    head, x = Head(5, 7, 3, layers, norm, bias, length).eval(), torch.randn(4, 5)
    names = ["mlp.weight", "mlp.bias"] if layers == 1 else ["mlp.0.weight", "mlp.3.weight"]
    assert [name for name in head.state_dict() if not name.startswith("mlp.1.")] == names
    weights = head.state_dict()
    if layers == 1:
        y = x @ weights["mlp.weight"].t() + weights["mlp.bias"]
        wanted = y / y.norm(dim=1, keepdim=True)
    else:  # batch normalisation that has seen nothing divides by (1 + epsilon)^0.5
        wanted = F.gelu(x @ weights["mlp.0.weight"].t() / 1.001**0.5) @ weights["mlp.3.weight"].t()
    torch.testing.assert_close(head(x), wanted, rtol=1e-5, atol=1e-6)


def test_one_crop_is_compared_with_the_other_view_alone() -> None:
    teacher, student = F.normalize(torch.randn(2, 4, 6), dim=2), F.normalize(torch.randn(1, 4, 6), dim=2)
    found = distillation_loss(student, teacher, together=False)
    torch.testing.assert_close(found["comp"], (teacher[1] * student[0]).sum(1).mean())


def test_a_cloud_without_a_masked_voxel_is_no_division_by_nothing() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    assert float(per_cloud(torch.tensor([[2.0, 5.0], [7.0, 9.0]]), mask)) == 1.0
