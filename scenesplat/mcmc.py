"""3DGS as a Markov chain (Kheradmand 2024): what becomes of a Gaussian that is split among several, and the noise.

Shape suffixes: N Gaussians, n those that are drawn.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from scenesplat.rasterize import covariances

MOST_COPIES = 51  # gsplat's table of binomials ends there
STEEPNESS, FAINT = 100.0, 0.995  # of the gate of the noise


@cache
def _coefficients() -> Tensor:
    """[copies, k]: (-1)^k C(copies, k + 1) / sqrt(k + 1), of equation 9 with its inner sum over i carried out."""
    rows = [
        [(-1.0) ** k * math.comb(copies, k + 1) / math.sqrt(k + 1) for k in range(MOST_COPIES)]
        for copies in range(MOST_COPIES + 1)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def shared(opacities_N: Tensor, scales_N3: Tensor, copies_N: Tensor) -> tuple[Tensor, Tensor]:
    """Opacities and standard deviations of each of so many equal copies that together look like the one (equation 9).

    Args:
        opacities_N: 0..1. copies_N: whole numbers; above 51 they count as 51.
    """
    copies_N = copies_N.long().clamp(1, MOST_COPIES)
    before_N = opacities_N.double()
    after_N = 1 - (1 - before_N) ** (1 / copies_N)
    powers_NK = after_N[:, None] ** torch.arange(1, MOST_COPIES + 1, device=after_N.device)
    below_N = (_coefficients().to(after_N.device)[copies_N] * powers_NK).sum(1)
    return after_N.to(opacities_N), (scales_N3.double() * (before_N / below_N)[:, None]).to(scales_N3)


def drawn(weights_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Numbers [n] drawn with replacement in proportion to weights."""
    ends_N = weights_N.double().cumsum(0)
    at_n = torch.rand(count, generator=generator, dtype=torch.float64).to(ends_N.device) * ends_N[-1]
    return torch.searchsorted(ends_N, at_n, right=True).clamp(max=len(weights_N) - 1)


def wandering(
    quaternions_N4: Tensor,
    scales_N3: Tensor,
    opacities_N: Tensor,
    noise_N3: Tensor,
    size: float,
    steepness: float = STEEPNESS,
    faint: float = FAINT,
) -> Tensor:
    """Displacements [N, 3]: noise in the shape of each Gaussian, only where it is faint (equation 8).

    Args:
        scales_N3: standard deviations. opacities_N: 0..1. noise_N3: of unit variance. size: rate times strength.
        steepness, faint: of the gate of the noise, a sigmoid in 1 - opacity.
    """
    gate_N1 = torch.sigmoid(steepness * ((1 - opacities_N) - faint))[:, None]
    return (covariances(quaternions_N4, scales_N3) @ (noise_N3 * gate_N1 * size)[..., None])[..., 0]
