"""The networks: cells of a genotype, stacked, for CIFAR-like and ImageNet-like pictures.

Source: arXiv 2108.06156 section 3.1 and figure 2; chakkritte/EEEA-Net, model.py and operations.py, whose names of
weights are kept. An inverted residual keeps its width there (figure 2 widens it 16 times).

Shape suffixes: B batch, C channels, H W height and width, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.kernels.cells import concatenate, factorized_reduce
from common.kernels.depthwise import DepthwiseConv2d
from eeea_net.config import NetworkConfig
from eeea_net.genotypes import Genotype


def _conv(inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, stride: int | tuple[int, int] = 1) -> nn.Conv2d:
    """A full convolution that keeps the sides at stride 1."""
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    return nn.Conv2d(inputs, outputs, sides, stride, (sides[0] // 2, sides[1] // 2), bias=False)


def _depthwise(channels: int, kernel: int, stride: int, dilation: int = 1) -> DepthwiseConv2d:
    return DepthwiseConv2d(channels, kernel, stride, dilation * (kernel - 1) // 2, dilation)


class Activated(nn.Module, ABC):
    """An operation that begins with a ReLU: `forward` takes the maps before it, `after` those behind it."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.after(F.relu(x_BCHW))

    @abstractmethod
    def after(self, x_BCHW: Tensor) -> Tensor: ...


class State:
    """Maps that several operations read; a ReLU that they begin with is taken once for all."""

    def __init__(self, x_BCHW: Tensor) -> None:
        self.x_BCHW = x_BCHW
        self._positive_BCHW: Tensor | None = None

    def through(self, operation: nn.Module) -> Tensor:
        if not isinstance(operation, Activated):
            return operation(self.x_BCHW)
        if self._positive_BCHW is None:
            self._positive_BCHW = F.relu(self.x_BCHW)
        return operation.after(self._positive_BCHW)


