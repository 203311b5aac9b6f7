"""Distortion between two images: PSNR and SSIM, one value per image.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError

WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004, Section III-C
K1, K2 = 0.01, 0.03


def _range(a_NCHW: Tensor, b_NCHW: Tensor, data_range: float | None) -> float:
    if a_NCHW.shape != b_NCHW.shape or a_NCHW.ndim != 4:
        raise UserError(f"images {tuple(a_NCHW.shape)} and {tuple(b_NCHW.shape)}: expected one shape [N,C,H,W]")
    if a_NCHW.dtype != b_NCHW.dtype:
        raise UserError(f"cannot compare {a_NCHW.dtype} with {b_NCHW.dtype} images: convert both to uint8 or float")
    if data_range is not None:
        return data_range
    return 255.0 if a_NCHW.dtype == torch.uint8 else 1.0


def psnr(a_NCHW: Tensor, b_NCHW: Tensor, data_range: float | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB, float64 [N]; infinite for equal images.

    data_range: largest minus smallest possible value; by default 255 for uint8 and 1 for floats.
    """
    peak = _range(a_NCHW, b_NCHW, data_range)
    error_N = (a_NCHW.double() - b_NCHW.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(peak**2 / error_N)


def ssim(a_NCHW: Tensor, b_NCHW: Tensor, data_range: float | None = None) -> Tensor:
    """Structural similarity (Wang et al. 2004, Eq. 13), float64 [N], averaged over channels and full windows.

    Gaussian window 11 x 11, sigma 1.5, biased moments; the same data_range rule as `psnr`. Needs sides >= 11.
    """
    peak = _range(a_NCHW, b_NCHW, data_range)
    channels, height, width = a_NCHW.shape[1:]
    if min(height, width) < WINDOW:
        raise UserError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels, got {height} x {width}")
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=a_NCHW.device) - WINDOW // 2
    taps = torch.exp(-offsets.square() / (2 * SIGMA**2))
    taps /= taps.sum()

    def blur(x_NCHW: Tensor) -> Tensor:
        rows = F.conv2d(x_NCHW, taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(rows, taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    a, b = a_NCHW.double(), b_NCHW.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    map_NCHW = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    )
    return map_NCHW.mean(dim=(1, 2, 3))
