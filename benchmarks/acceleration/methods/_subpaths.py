"""Consistency distillation and its sub-path form, by the functions of `slam`: what LCM, SLAM and their adaptors share.

A sample costs 3 forwards for the student's step, 2 for the teacher's guided DDIM step and 1 for the averaged student.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.acceleration.fitting import EMA_DECAY, Loss
from benchmarks.acceleration.protocol import Bench, Budget, Sampler
from common.data.sampling import derive_seed, step_generator
from common.ema import Ema
from common.steps import StepDraws
from slam.config import LossConfig, StudentConfig, SubPathConfig
from slam.losses import draw_gamma, solve_subpath, subpath_loss
from slam.model import Student, averaged_copy, copy_unet, make_student
from slam.sampler import sample
from slam.subpath import SubPaths

SAMPLING_SEED = 4310  # of the noise that multi-step sampling adds
RANK = 16  # of every row that trains adaptors
LCM = SubPathConfig(solver_steps=50, gamma="one")
# The form that works in few steps, named as the extension that it is (slam/README.md).
SLAM = SubPathConfig(solver_steps=25, sigma="linear", time="effective", embedding_scale=0.1)


class AveragedTarget:
    """The averaged student that distillation regresses onto, updated once a step before it is used."""

    def __init__(self, student: Student) -> None:
        self.model, self.ema = averaged_copy(student), Ema(student, EMA_DECAY)

    def __call__(self, student: nn.Module, device: torch.device) -> Student:
        self.model.to(device)
        self.ema.to(device).update(student)
        self.ema.copy_to(self.model)
        return self.model


def loss_of(bench: Bench, student: Student, options: SubPathConfig) -> Loss:
    target, steps = AveragedTarget(student), options.solver_steps

    def loss(model: nn.Module, batch: dict[str, Tensor], draws: StepDraws) -> Tensor:
        assert isinstance(model, Student)
        x1_BCHW, states_BLD = batch["x1"], batch["states"]
        index_B = (draws.uniform() * steps).long().clamp(max=steps - 1)
        noise_BCHW = draws.normal(*x1_BCHW.shape[1:])
        gamma_B = draw_gamma(options.gamma, draws.uniform())
        w_B = torch.full_like(x1_BCHW[:, 0, 0, 0], bench.guidance - 1)
        path = solve_subpath(bench.teacher, model.paths, x1_BCHW, noise_BCHW, index_B, states_BLD, w_B)
        return subpath_loss(model, target(model, x1_BCHW.device), path, gamma_B, states_BLD, LossConfig())

    return loss


def distilled(
    bench: Bench, budget: Budget, lr: float, seed: int, options: SubPathConfig, kind: StudentConfig
) -> Sampler:
    """Train a student for the whole budget."""
    torch.manual_seed(derive_seed(seed, 2))  # of the adaptors' first weights
    if options.gamma == "one" and kind.kind == "full":  # its guidance is fixed: nothing is embedded
        paths = SubPaths(bench.teacher.schedule, options.solver_steps)
        student = Student(copy_unet(bench.teacher, None).train().requires_grad_(True), paths)
    else:
        student = make_student(bench.teacher, kind, options)
    loss = loss_of(bench, student, options)
    bench.fit(student, loss, bench.data, budget, lr, derive_seed(seed, 1), 1.0, extra=3.0)

    def draw(noise_BCHW: Tensor, states_BLD: Tensor, steps: int) -> Tensor:
        # Fresh noise between the steps, the same for every model: it depends on the first noise alone.
        key = int(noise_BCHW[0].flatten()[:4].contiguous().view(torch.int32).long().abs().sum())
        generator = step_generator(SAMPLING_SEED, key)
        return sample(
            student, noise_BCHW, states_BLD, steps, lambda _: torch.randn(noise_BCHW.shape, generator=generator)
        )

    return Sampler(draw, float, sum(p.numel() for p in student.parameters() if p.requires_grad))
