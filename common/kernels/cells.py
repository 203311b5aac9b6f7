"""Joints of NASNet-like cells in forms that CPUs go back through fast; equal to rounding.

Shape suffixes: B batch, C channels, H W height and width, K output channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def corner_weights(even_KC11: Tensor, odd_KC11: Tensor) -> Tensor:
    """Kernels [2K, C, 2, 2] whose stride is 2: the first see the even pixels (rows and columns), the others the odd."""
    return torch.cat([F.pad(even_KC11, (0, 1, 0, 1)), F.pad(odd_KC11, (1, 0, 1, 0))])


def factorized_reduce(x_BCHW: Tensor, even_KC11: Tensor, odd_KC11: Tensor) -> Tensor:
    """Half the sides: 1x1 convolutions of stride 2 on the even and on the odd pixels, one behind the other.

    They are one convolution of 2 x 2 pixels: two of every other pixel copy the maps and go back two to three times
    slower. Odd sides are filled with zeros.
    """
    height, width = x_BCHW.shape[2:]
    if height % 2 or width % 2:
        x_BCHW = F.pad(x_BCHW, (0, width % 2, 0, height % 2))
    return F.conv2d(x_BCHW, corner_weights(even_KC11, odd_KC11), stride=2)


class _Concatenation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts_BCHW: Tensor) -> Tensor:
        ctx.widths = [part_BCHW.shape[1] for part_BCHW in parts_BCHW]
        return torch.cat(parts_BCHW, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient_BCHW: Tensor) -> tuple[Tensor, ...]:
        parts = gradient_BCHW.split(ctx.widths, dim=1)
        return tuple(part.contiguous(memory_format=torch.channels_last) for part in parts)


def concatenate(parts_BCHW: list[Tensor]) -> Tensor:
    """`torch.cat` over channels; with channels last the parts' gradients are maps of their own, not every so many
    channels of one map, which batch norm goes back through half as fast."""
    last = parts_BCHW[0].is_contiguous(memory_format=torch.channels_last)
    if last and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return cast(Tensor, _Concatenation.apply(*parts_BCHW))
    return torch.cat(parts_BCHW, dim=1)
