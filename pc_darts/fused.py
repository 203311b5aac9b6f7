"""The mixed operations of a cell in batches: what `search_space.MixedOp` computes, with a tenth of the kernel calls.

All edges that read a state are computed at once, and the two inputs of the cell together, because

* they share the ReLU, the pools and the pools' batch statistics: these are computed once a state;
* their convolutions share shapes: one depthwise and one 1x1 convolution serve all of them;
* a non-affine batch norm times an architecture weight is an affine batch norm, whose gradient is the weight's;
* bypassing channels of all edges into a node are summed before they are concatenated and shuffled, once a node.

On CPUs tensors are channels-last, and some gradients of depthwise convolutions take faster ways to the same numbers
(`common/kernels/depthwise.py`). In eval mode, when every edge has pool statistics of its own, the plain implementation
runs.

Shape suffixes: B batch, C channels, H W height and width, S states of a group (1 or 2), T target nodes of a state,
E edges of a cell, O operations, P processed channels (C / partial), Q bypassing channels (C - P).
Channels of batched tensors are ordered (state, target, channel).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.kernels.cells import corner_weights
from common.kernels.depthwise import depthwise, input_gradient, kernel_gradient, same_sides
from pc_darts.operations import MOMENTUM, PRIMITIVES, BatchNorm, batch_norm, rearrange, statistics_are_frozen

_MAX, _AVG, _SKIP, _SEP3, _SEP5, _DIL3, _DIL5 = (
    PRIMITIVES.index(name)
    for name in (
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    )
)
_CONVOLUTIONS = (_SEP3, _SEP5, _DIL3, _DIL5)
_DENSE_BELOW = 16  # processed channels: up to here one block-diagonal 1x1 convolution is faster than a grouped one


class CellLike(Protocol):
    """What is needed of `search_space.Cell`."""

    partial: int
    sampling: Any
    _ops: nn.ModuleList


class _Shared(torch.autograd.Function):
    """Depthwise convolutions of stride 1 that read the same channels: each state's P channels `repeats` times.

    The repeated maps are not kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, weight: Tensor, dilation: int, repeats: int, channels: int) -> Tensor:
        ctx.save_for_backward(x_BCHW, weight)
        ctx.dilation, ctx.repeats, ctx.channels = dilation, repeats, channels
        return same_sides(_repeat(x_BCHW, repeats, channels), weight, dilation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x_BCHW, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _sum_repeats(input_gradient(gradient, weight, ctx.dilation), ctx.repeats, ctx.channels)
        if ctx.needs_input_grad[1]:
            wide = _repeat(x_BCHW, ctx.repeats, ctx.channels)
            dw = kernel_gradient(wide, gradient, weight.shape[-1], ctx.dilation)
        return dx, dw, None, None, None


def _repeat(x_BCHW: Tensor, repeats: int, channels: int) -> Tensor:
    """[B, (s, p)] -> [B, (s, t, p)], channels-last."""
    B, C, H, W = x_BCHW.shape
    x_BHWSP = x_BCHW.permute(0, 2, 3, 1).reshape(B, H, W, C // channels, 1, channels)
    wide = x_BHWSP.expand(-1, -1, -1, -1, repeats, -1).reshape(B, H, W, C * repeats)
    return wide.permute(0, 3, 1, 2)


def _sum_repeats(x_BCHW: Tensor, repeats: int, channels: int) -> Tensor:
    """Adjoint of `_repeat`."""
    B, C, H, W = x_BCHW.shape
    parts = x_BCHW.permute(0, 2, 3, 1).reshape(B, H, W, C // (repeats * channels), repeats, channels)
    total = sum(parts.select(4, t) for t in range(1, repeats)) + parts.select(4, 0)
    return total.reshape(B, H, W, C // repeats).permute(0, 3, 1, 2)


class _WeightedSum(torch.autograd.Function):
    """sum_i weight_i x_i without intermediate tensors."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *tensors)
        total = tensors[0] * weights[0]
        for i in range(1, len(tensors)):
            total.addcmul_(tensors[i], weights[i])
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, *tensors = ctx.saved_tensors
        dense = gradient.contiguous(memory_format=_layout(tensors[0]))
        flat = _flat(dense)
        dweights = torch.stack([torch.dot(flat, _flat(tensor)) for tensor in tensors])
        return dweights, *(dense * weights[i] for i in range(len(tensors)))


def _layout(x_BCHW: Tensor) -> torch.memory_format:
    return torch.channels_last if x_BCHW.device.type == "cpu" else torch.contiguous_format


def _flat(x_BCHW: Tensor) -> Tensor:
    """All elements in memory order, without a copy when dense."""
    return (x_BCHW.permute(0, 2, 3, 1) if x_BCHW.device.type == "cpu" else x_BCHW).reshape(-1)


class _Group:
    """The edges from `states` to the last `targets` nodes of a cell, and their running statistics in one piece each."""

    def __init__(self, cell: CellLike, states: Sequence[int], nodes: int, stride: int, channels: int) -> None:
        self.states, self.stride, self.channels = tuple(states), stride, channels
        self.first_target = max(states[-1] - 1, 0)
        self.targets = nodes - self.first_target
        starts = [node * (node + 3) // 2 for node in range(nodes)]
        self.edges = [starts[node] + state for state in states for node in range(self.first_target, nodes)]
        self.ops: list[Any] = [cell._ops[edge]._ops for edge in self.edges]
        self.packed: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.index: Tensor | None = None
        S, T = len(self.states), self.targets
        self.mask = torch.eye(S * T)

    def norms(self, op: int, position: int) -> tuple[Tensor, Tensor]:
        """Running mean and variance of a norm over all edges [S * T * P]; the modules' buffers become views."""
        modules: list[BatchNorm] = [_norm_of(ops[op], position) for ops in self.ops]
        known = self.packed.get((op, position))
        if known is not None:
            first, last = modules[0], modules[-1]
            if (
                first.running_mean.data_ptr() == known[0].data_ptr()
                and last.running_var.data_ptr() == known[1][-self.channels :].data_ptr()
                and first.running_mean.dtype == known[0].dtype
            ):
                return known
        mean = torch.cat([module.running_mean for module in modules])
        var = torch.cat([module.running_var for module in modules])
        for i, module in enumerate(modules):
            part = slice(i * self.channels, (i + 1) * self.channels)
            module.running_mean, module.running_var = mean[part], var[part]
        self.packed[op, position] = (mean, var)
        return mean, var

    def weights(self, op: int, position: int) -> Tensor:
        """Convolution weights of all edges, [S * T * P, ...]."""
        return torch.cat([ops[op].op[position].weight for ops in self.ops])

    def pointwise(self, x_BCHW: Tensor, op: int, position: int) -> Tensor:
        """The 1x1 convolutions of all edges."""
        weight, P = self.weights(op, position), self.channels
        groups = len(self.edges)
        if groups > 1 and P < _DENSE_BELOW and x_BCHW.device.type == "cpu":
            self.mask = self.mask.to(weight)
            blocks = weight.view(groups, P, 1, P) * self.mask[:, None, :, None]
            weight, groups = blocks.view(groups * P, groups * P, 1, 1), 1
        return F.conv2d(x_BCHW, weight, groups=groups)

    def depthwise(self, x_BCHW: Tensor, op: int, position: int, shared: bool) -> Tensor:
        """The depthwise convolutions of all edges; `shared`: x holds the states' channels once."""
        weight = self.weights(op, position)
        dilation = 2 if op in (_DIL3, _DIL5) else 1
        repeats = self.targets if shared else 1
        stride = self.stride if shared else 1
        if x_BCHW.device.type == "cpu" and repeats > 1:
            if stride == dilation == 2:  # every other pixel, as an ordinary one
                x_BCHW = x_BCHW[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
                stride = dilation = 1
            if stride == 1:
                return cast(Tensor, _Shared.apply(x_BCHW, weight, dilation, repeats, self.channels))
        if repeats > 1:
            x_BCHW = _repeat(x_BCHW, repeats, self.channels)
        return depthwise(x_BCHW, weight, stride, dilation * (weight.shape[-1] // 2), dilation)

    def norm(self, x_BCHW: Tensor, op: int, position: int, weight_ST: Tensor | None) -> Tensor:
        """Batch norm of all edges, times an architecture weight an edge."""
        mean, var = self.norms(op, position)
        weight = None if weight_ST is None else weight_ST.reshape(-1).repeat_interleave(self.channels)
        return batch_norm(x_BCHW, weight, None, mean, var, True)

    def pool_norm(self, pooled_BCHW: Tensor, op: int) -> Tensor:
        """The norm after a pool: the batch is the same for all targets, so it is normalised once."""
        mean, var = pooled_BCHW.new_zeros(2, pooled_BCHW.shape[1]).unbind()
        y_BCHW = batch_norm(pooled_BCHW, None, None, mean, var, True, momentum=1.0)
        if not statistics_are_frozen():
            shape = (len(self.states), self.targets, self.channels)
            for packed, fresh in zip(self.norms(op, 1), (mean, var), strict=True):
                packed.view(shape).lerp_(fresh.view(shape[0], 1, -1).expand(shape), MOMENTUM)
        return y_BCHW

    def mixed(self, parts_BPHW: Sequence[Tensor], op_weights_EO: Tensor, edge_weights_E: Tensor) -> Tensor:
        """What the group adds to its targets, [B, T * P, H, W]. parts: the processed channels of the states."""
        S, T, P = len(self.states), self.targets, self.channels
        x_BCHW = parts_BPHW[0] if S == 1 else torch.cat(list(parts_BPHW), dim=1)
        x_BCHW = x_BCHW.contiguous(memory_format=_layout(x_BCHW))
        if self.index is None or self.index.device != x_BCHW.device:
            self.index = torch.tensor(self.edges, device=x_BCHW.device)
        weights_OST = (op_weights_EO * edge_weights_E[:, None])[self.index].t().reshape(-1, S, T)
        positive = F.relu(x_BCHW)
        terms = []
        for op in _CONVOLUTIONS:
            y = self.pointwise(self.depthwise(positive, op, 1, shared=True), op, 2)
            if op in (_SEP3, _SEP5):
                y = F.relu(self.norm(y, op, 3, None))
                y = self.pointwise(self.depthwise(y, op, 5, shared=False), op, 6)
            terms.append(self.norm(y, op, 7 if op in (_SEP3, _SEP5) else 3, weights_OST[op]))
        if self.stride == 2:
            terms.append(self.norm(self.reduce(positive), _SKIP, 0, weights_OST[_SKIP]))
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        shared = [
            self.pool_norm(F.max_pool2d(x_BCHW, 3, self.stride, 1), _MAX),
            self.pool_norm(average_pool(x_BCHW, self.stride), _AVG),
        ]
        kinds = [_MAX, _AVG]
        if self.stride == 1:
            shared.append(x_BCHW)
            kinds.append(_SKIP)
        # [T, P, kind, S, P']: the weight where P' = P.
        spread = weights_OST[kinds].permute(2, 0, 1)[:, None, :, :, None] * torch.eye(P).to(x_BCHW)[:, None, None, :]
        spread = spread.reshape(T * P, len(kinds) * S * P, 1, 1)
        if S > 1:
            total = total[:, : T * P] + total[:, T * P :]
        return total + F.conv2d(torch.cat(shared, dim=1), spread)

    def reduce(self, positive_BCHW: Tensor) -> Tensor:
        """The FactorizedReduce of all edges: its two 1x1 convolutions on even and odd pixels are one of 2x2 pixels."""
        H, W = positive_BCHW.shape[2:]
        if H % 2 or W % 2:
            positive_BCHW = F.pad(positive_BCHW, (0, W % 2, 0, H % 2))
        reductions = [ops[_SKIP] for ops in self.ops]
        weight = torch.cat([corner_weights(skip.conv_1.weight, skip.conv_2.weight) for skip in reductions])
        return F.conv2d(positive_BCHW, weight, stride=2, groups=len(self.states))


def _norm_of(op: nn.Module, position: int) -> BatchNorm:
    norm = op.bn if hasattr(op, "bn") else (op.op if hasattr(op, "op") else op)[position]  # type: ignore[index]
    assert isinstance(norm, BatchNorm)
    return norm


def average_pool(x_BCHW: Tensor, stride: int) -> Tensor:
    """3x3 average without the padding; on CPUs as a depthwise convolution, which is many times faster."""
    if x_BCHW.device.type != "cpu":
        return F.avg_pool2d(x_BCHW, 3, stride, 1, count_include_pad=False)
    C, H, W = x_BCHW.shape[1:]
    ones = x_BCHW.new_ones(1, 1, 3, 3)
    total = depthwise(x_BCHW, ones.expand(C, 1, 3, 3).contiguous(), stride, padding=1)
    return total / F.conv2d(x_BCHW.new_ones(1, 1, H, W), ones, stride=stride, padding=1)


class FusedEdges:
    """The edges of one cell. Holds no parameters: those stay in the cell's modules, under the authors' names."""

    def __init__(self, channels: int, nodes: int, reduction: bool) -> None:
        self.channels, self.nodes, self.reduction = channels, nodes, reduction
        self.groups: list[_Group] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedEdges:
        """Groups refer to a cell's modules; a copied cell makes its own."""
        return FusedEdges(self.channels, self.nodes, self.reduction)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "groups": []}

    def __call__(
        self,
        cell: CellLike,
        states: Sequence[Tensor],
        op_weights_EO: Tensor,
        edge_weights_E: Tensor,
        order_C: Tensor | None,
    ) -> list[Tensor]:
        """The nodes of the cell, [B, C, H, W] each. states: the two preprocessed inputs."""
        if not self.groups:
            sources: list[tuple[int, ...]] = [(0, 1), *((state,) for state in range(2, self.nodes + 1))]
            self.groups = [
                _Group(cell, s, self.nodes, 2 if self.reduction and s[0] < 2 else 1, self.channels) for s in sources
            ]
        P = self.channels
        mixed: list[list[Tensor]] = [[] for _ in range(self.nodes)]
        bypasses: list[Tensor] = []
        nodes: list[Tensor] = []

        def add(group: _Group, members: Sequence[Tensor]) -> None:
            if order_C is not None:
                members = [state[:, order_C] for state in members]
            contribution = group.mixed([state[:, :P] for state in members], op_weights_EO, edge_weights_E)
            for i, part in enumerate(contribution.split(P, dim=1)):
                mixed[group.first_target + i].append(part)
            for state_BCHW in members:
                if cell.partial > 1:
                    bypass_BQHW = state_BCHW[:, P:]
                    if group.stride == 2:
                        bypass_BQHW = F.max_pool2d(bypass_BQHW, 2, 2, ceil_mode=True)
                    bypasses.append(bypass_BQHW.contiguous(memory_format=_layout(bypass_BQHW)))

        add(self.groups[0], states)
        edge = 0
        for node in range(self.nodes):
            total = mixed[node][0]
            for part in mixed[node][1:]:
                total = total + part
            if cell.partial > 1:
                weights = edge_weights_E[edge : edge + 2 + node]
                total = torch.cat([total, _WeightedSum.apply(weights, *bypasses)], dim=1)
            edge += 2 + node
            nodes.append(rearrange(total, cell.partial, cell.sampling, order_C))
            if node + 1 < self.nodes:
                add(self.groups[node + 1], nodes[-1:])
        return nodes
