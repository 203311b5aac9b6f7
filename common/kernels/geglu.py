"""GEGLU, value * GELU(gate): on CPUs in training it keeps its input alone and writes the gradient in place.

Plain torch keeps GELU(gate) too and puts the gradients of both halves together in another pass. Elsewhere (GPUs,
compiled code, no gradients) it is the plain expression.

Shapes: D features; the input holds value and gate side by side, [..., 2 D].
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def geglu(x: Tensor) -> Tensor:
    """[..., 2 D] to [..., D]: the first half times the exact GELU of the second."""
    if x.device.type != "cpu" or not (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return _plain(x)
    return cast(Tensor, _Geglu.apply(x))


def _plain(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _plain(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of these gradients are asked for
            with torch.enable_grad():
                return torch.autograd.grad(_plain(x), x, dout, create_graph=True)[0]
        value, gate = x.chunk(2, dim=-1)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dvalue, dgate = dx.chunk(2, dim=-1)
        torch.mul(dout, F.gelu(gate), out=dvalue)
        torch.ops.aten.gelu_backward.grad_input(dout * value, gate, grad_input=dgate)
        return dx
