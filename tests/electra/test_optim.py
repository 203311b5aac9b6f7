"""The official optimizer, schedule and parameter groups."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from electra.masking import SpecialIds
from electra.objectives import ElectraPretrainer
from electra.optim import (
    OfficialAdam,
    clip_global_norm,
    layer_depth,
    learning_rate,
    official_optimizer,
    parameter_groups,
    set_learning_rate,
)
from tests.electra.test_model import TINY


def by_hand(p: Tensor, grads: list[Tensor], lr: float, decay: float) -> Tensor:
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for g in grads:
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        p = p - lr * (m / (v.sqrt() + 1e-6) + decay * p)
    return p


def test_updates_have_no_bias_correction_and_decay_apart_from_the_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, generator=generator)
    grads = [torch.randn(4, 3, generator=generator) for _ in range(5)]
    parameter = nn.Parameter(start.clone())
    optimizer = OfficialAdam([parameter], 0.01, weight_decay=0.1)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), by_hand(start, grads, 0.01, 0.1), rtol=1e-6, atol=1e-6)


def test_training_goes_on_from_a_saved_state_as_if_uninterrupted() -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(6, generator=generator) for _ in range(4)]
    whole = nn.Parameter(torch.ones(6))
    first = OfficialAdam([whole], 0.01)
    for grad in grads[:2]:
        whole.grad = grad.clone()
        first.step()
    again = nn.Parameter(whole.detach().clone())
    second = OfficialAdam([again], 0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for grad in grads[2:]:
        for parameter, optimizer in ((whole, first), (again, second)):
            parameter.grad = grad.clone()
            optimizer.step()
    assert torch.equal(whole, again)


def test_warm_up_and_decay_act_together() -> None:
    assert learning_rate(0, 1.0, 10, 100) == 0
    assert learning_rate(5, 1.0, 10, 100) == pytest.approx(0.95 * 0.5)
    assert learning_rate(50, 1.0, 10, 100, power=2.0) == pytest.approx(0.25)
    assert learning_rate(100, 1.0, 10, 100) == learning_rate(120, 1.0, 10, 100) == 0
    assert learning_rate(0, 1.0, 0, 100) == 1


def test_biases_and_layer_norms_do_not_decay() -> None:
    model = ElectraPretrainer(TINY, SpecialIds())
    by_id = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model.named_parameters(), 0.01)
    names = {group["weight_decay"]: {by_id[id(p)] for p in group["params"]} for group in groups}
    assert all("LayerNorm" in name or name.endswith("bias") for name in names[0.0])
    assert "electra.embeddings.word_embeddings.weight" in names[0.01]
    assert not any("LayerNorm" in name or name.endswith("bias") for name in names[0.01])
    assert len(names[0.0]) + len(names[0.01]) == len(by_id)


def test_a_parameter_under_two_names_is_updated_once() -> None:
    shared = nn.Parameter(torch.ones(2, 2))
    groups = parameter_groups([("a.weight", shared), ("b.weight", shared)])
    assert [len(group["params"]) for group in groups] == [1]


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("electra.embeddings.word_embeddings.weight", 0),
        ("electra/embeddings_project/kernel", 0),
        ("embeddings.LayerNorm.bias", 0),
        ("electra.relative_positions.bias", 0),
        ("electra.encoder.layer.0.attention.self.query.weight", 1),
        ("electra/encoder/layer_11/output/dense/kernel", 12),
        ("head.dense.weight", 14),
        ("task_specific/sst/dense/kernel", 14),
    ],
)
def test_depth_follows_from_the_name(name: str, depth: int) -> None:
    assert layer_depth(name, 12) == depth


def test_layer_wise_rates_reach_the_updates() -> None:
    model = nn.ModuleDict({"electra": ElectraPretrainer(TINY, SpecialIds()).electra, "head": nn.Linear(16, 2)})
    optimizer = official_optimizer(model, 1.0, 0.0, layer_decay=0.5, n_layers=2)
    set_learning_rate(optimizer, 0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert rates[id(named["head.weight"])] == pytest.approx(0.1)
    assert rates[id(named["electra.encoder.layer.1.output.dense.weight"])] == pytest.approx(0.1 * 0.5**2)
    assert rates[id(named["electra.embeddings.word_embeddings.weight"])] == pytest.approx(0.1 * 0.5**4)


def test_layer_wise_rates_need_the_depth() -> None:
    with pytest.raises(UserError, match="number of layers"):
        parameter_groups([], layer_decay=0.8)


def test_clipping_scales_all_gradients_together_and_leaves_small_ones() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert float(clip_global_norm([a, b], 1.0)) == pytest.approx(5)
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), torch.tensor([0.6, 0.0, 0.8]))
    assert float(clip_global_norm([a, b], 2.0)) == pytest.approx(1)
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), torch.tensor([0.6, 0.0, 0.8]))
