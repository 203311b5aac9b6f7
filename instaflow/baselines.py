"""What InstaFlow is compared with: progressive distillation, direct distillation, latent consistency distillation.

All of them work on latents as the U-Net sees them, in the discrete time tau of the teacher's noise schedule.

Shape suffixes: B batch, C channels, H height, W width, L text tokens, D text width, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from instaflow.flow import NoiseSchedule, UNetFlow, conditioned, rectified_flow_loss, sample_times
from instaflow.teacher import Teacher

Network = Callable[[Tensor, Tensor], Tensor]  # (z_BCHW, tau_B) -> output of the schedule's prediction type


def levels(schedule: NoiseSchedule, tau_B: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) [B, 1, 1, 1] at training steps tau."""
    alpha2_B111 = schedule.alphas_cumprod_T.to(tau_B.device)[tau_B].view(-1, 1, 1, 1)
    return alpha2_B111.sqrt().float(), (1 - alpha2_B111).sqrt().float()


def ddim_step(
    network: Network, schedule: NoiseSchedule, z_BCHW: Tensor, tau_B: Tensor, to_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Deterministic DDIM from training steps tau to earlier ones; also the x1 estimate it used."""
    alpha, sigma = levels(schedule, tau_B)
    x1_BCHW, eps_BCHW = schedule.read(network(z_BCHW, tau_B), z_BCHW, alpha, sigma)
    alpha_to, sigma_to = levels(schedule, to_B)
    return alpha_to * x1_BCHW + sigma_to * eps_BCHW, x1_BCHW


def guided_network(unet: Any, states_BLD: Tensor, null_BLD: Tensor | None = None, guidance: float = 1.0) -> Network:
    """The U-Net for fixed prompts, with classifier-free guidance above 1 (both branches in one batch)."""

    def network(z_BCHW: Tensor, tau_B: Tensor) -> Tensor:
        if guidance <= 1 or null_BLD is None:
            return unet(z_BCHW, tau_B, states_BLD, return_dict=False)[0]
        states = torch.cat([null_BLD.expand_as(states_BLD), states_BLD])
        both = unet(torch.cat([z_BCHW, z_BCHW]), torch.cat([tau_B, tau_B]), states, return_dict=False)[0]
        null_BCHW, text_BCHW = both.chunk(2)
        return null_BCHW + guidance * (text_BCHW - null_BCHW)

    return network


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
    alpha, sigma = levels(schedule, t_B)
    alpha_end, sigma_end = levels(schedule, t_end_B)
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


def direct_distillation_loss(flow: UNetFlow, x0_BCHW: Tensor, x1_BCHW: Tensor, states_BLD: Tensor) -> Tensor:
    """One-step distillation of the teacher itself, without reflow: || X1 - (X0 + w(X0 | T)) ||^2 on its own pairs."""
    t_B = sample_times(len(x0_BCHW), "t0", device=x0_BCHW.device)
    return rectified_flow_loss(conditioned(flow, states_BLD), x0_BCHW, x1_BCHW, t_B)


def guidance_embedding(w_B: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding [B, E] of the guidance w (Luo et al., arXiv 2310.04378), w = 0 without guidance."""
    half = width // 2
    frequencies_E = torch.exp(-math.log(10_000.0) / (half - 1) * torch.arange(half, device=w_B.device))
    angles_BE = 1000.0 * w_B.float()[:, None] * frequencies_E[None]
    embedding_BE = torch.cat([angles_BE.sin(), angles_BE.cos()], dim=1)
    return nn.functional.pad(embedding_BE, (0, width % 2))


class ConsistencyModel(nn.Module):
    """f(z, tau | text, w) = c_skip z + c_out x1_hat: a latent consistency model around a diffusion U-Net.

    Args:
        unet: a diffusers U-Net; with `time_cond_proj_dim` it receives the guidance embedding.
        timestep_scaling, sigma_data: of the boundary condition f(z, 0) = z.
    """

    def __init__(
        self, unet: Any, schedule: NoiseSchedule, timestep_scaling: float = 10.0, sigma_data: float = 0.5
    ) -> None:
        super().__init__()
        self.unet, self.schedule = unet, schedule
        self.timestep_scaling, self.sigma_data = timestep_scaling, sigma_data

    def forward(self, z_BCHW: Tensor, tau_B: Tensor, states_BLD: Tensor, w_B: Tensor) -> Tensor:
        """The x1 that the path through z leads to. `w_B` is the guidance beyond the conditional network (scale - 1)."""
        width = self.unet.config.time_cond_proj_dim
        condition = None if width is None else guidance_embedding(w_B, width).to(z_BCHW.dtype)
        output_BCHW = self.unet(z_BCHW, tau_B, states_BLD, timestep_cond=condition, return_dict=False)[0]
        alpha, sigma = levels(self.schedule, tau_B)
        x1_BCHW, _ = self.schedule.read(output_BCHW, z_BCHW, alpha, sigma)
        time_B111 = (self.timestep_scaling * tau_B.float()).view(-1, 1, 1, 1)
        square = time_B111.square() + self.sigma_data**2
        return self.sigma_data**2 / square * z_BCHW + time_B111 / square.sqrt() * x1_BCHW


def consistency_student(teacher: Teacher, width: int | None = 256) -> ConsistencyModel:
    """A trainable float32 copy of the teacher that starts as the teacher.

    Args:
        width: of the guidance embedding whose new projection starts at zero; None for a fixed guidance without one.
    """
    from diffusers import UNet2DConditionModel

    config = {key: value for key, value in dict(teacher.unet.config).items() if not key.startswith("_")}
    unet = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": width})
    missing, _ = unet.load_state_dict(teacher.unet.state_dict(), strict=False)
    if set(missing) - {"time_embedding.cond_proj.weight"}:
        raise UserError(f"the teacher's U-Net cannot be rebuilt from its config: {missing[0]} is missing")
    if width is not None:
        nn.init.zeros_(unet.time_embedding.cond_proj.weight)
    return ConsistencyModel(unet.float().train().requires_grad_(True), teacher.schedule)


def consistency_grid(schedule: NoiseSchedule, solver_steps: int = 50) -> Tensor:
    """Training steps of the teacher's solver, ascending: k T/S - 1 for k = 1 .. S."""
    return torch.arange(1, solver_steps + 1) * (schedule.steps // solver_steps) - 1


def consistency_loss(
    student: ConsistencyModel,
    target: ConsistencyModel,
    teacher: Teacher,
    x1_BCHW: Tensor,
    noise_BCHW: Tensor,
    index_B: Tensor,
    states_BLD: Tensor,
    w_B: Tensor,
    solver_steps: int = 50,
    huber: float = 1e-3,
) -> Tensor:
    """Latent consistency distillation: f_student(z_{n+k}) against f_target at the teacher's guided DDIM step to z_n.

    Args:
        target: the averaged student, or the student itself.
        x1_BCHW: clean latents, as the U-Net sees them.
        index_B: which step of the solver's grid z_{n+k} is at: 0 .. S - 1 (0 goes to the data end).
        w_B: guidance per sample: c + w (c - u).
        huber: c of the pseudo-Huber distance; 0 for the squared error.
    """
    schedule = teacher.schedule
    grid = consistency_grid(schedule, solver_steps).to(x1_BCHW.device)
    t_B = grid[index_B]
    to_B = torch.where(index_B > 0, grid[(index_B - 1).clamp(min=0)], 0)
    alpha, sigma = levels(schedule, t_B)
    z_BCHW = alpha * x1_BCHW + sigma * noise_BCHW
    with torch.no_grad():

        def guided(z: Tensor, tau_B: Tensor) -> Tensor:
            both = torch.cat([teacher.null(len(z)).to(states_BLD), states_BLD])
            output = teacher.unet(torch.cat([z, z]), torch.cat([tau_B, tau_B]), both, return_dict=False)[0]
            null_BCHW, text_BCHW = output.chunk(2)
            return text_BCHW + w_B.view(-1, 1, 1, 1) * (text_BCHW - null_BCHW)

        earlier_BCHW, _ = ddim_step(guided, schedule, z_BCHW, t_B, to_B)
        wanted_BCHW = target(earlier_BCHW, to_B, states_BLD, w_B)
    difference_BCHW = student(z_BCHW, t_B, states_BLD, w_B).float() - wanted_BCHW.float()
    if huber == 0:
        return difference_BCHW.square().mean()
    return (difference_BCHW.square() + huber**2).sqrt().sub(huber).mean()


@torch.no_grad()
def consistency_sample(
    student: ConsistencyModel,
    z_BCHW: Tensor,
    states_BLD: Tensor,
    steps: int,
    guidance: float,
    generator: torch.Generator | None = None,
    solver_steps: int = 50,
) -> Tensor:
    """N-step sampling: jump to the data, add fresh noise of the next level, jump again. `guidance` is w + 1."""
    grid = consistency_grid(student.schedule, solver_steps).flip(0).tolist()
    if not 1 <= steps <= solver_steps:
        raise UserError(f"{steps} consistency steps: expected 1 to {solver_steps}")
    times = [grid[math.floor(i * len(grid) / steps)] for i in range(steps)]
    w_B = z_BCHW.new_full((len(z_BCHW),), guidance - 1)
    x1_BCHW = z_BCHW
    for i, tau in enumerate(times):
        tau_B = torch.full((len(z_BCHW),), tau, device=z_BCHW.device)
        x1_BCHW = student(z_BCHW, tau_B, states_BLD, w_B)
        if i + 1 < steps:
            alpha, sigma = levels(student.schedule, torch.full_like(tau_B, times[i + 1]))
            fresh_BCHW = torch.randn(z_BCHW.shape, generator=generator).to(z_BCHW)
            z_BCHW = alpha * x1_BCHW + sigma * fresh_BCHW
    return x1_BCHW
