"""Heads of section 4.3 on a backbone's three maps: SSDLite, BiSeNet, SimpleBaseline.

Sources: SSD (Liu et al. 2016) with MobileNetV2's separable heads (Sandler et al. 2018, section 6.2); BiSeNet (Yu et al.
2018, figures 2 and 3); Simple Baselines (Xiao et al. 2018, section 2). Sizes are those of the authors' transfer code.

Shape suffixes: B batch, C channels, H W sides, K classes without the background, P priors; boxes are fractions of the
side, x0 y0 x1 y1 or, where it is said, centre and sides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from eeea_net.backbones import Backbone
from eeea_net.once_for_all import ConvLayer

# Sides of SSDLite's priors in pixels of its 320: one range a map, the last one repeated for further maps.
PRIOR_SIDES = ((60, 105), (105, 150), (150, 195), (195, 240), (240, 285), (285, 330))
PRIOR_PICTURE = 320
RATIOS = (2, 3)
PRIORS = 2 + 2 * len(RATIOS)  # of a place
EXPANSIONS = (0.2, 0.25, 0.5, 0.25)  # inside SSDLite's further layers
VARIANCES = (0.1, 0.2)


@cache
def priors(shapes: tuple[tuple[int, int], ...]) -> Tensor:
    """Boxes [P, 4] (centre x, y, width, height) that are corrected, map after map, row after row."""
    found = []
    for number, (height, width) in enumerate(shapes):
        low, high = (side / PRIOR_PICTURE for side in PRIOR_SIDES[min(number, len(PRIOR_SIDES) - 1)])
        sides = [(low, low), (math.sqrt(low * high),) * 2]
        for ratio in map(math.sqrt, RATIOS):
            sides += [(low * ratio, low / ratio), (low / ratio, low * ratio)]
        places = itertools.product(range(height), range(width))
        found += [((x + 0.5) / width, (y + 0.5) / height, w, h) for y, x in places for w, h in sides]
    boxes_P4 = torch.tensor(found, device="cpu")  # kept, so not on the device that happens to be in use
    boxes_P4[:, 2:] = boxes_P4[:, 2:].clamp(max=1)
    return boxes_P4


def corners(centred: Tensor) -> Tensor:
    """Centre and sides to x0 y0 x1 y1, in the last dimension."""
    middle, half = centred[..., :2], centred[..., 2:] / 2
    return torch.cat([middle - half, middle + half], -1)


def encode(boxes: Tensor, priors_P4: Tensor) -> Tensor:
    """What must be predicted for boxes (x0 y0 x1 y1) [..., P, 4], each by its prior (SSD, equation 2)."""
    middle, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]).clamp_min(1e-6)
    shift = (middle - priors_P4[:, :2]) / priors_P4[:, 2:] / VARIANCES[0]
    return torch.cat([shift, (sides / priors_P4[:, 2:]).log() / VARIANCES[1]], -1)


def decode(offsets: Tensor, priors_P4: Tensor) -> Tensor:
    """Boxes (x0 y0 x1 y1) of predictions: the inverse of `encode`."""
    middle = priors_P4[:, :2] + offsets[..., :2] * VARIANCES[0] * priors_P4[:, 2:]
    return corners(torch.cat([middle, priors_P4[:, 2:] * (offsets[..., 2:] * VARIANCES[1]).exp()], -1))


def _separable(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ConvLayer(inputs, inputs, 3, groups=inputs, act="relu"), nn.Conv2d(inputs, outputs, 1))


class SSDLite(nn.Module):
    """Scores and boxes from the two last maps of the backbone and further ones, each half as large.

    Args:
        classes: without the background, which is class 0 of the scores.
        extras: channels of the further maps.
    """

    def __init__(self, backbone: Backbone, classes: int, extras: Sequence[int] = (512, 256, 256, 64)) -> None:
        super().__init__()
        self.backbone, self.classes = backbone, classes
        layers, inputs = [], backbone.widths[-1]
        for outputs, expansion in zip(extras, itertools.chain(EXPANSIONS, itertools.repeat(EXPANSIONS[-1]))):
            inside = max(1, round(inputs * expansion))
            wide, depth = ConvLayer(inputs, inside, act="relu"), ConvLayer(inside, inside, 3, 2, inside, "relu")
            layers.append(nn.Sequential(wide, depth, ConvLayer(inside, outputs)))
            inputs = outputs
        self.extras = nn.ModuleList(layers)
        widths = [*backbone.widths[1:], *extras]

        def heads(values: int) -> nn.ModuleList:
            last = nn.Conv2d(widths[-1], PRIORS * values, 1)
            return nn.ModuleList([*(_separable(width, PRIORS * values) for width in widths[:-1]), last])

        self.scores, self.boxes = heads(classes + 1), heads(4)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(scores [B, P, K + 1], corrections [B, P, 4], priors [P, 4])."""
        maps = self.backbone(x_BCHW)[1:]
        for layer in self.extras:
            maps.append(layer(maps[-1]))

        def flat(heads: nn.ModuleList, values: int) -> Tensor:
            found = [head(one).permute(0, 2, 3, 1).flatten(1) for head, one in zip(heads, maps)]
            return torch.cat(found, 1).view(len(x_BCHW), -1, values)

        boxes_P4 = priors(tuple((one.shape[2], one.shape[3]) for one in maps)).to(x_BCHW.device)
        return flat(self.scores, self.classes + 1), flat(self.boxes, 4), boxes_P4


