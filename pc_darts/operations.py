"""The operations of the search space, channel shuffle and drop path.

Source: arXiv 1907.05737 section 3 and the DARTS space it builds on (arXiv 1806.09055 section 3.1);
yuhuixu1993/PC-DARTS, operations.py. Module names are those of the authors' code, so their state dicts fit.

Shape suffixes: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.batch_norm import statistics_group, synchronised_batch_norm
from common.errors import UserError
from common.kernels.cells import factorized_reduce
from common.kernels.depthwise import DepthwiseConv2d
from pc_darts.config import Sampling

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
# Only in published cells of other searches (NASNet, AmoebaNet), never searched over here.
FURTHER_OPERATIONS = ("sep_conv_7x7", "conv_7x1_1x7")
EPSILON, MOMENTUM = 1e-5, 0.1  # of every batch normalisation

_frozen: ContextVar[bool] = ContextVar("frozen", default=False)


@contextmanager
def frozen_statistics() -> Iterator[None]:
    """Running statistics keep their values inside; training mode still normalises by the batch.

    Architecture steps and finite differences run the network on other images and other weights, which must not count.
    """
    token = _frozen.set(True)
    try:
        yield
    finally:
        _frozen.reset(token)


def statistics_are_frozen() -> bool:
    return _frozen.get()


def batch_norm(
    x_BCHW: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    mean_C: Tensor | None,
    var_C: Tensor | None,
    training: bool,
    momentum: float = MOMENTUM,
) -> Tensor:
    """Batch normalisation that knows of `frozen_statistics` and `synchronised_statistics`.

    mean_C, var_C: running statistics, moved by `momentum` towards those of the batch in training mode, used in eval.
    """
    if not training:
        return F.batch_norm(x_BCHW, mean_C, var_C, weight_C, bias_C, False, 0.0, EPSILON)
    if _frozen.get():
        mean_C = var_C = None
    group = statistics_group()
    if group is None:
        return F.batch_norm(x_BCHW, mean_C, var_C, weight_C, bias_C, True, momentum, EPSILON)
    return synchronised_batch_norm(x_BCHW, weight_C, bias_C, mean_C, var_C, momentum, EPSILON, group)


class BatchNorm(nn.Module):
    """Batch normalisation without the counter of batches that the authors' checkpoints (torch 0.3) do not have."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return batch_norm(x_BCHW, self.weight, self.bias, self.running_mean, self.running_var, self.training)

    def extra_repr(self) -> str:
        return f"{self.channels}, affine={self.weight is not None}"


def _conv(inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, bias=False, **options)


class ReLUConvBN(nn.Module):
    """ReLU, 1x1 convolution, batch norm: brings the two inputs of a cell to its width."""

    def __init__(self, inputs: int, outputs: int, affine: bool) -> None:
        super().__init__()
        self.op = nn.Sequential(nn.ReLU(), _conv(inputs, outputs), BatchNorm(outputs, affine))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.op(x_BCHW)


class DilatedConv(nn.Module):
    """ReLU, depthwise kernel x kernel of dilation 2, 1x1, batch norm."""

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__()
        depthwise = DepthwiseConv2d(channels, kernel, stride, padding=kernel - 1, dilation=2)
        self.op = nn.Sequential(nn.ReLU(), depthwise, _conv(channels, channels), BatchNorm(channels, affine))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.op(x_BCHW)


