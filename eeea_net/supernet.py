"""The elastic network of the once-for-all space: one set of weights for every kernel, width, depth and resolution.

The weights are those of the largest member. Any other one takes the first channels, the first blocks of each stage and
the middle of each kernel, through a learned matrix (Once-for-All, section 3.3). A member runs as a `Subnet` on these
very slices, so that what is extracted is what was active.

Shape suffixes: B batch, C channels, H W height and width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from eeea_net.once_for_all import ConvLayer, Design, Subnet, SubnetChoice, on_meta


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


@lru_cache(maxsize=256)
def _skeleton(choice: SubnetChoice, design: Design) -> Subnet:
    """A member without weights, which are put in when it runs."""
    return on_meta(choice, design)


def resized(x_BCHW: Tensor, side: int) -> Tensor:
    """Pictures at another resolution."""
    if x_BCHW.shape[-1] == side:
        return x_BCHW
    return F.interpolate(x_BCHW, (side, side), mode="bilinear", antialias=True)


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
        for name, wanted in _skeleton(choice, self.design).state_dict().items():
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
        skeleton = _skeleton(choice, self.design).train(self.training)
        return functional_call(skeleton, self.state_of(choice), (resized(x_BCHW, choice.resolution),))

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


@torch.no_grad()
def recalibrate(network: Subnet, batches: Iterable[Tensor]) -> Subnet:
    """Give a member's batch norms the statistics of these pictures, exactly: each layer's mean and variance over all
    pictures, given that the layers before have theirs. Order and division into batches change nothing but rounding.

    Args:
        batches: pictures [B, C, H, W] at the member's resolution; one layer's maps of all of them are in memory.
    """

    def settled(layer: ConvLayer, values: list[Tensor]) -> list[Tensor]:
        maps = [layer.conv(value) for value in values]
        if layer.bn is not None:
            count = sum(one.numel() // one.shape[1] for one in maps)
            mean_C = torch.stack([one.double().sum((0, 2, 3)) for one in maps]).sum(0) / count
            square = [(one.double() - mean_C.view(1, -1, 1, 1)).square().sum((0, 2, 3)) for one in maps]
            assert layer.bn.running_mean is not None and layer.bn.running_var is not None
            layer.bn.running_mean.copy_(mean_C)
            layer.bn.running_var.copy_(torch.stack(square).sum(0) / count)
        parts = [part for part in (layer.bn, layer.act, layer.se) if part is not None]
        for part in parts:
            maps = [part(one) for one in maps]
        return maps

    network.eval()
    values = settled(network.first_conv, list(batches))
    for block in network.blocks:
        inner = values
        for layer in block.layers():
            inner = settled(layer, inner)
        values = [a + b for a, b in zip(values, inner)] if block.shortcut else inner
    settled(network.final_expand_layer, values)
    return network


def member_count(elastic: Elastic, stages: int) -> int:
    """How many networks the space has, resolutions included."""
    block = len(elastic.kernels) * len(elastic.expands)
    return len(elastic.resolutions) * math.prod([sum(block**depth for depth in elastic.depths)] * stages)
