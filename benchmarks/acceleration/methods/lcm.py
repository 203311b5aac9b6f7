"""Latent consistency distillation (Luo et al., arXiv 2310.04378) at one fixed guidance, from real latents.

A sample costs 3 forwards for the student's step, 2 for the teacher's guided DDIM step and 1 for the averaged student.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.acceleration.fitting import EMA_DECAY, Loss
from benchmarks.acceleration.protocol import Bench, Budget, Method, Sampler, trained_parameters
from common.data.sampling import derive_seed, step_generator
from common.ema import Ema
from common.errors import UserError
from common.solvers import ddim_step
from common.steps import StepDraws
from common.teacher import NoiseSchedule, Teacher

SOLVER_STEPS = 50
SAMPLING_SEED = 4310  # of the noise that multi-step sampling adds


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
        alpha, sigma = self.schedule.levels(tau_B)
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
    alpha, sigma = schedule.levels(t_B)
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
            alpha, sigma = student.schedule.levels(torch.full_like(tau_B, times[i + 1]))
            fresh_BCHW = torch.randn(z_BCHW.shape, generator=generator).to(z_BCHW)
            z_BCHW = alpha * x1_BCHW + sigma * fresh_BCHW
    return x1_BCHW


class AveragedTarget:
    """The averaged student that consistency distillation regresses onto, updated once a step before it is used."""

    def __init__(self, student: ConsistencyModel) -> None:
        self.model = copy.deepcopy(student).requires_grad_(False)
        self.ema = Ema(student, EMA_DECAY)

    def __call__(self, student: nn.Module, device: torch.device) -> ConsistencyModel:
        self.model.to(device)
        self.ema.to(device).update(student)
        self.ema.copy_to(self.model)
        return self.model


def loss_of(bench: Bench, student: ConsistencyModel) -> Loss:
    target = AveragedTarget(student)

    def loss(model: nn.Module, batch: dict[str, Tensor], draws: StepDraws) -> Tensor:
        assert isinstance(model, ConsistencyModel)
        x1_BCHW = batch["x1"]
        index_B = (draws.uniform() * SOLVER_STEPS).long().clamp(max=SOLVER_STEPS - 1)
        noise = draws.normal(*x1_BCHW.shape[1:])
        w_B = torch.full_like(x1_BCHW[:, 0, 0, 0], bench.guidance - 1)
        return consistency_loss(
            model,
            target(model, x1_BCHW.device),
            bench.teacher,
            x1_BCHW,
            noise,
            index_B,
            batch["states"],
            w_B,
            SOLVER_STEPS,
        )

    return loss


def build(bench: Bench, budget: Budget, lr: float, seed: int) -> Sampler:
    student = consistency_student(bench.teacher, width=None)
    bench.fit(student, loss_of(bench, student), bench.data, budget, lr, derive_seed(seed, 1), 1.0, extra=3.0)

    def draw(noise_BCHW: Tensor, states_BLD: Tensor, steps: int) -> Tensor:
        # Fresh noise between the steps, the same for every model: it depends on the first noise alone.
        key = int(noise_BCHW[0].flatten()[:4].contiguous().view(torch.int32).long().abs().sum())
        generator = step_generator(SAMPLING_SEED, key)
        return consistency_sample(student, noise_BCHW, states_BLD, steps, bench.guidance, generator, SOLVER_STEPS)

    return Sampler(draw, float, trained_parameters([student]))


METHOD = Method("LCM", (1, 2, 4, 8), "full U-Net", "learning rate", build)
