"""What a picture holds at which frequency: bands, spectra, coherence, edges.

Frequencies are in cycles per picture: radius sqrt(fx^2 + fy^2) with f = fftfreq(n) n, also where H and W differ. All
transforms are orthonormal, so that sums over frequencies are sums over pixels.

Shape suffixes: B batch, C channels, H height, W width, F columns of the real FFT, R radii.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError

TINY = 1e-12


def radii(height: int, width: int, half: bool = False) -> Tensor:
    """Radius of every frequency in the order of the FFT, [H, W], or [H, W // 2 + 1] of the real one."""
    rows_H = torch.fft.fftfreq(height, dtype=torch.float64) * height
    columns_W = (torch.fft.rfftfreq if half else torch.fft.fftfreq)(width, dtype=torch.float64) * width
    return (rows_H.square()[:, None] + columns_W.square()[None]).sqrt()


def low_pass(x_BCHW: Tensor, radius: float, gaussian: bool = False) -> Tensor:
    """What lies at most `radius` from the mean: an ideal circular mask, or a Gaussian of that deviation."""
    height, width = x_BCHW.shape[-2:]
    distance_HF = radii(height, width, half=True).to(x_BCHW.device)
    mask_HF = (-0.5 * (distance_HF / radius).square()).exp() if gaussian else (distance_HF <= radius).float()
    return torch.fft.irfft2(torch.fft.rfft2(x_BCHW.float()) * mask_HF, s=(height, width))


def high_pass(x_BCHW: Tensor, radius: float, gaussian: bool = False) -> Tensor:
    """The rest."""
    return x_BCHW - low_pass(x_BCHW, radius, gaussian)


def exchanged(low_BCHW: Tensor, high_BCHW: Tensor, radius: float) -> Tensor:
    """Low frequencies of the first, high ones of the second."""
    return low_pass(low_BCHW, radius) + high_pass(high_BCHW, radius)


def high_frequency_share(x_BCHW: Tensor, radius: float) -> Tensor:
    """Energy above `radius` over all energy, [B]."""
    power_BCHW = torch.fft.fft2(x_BCHW.double(), norm="ortho").abs().square()
    above_HW = radii(*x_BCHW.shape[-2:]).to(x_BCHW.device) > radius
    return ((power_BCHW * above_HW).sum((1, 2, 3)) / power_BCHW.sum((1, 2, 3)).clamp(min=TINY)).float()


def radial_power(x_BCHW: Tensor) -> Tensor:
    """Mean |FFT|^2 over batch, channels and the frequencies of each rounded radius, [R]: 0 .. min(H, W) / 2."""
    height, width = x_BCHW.shape[-2:]
    power_HW = torch.fft.fft2(x_BCHW.double(), norm="ortho").abs().square().mean((0, 1))
    ring_HW = radii(height, width).round().long().to(x_BCHW.device)
    count = min(height, width) // 2 + 1
    total_R = power_HW.new_zeros(int(ring_HW.max()) + 1).index_add_(0, ring_HW.flatten(), power_HW.flatten())
    size_R = torch.bincount(ring_HW.flatten(), minlength=len(total_R))
    return (total_R / size_R)[:count].float()


def bands(height: int, width: int, edges: Sequence[float]) -> Tensor:
    """Masks [R, H, W] of the rings edges[i] < radius <= edges[i + 1], in the order of the FFT."""
    distance_HW = radii(height, width)
    return torch.stack([(distance_HW > a) & (distance_HW <= b) for a, b in pairwise(edges)])


def coherence(x_BCHW: Tensor, y_BCHW: Tensor, edges: Sequence[float]) -> Tensor:
    """How far two sets of pictures agree, band by band, [R]: |sum X conj Y| / sqrt(sum |X|^2 sum |Y|^2).

    The sums run over pictures, channels and the band; noise of any energy agrees with nothing.
    """
    if x_BCHW.shape != y_BCHW.shape:
        raise UserError(f"coherence of {tuple(x_BCHW.shape)} with {tuple(y_BCHW.shape)}: expected equal shapes")
    x, y = (torch.fft.fft2(z.double(), norm="ortho") for z in (x_BCHW, y_BCHW))
    masks_RHW = bands(x_BCHW.shape[-2], x_BCHW.shape[-1], edges).to(x_BCHW.device)
    cross, power_x, power_y = (z.sum((0, 1)) for z in ((x * y.conj()).real, x.abs().square(), y.abs().square()))

    def over(z_HW: Tensor) -> Tensor:
        return (masks_RHW * z_HW).sum((1, 2))

    return (over(cross) / (over(power_x) * over(power_y)).sqrt().clamp(min=TINY)).float()


def relative_error(x_BCHW: Tensor, y_BCHW: Tensor, edges: Sequence[float]) -> Tensor:
    """sqrt(sum |X - Y|^2 / sum |Y|^2) in every band, [R]: the error of pictures x against y."""
    masks_RHW = bands(x_BCHW.shape[-2], x_BCHW.shape[-1], edges).to(x_BCHW.device)
    error, power = (
        torch.fft.fft2(z.double(), norm="ortho").abs().square().sum((0, 1)) for z in (x_BCHW - y_BCHW, y_BCHW)
    )
    return ((masks_RHW * error).sum((1, 2)) / (masks_RHW * power).sum((1, 2)).clamp(min=TINY)).sqrt().float()


def sobel(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Differences along width and height by the unnormalised 3 x 3 kernels, mirrored at the border."""
    channels = x_BCHW.shape[1]
    along = x_BCHW.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([along, along.T])[:, None].repeat(channels, 1, 1, 1)
    padded = F.pad(x_BCHW, (1, 1, 1, 1), mode="reflect")
    both = F.conv2d(padded, kernels, groups=channels)
    return both[:, 0::2], both[:, 1::2]


def edges(x_BCHW: Tensor) -> Tensor:
    """Sobel magnitude, channel by channel."""
    x, y = sobel(x_BCHW)
    return (x.square() + y.square() + TINY).sqrt()
