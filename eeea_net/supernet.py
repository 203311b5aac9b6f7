"""The elastic network of the once-for-all space: one set of weights for every kernel, width, depth and resolution.

The weights are those of the largest member. Any other one takes the first channels, the first blocks of each stage and
the middle of each kernel, through a learned matrix (Once-for-All, section 3.3). A member runs on these very slices; a
test holds what is extracted to what was active.

Pictures are laid out channels last, in which CPUs compute depthwise convolutions, and above all their gradients, in
half the time or less.

Shape suffixes: B batch, C channels, H W height and width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.kernels.depthwise import depthwise
from eeea_net.once_for_all import (
    Block,
    ConvLayer,
    Design,
    Gate,
    Subnet,
    SubnetBlock,
    SubnetChoice,
    divisible,
    on_meta,
    subnet_blocks,
)


@dataclass(frozen=True)
class Elastic:
    """What may be chosen: kernels, expansions, depths of the stages, sides of the pictures."""

    kernels: tuple[int, ...]
    expands: tuple[int, ...]
    depths: tuple[int, ...]
    resolutions: tuple[int, ...]

    def draw(self, stages: int, random: np.random.Generator) -> SubnetChoice:
        """A member, every choice equally likely."""
        depths = tuple(int(random.choice(self.depths)) for _ in range(stages))
        blocks = sum(depths)
        kernels = tuple(int(random.choice(self.kernels)) for _ in range(blocks))
        expands = tuple(int(random.choice(self.expands)) for _ in range(blocks))
        return SubnetChoice(kernels, expands, depths, int(random.choice(self.resolutions)))

    def largest(self, stages: int) -> SubnetChoice:
        blocks = stages * max(self.depths)
        sizes = (max(self.kernels),) * blocks, (max(self.expands),) * blocks, (max(self.depths),) * stages
        return SubnetChoice(*sizes, max(self.resolutions))


def phases(elastic: Elastic) -> list[tuple[str, Elastic]]:
    """Progressive shrinking: all at its largest, then kernels, then depths, then widths become elastic, smaller ones
    step by step. The resolution is elastic from the start."""

    def largest(values: Sequence[int]) -> list[int]:
        return sorted(values, reverse=True)

    kernels, depths, expands = (largest(values) for values in (elastic.kernels, elastic.depths, elastic.expands))
    found = [("largest", Elastic((kernels[0],), (expands[0],), (depths[0],), elastic.resolutions))]
    if len(kernels) > 1:
        found.append(("kernel", Elastic(tuple(kernels), (expands[0],), (depths[0],), elastic.resolutions)))
    for count in range(2, len(depths) + 1):
        now = Elastic(tuple(kernels), (expands[0],), tuple(depths[:count]), elastic.resolutions)
        found.append((f"depth {count - 1}", now))
    for count in range(2, len(expands) + 1):
        now = Elastic(tuple(kernels), tuple(expands[:count]), tuple(depths), elastic.resolutions)
        found.append((f"width {count - 1}", now))
    return found


def middle(weight_OIKK: Tensor, side: int) -> Tensor:
    """The middle side x side entries of kernels."""
    margin = (weight_OIKK.shape[-1] - side) // 2
    return weight_OIKK[..., margin : margin + side, margin : margin + side]


def resized(x_BCHW: Tensor, side: int) -> Tensor:
    """Pictures at another resolution, channels last."""
    if x_BCHW.shape[-1] != side:
        x_BCHW = F.interpolate(x_BCHW, (side, side), mode="bilinear", antialias=True)
    return x_BCHW.contiguous(memory_format=torch.channels_last)


def _normalised(x_BCHW: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """By the first channels of a batch norm, whose statistics move in training mode."""
    count = x_BCHW.shape[1]
    mean, variance, weight, bias = norm.running_mean, norm.running_var, norm.weight, norm.bias
    assert mean is not None and variance is not None and norm.momentum is not None
    statistics, scale = (mean[:count], variance[:count]), (weight[:count], bias[:count])
    return F.batch_norm(x_BCHW, *statistics, *scale, norm.training, norm.momentum, norm.eps)


def _gated(x_BCHW: Tensor, gate: Gate) -> Tensor:
    """By the first channels of a gate, which is narrower inside for fewer of them."""
    count = x_BCHW.shape[1]
    reduce, expand = gate.convolutions()
    assert reduce.bias is not None and expand.bias is not None
    inside = divisible(count // 4)
    mean_BC11 = x_BCHW.mean((2, 3), keepdim=True)
    narrow_BC11 = F.relu(F.conv2d(mean_BC11, reduce.weight[:inside, :count], reduce.bias[:inside]))
    wide_BC11 = F.conv2d(narrow_BC11, expand.weight[:count, :inside], expand.bias[:count])
    return x_BCHW * F.hardsigmoid(wide_BC11)


class Supernet(nn.Module):
    """All members of an elastic space in one network.

    Args:
        elastic: the whole space; kernels are odd.
    """

    def __init__(self, elastic: Elastic, design: Design) -> None:
        super().__init__()
        self.elastic, self.design = elastic, design
        self.stages = len(design.widths)
        self.full = elastic.largest(self.stages)
        self.largest = Subnet.of(self.full, design)
        kernels = sorted(elastic.kernels, reverse=True)
        self.steps = list(pairwise(kernels))  # 7 to 5, 5 to 3
        blocks = len(self.full.kernels)
        self.transforms = nn.ModuleList(
            nn.ParameterDict({f"{a}to{b}": nn.Parameter(torch.eye(b * b)) for a, b in self.steps})
            for _ in range(blocks)
        )

    def place(self, choice: SubnetChoice, block: int) -> int:
        """Which block of the largest member holds the weights of a member's block (the fixed first one is 0)."""
        if block == 0:
            return 0
        left = block - 1
        for stage, depth in enumerate(choice.depths):
            if left < depth:
                return 1 + stage * max(self.elastic.depths) + left
            left -= depth
        raise IndexError(block)

    def _kernel(self, weight_OIKK: Tensor, place: int, side: int) -> Tensor:
        """A smaller kernel: the middle of the next larger one, through that step's matrix."""
        for before, after in self.steps:
            if weight_OIKK.shape[-1] == side:
                break
            if weight_OIKK.shape[-1] == before:
                flat = middle(weight_OIKK, after).reshape(-1, after * after)
                matrix = self.get_parameter(f"transforms.{place - 1}.{before}to{after}")
                weight_OIKK = F.linear(flat, matrix).view(*weight_OIKK.shape[:2], after, after)
        return weight_OIKK

    def state_of(self, choice: SubnetChoice) -> dict[str, Tensor]:
        """A member's parameters and statistics: slices of the largest one's, with their gradients."""
        own = dict(self.largest.named_parameters()) | dict(self.largest.named_buffers())
        found = {}
        for name, wanted in on_meta(choice, self.design).state_dict().items():
            parts = name.split(".")
            source, place = name, 0
            if parts[0] == "blocks":
                place = self.place(choice, int(parts[1]))
                source = ".".join(["blocks", str(place), *parts[2:]])
            value = own[source]
            if place and name.endswith("depth_conv.conv.weight"):
                value = self._kernel(value, place, wanted.shape[-1])
            found[name] = value[tuple(slice(0, size) for size in wanted.shape)] if wanted.ndim else value
        return found

    def forward(self, x_BCHW: Tensor, choice: SubnetChoice | None = None) -> Tensor:
        """Logits [B, K] of a member (default: the largest) at its resolution; in training mode its batches move the
        statistics of the channels that it has."""
        choice = choice or self.full
        x_BCHW = self.largest.first_conv(resized(x_BCHW, choice.resolution))
        for number, block in enumerate(subnet_blocks(choice.kernels, choice.expands, choice.depths, self.design)):
            y_BCHW = self._block(x_BCHW, block, self.place(choice, number))
            x_BCHW = x_BCHW + y_BCHW if block.shortcut else y_BCHW
        return self.largest.answers(self.largest.final_expand_layer(x_BCHW))

    def _block(self, x_BCHW: Tensor, block: Block, place: int) -> Tensor:
        """What a member's block computes, on slices of the largest one's."""
        layers = self.largest.block(place).layers()
        sizes = {0: block.middle, len(layers) - 1: block.out_channels}
        for number, layer in enumerate(layers):
            conv, outputs = layer.conv, sizes.get(number, block.middle)
            by_channel = conv.groups > 1
            weight = conv.weight[:outputs, : 1 if by_channel else x_BCHW.shape[1]]
            if by_channel and place:
                weight = self._kernel(weight, place, block.kernel_size)
            padding = weight.shape[-1] // 2
            if by_channel:
                x_BCHW = depthwise(x_BCHW, weight, conv.stride[0], padding)
            else:
                x_BCHW = F.conv2d(x_BCHW, weight, None, conv.stride, padding)
            if layer.bn is not None:
                x_BCHW = _normalised(x_BCHW, layer.bn)
            if layer.act is not None:
                x_BCHW = layer.act(x_BCHW)
            if layer.se is not None:
                x_BCHW = _gated(x_BCHW, layer.se)
        return x_BCHW

    @torch.no_grad()
    def extract(self, choice: SubnetChoice) -> Subnet:
        """A member by itself, with copies of its weights."""
        network = Subnet.of(choice, self.design)
        network.load_state_dict({name: value.detach().clone() for name, value in self.state_of(choice).items()})
        return network.to(next(self.parameters()).device)

    @torch.no_grad()
    def sort_channels(self) -> None:
        """Put the inner channels of every block in the order of their weight in its last convolution, the heaviest
        first, so that narrow members keep what counts. The largest member's output does not change."""
        for block in list(self.largest.blocks)[1:]:
            wide, depth, narrow = block.layers()
            order = narrow.conv.weight.abs().sum((0, 2, 3)).argsort(descending=True, stable=True)
            narrow.conv.weight.copy_(narrow.conv.weight[:, order])
            for layer in (wide, depth):
                layer.conv.weight.copy_(layer.conv.weight[order])
                for name in ("weight", "bias", "running_mean", "running_var"):
                    getattr(layer.bn, name).copy_(getattr(layer.bn, name)[order])
            if depth.se is not None:
                reduce, expand = depth.se.convolutions()
                reduce.weight.copy_(reduce.weight[:, order])
                for part in (expand.weight, expand.bias):
                    assert part is not None
                    part.copy_(part[order])


