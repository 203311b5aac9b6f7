"""Depthwise convolution whose gradients take faster ways to the same sums on CPUs.

oneDNN runs forward passes of depthwise convolutions by fast code whatever the kernel, and backward passes by fast code
for kernels of 3 without dilation alone; for the others they take up to a hundred times as long. So, of float32 maps on
a CPU, channels last:

* a dilated convolution whose stride is its dilation sees every stride-th pixel only: it is an ordinary one of those;
* at stride 1 the gradient of the maps is a forward pass with the kernel turned by 180 degrees;
* the gradient of the kernel at stride 1 is taken in parts that have fast code: a dilated one of each of the interleaved
  maps without dilation, a kernel wider than 3 in parts of 3 columns. On maps of few pixels it is the convolution of the
  maps with the gradient, every channel of every sample for itself, as a forward pass.

Everything else is torch's function. No rule is of one kind of CPU: each was several times faster or level with AVX2
and AVX-512. Sums are in another order, so results agree to rounding.

Shape suffixes: B batch, C channels, H W height and width, k the kernel's sides.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Pixels of a side, without those that a dilation leaves out, up to which samples and channels are the groups; twice as
# many where samples times channels are few.
_FEW, _GROUPS = 4, 1024
_COLUMNS = 3  # of a kernel that oneDNN has fast code for
_EXACT = (torch.float32, torch.float64)


def depthwise(x_BCHW: Tensor, weight_C1kk: Tensor, stride: int = 1, padding: int = 0, dilation: int = 1) -> Tensor:
    """`F.conv2d` with as many groups as channels, each with a kernel of its own; square kernels of odd sides."""
    if not _applies(x_BCHW, weight_C1kk):
        return F.conv2d(x_BCHW, weight_C1kk, None, stride, padding, dilation, len(weight_C1kk))
    if stride == dilation > 1 and padding % stride == 0:
        x_BCHW = x_BCHW[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)
        stride, padding, dilation = 1, padding // stride, 1
    if stride == 1 and 2 * padding == dilation * (weight_C1kk.shape[-1] - 1):
        return cast(Tensor, _SameSides.apply(x_BCHW, weight_C1kk, dilation))
    return F.conv2d(x_BCHW, weight_C1kk, None, stride, padding, dilation, len(weight_C1kk))


def _applies(x_BCHW: Tensor, weight_C1kk: Tensor) -> bool:
    """Whether gradients of maps with channels last will be taken on a CPU, in the maps' dtype."""
    return (
        torch.is_grad_enabled()
        and (x_BCHW.requires_grad or weight_C1kk.requires_grad)
        and x_BCHW.device.type == "cpu"
        and x_BCHW.dtype == weight_C1kk.dtype
        and x_BCHW.dtype in _EXACT
        and x_BCHW.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with as many groups as channels, without a bias, for square kernels."""

    def __init__(self, channels: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> None:
        super().__init__(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return depthwise(x_BCHW, self.weight, self.stride[0], cast(int, self.padding[0]), self.dilation[0])


class _SameSides(torch.autograd.Function):
    """Stride 1, sides kept."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, weight_C1kk: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x_BCHW, weight_C1kk)
        ctx.dilation = dilation
        return same_sides(x_BCHW, weight_C1kk, dilation)

    @staticmethod
    def backward(ctx: Any, gradient_BCHW: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_BCHW, weight_C1kk = ctx.saved_tensors
        gradient_BCHW = gradient_BCHW.contiguous(memory_format=torch.channels_last)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(gradient_BCHW, weight_C1kk, ctx.dilation)
        if ctx.needs_input_grad[1]:
            dw = kernel_gradient(x_BCHW, gradient_BCHW, weight_C1kk.shape[-1], ctx.dilation)
        return dx, dw, None


def same_sides(x_BCHW: Tensor, weight_C1kk: Tensor, dilation: int) -> Tensor:
    """The convolution at stride 1 that keeps the sides."""
    padding = dilation * (weight_C1kk.shape[-1] // 2)
    return F.conv2d(x_BCHW, weight_C1kk, None, 1, padding, dilation, len(weight_C1kk))


def input_gradient(gradient_BCHW: Tensor, weight_C1kk: Tensor, dilation: int) -> Tensor:
    """Gradient of the maps of `same_sides`."""
    return same_sides(gradient_BCHW, weight_C1kk.flip(2, 3), dilation)


def kernel_gradient(x_BCHW: Tensor, gradient_BCHW: Tensor, kernel: int, dilation: int) -> Tensor:
    """Gradient [C, 1, k, k] of the kernels of `same_sides`."""
    if kernel <= _COLUMNS and dilation == 1:
        return _plain(x_BCHW, gradient_BCHW, (kernel, kernel), kernel // 2)
    few = _FEW if x_BCHW.shape[0] * x_BCHW.shape[1] > _GROUPS else 2 * _FEW
    if min(x_BCHW.shape[2:]) <= few * dilation:
        return _samples_as_groups(x_BCHW, gradient_BCHW, kernel, dilation)
    if dilation > 1:
        x_BCHW, gradient_BCHW = (_interleaved(maps, dilation) for maps in (x_BCHW, gradient_BCHW))
    if kernel <= _COLUMNS:
        return _plain(x_BCHW, gradient_BCHW, (kernel, kernel), kernel // 2)
    pad, width, parts = kernel // 2, x_BCHW.shape[3], []
    padded_BCHW = F.pad(x_BCHW, (pad, pad))
    for first in range(0, kernel, _COLUMNS):
        columns = min(_COLUMNS, kernel - first)
        seen_BCHW = padded_BCHW[:, :, :, first : first + width + columns - 1]
        seen_BCHW = seen_BCHW.contiguous(memory_format=torch.channels_last)
        parts.append(_plain(seen_BCHW, gradient_BCHW, (kernel, columns), pad, 0))
    return torch.cat(parts, dim=3)


def _plain(
    x_BCHW: Tensor, gradient_BCHW: Tensor, kernel: tuple[int, int], above: int, beside: int | None = None
) -> Tensor:
    """torch's own, with so much padding above and beside."""
    channels = x_BCHW.shape[1]
    weight_C1kk = x_BCHW.new_empty(channels, 1, *kernel)
    padding = [above, above if beside is None else beside]
    arguments = ([1, 1], padding, [1, 1], False, [0, 0], channels, [False, True, False])
    return torch.ops.aten.convolution_backward(gradient_BCHW, x_BCHW, weight_C1kk, None, *arguments)[1]


def _samples_as_groups(x_BCHW: Tensor, gradient_BCHW: Tensor, kernel: int, dilation: int) -> Tensor:
    B, C, H, W = x_BCHW.shape
    x_1DHW = x_BCHW.permute(2, 3, 0, 1).reshape(1, H, W, B * C).permute(0, 3, 1, 2)
    padding = dilation * (kernel // 2)
    taps_1Dkk = F.conv2d(x_1DHW, gradient_BCHW.reshape(B * C, 1, H, W), None, dilation, padding, 1, B * C)
    return taps_1Dkk.view(B, C, kernel, kernel).sum(0).unsqueeze(1)


def _interleaved(x_BCHW: Tensor, step: int) -> Tensor:
    """Every `step`-th row and column as a map of its own, all of them in the batch; what lacks is zero."""
    B, C, H, W = x_BCHW.shape
    x_BCHW = F.pad(x_BCHW, (0, -W % step, 0, -H % step))
    high, wide = -(-H // step), -(-W // step)
    parts = x_BCHW.permute(0, 2, 3, 1).reshape(B, high, step, wide, step, C)
    return parts.permute(2, 4, 0, 1, 3, 5).reshape(step * step * B, high, wide, C).permute(0, 3, 1, 2)
