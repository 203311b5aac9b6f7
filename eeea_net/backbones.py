"""Backbones of section 4.3: three maps, each half as large as the one before, of a network that classifies.

- a searched member of the once-for-all space, or EEEA-Net-C1 and C2;
- MobileNetV3-Large (Howard et al. 2019, table 1), of the same kind of blocks;
- cells of a genotype, pc_darts' among them.

Shape suffixes: B batch, C channels, H W sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from eeea_net.config import NetworkConfig
from eeea_net.counting import measured
from eeea_net.genotypes import Genotype
from eeea_net.model import Network, NetworkCell, is_reduction, widths
from eeea_net.once_for_all import DESIGNS, Design, Subnet, SubnetChoice, from_records, published_subnet
from eeea_net.training import load_model

# Kernels and expansions of MobileNetV3-Large's blocks, by stage of 24, 40, 80, 112 and 160 channels.
MOBILENET_V3 = (
    ((3, 4.0), (3, 3.0)),
    ((5, 3.0), (5, 3.0), (5, 3.0)),
    ((3, 6.0), (3, 2.5), (3, 2.3), (3, 2.3)),
    ((3, 6.0), (3, 6.0)),
    ((5, 6.0), (5, 6.0), (5, 6.0)),
)
SUBNETS = ("EEEA_C1", "EEEA_C2")
WIDEST = 256  # channels tried for cells of equal MACs


@dataclass(frozen=True)
class Plan:
    """How a classifier is built.

    Attributes:
        build: gives one with new weights.
        weights: that a trained one came with.
        design: of one of the once-for-all space.
        source: the folder of a trained one.
    """

    name: str
    build: Callable[[], Subnet | Network]
    weights: dict[str, Tensor] | None = None
    design: Design | None = None
    source: Path | None = None

    def macs(self, side: int, first_stride: int) -> int:
        """Of the backbone, for a picture."""
        with torch.device("meta"):
            network = self.build()
            return measured(Backbone.of(network, first_stride), side, first_convolution(network).in_channels)[1]


def first_convolution(network: Subnet | Network) -> nn.Conv2d:
    return next(module for module in network.modules() if isinstance(module, nn.Conv2d))


class Backbone(nn.Module):
    """The three last maps of different sides of a network, without its classifier.

    Attributes:
        widths: channels of the maps. strides: their pictures' pixels to one of theirs.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(network: Subnet | Network, first_stride: int) -> Backbone:
        """The network itself, with its weights; its first convolution takes the stride."""
        first = first_convolution(network)
        if isinstance(network, Subnet) or network.config.stem == "cifar":
            first.stride = (first_stride, first_stride)
        return SubnetBackbone(network) if isinstance(network, Subnet) else CellBackbone(network)