def _settled(layer: ConvLayer, values: list[Tensor], others: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Both through a layer in eval mode whose batch norm is given the statistics of all `values` together."""
    if layer.bn is not None:
        norm, maps = layer.bn, [layer.conv(value) for value in values]
        mean_C, variance_C, total = torch.zeros(1), torch.zeros(1), 0
        for one in maps:
            count = one.numel() // one.shape[1]
            own_C, spread_C = torch.zeros_like(norm.weight), torch.zeros_like(norm.weight)
            F.batch_norm(one, own_C, spread_C, training=True, momentum=1.0)
            own_C, spread_C = own_C.double(), spread_C.double() * (count - 1) / count
            # Chan, Golub, LeVeque 1983: moments of two parts together.
            shift_C = own_C - mean_C.to(own_C)
            share = count / (total + count)
            mean_C = mean_C.to(own_C) + share * shift_C
            variance_C = variance_C.to(own_C).lerp(spread_C, share) + share * (1 - share) * shift_C.square()
            total += count
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean_C)
        norm.running_var.copy_(variance_C)
        parts = [part for part in (norm, layer.act, layer.se) if part is not None]
        for part in parts:
            maps = [part(one) for one in maps]
    else:
        maps = [layer(value) for value in values]
    return maps, [layer(one) for one in others]


def _settled_block(block: SubnetBlock, values: list[Tensor], others: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    inner = (values, others)
    for layer in block.layers():
        inner = _settled(layer, *inner)
    if not block.shortcut:
        return inner
    added = ([a + b for a, b in zip(before, after)] for before, after in zip((values, others), inner))
    return next(added), next(added)


@torch.no_grad()
def recalibrate(network: Subnet, batches: Iterable[Tensor]) -> Subnet:
    """Give a member's batch norms the statistics of these pictures, exactly: each layer's mean and variance over all
    pictures, given that the layers before have theirs. Order and division into batches change nothing but rounding.

    Args:
        batches: pictures [B, C, H, W] at the member's resolution; one layer's maps of all of them are in memory.
    """
    network.eval()
    values, _ = _settled(network.first_conv, list(batches), [])
    for block in network.blocks:
        values, _ = _settled_block(block, values, [])
    _settled(network.final_expand_layer, values, [])
    return network


class Population:
    """Members that are re-calibrated and asked together: what two of them have in common from the pictures on is
    computed once. Each answers as it would alone.

    Args:
        calibration: pictures that the batch norms take their statistics from; pictures: that are asked about. Both
            [B, C, H, W] at the largest resolution.
        memory: bytes of maps that are kept for the next member.
    """

    def __init__(self, supernet: Supernet, calibration: Tensor, pictures: list[Tensor], memory: int = 2**30) -> None:
        self.supernet, self.calibration, self.pictures, self.memory = supernet, calibration, pictures, memory

    def _path(self, choice: SubnetChoice) -> list[tuple[Any, ...]]:
        """What decides each block's output, after the pictures' resolution."""
        blocks = subnet_blocks(choice.kernels, choice.expands, choice.depths, self.supernet.design)
        places = [self.supernet.place(choice, number) for number in range(len(blocks))]
        return [(choice.resolution,), *((at, b.kernel_size, b.expand_ratio) for at, b in zip(places, blocks))]

    @torch.no_grad()
    def logits(self, choices: Sequence[SubnetChoice]) -> Iterator[tuple[int, list[Tensor]]]:
        """(a member's number, its logits [B, K] of each batch of pictures), in an order that shares most."""
        paths = [self._path(choice) for choice in choices]
        kept: list[tuple[tuple[Any, ...], list[Tensor], list[Tensor]]] = []  # (step of the path, maps behind it)
        for number in sorted(range(len(choices)), key=paths.__getitem__):
            choice, path = choices[number], paths[number]
            network = self.supernet.extract(choice).eval()
            shared = 0
            while shared < min(len(kept), len(path)) and kept[shared][0] == path[shared]:
                shared += 1
            del kept[shared:]
            if kept:
                _, values, others = kept[-1]
            used = sum(map(_bytes, kept))
            for place in range(shared, len(path)):
                if place:
                    values, others = _settled_block(network.block(place - 1), values, others)
                else:
                    values = [resized(self.calibration, choice.resolution)]
                    others = [resized(one, choice.resolution) for one in self.pictures]
                    values, others = _settled(network.first_conv, values, others)
                state = (path[place], values, others)
                used += _bytes(state)
                if len(kept) == place and used <= self.memory:
                    kept.append(state)
            _, others = _settled(network.final_expand_layer, values, others)
            yield number, [network.answers(one) for one in others]


def _bytes(state: tuple[Any, list[Tensor], list[Tensor]]) -> int:
    return sum(one.numel() * one.element_size() for one in (*state[1], *state[2]))


def member_count(elastic: Elastic, stages: int) -> int:
    """How many networks the space has, resolutions included."""
    block = len(elastic.kernels) * len(elastic.expands)
    return len(elastic.resolutions) * math.prod([sum(block**depth for depth in elastic.depths)] * stages)
