"""The MoE layer: gate, permute, AlltoAll, grouped expert GEMM, AlltoAll back, combine.

Tokens are sorted by expert once (in the gate); from there on only rows that exist move and are multiplied. Parameter
names are DeepSpeed's (`deepspeed_moe.gate.wg.weight`, `deepspeed_moe.experts.deepspeed_experts.0.fc1.weight`), where
the number counts the experts of this rank.

Shapes: T tokens of a rank, D hidden, F expert hidden, E experts of all ranks, G experts of this rank, K choices,
N rows that arrive at this rank, R ranks of the expert group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.kernels.moe_dispatch import combine_rows, permute_rows
from common.kernels.products import Linear, product
from se_moe.communication import (
    ParallelGroups,
    Transport,
    all_to_all_rows,
    direct_transport,
    plan_from_counts,
)
from se_moe.config import GateConfig
from se_moe.gating import (
    JITTER,
    Routing,
    gshard_routing,
    switch_routing,
    topk_routing,
    tutel_routing,
)


class TopKGate(nn.Module):
    """Linear gate in float32 (also under autocast) with the routing of `GateConfig`."""

    def __init__(self, hidden: int, experts: int, config: GateConfig) -> None:
        super().__init__()
        if not 1 <= config.top_k <= experts:
            raise UserError(f"top_k is {config.top_k}, but there are {experts} experts: choose 1 to that many")
        self.config = config
        self.wg = nn.Linear(hidden, experts, bias=False)

    def forward(self, x_TD: Tensor, used_token_T: Tensor | None = None) -> Routing:
        config, training = self.config, self.training
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            if config.noise == "jitter" and training:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - JITTER, 1 + JITTER)
            logits_TE = F.linear(x_TD, self.wg.weight.float())
            return self.route(logits_TE, used_token_T)

    def route(self, logits_TE: Tensor, used_token_T: Tensor | None = None) -> Routing:
        """The routing of given logits, with this gate's random numbers."""
        config, training = self.config, self.training
        factor = config.capacity_factor if training else config.eval_capacity_factor
        limits = (factor, config.min_capacity, config.drop_tokens)
        if config.batch_prioritized:
            if used_token_T is not None:
                raise UserError("batch_prioritized serves every token: it cannot be combined with used_token")
            factor = factor if config.drop_tokens else 0.0
            return tutel_routing(torch.softmax(logits_TE, dim=1), config.top_k, factor, batch_prioritized=True)
        if config.top_k == 1:
            random = config.use_rts and config.drop_tokens and training
            rts_TE = torch.rand_like(logits_TE) if random else None
            noise_TE = _gumbel_like(logits_TE) if config.noise == "rsample" and training else None
            return switch_routing(logits_TE, *limits, used_token_T, rts_TE, noise_TE)
        if config.top_k == 2:
            noise_TE = _gumbel_like(logits_TE) if config.second_sampling and training else None
            return gshard_routing(logits_TE, *limits, used_token_T, noise_TE)
        return topk_routing(logits_TE, config.top_k, *limits, config.drop_policy, used_token_T)


def _gumbel_like(x: Tensor) -> Tensor:
    return -torch.empty_like(x).exponential_().log()


