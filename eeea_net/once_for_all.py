"""Networks of the once-for-all space (section 4.2): MobileNetV3-like blocks of chosen kernels, widths and depths.

Source: arXiv 2108.06156 section 4.2; Once-for-All (Cai et al. 2020); the released EEEA-Net-C1 and C2 (darmo 0.1.15),
whose names of weights are kept.

Shape suffixes: B batch, C channels, H W height and width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.files import read_yaml
from common.kernels.depthwise import DepthwiseConv2d

KERNELS, EXPANDS, DEPTHS = (3, 5, 7), (3, 4, 6), (2, 3, 4)
RESOLUTIONS = tuple(range(192, 257, 4))


@dataclass(frozen=True)
class Design:
    """What all networks of a space share; defaults: the paper's, for ImageNet.

    Args:
        stem: channels of the first convolution and of the first block.
        widths, strides, hswish, se: of each stage.
        final, mix: channels of the last 1x1 convolution and of the layer behind the pooling.
        first_stride: of the first convolution.
    """

    stem: int = 16
    widths: tuple[int, ...] = (24, 40, 80, 112, 160)
    strides: tuple[int, ...] = (2, 2, 2, 1, 2)
    hswish: tuple[bool, ...] = (False, False, True, True, True)
    se: tuple[bool, ...] = (False, True, False, True, True)
    final: int = 960
    mix: int = 1280
    classes: int = 1000
    in_channels: int = 3
    first_stride: int = 2


DESIGNS = {
    "imagenet": Design(),
    # of `configs/once_for_all.yaml`: pictures of 16 to 32 pixels
    "small": Design(8, (8, 16, 24), (1, 2, 2), (False, True, True), (False, True, True), 64, 96, first_stride=1),
}


@dataclass(frozen=True)
class SubnetChoice:
    """A member of the space: kernels and expansions of its blocks in order, blocks of each stage, side of pictures."""

    kernels: tuple[int, ...]
    expands: tuple[float, ...]
    depths: tuple[int, ...]
    resolution: int

    def __post_init__(self) -> None:
        blocks = sum(self.depths)
        if len(self.kernels) != blocks or len(self.expands) != blocks:
            raise UserError(
                f"a network of {blocks} blocks (depths {list(self.depths)}) needs as many kernels and expansions, not "
                f"{len(self.kernels)} and {len(self.expands)}"
            )


def divisible(value: float, by: int = 8) -> int:
    """The nearest multiple, at least `by` and not below 90 % of the value (MobileNet's rule)."""
    nearest = max(by, int(value + by / 2) // by * by)
    return nearest + by if nearest < 0.9 * value else nearest


@dataclass(frozen=True)
class Block:
    """One block, as the authors' configs write it; `mid_channels` None is inputs times expansion."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    expand_ratio: float
    mid_channels: int | None
    act_func: str
    use_se: bool
    shortcut: bool

    @property
    def middle(self) -> int:
        return self.mid_channels or round(self.in_channels * self.expand_ratio)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def subnet_blocks(
    kernels: Sequence[int], expands: Sequence[float], depths: Sequence[int], design: Design | None = None
) -> list[Block]:
    """The blocks of a member: a fixed first one, then the stages."""
    design = design or Design()
    blocks = [Block(design.stem, design.stem, 3, 1, 1, None, "relu", False, True)]
    inputs, chosen = design.stem, zip(kernels, expands, strict=True)
    for stage, depth in enumerate(depths):
        width = design.widths[stage]
        for place in range(depth):
            kernel, expand = next(chosen)
            stride = design.strides[stage] if place == 0 else 1
            activation = "h_swish" if design.hswish[stage] else "relu"
            middle = divisible(inputs * expand)
            same = stride == 1 and inputs == width
            blocks.append(Block(inputs, width, kernel, stride, expand, middle, activation, design.se[stage], same))
            inputs = width
    return blocks


def subnet_cost(choice: SubnetChoice, design: Design) -> tuple[int, int]:
    """(parameters, MACs) of a member at its resolution, from formulas; the same as `counting.measured`."""
    side = -(-choice.resolution // design.first_stride)
    parameters = 9 * design.in_channels * design.stem + 2 * design.stem
    macs = 9 * design.in_channels * design.stem * side * side
    blocks = subnet_blocks(choice.kernels, choice.expands, choice.depths, design)
    for block in blocks:
        middle, after = block.middle, -(-side // block.stride)
        if block.expand_ratio > 1:
            parameters += block.in_channels * middle + 2 * middle
            macs += block.in_channels * middle * side * side
        depthwise = middle * block.kernel_size**2
        parameters += depthwise + 2 * middle + middle * block.out_channels + 2 * block.out_channels
        macs += (depthwise + middle * block.out_channels) * after * after
        if block.use_se:
            narrow = divisible(middle // 4)
            parameters += 2 * middle * narrow + middle + narrow
            macs += 2 * middle * narrow
        side = after
    last = blocks[-1].out_channels
    parameters += last * design.final + 2 * design.final + design.final * design.mix
    parameters += (design.mix + 1) * design.classes
    macs += last * design.final * side * side + design.final * design.mix + design.mix * design.classes
    return parameters, macs


def activation(name: str) -> nn.Module:
    """`relu` or `h_swish`.

    Raises:
        UserError: another one.
    """
    if name not in ("relu", "h_swish"):
        raise UserError(f"activation {name!r}: expected relu or h_swish")
    return nn.Hardswish() if name == "h_swish" else nn.ReLU()


class Gate(nn.Module):
    """Squeeze-and-excitation of MobileNetV3: with biases, a quarter as wide inside, a hard sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = divisible(channels // 4)
        self.fc = nn.ModuleDict({"reduce": nn.Conv2d(channels, narrow, 1), "expand": nn.Conv2d(narrow, channels, 1)})

    def forward(self, x_BCHW: Tensor) -> Tensor:
        reduce, expand = self.convolutions()
        return x_BCHW * F.hardsigmoid(expand(F.relu(reduce(x_BCHW.mean((2, 3), keepdim=True)))))

    def convolutions(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """The narrowing and the widening one."""
        reduce, expand = self.fc["reduce"], self.fc["expand"]
        assert isinstance(reduce, nn.Conv2d) and isinstance(expand, nn.Conv2d)
        return reduce, expand


class ConvLayer(nn.Module):
    """A convolution, batch norm (or none), an activation (or none), a gate (or none)."""

    bn: nn.BatchNorm2d | None
    se: Gate | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: str = "",
        norm: bool = True,
        gate: bool = False,
    ) -> None:
        super().__init__()
        self.conv: nn.Conv2d
        if groups == inputs == outputs:
            self.conv = DepthwiseConv2d(inputs, kernel, stride, kernel // 2)
        else:
            self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs) if norm else None
        self.act = activation(act) if act else None
        self.se = Gate(outputs) if gate else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv(x_BCHW)
        for part in (self.bn, self.act, self.se):
            if part is not None:
                x_BCHW = part(x_BCHW)
        return x_BCHW


class SubnetBlock(nn.Module):
    """Widen (1x1), depthwise with a gate, narrow (1x1); the input is added where the shapes allow it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        middle, act = block.middle, block.act_func
        layers = {}
        if block.expand_ratio > 1:
            layers["inverted_bottleneck"] = ConvLayer(block.in_channels, middle, act=act)
        layers["depth_conv"] = ConvLayer(
            middle, middle, block.kernel_size, block.stride, middle, act, gate=block.use_se
        )
        layers["point_linear"] = ConvLayer(middle, block.out_channels)
        self.mobile_inverted_conv = nn.ModuleDict(layers)
        self.shortcut = block.shortcut

    def layers(self) -> list[ConvLayer]:
        """In the order in which they are computed."""
        return [layer for layer in self.mobile_inverted_conv.values() if isinstance(layer, ConvLayer)]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = x_BCHW
        for layer in self.layers():
            y_BCHW = layer(y_BCHW)
        return x_BCHW + y_BCHW if self.shortcut else y_BCHW


class Blocks(nn.ModuleList):
    """A list of blocks, for type checkers."""

    def __iter__(self) -> Iterator[SubnetBlock]:  # type: ignore[override]
        return super().__iter__()  # type: ignore[return-value]


class Subnet(nn.Module):
    """One network of the space, by itself."""

    blocks: Blocks

    def __init__(
        self,
        blocks: Sequence[Block],
        first: int = 16,
        final: int = 960,
        mix: int = 1280,
        classes: int = 1000,
        epsilon: float = 1e-5,
        momentum: float = 0.1,
        in_channels: int = 3,
        first_stride: int = 2,
    ) -> None:
        super().__init__()
        self.first_conv = ConvLayer(in_channels, first, 3, first_stride, act="h_swish")
        self.blocks = Blocks(SubnetBlock(block) for block in blocks)
        self.final_expand_layer = ConvLayer(blocks[-1].out_channels, final, act="h_swish")
        self.feature_mix_layer = ConvLayer(final, mix, act="h_swish", norm=False)
        self.classifier = nn.ModuleDict({"linear": nn.Linear(mix, classes)})
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = epsilon, momentum

    @classmethod
    def of(cls, choice: SubnetChoice, design: Design | None = None) -> Subnet:
        """The network of a choice."""
        design = design or Design()
        blocks = subnet_blocks(choice.kernels, choice.expands, choice.depths, design)
        sizes = (design.stem, design.final, design.mix, design.classes)
        return cls(blocks, *sizes, in_channels=design.in_channels, first_stride=design.first_stride)

    def block(self, place: int) -> SubnetBlock:
        """By its number, the fixed first one's being 0."""
        found = self.blocks[place]
        assert isinstance(found, SubnetBlock)
        return found

    def features(self, x_BCHW: Tensor, after: Sequence[int]) -> list[Tensor]:
        """Maps behind the blocks of these numbers, and behind the last 1x1 convolution (section 4.3's taps)."""
        found = []
        x_BCHW = self.first_conv(x_BCHW)
        for number, block in enumerate(self.blocks):
            x_BCHW = block(x_BCHW)
            if number in after:
                found.append(x_BCHW)
        return [*found, self.final_expand_layer(x_BCHW)]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Pictures to logits [B, K]."""
        return self.answers(self.features(x_BCHW, ())[0])

    def answers(self, last_BCHW: Tensor) -> Tensor:
        """Logits [B, K] from the maps behind the last 1x1 convolution."""
        return self.classifier["linear"](self.feature_mix_layer(last_BCHW.mean((2, 3), keepdim=True)).flatten(1))


def from_records(choice: dict[str, Any], design: dict[str, Any]) -> tuple[SubnetChoice, Design]:
    """A member and its design from what JSON holds of their fields.

    Raises:
        TypeError: a field is missing or unknown.
    """

    def fields(content: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}

    return SubnetChoice(**fields(choice)), Design(**fields(design))


def published_subnet(name: str) -> SubnetChoice:
    """EEEA_C1 or EEEA_C2.

    Raises:
        UserError: another name.
    """
    listed = read_yaml(Path(__file__).with_name("subnets.yaml"))
    if name not in listed:
        raise UserError(f"network {name!r}: expected one of {', '.join(listed)}")
    of = listed[name]
    return SubnetChoice(tuple(of["kernels"]), tuple(of["expands"]), tuple(of["depths"]), of["resolution"])


def from_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names: released files have `mobile_inverted_conv` or, in later releases of once-for-all, `conv`
    around a block's layers, and may be wrapped by DataParallel (`module.`)."""

    def renamed(name: str) -> str:
        name = name.removeprefix("module.")
        parts = name.split(".")
        if parts[0] == "blocks" and parts[2] == "conv":
            parts[2] = "mobile_inverted_conv"
        return ".".join(parts)

    return {renamed(name): value for name, value in state.items()}


def on_meta(choice: SubnetChoice, design: Design | None = None) -> Subnet:
    """The network on the meta device, to be counted."""
    with torch.device("meta"):
        return Subnet.of(choice, design)
