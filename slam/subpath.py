"""Sub-paths of a teacher's ODE, the straight line between their ends, and what a point of it holds (section 3).

x_t = alpha_t x1 + sigma_t eps is the noisy end of a sub-path, x_s its cleaner end, s = t - k. The line

    x_gamma = gamma x_t + (1 - gamma) (alpha_t / alpha_s) x_s

has the mean alpha_t x1 at every gamma; the drift factor alpha_t / alpha_s sees to that. All coefficients are computed
in float64 and rounded once, so that gamma = 1 is the consistency model's own input to the bit.

Shape suffixes: B batch, C channels, H height, W width, T training steps, N solver steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.errors import UserError
from common.teacher import NoiseSchedule

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0


@dataclass(frozen=True)
class SubPaths:
    """The N sub-paths of a schedule: number n goes from training step start_N[n] to end_N[n], the first one to 0.

    Args:
        sigma: how the noise level between the ends is taken (`sigma_gamma`).
        drift: False leaves the factor alpha_t / alpha_s out (ablation).
    """

    schedule: NoiseSchedule
    steps: int = 50
    sigma: Literal["quadrature", "linear"] = "quadrature"
    drift: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= self.schedule.steps:
            raise UserError(
                f"--subpath.solver_steps {self.steps}: expected a number from 1 to {self.schedule.steps}, the training "
                "steps of the teacher's schedule"
            )

    @property
    def skip(self) -> int:
        """k, training steps of a sub-path."""
        return self.schedule.steps // self.steps

    @property
    def start_N(self) -> Tensor:
        return torch.arange(1, self.steps + 1) * self.skip - 1

    @property
    def end_N(self) -> Tensor:
        return (self.start_N - self.skip).clamp(min=0)

    def levels(self, tau_B: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at training steps, float64 [B]; alpha is above 0, so that every line has a direction."""
        square_B = self.schedule.alphas_cumprod_T.to(tau_B.device)[tau_B]
        return square_B.sqrt(), (1 - square_B).sqrt()

    def drift_factor(self, t_B: Tensor, s_B: Tensor) -> Tensor:
        """alpha_t / alpha_s, float64 [B]."""
        return self.levels(t_B)[0] / self.levels(s_B)[0]

    def point(self, x_t_BCHW: Tensor, x_s_BCHW: Tensor, gamma_B: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """x_gamma, [B, C, H, W]."""
        gamma = column(gamma_B.double()).to(x_t_BCHW)
        scale_B = self.drift_factor(t_B, s_B) if self.drift else torch.ones_like(gamma_B, dtype=torch.float64)
        cleaner_BCHW = column(scale_B).to(x_t_BCHW) * x_s_BCHW
        return gamma * x_t_BCHW + (1 - gamma) * cleaner_BCHW

    def sigma_gamma(self, gamma_B: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """Noise level of x_gamma, float64 [B]; sigma_t at gamma = 1, sigma_s alpha_t / alpha_s at gamma = 0.

        quadrature (the released code) adds what x_t gains over the drifted x_s as independent noise; linear is exact
        where x_s was reached from x_t by a DDIM step, since both then hold the same noise.
        """
        gamma_B = gamma_B.double()
        factor_B = self.drift_factor(t_B, s_B)
        drifted_B = self.levels(s_B)[1] * factor_B
        if self.sigma == "linear":
            return (1 - gamma_B) * drifted_B + gamma_B * self.levels(t_B)[1]
        return (drifted_B.square() + gamma_B.square() * (1 - factor_B.square())).sqrt()

    def effective_time(self, t_B: Tensor, sigma_B: Tensor) -> Tensor:
        """Fractional training step, float64 [B], at which the schedule's alpha / sigma is alpha_t / sigma_gamma.

        Log-linear between training steps (an extension: a copied teacher is then right at every gamma).
        """
        square_T = self.schedule.alphas_cumprod_T.to(t_B.device)
        falling_T = 0.5 * (square_T.log() - (1 - square_T).log())  # log(alpha / sigma), from the data end on
        wanted_B = self.levels(t_B)[0].log() - sigma_B.log()
        right_B = torch.searchsorted(-falling_T, -wanted_B).clamp(1, self.schedule.steps - 1)
        high_B, low_B = falling_T[right_B - 1], falling_T[right_B]
        # A schedule with equal neighbours (zero signal at its end) has no slope there.
        share_B = ((high_B - wanted_B) / (high_B - low_B).clamp(min=1e-12)).clamp(0, 1)
        return right_B - 1 + share_B


def column(values_B: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values_B.view(-1, 1, 1, 1)


def boundary_scalings(
    t_B: Tensor, scaling: float = TIMESTEP_SCALING, sigma_data: float = SIGMA_DATA
) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) float64 [B] of f = c_skip x + c_out x1_hat, so that f(x, 0) = x; t is the raw training step."""
    scaled_B = scaling * t_B.double()
    square_B = scaled_B.square() + sigma_data**2
    return sigma_data**2 / square_B, scaled_B / square_B.sqrt()
