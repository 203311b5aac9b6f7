"""DISTS (Ding et al. 2020, arXiv 2004.07728): similarity of texture and structure in the features of any trunk.

Features are the picture itself and five stages of a VGG16, each but the first begun by L2 pooling (Hanning window).

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

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
        return _L2Pooling.apply(x_BCHW, self.filter, self.padding)  # type: ignore[no-any-return]


def _whole(x: Tensor) -> Tensor:
    """At least single precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _L2Pooling(torch.autograd.Function):
    """sqrt(blur(x^2)), keeping what goes in and comes out: torch would keep the squares too."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, filter_C1kk: Tensor, padding: int) -> Tensor:
        square_BCHW = F.conv2d(x_BCHW.square(), filter_C1kk, stride=2, padding=padding, groups=x_BCHW.shape[1])
        y_BCHW = square_BCHW.add_(1e-12).sqrt_()
        ctx.save_for_backward(x_BCHW, y_BCHW, filter_C1kk)
        ctx.padding = padding
        return y_BCHW

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_BCHW: Tensor) -> tuple[Tensor, None, None]:
        x_BCHW, y_BCHW, filter_C1kk = ctx.saved_tensors
        square_BCHW = conv2d_input(
            x_BCHW.shape, filter_C1kk.to(y_BCHW.dtype), grad_BCHW / y_BCHW, 2, ctx.padding, groups=x_BCHW.shape[1]
        )
        return square_BCHW.mul_(x_BCHW), None, None  # 2 x / (2 y)


class _Similarity(torch.autograd.Function):
    """Sum over channels of alpha l + beta s [B] (equations 3 and 4), keeping nothing but the features.

    Its gradient is linear in them: of l and s by the means, variances and the covariance of each channel.
    """

    @staticmethod
    def forward(ctx: Any, f_BCHW: Tensor, g_BCHW: Tensor, alpha_C: Tensor, beta_C: Tensor) -> Tensor:
        f_BCN, g_BCN = _whole(f_BCHW).flatten(2), _whole(g_BCHW).flatten(2)
        mean_f, mean_g = f_BCN.mean(2), g_BCN.mean(2)
        f_BCN, g_BCN = f_BCN - mean_f[..., None], g_BCN - mean_g[..., None]
        # Products of rows: torch.var_mean takes five to ten times as long on CPUs.
        dot, count = torch.linalg.vecdot, f_BCN.shape[2]
        var_f, var_g, covariance = (dot(x, y) / count for x, y in ((f_BCN, f_BCN), (g_BCN, g_BCN), (f_BCN, g_BCN)))
        texture = (2 * mean_f * mean_g + C1) / (mean_f.square() + mean_g.square() + C1)
        structure = (2 * covariance + C2) / (var_f + var_g + C2)
        ctx.save_for_backward(f_BCHW, g_BCHW, alpha_C, beta_C, mean_f, mean_g, var_f + var_g, texture, structure)
        return (alpha_C * texture + beta_C * structure).sum(1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        f_BCHW, g_BCHW, alpha_C, beta_C, mean_f, mean_g, variances, texture, structure = ctx.saved_tensors
        each = grad_B[:, None] / f_BCHW[0, 0].numel()
        by_mean = 2 * alpha_C * each / (mean_f.square() + mean_g.square() + C1)
        by_product = 2 * beta_C * each / (variances + C2)

        def of(x: Tensor, y: Tensor, mean_x: Tensor, mean_y: Tensor) -> Tensor:
            # by_product (y - mean_y - s (x - mean_x)) + by_mean (mean_y - l mean_x): alike features cancel exactly.
            shift = by_mean * (mean_y - mean_x * texture) - by_product * (mean_y - structure * mean_x)
            likeness, scale, shift = (z[:, :, None, None] for z in (structure, by_product, shift))
            return torch.addcmul(_whole(y), _whole(x), likeness, value=-1).mul_(scale).add_(shift).to(x.dtype)

        for_f = of(f_BCHW, g_BCHW, mean_f, mean_g) if ctx.needs_input_grad[0] else None
        for_g = of(g_BCHW, f_BCHW, mean_g, mean_f) if ctx.needs_input_grad[1] else None
        return for_f, for_g, None, None


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
        weights = zip(*((part.flatten() / whole).split(self.channels) for part in (self.alpha, self.beta)))
        similarity_B = x[0].new_zeros(len(x[0]))
        for f_BCHW, g_BCHW, (alpha_C, beta_C) in zip(x, y, weights):
            similarity_B = similarity_B + _Similarity.apply(f_BCHW, g_BCHW, alpha_C, beta_C)
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
