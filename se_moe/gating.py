"""Gates: which experts a token visits, which of its routes survive the capacity, and what each route weighs.

Shapes: T tokens of a rank, D hidden, E experts of all ranks, K choices of a token, N = K * T routes.
Route n = k * T + t is choice k of token t.

A decision takes one sort. Every route gets an integer key (its expert, then the rule that decides who is served first);
after sorting, the routes of an expert stand together, the place in that run is the route's place in the expert's queue,
and the same order is the permutation that brings tokens to experts. No [T, E, capacity] tensor exists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from se_moe.config import DropPolicy

JITTER = 1e-2  # Switch Transformer: inputs of the gate are multiplied by U(1 - JITTER, 1 + JITTER)


@dataclass
class Routing:
    """Where the tokens of one rank go.

    Attributes:
        expert_KT: expert of every choice, int64; -1 where the token is not routed at all (`used_token`).
        keep_KT: whether the route survived the capacity.
        weight_KT: combine weight of every route, differentiable; means nothing where the route was dropped.
        order: kept routes sorted by expert, int64 [kept].
        sizes_E: kept routes of every expert, int64.
        requested_E: routes of every expert before dropping (DeepSpeed's `exp_counts`), int64.
        capacity: routes an expert takes from this rank; None where nothing is dropped.
        aux_loss: load-balancing loss (1 for a uniform gate in the Switch and GShard form), scalar.
        z_loss: mean square of the logits' log-sum-exp (ST-MoE), scalar.
    """

    expert_KT: Tensor
    keep_KT: Tensor
    weight_KT: Tensor
    order: Tensor
    sizes_E: Tensor
    requested_E: Tensor
    capacity: int | None
    aux_loss: Tensor
    z_loss: Tensor

    def slots(self, in_token_order: bool = False) -> Tensor:
        """Place of every kept route in its expert's queue, [K, T]; 0 for dropped routes.

        Queues are in the order in which routes were served, or renumbered token by token (`in_token_order`: DeepSpeed
        does so after a choice by random numbers or probability). Only padded layouts and recordings of other libraries
        need this; dispatch does not.
        """
        experts = self.sizes_E.numel()
        starts = F.pad(self.sizes_E.cumsum(0), (1, 0))
        expert_N = self.expert_KT.reshape(-1)
        order = self.order
        if in_token_order:
            choices, tokens = self.expert_KT.shape
            token_major = order % tokens * choices + order // tokens
            key = expert_N[order] * self.expert_KT.numel() + token_major
            order = order[key.argsort()]
        slot = torch.zeros_like(expert_N)
        slot[order] = torch.arange(order.numel(), device=order.device) - starts[expert_N[order].clamp(max=experts)]
        return slot.view_as(self.expert_KT)


def expert_capacity(tokens: int, experts: int, factor: float, minimum: int) -> int:
    """ceil(T / E * factor), at least `minimum` (Switch); in float32, as the recorded libraries round it."""
    return max(int(torch.ceil((tokens / experts) * torch.tensor(factor)).item()), minimum)


def _ascending_bits(value: Tensor) -> Tensor:
    """int64 in [-2^31, 2^31) with the order of the float32 values."""
    bits = value.float().contiguous().view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)


def _sort_routes(
    expert_KT: Tensor,
    experts: int,
    capacity: int | None,
    priority_KT: Tensor | None,
    token_major: bool,
    masked: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(order of kept routes, keep_KT, sizes_E, requested_E) by one stable sort.

    Routes of an expert are served by falling `priority_KT` if given, else all first choices before all second choices,
    or token by token with `token_major`. Expert -1 (there are such only if `masked`) is never served.
    """
    choices, tokens = expert_KT.shape
    routes = choices * tokens
    key_KT = torch.where(expert_KT < 0, experts, expert_KT)
    if priority_KT is not None:
        stride = 1 << 33
        key_KT = key_KT * stride - _ascending_bits(priority_KT) + (1 << 32)
    elif token_major and choices > 1:
        stride = routes
        token_T = torch.arange(tokens, device=key_KT.device) * choices
        choice_K = torch.arange(choices, device=key_KT.device)
        key_KT = key_KT * stride + token_T + choice_K[:, None]
    else:
        stride = 1
    sorted_key, order = torch.sort(key_KT.reshape(-1), stable=True)
    bounds = torch.arange(experts + 1, device=order.device) * stride
    starts = torch.searchsorted(sorted_key, bounds)  # starts[E] is where routes to no expert begin
    requested_E = starts.diff()
    if capacity is None:
        keep_KT = expert_KT >= 0
        if masked:  # otherwise a GPU need not be asked where the served routes end
            order = order[: int(starts[-1])]
        return order, keep_KT, requested_E, requested_E
    sorted_expert = torch.div(sorted_key, stride, rounding_mode="floor")
    place = torch.arange(routes, device=order.device) - starts[sorted_expert.clamp(max=experts)]
    kept = (place < capacity) & (sorted_expert < experts)
    order = order[kept]
    keep = torch.zeros(routes, dtype=torch.bool, device=order.device)
    keep[order] = True
    return order, keep.reshape(choices, tokens), requested_E.clamp(max=capacity), requested_E


def balance_loss(probs_TE: Tensor, expert_KT: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e (Switch eq. (4)): f_e choices per token that went to e, P_e its mean probability.

    The choices given are those that count: GShard, DeepSpeed top-2 and Tutel give the first ones (GShard writes the
    same number as mean_e(m_e c_e) * E^2); Mixtral and Paddle's GShardGate give all K, which makes it K times as large.

    Args:
        expert_KT: int64; -1 counts for nobody.
        weight_T: what each token counts, for example 0 for padding; None: all 1.
    """
    experts = probs_TE.shape[1]
    if weight_T is None:
        return _balance(probs_TE, _count(expert_KT.reshape(-1), experts))
    weight_T = weight_T.to(probs_TE.dtype)
    weight_KT = (weight_T * (expert_KT >= 0)).reshape(-1)
    counted_E = torch.zeros(experts, dtype=probs_TE.dtype, device=probs_TE.device)
    counted_E.index_add_(0, expert_KT.clamp(min=0).reshape(-1), weight_KT)
    total = weight_T.sum()
    return ((probs_TE * weight_T[:, None]).sum(0) / total * (counted_E / total)).sum() * experts


def _balance(probs_TE: Tensor, counted_E: Tensor) -> Tensor:
    tokens, experts = probs_TE.shape
    return (probs_TE.mean(0) * (counted_E / tokens)).sum() * experts


def load_importance_loss(scores_TE: Tensor, kth_logit_T: Tensor, gate_noise: float) -> Tensor:
    """Library. Mean of the squared variation coefficients of importance and load (Shazeer et al. 2017, A; Tutel).

    Args:
        scores_TE: softmax probabilities.
        kth_logit_T: the smallest logit that was chosen, against which Tutel compares the scores.
        gate_noise: standard deviation of the gate's noise times E.
    """
    spread = gate_noise / scores_TE.shape[1]
    load_E = torch.special.ndtr((scores_TE.float() - kth_logit_T[:, None]) / spread).sum(0)
    importance_E = scores_TE.float().sum(0)
    return (_variation(importance_E) + _variation(load_E)) / 2


def _variation(x_E: Tensor) -> Tensor:
    return x_E.var() / (x_E.mean().square() + 1e-10)


def _count(expert_N: Tensor, experts: int) -> Tensor:
    return torch.bincount(torch.where(expert_N < 0, experts, expert_N), minlength=experts + 1)[:experts]


def z_loss(logits: Tensor) -> Tensor:
    """Router z-loss (ST-MoE eq. (5)): mean over all tokens of logsumexp(logits [..., E])^2."""
    return torch.logsumexp(logits.float(), dim=-1).square().mean()


def _check(logits_TE: Tensor, choices: int) -> None:
    if logits_TE.ndim != 2:
        raise UserError(f"gate logits must be [tokens, experts], got shape {tuple(logits_TE.shape)}")
    if not 1 <= choices <= logits_TE.shape[1]:
        raise UserError(f"top_k is {choices}, but the gate has {logits_TE.shape[1]} experts: choose 1 to that many")


def switch_routing(
    logits_TE: Tensor,
    capacity_factor: float = 1.0,
    min_capacity: int = 4,
    drop_tokens: bool = True,
    used_token_T: Tensor | None = None,
    rts_TE: Tensor | None = None,
    noise_TE: Tensor | None = None,
) -> Routing:
    """Switch top-1: the weight is the softmax probability itself.

    Args:
        logits_TE: float.
        capacity_factor, min_capacity: an expert takes max(ceil(T / E * factor), min_capacity) tokens of this rank.
        drop_tokens: False serves every token whatever the capacity.
        used_token_T: 0 for padding tokens, which go to no expert.
        rts_TE: random token selection: uniform numbers that decide which tokens of an overflowing expert survive (the
            largest). None: first come, first served.
        noise_TE: added to the logits for the choice of the expert only (DeepSpeed's RSample).
    """
    _check(logits_TE, 1)
    logits_TE = logits_TE.float()
    tokens, experts = logits_TE.shape
    probs_TE = torch.softmax(logits_TE, dim=1)
    expert_T = (probs_TE if noise_TE is None else logits_TE + noise_TE).argmax(1)
    gate_T = probs_TE.gather(1, expert_T[:, None])[:, 0]
    priority_KT = None if rts_TE is None else rts_TE.gather(1, expert_T[:, None]).T
    if used_token_T is not None:
        expert_T = torch.where(used_token_T.bool(), expert_T, -1)
    capacity = expert_capacity(tokens, experts, capacity_factor, min_capacity) if drop_tokens else None
    order, keep_KT, sizes_E, requested_E = _sort_routes(
        expert_T[None], experts, capacity, priority_KT, False, used_token_T is not None
    )
    aux_loss = _balance(probs_TE, requested_E)
    return Routing(
        expert_T[None], keep_KT, gate_T[None], order, sizes_E, requested_E, capacity, aux_loss, z_loss(logits_TE)
    )


def _renormalised(gate_KT: Tensor, keep_KT: Tensor) -> Tensor:
    """Gates of the surviving routes of a token, summing to one (to zero where none survived)."""
    gate_KT = gate_KT * keep_KT
    return gate_KT / gate_KT.sum(0).clamp(min=torch.finfo(gate_KT.dtype).eps)


def gshard_routing(
    logits_TE: Tensor,
    capacity_factor: float = 1.0,
    min_capacity: int = 4,
    drop_tokens: bool = True,
    used_token_T: Tensor | None = None,
    noise_TE: Tensor | None = None,
) -> Routing:
    """GShard top-2: capacity doubled, all first choices served before second ones, weights renormalised over survivors.

    `noise_TE` is added to the logits for the choice of the second expert only (Gumbel noise samples it in proportion to
    its probability). The auxiliary loss counts first choices. Other arguments as in `switch_routing`.
    """
    _check(logits_TE, 2)
    logits_TE = logits_TE.float()
    tokens, experts = logits_TE.shape
    probs_TE = torch.softmax(logits_TE, dim=1)
    first_T = probs_TE.argmax(1)
    ranked_TE = logits_TE.detach() if noise_TE is None else logits_TE.detach() + noise_TE
    second_T = ranked_TE.scatter(1, first_T[:, None], -math.inf).argmax(1)
    expert_KT = torch.stack((first_T, second_T))
    gate_KT = probs_TE.gather(1, expert_KT.T).T
    if used_token_T is not None:
        expert_KT = torch.where(used_token_T.bool(), expert_KT, -1)
    capacity = expert_capacity(tokens, experts, 2 * capacity_factor, min_capacity) if drop_tokens else None
    order, keep_KT, sizes_E, requested_E = _sort_routes(
        expert_KT, experts, capacity, None, False, used_token_T is not None
    )
    return Routing(
        expert_KT,
        keep_KT,
        _renormalised(gate_KT, keep_KT),
        order,
        sizes_E,
        requested_E,
        capacity,
        balance_loss(probs_TE, expert_KT[:1]),
        z_loss(logits_TE),
    )


def topk_routing(
    logits_TE: Tensor,
    k: int,
    capacity_factor: float = 1.0,
    min_capacity: int = 4,
    drop_tokens: bool = True,
    drop_policy: DropPolicy = "probs",
    used_token_T: Tensor | None = None,
) -> Routing:
    """Top-k: an overflowing expert keeps its likeliest tokens ("probs") or the first ones ("position").

    Weights are renormalised over the survivors; the auxiliary loss counts all choices and divides by k, so that 1 still
    means balance. Other arguments as in `switch_routing`.
    """
    _check(logits_TE, k)
    if drop_policy not in ("probs", "position"):
        raise UserError(f'drop_policy is "{drop_policy}": choose "probs" or "position"')
    logits_TE = logits_TE.float()
    tokens, experts = logits_TE.shape
    probs_TE = torch.softmax(logits_TE, dim=1)
    gate_TK, expert_TK = probs_TE.topk(k, dim=1)
    expert_KT = expert_TK.T.contiguous()
    if used_token_T is not None:
        expert_KT = torch.where(used_token_T.bool(), expert_KT, -1)
    capacity = expert_capacity(tokens, experts, k * capacity_factor, min_capacity) if drop_tokens else None
    priority_KT = gate_TK.detach().T if capacity is not None and drop_policy == "probs" else None
    order, keep_KT, sizes_E, requested_E = _sort_routes(
        expert_KT, experts, capacity, priority_KT, True, used_token_T is not None
    )
    return Routing(
        expert_KT,
        keep_KT,
        _renormalised(gate_TK.T, keep_KT),
        order,
        sizes_E,
        requested_E,
        capacity,
        _balance(probs_TE, requested_E) / k,
        z_loss(logits_TE),
    )


def selected_softmax(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Library. (experts, weights), [T, k] each: softmax over the k chosen logits (fastmoe's NaiveGate, Mixtral)."""
    _check(logits_TE, k)
    value_TK, expert_TK = logits_TE.float().topk(k, dim=1)
    return expert_TK, torch.softmax(value_TK, dim=1)


def tutel_routing(
    scores_TE: Tensor,
    k: int,
    capacity_factor: float = 1.0,
    batch_prioritized: bool = False,
    normalize_gate: bool = True,
    alignment: int = 1,
) -> Routing:
    """Routing as in Tutel, from softmax scores: queue places by choice, then by position in the batch.

    Args:
        scores_TE: softmax probabilities.
        capacity_factor: capacity = k * int(factor * ceil(T / E)), rounded up to a multiple of `alignment`. 0: the
            largest queue; negative: the largest queue, but at most that of -factor.
        batch_prioritized: tokens with the largest score are served first instead of the first in the batch.
        normalize_gate: weights of a token's k choices sum to one (for k > 1), counted before dropping.
    """
    _check(scores_TE, k)
    tokens, experts = scores_TE.shape
    expert_KT = scores_TE.topk(k, dim=1).indices.T.contiguous()
    gate_KT = scores_TE.gather(1, expert_KT.T).T
    if normalize_gate and k > 1:
        gate_KT = gate_KT / gate_KT.sum(0).clamp(min=torch.finfo(gate_KT.dtype).eps)
    nominal = k * int(abs(capacity_factor) * math.ceil(tokens / experts))
    capacity = nominal
    if capacity_factor <= 0:
        largest = int(_count(expert_KT.reshape(-1), experts).max())
        capacity = largest if capacity_factor == 0 else min(largest, nominal)
    capacity = math.ceil(capacity / alignment) * alignment
    priority_KT = None
    if batch_prioritized:
        # First choices still precede second ones: rank the tokens, then count down by choice.
        by_score_T = torch.sort(scores_TE.max(1).values, descending=True, stable=True).indices
        rank_T = torch.empty_like(by_score_T)
        rank_T[by_score_T] = torch.arange(tokens, device=by_score_T.device)
        priority_KT = -(rank_T + tokens * torch.arange(k, device=rank_T.device)[:, None]).float()
    order, keep_KT, sizes_E, requested_E = _sort_routes(expert_KT, experts, capacity, priority_KT, False)
    return Routing(
        expert_KT,
        keep_KT,
        gate_KT,
        order,
        sizes_E,
        requested_E,
        capacity,
        balance_loss(scores_TE, expert_KT[:1]),
        scores_TE.new_zeros(()),
    )
