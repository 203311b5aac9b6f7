"""The head's diffusion: cosine levels over 1000 steps, a learned variance, ancestral and DDIM steps.

Shape suffixes: R rows (tokens), C numbers of a token, T steps.
"""

from __future__ import annotations

import math
import re
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from common.errors import UserError

STEPS = 1000
MAX_BETA = 0.999


def noise_levels(schedule: str = "cosine", steps: int = STEPS) -> Tensor:
    """The betas [T], float64, of a schedule by name.

    Raises:
        UserError: another schedule.
    """
    if schedule == "linear":
        return torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    if schedule != "cosine":
        raise UserError(f"noise schedule {schedule!r}: expected cosine or linear")
    bar = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
    return torch.tensor([min(1 - after / before, MAX_BETA) for before, after in pairwise(bar)], dtype=torch.float64)


def respacing(steps: int, wanted: str) -> list[int]:
    """The training steps that a shorter chain keeps: `25`, `ddim20` (a whole stride), or `10,15` (a count a section);
    nothing keeps all.

    Raises:
        UserError: that chain cannot be made of so many steps, or it is written otherwise.
    """
    if not wanted:
        return list(range(steps))
    if not re.fullmatch(r"ddim\d+|\d+(,\d+)*", wanted):
        raise UserError(f"chain {wanted!r}: expected a number of steps, ddim and a number, or numbers with commas")
    if wanted.startswith("ddim"):
        count = int(wanted.removeprefix("ddim"))
        for stride in range(1, steps):
            if len(range(0, steps, stride)) == count:
                return list(range(0, steps, stride))
        raise UserError(f"{wanted}: no whole stride makes {count} of {steps} steps")
    counts = [int(part) for part in wanted.split(",")]
    kept, start = [], 0
    for number, count in enumerate(counts):
        size = steps // len(counts) + (number < steps % len(counts))
        if not 1 <= count <= size:
            raise UserError(f"{wanted}: cannot make {count} steps of {size}")
        gap, at = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            kept.append(start + round(at))
            at += gap
        start += size
    return sorted(set(kept))


