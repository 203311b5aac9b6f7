"""Recorded gates: DeepSpeed, Tutel, fastmoe, Paddle and the HF router losses."""

from __future__ import annotations

import torch
from torch import Tensor

from common.kernels.moe_dispatch import combine_rows, permute_rows
from se_moe.gating import (
    Routing,
    balance_loss,
    gshard_routing,
    load_importance_loss,
    selected_softmax,
    switch_routing,
    topk_routing,
    tutel_routing,
    z_loss,
)
from tests.golden_case import Case, Check, assert_close


def _padded(routing: Routing, slot_KT: Tensor, shape: torch.Size) -> Tensor:
    """Combine weights [T, E, capacity] of a routing, as DeepSpeed lays them out."""
    padded = torch.zeros(shape)
    for expert_T, keep_T, slot_T, weight_T in zip(routing.expert_KT, routing.keep_KT, slot_KT, routing.weight_KT):
        token_T = torch.nonzero(keep_T)[:, 0]
        places = (token_T, expert_T[token_T], slot_T[token_T])
        padded = padded.index_put(places, weight_T[token_T], accumulate=True)
    return padded


def _deepspeed_routing(case: Case, logits: Tensor, rts: Tensor | None) -> Routing:
    config, given = case.config, case.group("in")
    limits = (config["capacity_factor"], config["min_capacity"], config.get("drop_tokens", True))
    noise, used = given.get("gumbel_noise"), given.get("used_token")
    if "top1gating" in case.source:
        return switch_routing(logits, *limits, used, rts, noise)
    if "top2gating" in case.source:
        return gshard_routing(logits, *limits, used, noise)
    return topk_routing(logits, config["k"], *limits, config.get("drop_policy", "probs"), used)


def check_deepspeed_gate(case: Case) -> None:
    given, out = case.group("in"), case.group("out")
    rts = given.get("uniform_rts")
    first_served = "top1gating" in case.source and rts is None and case.config.get("drop_tokens", True)
    if first_served:
        _check_counts_only(case)
        # Which tokens survived is an accident of torch.topk over equal numbers: repeat the recorded decision.
        rts = (out["routes_index"][0] >= 0).float()[:, None].expand(given["logits"].shape)
    logits = given["logits"].clone().requires_grad_()
    routing = _deepspeed_routing(case, logits, rts)
    chosen = "topkgating" in case.source or rts is not None
    slot_KT = routing.slots(in_token_order=chosen)
    combine = _padded(routing, slot_KT, out["combine_weights"].shape)
    assert_close(combine, out["combine_weights"], "combine weights")
    assert_close((combine != 0).float(), out["dispatch_mask"], "dispatch mask")
    assert_close(routing.requested_E.float(), out["exp_counts"], "counts before dropping")
    assert_close(routing.aux_loss.reshape(1), out["l_aux"], "l_aux")
    if routing.capacity is not None:
        assert routing.capacity == int(out["capacity"])
    else:
        assert int(routing.requested_E.max()) == int(out["capacity"])
    if "topkgating" not in case.source:  # that one ranks the choices of a token in its own way
        kept_KT = routing.keep_KT
        assert_close(torch.where(kept_KT, routing.expert_KT, -1).float(), out["routes_index"], "experts")
        assert_close(torch.where(kept_KT, slot_KT, 0).float(), out["routes_location"], "slots")
        assert_close(routing.weight_KT * kept_KT, out["routes_gate"], "gates")
    loss = 3 * routing.aux_loss + (combine * given["upstream_combine"]).sum()
    assert_close(torch.autograd.grad(loss, logits)[0], out["grad_logits"], "gradient of the logits")


def _check_counts_only(case: Case) -> None:
    """First come, first served: everything that does not depend on DeepSpeed's tie order."""
    out = case.group("out")
    routing = _deepspeed_routing(case, case.group("in")["logits"], None)
    experts = out["exp_counts"].numel()
    recorded_T = out["routes_index"][0].long()
    kept = torch.bincount(recorded_T[recorded_T >= 0], minlength=experts)
    assert torch.equal(routing.sizes_E, kept), "kept tokens per expert"
    assert_close(routing.requested_E.float(), out["exp_counts"], "counts before dropping")
    assert_close(routing.aux_loss.reshape(1), out["l_aux"], "l_aux")
    both_T = (recorded_T >= 0) & routing.keep_KT[0]
    assert torch.equal(routing.expert_KT[0][both_T], recorded_T[both_T]), "experts"
    assert_close(routing.weight_KT[0][both_T], out["routes_gate"][0][both_T], "gates of kept tokens")
    order = routing.order
    assert all(torch.all(run.diff() > 0) for run in torch.split(order, routing.sizes_E.tolist())), "not first come"


