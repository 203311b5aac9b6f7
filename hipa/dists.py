"""DISTS (Ding et al. 2020, arXiv 2004.07728): similarity of texture and structure in the features of any trunk.

Features are the picture itself and five stages of a VGG16, each but the first begun by L2 pooling (Hanning window).

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.metrics.lpips import VGG16Trunk, read_tensors
from common.metrics.perceptual import perceptual_distance

C1 = C2 = 1e-6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for pictures in [0, 1]


class L2Pool(nn.Module):
    """Square root of the blurred square, every second pixel: pooling without aliasing."""

    filter: Tensor

    def __init__(self, channels: int, size: int = 5) -> None:
        super().__init__()
        window = np.hanning(size)[1:-1]
        kernel = torch.tensor(np.outer(window, window) / np.outer(window, window).sum(), dtype=torch.float32)
        self.register_buffer("filter", kernel[None, None].repeat(channels, 1, 1, 1))
        self.padding = (size - 2) // 2

    def forward(self, x_BCHW: Tensor) -> Tensor:
        square_BCHW = F.conv2d(x_BCHW.square(), self.filter, stride=2, padding=self.padding, groups=x_BCHW.shape[1])
        return (square_BCHW + 1e-12).sqrt()


class Dists(nn.Module):
    """1 - sum over features of (alpha l + beta s), [B]; 0 for equal pictures. Differentiable in both.

    Args:
        stages: five networks, each from the features before; they stay frozen.
        channels: of their outputs.
        name: of the trunk, which every reported number carries.
    """

    alpha: Tensor
    beta: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, stages: Sequence[nn.Module], channels: Sequence[int], name: str = "dists") -> None:
        super().__init__()
        self.stages, self.channels, self.name = nn.ModuleList(stages), [3, *channels], name
        count = sum(self.channels)
        # One weight for all, as DISTS starts; the official ones were fitted to ImageNet's VGG16.
        self.register_buffer("alpha", torch.full((1, count, 1, 1), 0.5 / count))
        self.register_buffer("beta", torch.full((1, count, 1, 1), 0.5 / count))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Dists:
        return super().train(False)

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """The picture in [0, 1] and its five stages."""
        found, h_BCHW = [x_BCHW], (x_BCHW - self.mean) / self.std
        for stage in self.stages:
            h_BCHW = stage(h_BCHW)
            found.append(h_BCHW)
        return found

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """Distance [B] of pictures in [0, 1]."""
        return self.between(self.features(x_BCHW), self.features(y_BCHW))

    def between(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        """The same of features, where those of a target are kept."""
        whole = self.alpha.sum() + self.beta.sum()
        weights = zip((self.alpha / whole).split(self.channels, 1), (self.beta / whole).split(self.channels, 1))
        similarity_B = x[0].new_zeros(len(x[0]))
        for f_BCHW, g_BCHW, (alpha, beta) in zip(x, y, weights):
            mean_f, mean_g = f_BCHW.mean((2, 3), keepdim=True), g_BCHW.mean((2, 3), keepdim=True)
            var_f = (f_BCHW - mean_f).square().mean((2, 3), keepdim=True)
            var_g = (g_BCHW - mean_g).square().mean((2, 3), keepdim=True)
            covariance = (f_BCHW * g_BCHW).mean((2, 3), keepdim=True) - mean_f * mean_g
            texture = (2 * mean_f * mean_g + C1) / (mean_f.square() + mean_g.square() + C1)
            structure = (2 * covariance + C2) / (var_f + var_g + C2)
            similarity_B = similarity_B + (alpha * texture + beta * structure).sum((1, 2, 3))
        return 1 - similarity_B


def dists(trunk: str = "trained") -> Dists:
    """DISTS on the trunk that `common.metrics.perceptual` names: trained, random, or files of VGG16's weights.

    The official channel weights are taken from a file that holds them (`vgg16.pth,weights.pt`).

    Raises:
        UserError: another network, or channel weights that do not fit it.
    """
    found = perceptual_distance(trunk).net
    if not isinstance(found, VGG16Trunk):
        raise UserError(f"--loss.trunk {trunk}: DISTS stands on VGG16; expected its weights, trained or random")
    stages = []
    for number, names in enumerate(found.stages):
        layers: list[nn.Module] = [L2Pool(found.channels[number - 1])] if number else []
        for name in names:
            layers += [found.features[name], nn.ReLU()]
        stages.append(nn.Sequential(*layers))
    network = Dists(stages, found.channels, f"dists-{found.name}")
    files = [] if trunk in ("trained", "random") else [Path(part.strip()) for part in trunk.split(",")]
    state = {key: value for file in files for key, value in read_tensors(file).items() if key in ("alpha", "beta")}
    for name, value in state.items():
        if len(state) < 2 or value.numel() != network.alpha.numel():
            raise UserError(
                f"--loss.trunk {trunk}: {name} has {value.numel()} weights; expected alpha and beta with "
                f"{network.alpha.numel()} each, one a channel"
            )
        getattr(network, name).copy_(value.view_as(network.alpha))
    return network