class Diffusion:
    """A chain of noise levels; the tables are float64 [T].

    Args:
        betas_T: of the whole chain.
        kept: the steps of that chain that this one has; their betas come from the cumulative alphas.
    """

    def __init__(self, betas_T: Tensor, kept: list[int] | None = None) -> None:
        kept = list(range(len(betas_T))) if kept is None else kept
        bar_T = (1 - betas_T).cumprod(0)[kept]
        before_T = torch.cat([bar_T.new_ones(1), bar_T[:-1]])
        self.times = torch.tensor(kept)
        self.betas_T = 1 - bar_T / before_T
        self.alphas_cumprod_T, self._before_T = bar_T, before_T
        variance_T = self.betas_T * (1 - before_T) / (1 - bar_T)
        # The first step's variance is 0; its logarithm is taken of the second one's.
        self.posterior_log_variance_T = torch.cat([variance_T[1:2], variance_T[1:]]).log()
        self._log_betas_T = self.betas_T.log()
        self._from_x0_T = self.betas_T * before_T.sqrt() / (1 - bar_T)
        self._from_x_T = (1 - before_T) * (1 - self.betas_T).sqrt() / (1 - bar_T)

    def __len__(self) -> int:
        return len(self.times)

    def _at(self, table_T: Tensor, t_R: Tensor) -> Tensor:
        """[R, 1] float32 of a table."""
        return table_T.to(t_R.device)[t_R].float()[:, None]

    def noised(self, x0_RC: Tensor, t_R: Tensor, noise_RC: Tensor) -> Tensor:
        """x_t = sqrt(abar) x0 + sqrt(1 - abar) noise."""
        bar_T = self.alphas_cumprod_T
        return self._at(bar_T.sqrt(), t_R) * x0_RC + self._at((1 - bar_T).sqrt(), t_R) * noise_RC

    def estimate(self, x_RC: Tensor, t_R: Tensor, eps_RC: Tensor) -> Tensor:
        """x0 that x_t and its noise lead to."""
        bar_T = self.alphas_cumprod_T
        return self._at((1 / bar_T).sqrt(), t_R) * x_RC - self._at((1 / bar_T - 1).sqrt(), t_R) * eps_RC

    def posterior_mean(self, x0_RC: Tensor, x_RC: Tensor, t_R: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x0)."""
        return self._at(self._from_x0_T, t_R) * x0_RC + self._at(self._from_x_T, t_R) * x_RC

    def log_variance(self, share_RC: Tensor, t_R: Tensor) -> Tensor:
        """The learned one: share -1 is the posterior's, share 1 is beta, between them in the logarithm."""
        part = (share_RC + 1) / 2
        return part * self._at(self._log_betas_T, t_R) + (1 - part) * self._at(self.posterior_log_variance_T, t_R)

    def bound(self, output_R2C: Tensor, x0_RC: Tensor, x_RC: Tensor, t_R: Tensor) -> Tensor:
        """The variational bound's term of each row [R], in bits a number; its gradient reaches the variance alone."""
        eps_RC, share_RC = output_R2C.chunk(2, dim=1)
        mean_RC = self.posterior_mean(self.estimate(x_RC, t_R, eps_RC.detach()), x_RC, t_R)
        log_variance_RC = self.log_variance(share_RC, t_R)
        true_RC = self.posterior_mean(x0_RC, x_RC, t_R)
        true_log_R1 = self._at(self.posterior_log_variance_T, t_R)
        difference = log_variance_RC - true_log_R1
        distance = (true_RC - mean_RC).square() * (-log_variance_RC).exp()
        divergence_RC = 0.5 * (-1.0 + difference + (-difference).exp() + distance)
        likelihood_RC = -_discrete_log_likelihood(x0_RC, mean_RC, 0.5 * log_variance_RC)
        return torch.where((t_R == 0)[:, None], likelihood_RC, divergence_RC).mean(1) / math.log(2)

    def ancestral(
        self, x_RC: Tensor, t: int, eps_RC: Tensor, share_RC: Tensor, noise_RC: Tensor, clip: float = 0.0
    ) -> Tensor:
        """x_{t-1}, drawn with the learned variance; `noise_RC` is already scaled by the temperature."""
        t_R = torch.full((len(x_RC),), t, device=x_RC.device)
        mean_RC = self.posterior_mean(self._clipped(x_RC, t_R, eps_RC, clip), x_RC, t_R)
        if t == 0:
            return mean_RC
        return mean_RC + (0.5 * self.log_variance(share_RC, t_R)).exp() * noise_RC

    def ddim(self, x_RC: Tensor, t: int, eps_RC: Tensor, clip: float = 0.0) -> Tensor:
        """x_{t-1} without noise."""
        t_R = torch.full((len(x_RC),), t, device=x_RC.device)
        x0_RC = self._clipped(x_RC, t_R, eps_RC, clip)
        bar_T, before = self.alphas_cumprod_T, self._before_T
        if clip:  # the noise that goes with the clipped estimate
            scale = self._at((1 / (1 - bar_T)).sqrt(), t_R)
            eps_RC = (x_RC - self._at(bar_T.sqrt(), t_R) * x0_RC) * scale
        return self._at(before.sqrt(), t_R) * x0_RC + self._at((1 - before).sqrt(), t_R) * eps_RC

    def _clipped(self, x_RC: Tensor, t_R: Tensor, eps_RC: Tensor, clip: float) -> Tensor:
        x0_RC = self.estimate(x_RC, t_R, eps_RC)
        return x0_RC.clamp(-clip, clip) if clip else x0_RC


@cache
def training_chain() -> Diffusion:
    """The 1000 steps that the head learns."""
    return Diffusion(noise_levels())


@cache
def short_chain(wanted: str) -> Diffusion:
    """A sampling chain (`respacing`)."""
    return Diffusion(noise_levels(), respacing(STEPS, wanted))


def _discrete_log_likelihood(x_RC: Tensor, mean_RC: Tensor, log_scale_RC: Tensor) -> Tensor:
    """log of the mass that a Gaussian has in the bin of x, of 255 bins in [-1, 1] (improved DDPM)."""

    def below(z: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z.pow(3))))

    centred, inverse = x_RC - mean_RC, (-log_scale_RC).exp()
    upper, lower = below(inverse * (centred + 1 / 255)), below(inverse * (centred - 1 / 255))
    inner = (upper - lower).clamp(min=1e-12).log()
    ends = torch.where(x_RC > 0.999, (1.0 - lower).clamp(min=1e-12).log(), inner)
    return torch.where(x_RC < -0.999, upper.clamp(min=1e-12).log(), ends)
