"""Clipping by the global gradient norm where every rank holds other experts (Paddle's ClipGradForMOEByGlobalNorm).

The norm counts every parameter of the model once: dense gradients, equal on all ranks, are added locally; gradients of
experts and of sliced tensors are added over the ranks that hold the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from se_moe.communication import Group, group_size


@dataclass(frozen=True)
class Parts:
    """Parameters of which each rank of `group` holds others: its experts, its slices of dense tensors, its columns."""

    parameters: Sequence[nn.Parameter]
    group: Group


def _square_sum(parameters: Iterable[nn.Parameter]) -> Tensor:
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    return torch.stack([n.float() for n in torch._foreach_norm(grads)]).square().sum()


@torch.no_grad()
def global_norm(replicated: Iterable[nn.Parameter], parts: Sequence[Parts] = ()) -> Tensor:
    """Euclidean norm of the whole model's gradient, a float32 scalar, the same on every rank; a collective call."""
    total = _square_sum(replicated)
    for part in parts:
        own = _square_sum(part.parameters).to(total.device)
        if group_size(part.group) > 1:
            dist.all_reduce(own, group=part.group)
        total = total.to(own.device) + own
    return total.sqrt()


@torch.no_grad()
def clip_global_norm(replicated: Sequence[nn.Parameter], parts: Sequence[Parts] = (), max_norm: float = 1.0) -> Tensor:
    """Scale all gradients by min(1, max_norm / norm) and return the norm before clipping."""
    norm = global_norm(replicated, parts)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    grads = [p.grad for p in (*replicated, *(p for part in parts for p in part.parameters)) if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, scale)
    return norm
