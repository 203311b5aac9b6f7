"""Progressive distillation (Salimans & Ho, arXiv 2202.00512): where one step of a student with N steps has to point.

Shape suffixes: B batch, C channels, H height, W width (of the latents).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError
from common.solvers import Network, ddim_step
from common.teacher import NoiseSchedule


@dataclass(frozen=True)
class ProgressiveTarget:
    """Where one student step from z_t has to point (Salimans & Ho, arXiv 2202.00512, algorithm 2)."""

    t_B: Tensor
    t_mid_B: Tensor
    t_end_B: Tensor
    z_mid: Tensor
    z_end: Tensor
    x_target: Tensor
    eps_target: Tensor
    alpha: Tensor
    sigma: Tensor

    def weight(self, kind: str = "truncated_snr") -> Tensor:
        """Loss weight [B] of the x error: max(SNR, 1), or SNR + 1."""
        snr_B = (self.alpha / self.sigma).square().flatten()
        if kind == "truncated_snr":
            return snr_B.clamp(min=1)
        if kind == "snr_plus_1":
            return snr_B + 1
        raise UserError(f"loss weight {kind!r}: expected truncated_snr or snr_plus_1")


def progressive_grid(schedule: NoiseSchedule, student_steps: int, index_B: Tensor, half: int = 0) -> Tensor:
    """Training step of grid index i - half/2 in 0 .. N: i T/N - 1, and 0 for index 0."""
    span = schedule.steps / student_steps
    return ((index_B - 0.5 * half) * span).round().long().sub(1).clamp(min=0)


@torch.no_grad()
def progressive_target(
    network: Network, schedule: NoiseSchedule, z_BCHW: Tensor, index_B: Tensor, student_steps: int
) -> ProgressiveTarget:
    """The x of which one DDIM step i -> i - 1 of the N-step student equals two steps of its teacher.

    Args:
        network: the teacher (of the previous round), of the schedule's prediction type.
        z_BCHW: noisy latents at grid index i.
        index_B: grid indices i in 1 .. N.
    """
    t_B = progressive_grid(schedule, student_steps, index_B)
    t_mid_B = progressive_grid(schedule, student_steps, index_B, half=1)
    t_end_B = progressive_grid(schedule, student_steps, index_B - 1)
    z_mid, _ = ddim_step(network, schedule, z_BCHW, t_B, t_mid_B)
    z_end, _ = ddim_step(network, schedule, z_mid, t_mid_B, t_end_B)
    alpha, sigma = schedule.levels(t_B)
    alpha_end, sigma_end = schedule.levels(t_end_B)
    ratio = sigma_end / sigma
    x_target = (z_end - ratio * z_BCHW) / (alpha_end - ratio * alpha)
    return ProgressiveTarget(
        t_B, t_mid_B, t_end_B, z_mid, z_end, x_target, (z_BCHW - alpha * x_target) / sigma, alpha, sigma
    )


def progressive_loss(
    student: Network, target: ProgressiveTarget, schedule: NoiseSchedule, z_BCHW: Tensor, kind: str = "truncated_snr"
) -> Tensor:
    """Weighted squared error of the student's x1 estimate at z_t, mean over everything."""
    x1_BCHW, _ = schedule.read(student(z_BCHW, target.t_B), z_BCHW, target.alpha, target.sigma)
    square_BCHW = (x1_BCHW.float() - target.x_target.float()).square()
    return (target.weight(kind).view(-1, 1, 1, 1) * square_BCHW).mean()


@torch.no_grad()
def progressive_sample(network: Network, schedule: NoiseSchedule, z_BCHW: Tensor, steps: int) -> Tensor:
    """N DDIM steps on the grid the N-step student was trained on; ends at the x1 estimate of the last step."""
    x1_BCHW = z_BCHW
    for i in range(steps, 0, -1):
        index_B = torch.full((len(z_BCHW),), i, device=z_BCHW.device)
        t_B = progressive_grid(schedule, steps, index_B)
        z_BCHW, x1_BCHW = ddim_step(network, schedule, z_BCHW, t_B, progressive_grid(schedule, steps, index_B - 1))
    return x1_BCHW
