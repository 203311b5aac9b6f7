"""Low-resolution inputs for super-resolution (section 4.4): PIL bicubic, and the milder BSR degradation (D.6.1).

Every function is pure: the result depends on the image and the seed only. Arrays are float [H, W, 3] in [0, 1]
between the steps, as image codecs and filters expect.
"""

from __future__ import annotations

import io
import math
from typing import Literal

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from common.errors import UserError

Degradation = Literal["bicubic", "bsr"]


def _to_bytes(x_HWC: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x_HWC * 255.0), 0, 255).astype(np.uint8)


def _resize(x_HWC: np.ndarray, height: int, width: int, filter: Image.Resampling) -> np.ndarray:
    """Antialiased PIL resize of a float image, channel by channel so that nothing is rounded in between."""
    planes = [
        np.asarray(Image.fromarray(x_HWC[..., c].astype(np.float32)).resize((width, height), filter))
        for c in range(x_HWC.shape[-1])
    ]
    return np.clip(np.stack(planes, -1), 0.0, 1.0)


def _jpeg(x_HWC: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(_to_bytes(x_HWC)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer), np.float64) / 255.0


def _gaussian_kernel(sigma_1: float, sigma_2: float, angle: float, radius: int) -> np.ndarray:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    kernel = np.exp(-0.5 * ((u / sigma_1) ** 2 + (v / sigma_2) ** 2))
    return kernel / kernel.sum()


def _blur(x_HWC: np.ndarray, rng: np.random.Generator, scale: int) -> np.ndarray:
    """Isotropic or rotated anisotropic Gaussian, a quarter of BSRGAN's widths (the `light` variant)."""
    if rng.random() < 0.5:
        sigma_1 = sigma_2 = max((2 + 0.2 * scale) / 4 * rng.random(), 0.05)
    else:
        # BSRGAN draws the covariance's eigenvalues, hence the roots.
        sigma_1, sigma_2 = (max(math.sqrt((4 + scale) / 4 * rng.random()), 0.05) for _ in range(2))
    kernel = _gaussian_kernel(sigma_1, sigma_2, rng.uniform(0, math.pi), int(rng.integers(2, 7)))
    return np.clip(ndimage.convolve(x_HWC, kernel[..., None], mode="mirror"), 0.0, 1.0)


_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX)


def _random_resize(x_HWC: np.ndarray, rng: np.random.Generator, scale: int) -> np.ndarray:
    """Shrink by a random factor up to 2 x scale, or blur and take every scale-th pixel."""
    height, width = x_HWC.shape[:2]
    filter = _FILTERS[rng.integers(len(_FILTERS))]
    if rng.random() < 0.75:
        factor = rng.uniform(1.0, 2.0 * scale)
        return _resize(x_HWC, max(1, int(height / factor)), max(1, int(width / factor)), filter)
    sigma = rng.uniform(0.1, 0.6 * scale)
    blurred = ndimage.gaussian_filter(x_HWC, (sigma, sigma, 0), mode="mirror")
    return blurred[::scale, ::scale]


def _noise(x_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of level 1 to 2 (of 255): independent per channel, common to all, or correlated."""
    level = rng.uniform(1.0, 2.0) / 255.0
    shape = x_HWC.shape
    kind = rng.random()
    if kind < 0.4:
        noise = rng.normal(0, level, shape)
    elif kind < 0.8:
        noise = np.repeat(rng.normal(0, level, (*shape[:2], 1)), shape[2], -1)
    else:
        mix = np.linalg.qr(rng.normal(size=(shape[2], shape[2])))[0]
        noise = rng.normal(0, level, shape) * rng.random(shape[2]) @ mix
    return np.clip(x_HWC + noise, 0.0, 1.0)


def bicubic_low_resolution(image_CHW: Tensor, scale: int) -> Tensor:
    """PIL bicubic (antialiased) reduction of uint8 [3, H, W] to uint8 [3, H / scale, W / scale]."""
    _check(image_CHW, scale)
    height, width = image_CHW.shape[-2:]
    image = Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())
    low = image.resize((width // scale, height // scale), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(low)).permute(2, 0, 1).contiguous()


def bsr_low_resolution(image_CHW: Tensor, scale: int, seed: int) -> Tensor:
    """Blur, resize, noise and JPEG in random order, then a final JPEG; uint8 [3, H, W] to [3, H / scale, W / scale].

    Milder than BSRGAN: narrower blur, noise level 1 to 2, JPEG quality 80 to 95.
    """
    _check(image_CHW, scale)
    height, width = image_CHW.shape[-2:]
    rng = np.random.default_rng(seed)
    x_HWC = image_CHW.permute(1, 2, 0).numpy().astype(np.float64) / 255.0
    steps = [str(step) for step in rng.permutation(["blur", "blur", "resize", "to_low", "noise", "jpeg"])]
    first, second = sorted((steps.index("resize"), steps.index("to_low")))
    # The random resize comes before the one to the final size, else it would undo it.
    steps[first], steps[second] = "resize", "to_low"
    for step in steps:
        if step == "blur":
            x_HWC = _blur(x_HWC, rng, scale)
        elif step == "resize":
            x_HWC = _random_resize(x_HWC, rng, scale)
        elif step == "to_low":
            x_HWC = _resize(x_HWC, height // scale, width // scale, _FILTERS[rng.integers(len(_FILTERS))])
        elif step == "noise":
            x_HWC = _noise(x_HWC, rng)
        elif rng.random() < 0.9:
            x_HWC = _jpeg(x_HWC, int(rng.integers(80, 96)))
    x_HWC = _jpeg(x_HWC, int(rng.integers(80, 96)))
    return torch.from_numpy(_to_bytes(x_HWC)).permute(2, 0, 1).contiguous()


def low_resolution(image_CHW: Tensor, scale: int, degradation: Degradation = "bicubic", seed: int = 0) -> Tensor:
    """The low-resolution counterpart of an image, uint8 [3, H / scale, W / scale]."""
    if degradation == "bicubic":
        return bicubic_low_resolution(image_CHW, scale)
    if degradation == "bsr":
        return bsr_low_resolution(image_CHW, scale, seed)
    raise UserError(f"degradation {degradation!r} is unknown: use bicubic or bsr")


def _check(image_CHW: Tensor, scale: int) -> None:
    if image_CHW.dim() != 3 or image_CHW.shape[0] != 3 or image_CHW.dtype != torch.uint8:
        raise UserError(f"degradation takes uint8 [3, H, W], got {image_CHW.dtype} {tuple(image_CHW.shape)}")
    if scale < 1 or image_CHW.shape[1] % scale or image_CHW.shape[2] % scale:
        raise UserError(f"image sides {tuple(image_CHW.shape[1:])} must be divisible by the scale {scale}")
