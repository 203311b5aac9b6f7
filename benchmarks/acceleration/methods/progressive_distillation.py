"""Progressive distillation (Salimans & Ho, arXiv 2202.00512): 8, 4, 2, 1 steps, each round from the previous student.

The guided teacher stands in round one, which so distils guidance and halves its 16 DDIM steps at once.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from benchmarks.acceleration.fitting import Loss
from benchmarks.acceleration.protocol import Bench, Budget, Method, Sampler, trained_parameters
from common.data.sampling import derive_seed
from common.progressive import progressive_grid, progressive_loss, progressive_sample, progressive_target
from common.solvers import guided_network
from common.steps import StepDraws

ROUNDS = (8, 4, 2, 1)


def round_loss(bench: Bench, teacher: Any, steps: int, guidance: float) -> Loss:
    """Weighted error of the student's x1 against where two DDIM steps of `teacher` end (algorithm 2)."""
    schedule, null = bench.teacher.schedule, bench.null

    def loss(student: nn.Module, batch: dict[str, Tensor], draws: StepDraws) -> Tensor:
        x1_BCHW, states = batch["x1"], batch["states"]
        index_B = 1 + (draws.uniform() * steps).long().clamp(max=steps - 1)
        alpha, sigma = schedule.levels(progressive_grid(schedule, steps, index_B))
        z_BCHW = alpha * x1_BCHW + sigma * draws.normal(*x1_BCHW.shape[1:])
        target = progressive_target(guided_network(teacher, states, null, guidance), schedule, z_BCHW, index_B, steps)
        return progressive_loss(guided_network(student, states), target, schedule, z_BCHW)

    return loss


def build(bench: Bench, budget: Budget, lr: float, seed: int) -> Sampler:
    students: dict[int, Any] = {}
    teacher, guidance = bench.teacher.unet, bench.guidance
    for number, steps in enumerate(ROUNDS):
        student = copy.deepcopy(teacher).float().requires_grad_(True)
        extra = 4.0 if guidance > 1 else 2.0
        loss = round_loss(bench, teacher, steps, guidance)
        share = 1 / len(ROUNDS)
        bench.fit(student, loss, bench.data, budget, lr, derive_seed(seed, number), share, extra, what=f"{steps} steps")
        teacher, guidance = student.requires_grad_(False), 1.0
        students[steps] = student

    def draw(noise_BCHW: Tensor, states_BLD: Tensor, steps: int) -> Tensor:
        network = guided_network(students[steps], states_BLD)
        return progressive_sample(network, bench.teacher.schedule, noise_BCHW, steps)

    return Sampler(draw, float, trained_parameters(list(students.values())))


METHOD = Method("progressive distillation", (1, 2, 4, 8), "full U-Net per round", "learning rate", build)
