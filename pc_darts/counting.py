"""Sizes and costs: parameters and multiply-adds.

Source of the definitions: arXiv 1907.05737 tables 1 and 2; one multiply-add (MAC) is one product and one sum.

Shape suffixes: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pc_darts.config import FinalConfig
from pc_darts.genotypes import Cap, Genotype
from pc_darts.model import FinalNetwork
from pc_darts.operations import BatchNorm, make_operation
from pc_darts.search_space import SearchNetwork, is_reduction


@dataclass(frozen=True)
class Counts:
    """Sizes of a network; `macs` of one image, of convolutions and linear layers, without the auxiliary head.

    macs_with_norms: two more per element of every batch norm, which some published counts include.
    """

    parameters: int
    parameters_with_auxiliary: int
    macs: int
    macs_with_norms: int


def count(network: nn.Module, side: int, in_channels: int = 3) -> Counts:
    """Count a network for square images of `side` pixels; alphas and betas are not parameters of a search network.

    The network may be on the meta device; nothing is computed then.
    """
    parameters = network.weights() if isinstance(network, SearchNetwork) else list(network.parameters())
    auxiliary = getattr(network, "auxiliary_head", None)
    extra = sum(p.numel() for p in auxiliary.parameters()) if auxiliary is not None else 0
    total = sum(p.numel() for p in parameters)
    macs, norms = multiply_adds(network, torch.empty(1, in_channels, side, side, device=parameters[0].device))
    return Counts(total - extra, total, macs, macs + norms)


@torch.no_grad()
def multiply_adds(network: nn.Module, x_BCHW: Tensor) -> tuple[int, int]:
    """MACs of convolutions and linear layers in a forward pass, and of the batch norms (two an element)."""
    products = norms = 0

    def after(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal products, norms
        if isinstance(module, BatchNorm):
            norms += 2 * output.numel()
        elif isinstance(module, nn.Linear):
            products += output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            products += output.numel() * module.weight[0].numel()

    fused = isinstance(network, SearchNetwork) and any(cell.fused for cell in network.cells)
    if isinstance(network, SearchNetwork):
        network.set_fused(False)  # its modules are not called in the batched form
    training = network.training
    handles = [m.register_forward_hook(after) for m in network.modules() if not list(m.children())]
    try:
        network.eval()(x_BCHW)
    finally:
        for handle in handles:
            handle.remove()
        network.train(training)
        if isinstance(network, SearchNetwork):
            network.set_fused(fused)
    return products, norms


def size_cap(
    limit: float,
    measure: Literal["parameters", "macs"],
    config: FinalConfig,
    side: int = 32,
) -> Cap:
    """A bound for `derive` on the size of the final network (its auxiliary head apart) for pictures of `side` pixels.

    Parameters and MACs are exact: a network's size is a constant plus the sum of those of its chosen operations.
    """

    @cache
    def network_cost(genotype: Genotype) -> int:
        with torch.device("meta"):
            network = FinalNetwork(genotype, config)
        counts = count(network, side, config.in_channels)
        return counts.parameters if measure == "parameters" else counts.macs

    @cache
    def module_cost(name: str, width: int, stride: int, pixels: int) -> int:
        with torch.device("meta"):
            operation = make_operation(name, width, stride, affine=True)
            x_BCHW = torch.empty(1, width, pixels, pixels)
        if measure == "parameters":
            return sum(p.numel() for p in operation.parameters())
        return multiply_adds(operation, x_BCHW)[0]

    @cache
    def operation_cost(reduction: bool, name: str, state: int) -> int:
        """Over all cells of a kind."""
        width, pixels, total = config.channels, side, 0
        for _ in range(3 if config.stem == "imagenet" else 0):
            pixels = -(-pixels // 2)
        for index in range(config.layers):
            reduces = is_reduction(index, config.layers)
            width *= 2 if reduces else 1
            halved = -(-pixels // 2) if reduces else pixels
            if reduces == reduction:
                early = reduces and state < 2
                total += module_cost(name, width, 2 if early else 1, pixels if early else halved)
            pixels = halved
        return total

    def chosen(genotype: Genotype) -> int:
        return sum(
            operation_cost(reduction, *choice) for reduction in (False, True) for choice in genotype.choices(reduction)
        )

    @cache
    def constant(nodes: int) -> int:
        cell = tuple(("skip_connect", 0) for _ in range(2 * nodes))
        concat = tuple(range(2, 2 + nodes))
        simple = Genotype(cell, concat, cell, concat)
        return network_cost(simple) - chosen(simple)

    return Cap(limit, lambda genotype: constant(genotype.nodes) + chosen(genotype), operation_cost, measure)
