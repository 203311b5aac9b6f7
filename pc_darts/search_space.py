"""The search network of PC-DARTS: mixed operations on a part of the channels, cells, alphas and betas. K = 1 is DARTS.

Source: arXiv 1907.05737 sections 3.1 to 3.3; yuhuixu1993/PC-DARTS, model_search.py, model_search_imagenet.py.

Weights have the authors' names. Alphas and betas are parameters, hence in the state dict (the authors' are not).
What stands here computes one operation after the other, as the equations read; `fused.py` computes the same in batches.

Shape suffixes: B batch, C channels of a state, H W height and width, E edges of a cell, O operations, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pc_darts.config import Sampling, SearchConfig, SearchShape, Stem
from pc_darts.fused import FusedEdges
from pc_darts.genotypes import Cap, Genotype, derive, edge_count, edge_softmax
from pc_darts.operations import (
    PRIMITIVES,
    BatchNorm,
    FactorizedReduce,
    ReLUConvBN,
    make_operation,
    rearrange,
)

ARCHITECTURE = ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce")
INITIAL_SCALE = 1e-3  # of alphas and betas (section 4.2)
STEM_MULTIPLIER = 3


def is_reduction(cell: int, cells: int) -> bool:
    """Cells at one and two thirds of the depth halve the sides."""
    return cell in (cells // 3, 2 * cells // 3)


class MixedOp(nn.Module):
    """Equation 2: C / partial channels pass the weighted sum of all operations, the others bypass it.

    sampling: how other channels come first on the next edge. "shuffle" interleaves processed and bypassing channels
    (the paper's), "shift" moves the processed ones to the end, "random" puts every channel back in its place and takes
    the channels from a new random order in every training forward pass.
    """

    def __init__(self, channels: int, stride: int, partial: int, sampling: Sampling = "shuffle") -> None:
        super().__init__()
        self.processed = channels // partial
        self.partial, self.stride, self.sampling = partial, stride, sampling
        self.mp = nn.MaxPool2d(2, 2, ceil_mode=True)
        self._ops = nn.ModuleList()
        for name in PRIMITIVES:
            operation = make_operation(name, self.processed, stride, affine=False)
            if "pool" in name:
                operation = nn.Sequential(operation, BatchNorm(self.processed, affine=False))
            self._ops.append(operation)

    def forward(self, x_BCHW: Tensor, weights_O: Tensor, order_C: Tensor | None = None) -> Tensor:
        """weights_O: softmax of the alphas, in the order of PRIMITIVES. order_C: for random sampling."""
        if order_C is not None:
            x_BCHW = x_BCHW[:, order_C]
        part = x_BCHW[:, : self.processed]
        mixed = sum(weight * op(part) for weight, op in zip(weights_O, self._ops, strict=True))
        if self.partial == 1:
            return mixed
        bypass = x_BCHW[:, self.processed :]
        if self.stride == 2:
            bypass = self.mp(bypass)
        return rearrange(torch.cat([mixed, bypass], dim=1), self.partial, self.sampling, order_C)


class Cell(nn.Module):
    """A graph: two inputs, `nodes` nodes that each sum over all earlier states; the output concatenates them."""

    def __init__(
        self,
        config: SearchShape,
        before_last: int,
        last: int,
        channels: int,
        reduction: bool,
        reduction_before: bool,
        fused: bool = True,
    ) -> None:
        """before_last, last: channels of the two inputs. reduction_before: the previous cell halved the sides."""
        super().__init__()
        self.nodes, self.partial, self.sampling, self.channels = config.nodes, config.partial, config.sampling, channels
        self.reduction, self.fused = reduction, fused
        self.preprocess0: nn.Module
        if reduction_before:
            self.preprocess0 = FactorizedReduce(before_last, channels, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(before_last, channels, affine=False)
        self.preprocess1 = ReLUConvBN(last, channels, affine=False)
        self._ops = nn.ModuleList(
            MixedOp(channels, 2 if reduction and state < 2 else 1, config.partial, config.sampling)
            for node in range(config.nodes)
            for state in range(2 + node)
        )
        self.edges = FusedEdges(channels // config.partial, config.nodes, reduction)

    def forward(self, s0_BCHW: Tensor, s1_BCHW: Tensor, op_weights_EO: Tensor, edge_weights_E: Tensor) -> Tensor:
        """op_weights_EO, edge_weights_E: after their softmax. Returns [B, nodes * C, H, W] (half H, W if reducing)."""
        order_C = None
        if self.sampling == "random" and self.partial > 1 and self.training:
            order_C = torch.randperm(self.channels).to(s0_BCHW.device)
        states = [self.preprocess0(s0_BCHW), self.preprocess1(s1_BCHW)]
        if self.fused and self.training:
            nodes = self.edges(self, states, op_weights_EO, edge_weights_E, order_C)
            return torch.cat(nodes, dim=1)
        edge = 0
        for _ in range(self.nodes):
            total_BCHW = None
            for state_BCHW in states:
                term_BCHW = edge_weights_E[edge] * self._ops[edge](state_BCHW, op_weights_EO[edge], order_C)
                total_BCHW = term_BCHW if total_BCHW is None else total_BCHW + term_BCHW
                edge += 1
            states.append(total_BCHW)
        return torch.cat(states[2:], dim=1)


def make_stem(kind: Stem, in_channels: int, channels: int, first: int) -> dict[str, nn.Sequential]:
    """{"stem": 3x3 convolution}, or {"stem0", "stem1"}: three of stride 2, the first to `first` channels."""

    def conv(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), BatchNorm(outputs)]

    if kind == "cifar":
        return {"stem": nn.Sequential(*conv(in_channels, channels, 1))}
    return {
        "stem0": nn.Sequential(*conv(in_channels, first, 2), nn.ReLU(), *conv(first, channels, 2)),
        "stem1": nn.Sequential(nn.ReLU(), *conv(channels, channels, 2)),
    }


class SearchNetwork(nn.Module):
    """The network in which the cell is searched.

    fused: compute the mixed operations in batches (`fused.py`); same results and gradients, faster. Can be switched at
    any time with `set_fused`.
    """

    alphas_normal: nn.Parameter
    alphas_reduce: nn.Parameter
    betas_normal: nn.Parameter
    betas_reduce: nn.Parameter

    def __init__(self, config: SearchConfig, fused: bool = True) -> None:
        super().__init__()
        self.config = config
        channels, stem_channels = config.channels, STEM_MULTIPLIER * config.channels
        for name, module in make_stem(config.stem, config.in_channels, stem_channels, stem_channels // 2).items():
            self.add_module(name, module)
        before_last = last = stem_channels
        reduction_before = config.stem == "imagenet"
        self.cells = nn.ModuleList()
        for index in range(config.cells):
            reduction = is_reduction(index, config.cells)
            channels *= 2 if reduction else 1
            self.cells.append(Cell(config, before_last, last, channels, reduction, reduction_before, fused))
            reduction_before = reduction
            before_last, last = last, config.nodes * channels
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, config.classes)
        edges = edge_count(config.nodes)
        for name in ARCHITECTURE:
            shape = (edges, len(PRIMITIVES)) if name.startswith("alphas") else (edges,)
            learned = name.startswith("alphas") or config.edge_normalisation
            logits = torch.randn(shape) * INITIAL_SCALE if learned else torch.zeros(shape)
            self.register_parameter(name, nn.Parameter(logits, requires_grad=learned))

    def set_fused(self, fused: bool) -> SearchNetwork:
        """Choose how the mixed operations are computed; returns the network."""
        for cell in self.cells:
            assert isinstance(cell, Cell)
            cell.fused = fused
        return self

    def weights(self) -> list[nn.Parameter]:
        """What the training half of the images trains: everything but alphas and betas."""
        return [parameter for name, parameter in self.named_parameters() if name not in ARCHITECTURE]

    def architecture(self) -> list[nn.Parameter]:
        """What the validation half trains: alphas, and betas with edge normalisation."""
        return [getattr(self, name) for name in ARCHITECTURE if getattr(self, name).requires_grad]

    def op_weights(self, reduction: bool) -> Tensor:
        """Softmax of the alphas of a kind of cell, [E, O]."""
        return (self.alphas_reduce if reduction else self.alphas_normal).softmax(-1)

    def edge_weights(self, reduction: bool) -> Tensor:
        """Softmax of the betas over the edges into each node, [E]; ones without edge normalisation."""
        betas_E = self.betas_reduce if reduction else self.betas_normal
        return edge_softmax(betas_E) if self.config.edge_normalisation else torch.ones_like(betas_E)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images to logits [B, K]."""
        if self.config.stem == "imagenet":
            s0_BCHW = self.get_submodule("stem0")(x_BCHW)
            s1_BCHW = self.get_submodule("stem1")(s0_BCHW)
        else:
            s0_BCHW = s1_BCHW = self.get_submodule("stem")(x_BCHW)
        if x_BCHW.device.type == "cpu" and self.training and any(cell.fused for cell in self.cells):
            # Not before: over the stem's many pixels torch sums a channels-last batch norm less exactly.
            s0_BCHW, s1_BCHW = (s.contiguous(memory_format=torch.channels_last) for s in (s0_BCHW, s1_BCHW))
        kinds = (False, True)
        op_weights = {reduction: self.op_weights(reduction) for reduction in kinds}
        edge_weights = {reduction: self.edge_weights(reduction) for reduction in kinds}
        for cell in self.cells:
            kind = bool(cell.reduction)
            s0_BCHW, s1_BCHW = s1_BCHW, cell(s0_BCHW, s1_BCHW, op_weights[kind], edge_weights[kind])
        return self.classifier(self.global_pooling(s1_BCHW).flatten(1))

    @torch.no_grad()
    def genotype(self, cap: Cap | None = None) -> Genotype:
        """The cell that the present alphas and betas stand for."""
        if not self.config.edge_normalisation:
            return derive(self.alphas_normal, self.alphas_reduce, cap=cap)
        return derive(self.alphas_normal, self.alphas_reduce, self.betas_normal, self.betas_reduce, cap)