class Expert(nn.Module):
    """The feed-forward network of one expert: fc2(gelu(fc1(x)))."""

    def __init__(self, hidden: int, expert_hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(hidden, expert_hidden)
        self.fc2 = Linear(expert_hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ExpertHooks(Protocol):
    """What a storage manager is told about the experts of one layer (numbers count the experts of this rank).

    `announce` comes when the counts have arrived and before the tokens do; `acquire` must return with the parameters of
    `experts` readable, `release` says that this pass no longer reads them. Acquire and release come in pairs, once in
    the forward and once in the backward pass.
    """

    def announce(self, layer: MoELayer, experts: Sequence[int]) -> None: ...

    def acquire(self, layer: MoELayer, experts: Sequence[int], backward: bool) -> None: ...

    def release(self, layer: MoELayer, experts: Sequence[int], backward: bool) -> None: ...


def _grouped(rows_ND: Tensor) -> bool:
    """Whether one launch multiplies all experts' rows: where kernels run. A CPU is as fast one expert at a time."""
    return rows_ND.is_cuda


class _ExpertMLP(torch.autograd.Function):
    """All experts of a rank, two products each on its rows.

    Parameters are read between `acquire` and `release` only, and read again in backward: nothing of them is kept, so
    they may live elsewhere in between. Experts without rows get no gradient (None), so an optimizer leaves them alone.
    """

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, sizes: Sequence[int], layer: MoELayer, *weights: Tensor) -> Tensor:
        busy = [g for g, size in enumerate(sizes) if size]
        layer._acquire(busy, False)
        used = [weights[4 * g : 4 * g + 4] for g in busy]
        multiply = _multiply_grouped if _grouped(rows_ND) else _multiply_each
        starts = _starts([sizes[g] for g in busy])
        hidden_NF = multiply(rows_ND, [w[0] for w in used], [w[1] for w in used], starts, layer.expert_hidden)
        active_NF = F.gelu(hidden_NF)
        out_ND = multiply(active_NF, [w[2] for w in used], [w[3] for w in used], starts, rows_ND.shape[1])
        layer._release(busy, False)
        ctx.save_for_backward(rows_ND, hidden_NF, *weights)  # GELU is computed again
        ctx.rest = busy, starts, layer
        return out_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, hidden_NF, *weights = ctx.saved_tensors
        busy, starts, layer = ctx.rest
        layer._acquire(busy, True)
        backward = _backward_grouped if _grouped(rows_ND) else _backward_each
        second = [weights[4 * g + 2] for g in busy]
        dactive_NF, dw2, db2 = backward(grads[0].contiguous(), F.gelu(hidden_NF), second, starts)
        dhidden_NF = torch.ops.aten.gelu_backward(dactive_NF, hidden_NF)
        drows_ND, dw1, db1 = backward(dhidden_NF, rows_ND, [weights[4 * g] for g in busy], starts)
        layer._release(busy, True)
        found: list[Tensor | None] = [None] * len(weights)
        for g, *parts in zip(busy, dw1, db1, dw2, db2):
            for i, part in enumerate(parts):
                found[4 * g + i] = part.to(weights[4 * g + i].dtype)
        return drows_ND, None, None, *found


def _multiply_each(
    rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], starts: Sequence[int], width: int
) -> Tensor:
    out = rows.new_empty((rows.shape[0], width))
    for first, last, weight, bias in zip(starts, starts[1:], weights, biases):
        out[first:last] = product(rows[first:last], weight.to(rows.dtype).t(), bias.to(rows.dtype))
    return out