class Refinement(nn.Module):
    """Attention refinement (BiSeNet, figure 2b): a 3x3 convolution weighted by a gate that sees the whole map."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = ConvLayer(inputs, outputs, 3, act="relu")
        self.gate = ConvLayer(outputs, outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.conv(x_BCHW)
        return y_BCHW * self.gate(y_BCHW.mean((2, 3), keepdim=True)).sigmoid()


class Fusion(nn.Module):
    """Feature fusion (figure 2c) of both paths, side by side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = ConvLayer(inputs, outputs, act="relu")
        self.reduce = nn.Conv2d(outputs, outputs // 4, 1, bias=False)
        self.expand = nn.Conv2d(outputs // 4, outputs, 1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.conv(x_BCHW)
        gate_BC11 = self.expand(F.relu(self.reduce(y_BCHW.mean((2, 3), keepdim=True)))).sigmoid()
        return y_BCHW + y_BCHW * gate_BC11


class BiSeNet(nn.Module):
    """A class for every pixel: a spatial path of three convolutions beside the backbone's context path.

    The spatial path ends at the sides of twice the backbone's middle map (an eighth of the picture in the paper).

    Args:
        classes: with the background.
        width: of both paths.
    """

    def __init__(self, backbone: Backbone, classes: int, width: int = 128, in_channels: int = 3) -> None:
        super().__init__()
        self.backbone = backbone
        halvings = int(math.log2(backbone.strides[1])) - 1
        if not 0 <= halvings <= 3:
            raise UserError(f"BiSeNet needs maps of at most a sixteenth of the sides, not 1/{backbone.strides[1]}")
        strides = [2 if place < halvings else 1 for place in range(3)]
        half = width // 2
        self.spatial = nn.Sequential(
            ConvLayer(in_channels, half, 7, strides[0], act="relu"),
            ConvLayer(half, half, 3, strides[1], act="relu"),
            ConvLayer(half, half, 3, strides[2], act="relu"),
            ConvLayer(half, width, act="relu"),
        )
        middle, last = backbone.widths[1:]
        self.refine_middle, self.refine_last = Refinement(middle, width), Refinement(last, width)
        self.whole = ConvLayer(last, width, act="relu")
        self.up_last, self.up_middle = ConvLayer(width, width, 3, act="relu"), ConvLayer(width, width, 3, act="relu")
        self.fusion = Fusion(2 * width, 2 * width)

        def output(inputs: int, inside: int) -> nn.Sequential:
            return nn.Sequential(ConvLayer(inputs, inside, 3, act="relu"), nn.Conv2d(inside, classes, 1, bias=False))

        self.output = output(2 * width, 2 * width)
        self.auxiliary = nn.ModuleList([output(width, half), output(width, half)])

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Logits [B, K, H, W]; in training mode also those of the two auxiliary outputs."""
        _, middle_BCHW, last_BCHW = self.backbone(x_BCHW)
        whole_BC11 = self.whole(last_BCHW.mean((2, 3), keepdim=True))
        last_BCHW = self.refine_last(last_BCHW) + whole_BC11
        last_BCHW = self.up_last(F.interpolate(last_BCHW, middle_BCHW.shape[2:]))
        near_BCHW = self.spatial(x_BCHW)
        middle_BCHW = self.refine_middle(middle_BCHW) + last_BCHW
        middle_BCHW = self.up_middle(F.interpolate(middle_BCHW, near_BCHW.shape[2:]))
        logits = [self.output(self.fusion(torch.cat([near_BCHW, middle_BCHW], 1)))]
        if self.training:
            logits += [head(one) for head, one in zip(self.auxiliary, (middle_BCHW, last_BCHW))]
        sides = x_BCHW.shape[2:]
        return [F.interpolate(one, sides, mode="bilinear", align_corners=False) for one in logits]


class SimpleBaseline(nn.Module):
    """A heat map for every keypoint: transposed convolutions on the last map, each doubling its sides."""

    def __init__(self, backbone: Backbone, points: int, deconvolutions: Sequence[int] = (256, 256, 256)) -> None:
        super().__init__()
        self.backbone = backbone
        layers: list[nn.Module] = []
        inputs = backbone.widths[-1]
        for outputs in deconvolutions:
            up = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False)
            nn.init.normal_(up.weight, std=0.001)
            layers += [up, nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.up = nn.Sequential(*layers)
        self.output = nn.Conv2d(inputs, points, 1)
        nn.init.normal_(self.output.weight, std=0.001)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Heat maps [B, points, H, W]."""
        return self.output(self.up(self.backbone(x_BCHW)[-1]))