class SeparableConv(nn.Module):
    """[ReLU, depthwise kernel x kernel, 1x1, batch norm] twice; the stride is in the first."""

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for step in (stride, 1):
            depthwise = DepthwiseConv2d(channels, kernel, step, padding=kernel // 2)
            layers += [nn.ReLU(), depthwise, _conv(channels, channels), BatchNorm(channels, affine)]
        self.op = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.op(x_BCHW)


def shifted(x_BCHW: Tensor) -> Tensor:
    """The image one pixel up and left, so that a stride of 2 meets the odd pixels; sides are rounded up to even."""
    H, W = x_BCHW.shape[2:]
    if H % 2 or W % 2:
        x_BCHW = F.pad(x_BCHW, (0, W % 2, 0, H % 2))
    return x_BCHW[:, :, 1:, 1:]


class FactorizedReduce(nn.Module):
    """Halves the sides: two 1x1 convolutions of stride 2, on even and on odd pixels, give half of the channels each.

    Raises:
        UserError: the number of output channels is odd.
    """

    def __init__(self, inputs: int, outputs: int, affine: bool) -> None:
        super().__init__()
        if outputs % 2:
            raise UserError(
                f"{outputs} channels cannot be halved at a stride of 2; make channels / partial an even number at the "
                "first reduction (channels 8 for partial 4)"
            )
        self.relu = nn.ReLU()
        self.conv_1 = _conv(inputs, outputs // 2, stride=2)
        self.conv_2 = _conv(inputs, outputs // 2, stride=2)
        self.bn = BatchNorm(outputs, affine)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.relu(x_BCHW)
        if torch.is_grad_enabled():
            return self.bn(factorized_reduce(x_BCHW, self.conv_1.weight, self.conv_2.weight))
        return self.bn(torch.cat([self.conv_1(x_BCHW), self.conv_2(shifted(x_BCHW))], dim=1))


class Zero(nn.Module):
    """No connection: zeros, at half the sides when the stride is 2."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW[:, :, :: self.stride, :: self.stride] * 0.0


def _factorised_7x7(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Sequential(
        nn.ReLU(),
        _conv(channels, channels, (1, 7), stride=(1, stride), padding=(0, 3)),
        _conv(channels, channels, (7, 1), stride=(stride, 1), padding=(3, 0)),
        BatchNorm(channels, affine),
    )


def make_operation(name: str, channels: int, stride: int, affine: bool) -> nn.Module:
    """One of PRIMITIVES or FURTHER_OPERATIONS on `channels` channels, without the search's norm after pools.

    Raises:
        UserError: no operation has this name.
    """
    if name == "none":
        return Zero(stride)
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride=stride, padding=1)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)
    if name in ("sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7"):
        return SeparableConv(channels, int(name[-1]), stride, affine)
    if name in ("dil_conv_3x3", "dil_conv_5x5"):
        return DilatedConv(channels, int(name[-1]), stride, affine)
    if name == "conv_7x1_1x7":
        return _factorised_7x7(channels, stride, affine)
    known = ", ".join(PRIMITIVES + FURTHER_OPERATIONS)
    raise UserError(f"operation {name!r} is unknown; expected one of {known}")


def channel_shuffle(x_BCHW: Tensor, groups: int) -> Tensor:
    """Interleave `groups` equal parts of the channels: channel g * (C / groups) + c moves to c * groups + g."""
    B, C, H, W = x_BCHW.shape
    return x_BCHW.view(B, groups, C // groups, H, W).transpose(1, 2).reshape(B, C, H, W)


def rearrange(x_BCHW: Tensor, partial: int, sampling: Sampling, order_C: Tensor | None) -> Tensor:
    """Channels [processed, bypassing] into the order in which the next edges see them."""
    if order_C is not None:
        return x_BCHW[:, order_C.argsort()]
    if partial == 1:
        return x_BCHW
    if sampling == "shift":
        return x_BCHW.roll(-(x_BCHW.shape[1] // partial), dims=1)
    return channel_shuffle(x_BCHW, partial)


def drop_path(x_BCHW: Tensor, probability: float, kept_B111: Tensor | None = None) -> Tensor:
    """Drop the whole path of an image with `probability`; what is kept is divided by the share kept.

    kept_B111: 1 where an image keeps the path, else 0; drawn when not given, for the batch of all processes inside
        `synchronised_statistics`, of which each takes the rows that `Batches` gave it.
    """
    if probability <= 0.0:
        return x_BCHW
    if kept_B111 is None:
        group = statistics_group()
        world, rank = (1, 0) if group is None else (group.size(), group.rank())
        drawn = x_BCHW.new_empty(len(x_BCHW) * world, 1, 1, 1).bernoulli_(1.0 - probability)
        kept_B111 = drawn[rank::world]
    return x_BCHW / (1.0 - probability) * kept_B111
