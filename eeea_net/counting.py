"""Parameters and multiply-adds of a genotype's network, from formulas: some tenths of a millisecond a network.

A MAC is one product and one sum of a convolution or a linear layer. The same numbers come from the network itself on
the meta device (`measured`), in a thousand times as long; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from eeea_net.config import NetworkConfig
from eeea_net.genotypes import Genotype
from eeea_net.model import Network, is_reduction, widths


@dataclass(frozen=True)
class Counts:
    """Of one network without its auxiliary head; `macs` of one picture.

    official_parameters: with the non-local layer that each cell of the authors' code allocates and, without `se`, never
        uses. Their program compares these with beta.
    """

    parameters: int
    macs: int
    official_parameters: int


def _half(side: int) -> int:
    return -(-side // 2)


def _conv(weights: int, outputs: int, side: int) -> tuple[int, int]:
    """(parameters, MACs) of a convolution with a batch norm behind it."""
    return weights + 2 * outputs, weights * side * side


@cache
def operation_cost(name: str, channels: int, stride: int, side: int) -> tuple[int, int]:
    """(parameters, MACs) of an operation of the search space on maps of `side`."""
    area = (_half(side) if stride == 2 else side) ** 2
    square, kernel = channels * channels, int(name[-1]) if name[-1].isdigit() else 0
    depthwise = channels * kernel * kernel
    if name.endswith("pool_3x3") or name == "none" or (name == "skip_connect" and stride == 1):
        return 0, 0
    if name == "skip_connect":
        return square + 2 * channels, square * area
    if name.startswith("sep_conv"):
        return 2 * (depthwise + square + 2 * channels), 2 * (depthwise + square) * area
    if name.startswith("dil_conv"):
        return depthwise + square + 2 * channels, (depthwise + square) * area
    if name.startswith("inv_res"):
        return 2 * square + depthwise + 6 * channels, square * side * side + (depthwise + square) * area
    # 1x7 of stride (1, s), then 7x1 of stride (s, 1): the first halves the width alone
    return 14 * square + 2 * channels, 7 * square * (side * (_half(side) if stride == 2 else side) + area)


def count(genotype: Genotype, config: NetworkConfig, side: int) -> Counts:
    """Of the network for pictures of `side` x `side` pixels."""
    channels = config.channels
    if config.stem == "cifar":
        before_last = last = 3 * channels
        parameters, macs = _conv(27 * channels * config.in_channels, last, side)
        side_now = side
    else:
        before_last = last = channels
        parameters, macs, side_now = 0, 0, side
        for inputs, outputs in ((config.in_channels, channels // 2), (channels // 2, channels), (channels, channels)):
            side_now = _half(side_now)
            more = _conv(9 * inputs * outputs, outputs, side_now)
            parameters, macs = parameters + more[0], macs + more[1]
    unused = 0
    for layer, width in enumerate(widths(config)):
        reduction = is_reduction(layer, config.layers)
        cell = genotype.cell(reduction)
        side_after = _half(side_now) if reduction else side_now
        cost = [_conv(before_last * width, width, side_now), _conv(last * width, width, side_now)]
        for name, state in cell.pairs:
            early = reduction and state < 2
            cost.append(operation_cost(name, width, 2 if early else 1, side_now if early else side_after))
        before_last, last = last, width * len(cell.concat)
        non_local = 11 * last
        if config.se:
            narrow = last // 16
            gate = 2 * last * narrow
            cost.append((gate + non_local, gate + 9 * last * side_after * side_after))
        else:
            unused += non_local
        parameters += sum(one for one, _ in cost)
        macs += sum(one for _, one in cost)
        side_now = side_after
    parameters += (last + 1) * config.classes
    macs += last * config.classes
    return Counts(parameters, macs, parameters + unused)


@torch.no_grad()
def measured(network: nn.Module, side: int, in_channels: int = 3) -> tuple[int, int]:
    """(parameters without an auxiliary head, MACs) of a network as it is, which may lie on the meta device."""
    macs = 0

    def after(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal macs
        macs += output.numel() * (module.in_features if isinstance(module, nn.Linear) else module.weight[0].numel())  # type: ignore[operator, index]

    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(after) for layer in layers]
    training, device = network.training, next(network.parameters()).device
    try:
        network.eval()(torch.empty(1, in_channels, side, side, device=device))
    finally:
        for handle in handles:
            handle.remove()
        network.train(training)
    parameters = (p.numel() for name, p in network.named_parameters() if not name.startswith("auxiliary_head."))
    return sum(parameters), macs


def build_on_meta(genotype: Genotype, config: NetworkConfig) -> Network:
    """The network without memory, to be counted."""
    with torch.device("meta"):
        return Network(genotype, config)