def check_tutel(case: Case) -> None:
    config, given, out = case.config, case.group("in"), case.group("out")
    choices = config["top_k"]
    logits = given["logits"].clone().requires_grad_()
    scores = torch.softmax(logits, dim=1)
    routing = tutel_routing(
        scores,
        choices,
        config["capacity_factor"],
        config["batch_prioritized_routing"],
        config["normalize_gate"],
        config["alignment"],
    )
    assert routing.capacity == int(out["capacity"])
    assert_close(routing.expert_KT.float(), out["indices"], "experts")
    assert_close(routing.weight_KT, out["gates"], "gates")
    assert torch.equal(routing.keep_KT, out["locations"] < out["capacity"]), "dropped routes"
    slot_KT = routing.slots()
    assert_close(slot_KT * routing.keep_KT, out["locations"] * routing.keep_KT, "locations")
    assert_close(routing.aux_loss.reshape(1), out["gshard_loss"], "gshard loss")
    kth = logits.topk(choices, dim=1).values[:, -1]
    loss = load_importance_loss(scores, kth, config["gate_noise"])
    assert_close(loss.reshape(1), out["load_importance_loss"], "load and importance loss")
    assert_close(torch.autograd.grad(routing.aux_loss, logits)[0], out["grad_logits_of_loss"], "gradient of the loss")

    tokens = given["x"].shape[0]
    route_N = routing.order % tokens * choices + routing.order // tokens
    row = torch.full((tokens * choices,), -1)
    row[route_N] = torch.arange(route_N.numel())
    row_TK = row.view(tokens, choices)
    rows = permute_rows(given["x"], route_N, row_TK)
    dispatched = torch.zeros_like(out["dispatched"])
    dispatched[routing.expert_KT.reshape(-1)[routing.order], slot_KT.reshape(-1)[routing.order]] = rows
    assert_close(dispatched, out["dispatched"], "dispatched")
    combined = combine_rows(2 * rows + 1, routing.weight_KT.T, route_N, row_TK)
    assert_close(combined, out["combined_of_2x_plus_1"], "combined")


def check_fastmoe(case: Case) -> None:
    given, out, param = case.group("in"), case.group("out"), case.group("param")
    logits = given["x"] @ param["gate.weight"].T + param["gate.bias"]
    probs = torch.softmax(logits, dim=1)
    expert_TK, weight_TK = selected_softmax(logits, out["naive_top2_idx"].shape[1])
    assert_close(expert_TK.float(), out["naive_top2_idx"], "NaiveGate experts")
    assert_close(weight_TK, out["naive_top2_gate"], "NaiveGate weights")
    routing = switch_routing(logits, drop_tokens=False)
    assert_close(routing.expert_KT.T.float(), out["switch_idx"], "SwitchGate experts")
    assert_close(routing.weight_KT.T, out["switch_gate"], "SwitchGate weights")
    assert_close(routing.aux_loss.reshape(1), out["switch_loss"], "SwitchGate loss")
    assert_close(balance_loss(probs, expert_TK.T[:1]).reshape(1), out["gshard_loss"], "GShardGate loss")


def check_paddle(case: Case) -> None:
    given, out, param = case.group("in"), case.group("out"), case.group("param")
    logits = given["x"] @ param["gate.weight"] + param["gate.bias"]
    probs = torch.softmax(logits, dim=1)
    value_TK, expert_TK = logits.topk(out["naive_top2_idx"].shape[1], dim=1)
    assert_close(expert_TK.float(), out["naive_top2_idx"], "NaiveGate experts")
    assert_close(value_TK, out["naive_top2_value"], "NaiveGate raw logits")
    assert_close(balance_loss(probs, expert_TK.T).reshape(1), out["gshard_loss"], "GShardGate loss, both choices")
    routing = switch_routing(logits, drop_tokens=False)
    assert_close(routing.expert_KT.T.float(), out["switch_idx"], "SwitchGate experts")
    assert_close(routing.weight_KT.T, out["switch_value"], "SwitchGate weights")
    assert_close(routing.aux_loss.reshape(1), out["switch_loss"], "SwitchGate loss")


def check_router_losses(case: Case) -> None:
    given, out, k = case.group("in"), case.group("out"), case.config["top_k"]
    logits = given["logits"]  # [B, T, E]
    assert_close(z_loss(logits).reshape(1), out["router_z_loss"], "router z-loss")
    per_group = [switch_routing(group, drop_tokens=False).aux_loss for group in logits]
    assert_close(torch.stack(per_group).mean().reshape(1), out["switch_load_balancing_loss"], "Switch loss")
    layers = torch.cat([logits.flatten(0, 1), logits.flip(1).flatten(0, 1)])
    probs, expert_KT = torch.softmax(layers, dim=1), layers.topk(k, dim=1).indices.T
    assert_close(balance_loss(probs, expert_KT).reshape(1), out["mixtral_load_balancing_loss"], "Mixtral loss")
    mask = given["attention_mask"].reshape(-1).repeat(2)
    masked = balance_loss(probs, expert_KT, mask)
    assert_close(masked.reshape(1), out["mixtral_load_balancing_loss_masked"], "Mixtral loss with padding")


CHECKS = [
    Check("DeepSpeed gate", lambda c: "sharded_moe.py" in c.source, check_deepspeed_gate),
    Check("Tutel routing", lambda c: "tutel" in c.source, check_tutel),
    Check("fastmoe gates", lambda c: "fastmoe" in c.source, check_fastmoe),
    Check("Paddle gates", lambda c: "PaddlePaddle" in c.source, check_paddle),
    Check("HF router losses", lambda c: "router_z_loss_func" in c.source, check_router_losses),
]