class SubnetBackbone(Backbone):
    """Behind the last block before each of the two last halvings, and behind the last 1x1 convolution."""

    def __init__(self, network: Subnet) -> None:
        super().__init__()
        depthwise = [block.layers()[-2].conv for block in network.blocks]
        strides = [conv.stride[0] for conv in depthwise]
        self.after = [place for place, (_, stride) in enumerate(pairwise(strides)) if stride == 2][-2:]
        outputs = [block.layers()[-1].conv.out_channels for block in network.blocks]
        self.widths = (*(outputs[place] for place in self.after), network.final_expand_layer.conv.out_channels)
        whole = first_convolution(network).stride[0]
        for stride in strides:
            whole *= stride
        self.strides = (whole // 4, whole // 2, whole)
        del network.feature_mix_layer, network.classifier
        self.network = network

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        return self.network.features(x_BCHW, self.after)


class CellBackbone(Backbone):
    """Before each of the two reduction cells, and behind the last cell."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        config = network.config
        layers = [place for place in range(config.layers) if is_reduction(place, config.layers)]
        self.after = [*(place - 1 for place in layers), config.layers - 1]
        cells = [cell for cell in network.cells if isinstance(cell, NetworkCell)]
        width_of = widths(config)
        self.widths = tuple(len(cells[place].concat) * width_of[place] for place in self.after)
        whole = 4 * first_convolution(network).stride[0] * (4 if config.stem == "imagenet" else 1)
        self.strides = (whole // 4, whole // 2, whole)
        del network.classifier
        self.network = network

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        return self.network.features(x_BCHW, self.after)


def mobilenet_v3(design: Design) -> SubnetChoice:
    """MobileNetV3-Large's kernels, expansions and depths; of three stages its first, second and last ones.

    Raises:
        UserError: a design of another number of stages.
    """
    stages = len(design.widths)
    if stages not in (3, 5):
        raise UserError(f"mobilenetv3 has five stages, or three; the design has {stages}")
    chosen = MOBILENET_V3 if stages == 5 else (*MOBILENET_V3[:2], MOBILENET_V3[-1])
    blocks = [block for stage in chosen for block in stage]
    sizes = (tuple(kernel for kernel, _ in blocks), tuple(expand for _, expand in blocks))
    return SubnetChoice(*sizes, tuple(map(len, chosen)), 224)


def widened(design: Design, factor: float) -> Design:
    """All widths times a factor, rounded to even numbers."""

    def even(width: int) -> int:
        return max(2, 2 * round(factor * width / 2))

    widths = tuple(map(even, design.widths))
    return replace(design, stem=even(design.stem), widths=widths, final=even(design.final), mix=even(design.mix))


def nearest(plan_of: Callable[[int], Plan], sizes: Sequence[int], macs: int, side: int, first_stride: int) -> Plan:
    """The plan, among those of growing sizes, whose MACs come nearest."""
    low, high = 0, len(sizes) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan_of(sizes[middle]).macs(side, first_stride) < macs else (low, middle)
    return min(
        (plan_of(size) for size in sizes[low : high + 1]), key=lambda plan: abs(plan.macs(side, first_stride) - macs)
    )


def evened(plan_of: Callable[[Design], Plan], design: Design, macs: int, side: int, first_stride: int) -> Plan:
    """Of a design some of whose widths grow or shrink by up to 4, until the MACs are within 1 % where that can be.

    A factor on all widths is too coarse for small designs: its steps are up to a quarter of the whole there.
    """

    def error(design: Design) -> float:
        return abs(plan_of(design).macs(side, first_stride) / macs - 1)

    for place in 2 * list(range(len(design.widths) + 2)):
        if error(design) <= 0.01:
            break
        design = min((_resized(design, place, change) for change in (0, -4, -2, 2, 4)), key=error)
    return plan_of(design)


def _resized(design: Design, place: int, change: int) -> Design:
    """With one other width; place 0 is the last one, which costs the least."""
    widths = [design.final, *reversed(design.widths), design.stem]
    widths[place] = max(2, widths[place] + change)
    return replace(design, final=widths[0], widths=tuple(reversed(widths[1:-1])), stem=widths[-1])


def plan_of(
    name: str, classes: int, channels: int, layers: int, like: Plan | None, side: int, first_stride: int
) -> Plan:
    """A backbone by its name (`TransferConfig.backbone`).

    Args:
        classes, channels: of the pictures that it classifies before the transfer.
        layers: of one that is made of cells.
        like: it is widened or narrowed to this one's MACs at `side` pixels.

    Raises:
        UserError: no such network, or a folder that holds another kind.
    """
    macs = like.macs(side, first_stride) if like is not None else 0
    folder = Path(name)
    if folder.is_dir():
        return _of_folder(folder, channels)
    if name in SUBNETS or name == "mobilenetv3":
        base = like.design if name == "mobilenetv3" and like is not None and like.design else DESIGNS["imagenet"]
        base = replace(base, classes=classes, in_channels=channels)
        chosen = published_subnet(name) if name in SUBNETS else mobilenet_v3(base)

        def planned(design: Design) -> Plan:
            return Plan(name, lambda: Subnet.of(chosen, design), design=design)

        def wide(percent: int) -> Plan:
            return planned(base if percent == 100 else widened(base, percent / 100))

        if like is None:
            return planned(base)
        even = nearest(wide, range(10, 801), macs, side, first_stride).design or base
        return evened(planned, even, macs, side, first_stride)
    genotype = Genotype.load(name)  # names what it expected
    config = NetworkConfig(channels=16, layers=layers, classes=classes, in_channels=channels)

    def cells(width: int) -> Plan:
        return Plan(folder.stem, _builder_of_cells(genotype, replace(config, channels=width)))

    return cells(16) if like is None else nearest(cells, range(2, WIDEST, 2), macs, side, first_stride)


def _of_folder(folder: Path, channels: int) -> Plan:
    """Of what `train.py` wrote."""
    network, about = load_model(folder)
    weights = dict(network.state_dict())
    taken = first_convolution(network).in_channels
    if taken != channels:
        raise UserError(f"--backbone {folder}: it takes pictures of {taken} channels, not {channels}")
    if not isinstance(network, Subnet):
        return Plan(folder.name, _builder_of_cells(network.genotype, network.config), weights, source=folder)
    choice, design = from_records(about["choice"], about["design"])
    return Plan(folder.name, lambda: Subnet.of(choice, design), weights, design, folder)


def _builder_of_cells(genotype: Genotype, config: NetworkConfig) -> Callable[[], Network]:
    return lambda: Network(genotype, config)