def _backward_each(
    dout: Tensor, rows: Tensor, weights: Sequence[Tensor], starts: Sequence[int]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(gradient of the rows, of each weight, of each bias)."""
    drows = torch.empty_like(rows)
    dweights, dbiases = [], []
    for first, last, weight in zip(starts, starts[1:], weights):
        drows[first:last] = product(dout[first:last], weight.to(rows.dtype))
        dweights.append(product(dout[first:last].t(), rows[first:last]))
        dbiases.append(dout[first:last].sum(0))
    return drows, dweights, dbiases


def _multiply_grouped(
    rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], starts: Sequence[int], width: int
) -> Tensor:
    if not weights:
        return rows.new_empty((0, width))
    starts_G1 = torch.tensor(starts, device=rows.device)
    return torch.ops.less_compute.moe_grouped_linear(
        rows.contiguous(), stacked(weights).to(rows.dtype), stacked(biases).to(rows.dtype), starts_G1
    )


def _backward_grouped(
    dout: Tensor, rows: Tensor, weights: Sequence[Tensor], starts: Sequence[int]
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    if not weights:
        return torch.empty_like(rows), [], []
    starts_G1 = torch.tensor(starts, device=rows.device)
    drows, dweight_GFD, dbias_GF = torch.ops.less_compute.moe_grouped_linear_backward(
        dout, rows, stacked(weights).to(rows.dtype), starts_G1
    )
    return drows, dweight_GFD.unbind(), dbias_GF.unbind()


def _starts(sizes: Sequence[int]) -> list[int]:
    found = [0]
    for size in sizes:
        found.append(found[-1] + size)
    return found


class Experts(nn.Module):
    """The experts of this rank, under DeepSpeed's parameter names."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(experts)


class _Mixture(nn.Module):
    """DeepSpeed's `deepspeed_moe` level: the gate and the experts."""

    def __init__(self, gate: TopKGate, experts: Experts) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts


class MoEOutput(NamedTuple):
    """What a MoE layer returns.

    Attributes:
        y: like the input.
        aux_loss, z_loss: scalars of this rank's tokens (`Routing`).
        requested_E: routes of this rank's tokens per expert before dropping, int64.
    """

    y: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    requested_E: Tensor


class MoELayer(nn.Module):
    """A mixture of E feed-forward experts, E / R of them on this rank.

    Gradients: an expert's is the sum over all tokens that reached it from every rank of the expert group; the gate's is
    this rank's own. Reducing and dividing is the gradient buckets' business (`communication.GradientBuckets`).

    Args:
        hidden, expert_hidden: widths D and F.
        experts: E, a multiple of the expert group's size.
        gate: how tokens choose.
        groups: expert and data parallelism; None: one process.
        residual: adds a dense expert beside the mixture, mixed by a learnt softmax (DeepSpeed's residual MoE).
        transport: how AlltoAll rows travel.
    """

    def __init__(
        self,
        hidden: int,
        expert_hidden: int,
        experts: int,
        gate: GateConfig | None = None,
        groups: ParallelGroups | None = None,
        residual: bool = False,
        transport: Transport = direct_transport,
    ) -> None:
        super().__init__()
        self.groups = groups or ParallelGroups()
        ranks = self.groups.expert_size
        if experts % ranks:
            raise UserError(f"experts is {experts}: it must be a multiple of the {ranks} ranks that share them")
        self.num_experts, self.num_local = experts, experts // ranks
        self.expert_hidden = expert_hidden
        self.transport = transport
        self.hooks: ExpertHooks | None = None
        local = [Expert(hidden, expert_hidden) for _ in range(self.num_local)]
        self.deepspeed_moe = _Mixture(TopKGate(hidden, experts, gate or GateConfig()), Experts(local))
        self.mlp = Expert(hidden, expert_hidden) if residual else None
        self.coefficient = nn.Linear(hidden, 2) if residual else None

    @property
    def gate(self) -> TopKGate:
        return self.deepspeed_moe.gate

    @property
    def local_experts(self) -> list[Expert]:
        """The experts of this rank, in order; the first is expert `expert_rank * num_local` of all."""
        return list(self.deepspeed_moe.experts.deepspeed_experts)  # type: ignore[arg-type]

    def forward(self, x: Tensor, used_token: Tensor | None = None) -> MoEOutput:
        """x [..., D] -> MoEOutput; `used_token` [...] is 0 for padding, whose output is zero."""
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.gate(x_TD, None if used_token is None else used_token.reshape(-1))
        y_TD = self.with_dense_expert(self.dispatch(x_TD, routing), x_TD)
        return MoEOutput(y_TD.view(x.shape), routing.aux_loss, routing.z_loss, routing.requested_E)

    def with_dense_expert(self, y_TD: Tensor, x_TD: Tensor) -> Tensor:
        """The mixture's result beside the dense expert's, each by its share of a learnt softmax; as is without one."""
        if self.mlp is None or self.coefficient is None:
            return y_TD
        share_T2 = torch.softmax(self.coefficient(x_TD), dim=-1)
        return y_TD * share_T2[:, :1] + self.mlp(x_TD) * share_T2[:, 1:]

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Send every kept route's token to its expert and bring the weighted results back, [T, D]."""
        choices, tokens = routing.expert_KT.shape
        rows = routing.order.numel()
        route_N = routing.order % tokens * choices + torch.div(routing.order, tokens, rounding_mode="floor")
        row_TK = torch.full((tokens * choices,), -1, dtype=torch.int64, device=x_TD.device)
        row_TK[route_N] = torch.arange(rows, device=x_TD.device)
        row_TK = row_TK.view(tokens, choices)
        plan, arriving_RG = plan_from_counts(
            routing.sizes_E.view(-1, self.num_local), self.groups.expert, self.groups.topology
        )
        counts = arriving_RG.tolist()
        sizes = [sum(row[g] for row in counts) for g in range(self.num_local)]
        if self.hooks is not None:
            self.hooks.announce(self, [g for g, size in enumerate(sizes) if size])
        rows_ND = permute_rows(x_TD, route_N, row_TK)
        route = (self.groups.expert, self.groups.topology, self.transport)
        rows_ND = all_to_all_rows(rows_ND, plan, *route)
        rows_ND = _swap_blocks(rows_ND, counts, True)
        rows_ND = self.run_experts(rows_ND, sizes)
        rows_ND = _swap_blocks(rows_ND, counts, False)
        rows_ND = all_to_all_rows(rows_ND, plan.reverse(), *route)
        return combine_rows(rows_ND, routing.weight_KT.T, route_N, row_TK)

    def run_experts(self, rows_ND: Tensor, sizes: Sequence[int]) -> Tensor:
        """Rows sorted by local expert through their experts; `sizes` are the rows of each."""
        weights = [
            w for e in self.local_experts for w in (e.fc1.weight, e.fc1.bias, e.fc2.weight, e.fc2.bias)
        ]  # fmt: skip
        device = rows_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows_ND.dtype
        return _ExpertMLP.apply(rows_ND.to(dtype), sizes, self, *weights)

    @torch.no_grad()
    def pack(self) -> None:
        """Lay each kind of parameter of the local experts out as one block, for grouped products without a copy.

        Happens by itself on the way to a GPU. Where a storage manager swaps parameters it has no effect for long.
        """
        for kind in zip(*(expert.parameters() for expert in self.local_experts)):
            block = torch.stack([p.detach() for p in kind])
            for parameter, view in zip(kind, block):
                parameter.data = view

    def _apply(self, fn: Any, recurse: bool = True) -> MoELayer:
        super()._apply(fn, recurse)
        if self.gate.wg.weight.is_cuda:
            self.pack()
        return self

    def _acquire(self, experts: Sequence[int], backward: bool) -> None:
        if self.hooks is not None:
            self.hooks.acquire(self, experts, backward)

    def _release(self, experts: Sequence[int], backward: bool) -> None:
        if self.hooks is not None:
            self.hooks.release(self, experts, backward)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors stacked along a new first dimension; a view where `MoELayer.pack` has laid them out so."""
    first = tensors[0].detach()
    step = first.numel() * first.element_size()
    end = first.storage_offset() * first.element_size() + step * len(tensors)
    together = first.untyped_storage().nbytes() >= end and all(
        t.is_contiguous() and t.data_ptr() == first.data_ptr() + i * step for i, t in enumerate(tensors)
    )
    if together:
        return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))
    return torch.stack([t.detach() for t in tensors])


def _swap_blocks(rows_ND: Tensor, counts: list[list[int]], by_expert: bool) -> Tensor:
    """Blocks of rows from (source rank, local expert) order to (local expert, source rank), or back.

    `counts[r][g]` rows come from rank r for local expert g.
    """
    ranks, local = len(counts), len(counts[0])
    if ranks == 1 or local == 1:
        return rows_ND
    if by_expert:
        sizes = [counts[r][g] for r in range(ranks) for g in range(local)]
        order = [r * local + g for g in range(local) for r in range(ranks)]
    else:
        sizes = [counts[r][g] for g in range(local) for r in range(ranks)]
        order = [g * ranks + r for r in range(ranks) for g in range(local)]
    parts = torch.split(rows_ND, sizes)
    return torch.cat([parts[i] for i in order])
