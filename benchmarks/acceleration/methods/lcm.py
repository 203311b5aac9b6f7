"""Latent consistency distillation (Luo et al., arXiv 2310.04378) at one fixed guidance, from real latents.

A sample costs 3 forwards for the student's step, 2 for the teacher's guided DDIM step and 1 for the averaged student.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.acceleration.protocol import OPTIMISER, Bench, Budget, Method, Sampler, trained_parameters
from common.data.sampling import derive_seed, step_generator
from common.ema import Ema
from instaflow.baselines import ConsistencyModel, consistency_loss, consistency_sample, consistency_student
from instaflow.training import Draws, Loss

SOLVER_STEPS = 50
SAMPLING_SEED = 4310  # of the noise that multi-step sampling adds


class AveragedTarget:
    """The averaged student that consistency distillation regresses onto, updated once a step before it is used."""

    def __init__(self, student: ConsistencyModel) -> None:
        self.model = copy.deepcopy(student).requires_grad_(False)
        self.ema = Ema(student, OPTIMISER.ema_decay)

    def __call__(self, student: nn.Module, device: torch.device) -> ConsistencyModel:
        self.model.to(device)
        self.ema.to(device).update(student)
        self.ema.copy_to(self.model)
        return self.model


def loss_of(bench: Bench, student: ConsistencyModel) -> Loss:
    target = AveragedTarget(student)

    def loss(model: nn.Module, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        assert isinstance(model, ConsistencyModel)
        x1_BCHW = batch["x1"]
        index_B = (draws.uniform() * SOLVER_STEPS).long().clamp(max=SOLVER_STEPS - 1)
        noise = draws.normal(x1_BCHW.shape[1:])
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