class ConvBN(nn.Module):
    """A convolution, batch norm."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.norm(self.conv(x_BCHW))


class ActConvBN(Activated, ConvBN):
    """ReLU, a convolution, batch norm."""

    def after(self, x_BCHW: Tensor) -> Tensor:
        return ConvBN.forward(self, x_BCHW)


class FactorizedReduce(Activated):
    """Half the sides: two 1x1 convolutions of stride 2, one on the even and one on the odd pixels.

    Raises:
        UserError: an odd number of channels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        if outputs % 2:
            raise UserError(f"{outputs} channels cannot be halved where the sides are; give an even number (channels)")
        self.conv_1 = _conv(inputs, outputs // 2, stride=2)
        self.conv_2 = _conv(inputs, outputs // 2, stride=2)
        self.bn = nn.BatchNorm2d(outputs)

    def after(self, x_BCHW: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.bn(factorized_reduce(x_BCHW, self.conv_1.weight, self.conv_2.weight))
        height, width = x_BCHW.shape[2:]
        odd_BCHW = F.pad(x_BCHW, (0, width % 2, 0, height % 2))[:, :, 1:, 1:]
        return self.bn(torch.cat([self.conv_1(x_BCHW), self.conv_2(odd_BCHW)], dim=1))


class Row(Activated, nn.Sequential):
    """Layers, the first of which is a ReLU."""

    def after(self, x_BCHW: Tensor) -> Tensor:
        for layer in islice(self, 1, None):
            x_BCHW = layer(x_BCHW)
        return x_BCHW


class Chain(Activated):
    """[ReLU, depthwise, 1x1, batch norm], twice for a separable convolution, once for a dilated one."""

    def __init__(self, channels: int, kernel: int, strides: tuple[int, ...], dilation: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stride in strides:
            depthwise = _depthwise(channels, kernel, stride, dilation)
            layers += [nn.ReLU(), depthwise, _conv(channels, channels), nn.BatchNorm2d(channels)]
        self.op = Row(*layers)

    def after(self, x_BCHW: Tensor) -> Tensor:
        return self.op.after(x_BCHW)


class InvertedResidual(nn.Module):
    """1x1, depthwise, 1x1, each with batch norm; no activation before the last; the input is added at stride 1."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.residual = stride == 1
        self.op = nn.Sequential(
            ActConvBN(_conv(channels, channels)),
            ActConvBN(_depthwise(channels, kernel, stride)),
            ConvBN(_conv(channels, channels)),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.op(x_BCHW)
        return x_BCHW + y_BCHW if self.residual else y_BCHW


class Zero(nn.Module):
    """No connection."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.zeros_like(x_BCHW[:, :, :: self.stride, :: self.stride])


def make_operation(name: str, channels: int, stride: int) -> nn.Module:
    """One of `genotypes.KNOWN`."""
    kernel = int(name[-1]) if name[-1].isdigit() else 0
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, padding=1)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels)
    if name == "none":
        return Zero(stride)
    if name.startswith("sep_conv"):
        return Chain(channels, kernel, (stride, 1), dilation=1)
    if name.startswith("dil_conv"):
        return Chain(channels, kernel, (stride,), dilation=2)
    if name.startswith("inv_res"):
        return InvertedResidual(channels, kernel, stride)
    if name == "conv_7x1_1x7":
        across, down = _conv(channels, channels, (1, 7), (1, stride)), _conv(channels, channels, (7, 1), (stride, 1))
        return Row(nn.ReLU(), across, down, nn.BatchNorm2d(channels))
    raise UserError(f"operation {name!r} is unknown")


class SqueezeExcite(nn.Module):
    """Channels weighted by a gate that sees their means; without biases, 16 times narrower inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = channels // 16
        if not narrow:
            raise UserError(f"se: a cell of {channels} channels is too narrow; give at least 16 (channels)")
        self.fc = nn.Sequential(
            nn.Linear(channels, narrow, bias=False), nn.ReLU(), nn.Linear(narrow, channels, bias=False), nn.Sigmoid()
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * self.fc(x_BCHW.mean((2, 3)))[:, :, None, None]


class NonLocal(nn.Module):
    """AutoNL's light non-local block: pixels attend to each other by the product of their features, without softmax.

    The authors' `f / H * W` is taken from left to right, so that nothing is normalised on square maps; it is kept. The
    batch norm's scale begins at zero: the block begins as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise_conv = _depthwise(channels, 3, 1)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[2:]
        x_BCN = x_BCHW.flatten(2)
        # (x^T x) x^T: whichever product comes first, the result is the same; the smaller one is made.
        if height * width < x_BCHW.shape[1]:
            y_BCN = x_BCN @ (x_BCN.transpose(1, 2) @ x_BCN)
        else:
            y_BCN = (x_BCN @ x_BCN.transpose(1, 2)) @ x_BCN
        y_BCHW = y_BCN.view_as(x_BCHW) / height * width
        return x_BCHW + self.bn(self.depthwise_conv(y_BCHW))


def drop_path(x_BCHW: Tensor, probability: float) -> Tensor:
    """Drop a picture's whole path with `probability`; what is kept is divided by the share kept."""
    kept_B111 = x_BCHW.new_empty(len(x_BCHW), 1, 1, 1).bernoulli_(1 - probability)
    return x_BCHW / (1 - probability) * kept_B111


class NetworkCell(nn.Module):
    """A cell in place: its two inputs brought to its width, then the blocks, then their concatenation."""

    def __init__(
        self,
        genotype: Genotype,
        before_last: int,
        last: int,
        channels: int,
        reduction: bool,
        reduction_before: bool,
        se: bool,
    ) -> None:
        super().__init__()
        cell = genotype.cell(reduction)
        self.states = [state for _, state in cell.pairs]
        self.concat = cell.concat
        self.preprocess0: nn.Module
        if reduction_before:
            self.preprocess0 = FactorizedReduce(before_last, channels)
        else:
            self.preprocess0 = ActConvBN(_conv(before_last, channels))
        self.preprocess1 = ActConvBN(_conv(last, channels))
        self._ops = nn.ModuleList(
            make_operation(name, channels, 2 if reduction and state < 2 else 1) for name, state in cell.pairs
        )
        width = channels * len(self.concat)
        self.se_layer = SqueezeExcite(width) if se else None
        self.nl_layer = NonLocal(width) if se else None

    def forward(self, s0: State, s1: State, drop_probability: float) -> Tensor:
        """drop_probability: of a path, per picture; identities are never dropped."""
        values = [State(s0.through(self.preprocess0)), State(s1.through(self.preprocess1))]
        for first in range(0, len(self._ops), 2):
            paths = []
            for place in (first, first + 1):
                operation = self._ops[place]
                path_BCHW = values[self.states[place]].through(operation)
                if drop_probability > 0 and not isinstance(operation, nn.Identity):
                    path_BCHW = drop_path(path_BCHW, drop_probability)
                paths.append(path_BCHW)
            values.append(State(paths[0] + paths[1]))
        y_BCHW = concatenate([values[state].x_BCHW for state in self.concat])
        if self.se_layer is not None and self.nl_layer is not None:
            y_BCHW = self.nl_layer(self.se_layer(y_BCHW))
        return y_BCHW


class AuxiliaryHead(nn.Module):
    """A second classifier at two thirds of the depth, in training only: DARTS', which sees two by two windows.

    The authors' are of 5 pixels at strides of 3 (CIFAR: sides of 8 to 10) or 2 (ImageNet: 7 and 8); for other sides
    they follow the map's.
    """

    def __init__(self, channels: int, classes: int, stem: str) -> None:
        super().__init__()
        self.stride = 3 if stem == "cifar" else 2
        layers: list[nn.Module] = [nn.ReLU(), nn.Identity(), _conv(channels, 128), nn.BatchNorm2d(128), nn.ReLU()]
        layers += [nn.Conv2d(128, 768, 2, bias=False)]
        layers += [nn.BatchNorm2d(768)] if stem == "cifar" else []  # the ImageNet head lacks it
        self.features = nn.Sequential(*layers, nn.ReLU())
        self.classifier = nn.Linear(768, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu(x_BCHW)
        if min(x_BCHW.shape[2:]) < 3:
            x_BCHW = F.adaptive_avg_pool2d(x_BCHW, 2)
        else:
            (high, down), (wide, across) = (self._window(side) for side in x_BCHW.shape[2:])
            x_BCHW = F.avg_pool2d(x_BCHW, (high, wide), (down, across))
        return self.classifier(self.features[2:](x_BCHW).flatten(1))

    def _window(self, side: int) -> tuple[int, int]:
        """(pixels, stride) of two windows along a side."""
        if (side - 5) // self.stride == 1:
            return 5, self.stride
        pixels = -(-3 * side // 5)
        return pixels, side - pixels


def make_stem(config: NetworkConfig) -> dict[str, nn.Module]:
    """Modules before the cells by name: `stem` (3C channels), or `stem0` and `stem1` (C channels, an eighth a side)."""
    channels = config.channels
    if config.stem == "cifar":
        return {"stem": nn.Sequential(_conv(config.in_channels, 3 * channels, 3), nn.BatchNorm2d(3 * channels))}
    narrow = channels // 2
    first = [_conv(config.in_channels, narrow, 3, 2), nn.BatchNorm2d(narrow), nn.ReLU()]
    second = [_conv(narrow, channels, 3, 2), nn.BatchNorm2d(channels)]
    third = [nn.ReLU(), _conv(channels, channels, 3, 2), nn.BatchNorm2d(channels)]
    return {"stem0": nn.Sequential(*first, *second), "stem1": nn.Sequential(*third)}


def is_reduction(layer: int, layers: int) -> bool:
    """Cells at a third and at two thirds of the depth halve the sides."""
    return layer in (layers // 3, 2 * layers // 3)


def widths(config: NetworkConfig) -> list[int]:
    """Channels of every cell: doubled at reductions, or growing by `increment` (pyramid)."""
    found, channels = [], config.channels
    for layer in range(config.layers):
        if config.increment:
            channels = config.channels + layer * config.increment
        elif is_reduction(layer, config.layers):
            channels *= 2
        found.append(channels)
    return found


class Network(nn.Module):
    """A genotype's cells, stacked (`NetworkCIFAR`, `PyramidNetworkCIFAR`, `NetworkImageNet` of the authors).

    Set `drop_path_probability` before each epoch; it counts in training mode only.
    """

    def __init__(self, genotype: Genotype, config: NetworkConfig) -> None:
        super().__init__()
        self.genotype, self.config = genotype, config
        self.drop_path_probability = 0.0
        for name, module in make_stem(config).items():
            self.add_module(name, module)
        before_last = last = config.channels * (3 if config.stem == "cifar" else 1)
        self.cells = nn.ModuleList()
        self.auxiliary_after = 2 * config.layers // 3
        self.auxiliary_head: AuxiliaryHead | None = None
        reduction_before = config.stem == "imagenet"
        for layer, channels in enumerate(widths(config)):
            reduction = is_reduction(layer, config.layers)
            cell = NetworkCell(genotype, before_last, last, channels, reduction, reduction_before, config.se)
            self.cells.append(cell)
            before_last, last = last, channels * len(cell.concat)
            reduction_before = reduction
            if config.auxiliary and layer == self.auxiliary_after:
                self.auxiliary_head = AuxiliaryHead(last, config.classes, config.stem)
        self.classifier = nn.Linear(last, config.classes)

    def _before_the_cells(self, x_BCHW: Tensor) -> tuple[State, State]:
        if self.config.stem == "imagenet":
            s0_BCHW = self.get_submodule("stem0")(x_BCHW)
            return State(s0_BCHW), State(self.get_submodule("stem1")(s0_BCHW))
        s = State(self.get_submodule("stem")(x_BCHW))
        return s, s

    def features(self, x_BCHW: Tensor, after: Sequence[int]) -> list[Tensor]:
        """Maps behind the cells of these numbers (section 4.3); no path is dropped."""
        found = []
        s0, s1 = self._before_the_cells(x_BCHW)
        for layer, cell in enumerate(self.cells):
            s0, s1 = s1, State(cell(s0, s1, 0.0))
            if layer in after:
                found.append(s1.x_BCHW)
        return found

    def with_auxiliary(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [B, K], and those of the auxiliary head in training mode, where there is one."""
        s0, s1 = self._before_the_cells(x_BCHW)
        probability = self.drop_path_probability if self.training else 0.0
        auxiliary_BK = None
        for layer, cell in enumerate(self.cells):
            s0, s1 = s1, State(cell(s0, s1, probability))
            if layer == self.auxiliary_after and self.training and self.auxiliary_head is not None:
                auxiliary_BK = self.auxiliary_head(s1.x_BCHW)
        return self.classifier(s1.x_BCHW.mean((2, 3))), auxiliary_BK

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Pictures to logits [B, K]."""
        return self.with_auxiliary(x_BCHW)[0]
