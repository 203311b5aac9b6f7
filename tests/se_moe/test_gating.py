"""Facts about the gates that the recordings of other libraries do not pin."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from se_moe.config import GateConfig
from se_moe.gating import (
    Routing,
    _ascending_bits,
    balance_loss,
    expert_capacity,
    gshard_routing,
    switch_routing,
    topk_routing,
    tutel_routing,
)
from se_moe.moe import TopKGate


def _logits(tokens: int = 40, experts: int = 5, skew: float = 1.5, seed: int = 0) -> Tensor:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    logits[:, 0] += skew
    return logits


def _assert_order_is_the_permutation(routing: Routing) -> None:
    kept = torch.nonzero(routing.keep_KT.reshape(-1))[:, 0]
    assert torch.equal(routing.order.sort().values, kept)
    experts = routing.expert_KT.reshape(-1)[routing.order]
    assert torch.equal(experts, experts.sort().values)
    assert torch.equal(torch.bincount(experts, minlength=routing.sizes_E.numel()), routing.sizes_E)


@pytest.mark.parametrize("drop", [True, False])
def test_the_order_of_every_gate_lists_kept_routes_by_expert(drop: bool) -> None:
    logits = _logits()
    rts = torch.rand_like(logits)
    for routing in (
        switch_routing(logits, 1.0, 4, drop),
        switch_routing(logits, 1.0, 4, drop, rts_TE=rts),
        gshard_routing(logits, 0.7, 4, drop),
        topk_routing(logits, 3, 0.7, 4, drop, "probs"),
        topk_routing(logits, 3, 0.7, 4, drop, "position"),
        tutel_routing(torch.softmax(logits, 1), 2, 0.6 if drop else 0.0, batch_prioritized=True),
    ):
        _assert_order_is_the_permutation(routing)
        assert bool(routing.keep_KT.all()) == (not drop)


def test_capacity_holds_without_random_token_selection() -> None:
    routing = switch_routing(_logits(), capacity_factor=1.0, min_capacity=2)
    assert routing.capacity == 8
    assert int(routing.requested_E.max()) > 8 and int(routing.sizes_E.max()) == 8


def test_first_come_first_served_keeps_the_first_tokens_of_an_expert() -> None:
    routing = switch_routing(_logits(), capacity_factor=1.0, min_capacity=2)
    for expert in range(5):
        wanting = torch.nonzero(routing.expert_KT[0] == expert)[:, 0]
        assert torch.equal(torch.nonzero(routing.keep_KT[0] & (routing.expert_KT[0] == expert))[:, 0], wanting[:8])


def test_random_token_selection_keeps_the_largest_numbers() -> None:
    logits = _logits()
    rts = torch.rand(logits.shape, generator=torch.Generator().manual_seed(3))
    routing = switch_routing(logits, 1.0, 2, rts_TE=rts)
    wanting = routing.expert_KT[0] == 0
    kept, dropped = rts[wanting & routing.keep_KT[0], 0], rts[wanting & ~routing.keep_KT[0], 0]
    assert dropped.numel() > 0 and kept.min() > dropped.max()


def test_probability_policy_keeps_the_likeliest_tokens() -> None:
    logits = _logits()
    routing = topk_routing(logits, 2, 0.6, 2, drop_policy="probs")
    probs = torch.softmax(logits, 1)[:, 0]
    wanting = (routing.expert_KT == 0).any(0)
    kept = ((routing.expert_KT == 0) & routing.keep_KT).any(0)
    assert probs[kept].min() > probs[wanting & ~kept].max()


def test_first_choices_are_served_before_second_ones() -> None:
    routing = gshard_routing(_logits(skew=0.5), 0.4, 2)
    for expert in range(5):
        first = (routing.expert_KT[0] == expert).sum()
        seconds_kept = ((routing.expert_KT[1] == expert) & routing.keep_KT[1]).sum()
        assert int(seconds_kept) == max(0, int(routing.sizes_E[expert]) - int(first))


def test_top2_weights_of_survivors_sum_to_one() -> None:
    routing = gshard_routing(_logits(), 0.6, 2)
    survivors = routing.keep_KT.sum(0)
    total = (routing.weight_KT * routing.keep_KT).sum(0)
    assert {0, 1, 2} == set(survivors.tolist())
    assert torch.allclose(total, (survivors > 0).float())


def test_unused_tokens_are_routed_nowhere_and_count_for_nobody() -> None:
    logits = _logits(20, 4)
    used = torch.tensor([1, 0] * 10)
    for routing in (
        switch_routing(logits, drop_tokens=False, used_token_T=used),
        gshard_routing(logits, drop_tokens=False, used_token_T=used),
        topk_routing(logits, 3, drop_tokens=False, used_token_T=used),
    ):
        choices = routing.expert_KT.shape[0]
        assert torch.equal(routing.keep_KT, used.bool().expand(choices, -1))
        assert int(routing.requested_E.sum()) == 10 * choices
        _assert_order_is_the_permutation(routing)


def test_balance_loss_is_one_for_balance_and_larger_for_a_collapsed_gate() -> None:
    probs = torch.full((12, 4), 0.25)
    even = torch.arange(12)[None] % 4
    assert float(balance_loss(probs, even)) == pytest.approx(1.0)
    collapsed = torch.eye(4)[torch.zeros(12, dtype=torch.int64)]
    assert float(balance_loss(collapsed, torch.zeros(1, 12, dtype=torch.int64))) == pytest.approx(4.0)


def test_balance_loss_with_weights_ignores_padding() -> None:
    logits = _logits(10, 4)
    probs, expert = torch.softmax(logits, 1), logits.argmax(1)[None]
    weight = torch.tensor([1.0] * 6 + [0.0] * 4)
    assert float(balance_loss(probs, expert, weight)) == pytest.approx(float(balance_loss(probs[:6], expert[:, :6])))


def test_batch_priority_serves_the_surest_tokens_first() -> None:
    gate = TopKGate(6, 4, GateConfig(1, 0.5, drop_tokens=True, batch_prioritized=True))
    x = torch.randn(40, 6)
    routing = gate(x)
    score = torch.softmax(gate.wg(x), 1).max(1).values
    for expert in range(4):
        wanting = routing.expert_KT[0] == expert
        kept, dropped = score[wanting & routing.keep_KT[0]], score[wanting & ~routing.keep_KT[0]]
        assert dropped.numel() == 0 or kept.min() > dropped.max()
    assert not routing.keep_KT.all()
    with pytest.raises(UserError, match="used_token"):
        gate(x, torch.ones(40))


def test_capacity_rounds_up_and_has_a_minimum() -> None:
    assert expert_capacity(10, 4, 1.0, 1) == 3
    assert expert_capacity(10, 4, 1.0, 7) == 7
    assert expert_capacity(24, 8, 3 * 0.6, 2) == 6


def test_integer_keys_keep_the_order_of_floats() -> None:
    values = torch.tensor([-math.inf, -2.5, -1e-30, 0.0, 1e-30, 0.5, 0.5000001, 3.0, math.inf])
    keys = _ascending_bits(values)
    assert torch.equal(keys, keys.sort().values) and keys.unique().numel() == values.numel()


def test_jitter_multiplies_the_gates_input() -> None:
    gate = TopKGate(6, 4, GateConfig(1, noise="jitter", drop_tokens=False))
    x = torch.randn(5, 6)
    seen: list[Tensor] = []
    gate.route = lambda logits, used=None: seen.append(logits)  # type: ignore[method-assign,assignment,return-value,func-returns-value]
    gate(torch.zeros(5, 6))
    assert torch.equal(seen[0], torch.zeros(5, 4)), "noise was added"
    gate(x)
    difference = (seen[1] - x @ gate.wg.weight.T).abs()
    assert 0 < difference.max() <= 0.01 * (x.abs() @ gate.wg.weight.abs().T).max() + 1e-6
    gate.eval()
    gate(x)
    assert torch.allclose(seen[2], x @ gate.wg.weight.T)


@pytest.mark.parametrize("config", [GateConfig(1, drop_tokens=True), GateConfig(2, second_sampling=True)])
def test_random_numbers_are_drawn_in_training_only(config: GateConfig) -> None:
    gate = TopKGate(6, 4, config)
    x = torch.randn(64, 6)
    state = torch.get_rng_state()
    gate(x)
    assert not torch.equal(state, torch.get_rng_state())
    gate.eval()
    state = torch.get_rng_state()
    gate(x)
    assert torch.equal(state, torch.get_rng_state())


def test_evaluation_has_a_capacity_of_its_own() -> None:
    gate = TopKGate(6, 4, GateConfig(2, 0.5, 2.0, min_capacity=1, drop_tokens=True))
    x = torch.randn(32, 6)
    assert gate(x).capacity == 8
    gate.eval()
    assert gate(x).capacity == 32


def test_the_gate_stays_in_float32_under_autocast() -> None:
    gate = TopKGate(6, 4, GateConfig(2))
    x = torch.randn(32, 6)
    with torch.autocast("cpu", torch.bfloat16):
        routing = gate(x)
    assert torch.equal(routing.weight_KT, gate(x).weight_KT)


def test_wrong_options_are_named() -> None:
    with pytest.raises(UserError, match="top_k is 5"):
        TopKGate(4, 4, GateConfig(5))
    with pytest.raises(UserError, match="drop_policy"):
        topk_routing(_logits(), 2, drop_policy="random")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"\[tokens, experts\]"):
        switch_routing(torch.zeros(3))
