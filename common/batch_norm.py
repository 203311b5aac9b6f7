"""Batch normalisation by the statistics of all processes' rows: N processes compute what one does on the whole batch.

torch.nn.SyncBatchNorm refuses CPUs. Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_group: ContextVar[dist.ProcessGroup | None] = ContextVar("synchronised", default=None)


@contextmanager
def synchronised_statistics(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Batch statistics inside are those of all processes of `group` (default: all), forward and backward.

    Every process must hold the same number of images; N processes then compute what one does on the whole batch.
    """
    token = _group.set(group or dist.group.WORLD)
    try:
        yield
    finally:
        _group.reset(token)


def statistics_group() -> dist.ProcessGroup | None:
    """The processes that share the batch here; None outside `synchronised_statistics`."""
    return _group.get()


class _Sum(torch.autograd.Function):
    """Sum over processes; the gradient of a sum that everyone uses is the sum of everyone's gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def synchronised_batch_norm(
    x_BCHW: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    mean_C: Tensor | None,
    var_C: Tensor | None,
    momentum: float,
    epsilon: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """F.batch_norm in training mode, of the batch that the processes of `group` hold together.

    mean_C, var_C: running statistics, moved by `momentum` towards those of the batch.
    """
    given = x_BCHW.dtype
    x_BCHW = x_BCHW.to(torch.promote_types(given, torch.float32))
    count = x_BCHW.numel() // x_BCHW.shape[1] * group.size()
    shape = (1, -1, 1, 1)
    batch_mean_C = _Sum.apply(x_BCHW.sum((0, 2, 3)), group) / count
    centred_BCHW = x_BCHW - batch_mean_C.view(shape)
    batch_var_C = _Sum.apply(centred_BCHW.square().sum((0, 2, 3)), group) / count
    if mean_C is not None and var_C is not None:
        mean_C.lerp_(batch_mean_C.detach(), momentum)
        var_C.lerp_(batch_var_C.detach() * (count / (count - 1)), momentum)
    y_BCHW = centred_BCHW * torch.rsqrt(batch_var_C + epsilon).view(shape)
    if weight_C is not None:
        y_BCHW = y_BCHW * weight_C.view(shape)
    return (y_BCHW if bias_C is None else y_BCHW + bias_C.view(shape)).to(given)


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that knows of `synchronised_statistics`."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        group = statistics_group()
        if not self.training or group is None:
            return super().forward(x_BCHW)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        assert self.momentum is not None
        return synchronised_batch_norm(
            x_BCHW, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps, group
        )
