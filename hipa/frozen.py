"""Convolutions whose weights are frozen, without the activations that only those weights' gradients would need.

Torch keeps a convolution's input for the backward pass also where the weight needs no gradient. In a frozen U-Net and
decoder that is about a third of what a training step holds.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _FrozenConvolution(torch.autograd.Function):
    """A convolution that keeps its weight alone."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype, ctx.stride, ctx.padding = x_BCHW.shape, x_BCHW.dtype, stride, padding
        return F.conv2d(x_BCHW, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (grad_BCHW,) = ctx.saved_tensors, grads
        # Of the input only shape and layout are looked at: that of the gradient, or it would be turned around.
        last = not grad_BCHW.is_contiguous() and grad_BCHW.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        like_BCHW = torch.empty(ctx.shape, dtype=grad_BCHW.dtype, device=grad_BCHW.device, memory_format=layout)
        geometry = (ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1)
        found_BCHW, _, _ = torch.ops.aten.convolution_backward(
            grad_BCHW, like_BCHW, weight.to(grad_BCHW.dtype), None, *geometry, (True, False, False)
        )
        return found_BCHW.to(ctx.dtype), None, None, None, None


class FrozenConv2d(nn.Conv2d):
    """A `Conv2d` of zero padding, without dilation and groups, whose weights get no gradient."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (torch.is_grad_enabled() and input.requires_grad):
            return super()._conv_forward(input, weight, bias)
        return _FrozenConvolution.apply(input, weight, bias, self.stride, self.padding)  # type: ignore[no-any-return]


def spare_memory(module: nn.Module) -> int:
    """Make the frozen convolutions of a network `FrozenConv2d`s, in place; names and weights stay. Returns how many."""
    found = [
        m
        for m in module.modules()
        if type(m) is nn.Conv2d
        and not m.weight.requires_grad
        and (m.padding_mode, m.groups, tuple(m.dilation)) == ("zeros", 1, (1, 1))
        and not isinstance(m.padding, str)
    ]
    for convolution in found:
        convolution.__class__ = FrozenConv2d
    return len(found)
