"""One step of sub-path distillation, from clean latents to the loss (the algorithm of section 3.3).

Shape suffixes: B batch, C channels, H height, W width, L text tokens, D text width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.solvers import ddim_step
from common.teacher import Teacher
from slam.config import LossConfig, SubPathConfig
from slam.model import Student
from slam.subpath import SubPaths


@dataclass(frozen=True)
class SubPath:
    """The sub-paths of a batch: both ends, and where on them the student is trained."""

    t_B: Tensor
    s_B: Tensor
    x_t_BCHW: Tensor
    x_s_BCHW: Tensor


def draw_gamma(kind: str, uniform_B: Tensor) -> Tensor:
    """gamma [B] from uniform numbers in [0, 1) (`SubPathConfig.gamma`)."""
    if kind == "one":
        return torch.ones_like(uniform_B)
    return uniform_B if kind == "uniform" else uniform_B.round()


@torch.no_grad()
def solve_subpath(
    teacher: Teacher,
    paths: SubPaths,
    x1_BCHW: Tensor,
    noise_BCHW: Tensor,
    index_B: Tensor,
    states_BLD: Tensor,
    w_B: Tensor,
    null_BLD: Tensor | None = None,
) -> SubPath:
    """Steps 2 and 4: noise the latents to t, and follow the guided teacher by one DDIM step to s.

    The teacher's conditional and unconditional pass go through it in one batch, on a CPU one after the other: that is
    a twentieth slower there and holds half as much. c + w (c - u) is the usual guidance scale w + 1.

    Args:
        x1_BCHW: clean latents, as the U-Net sees them.
        index_B: which of the grid's sub-paths, 0 .. N - 1 (0 goes to the data end).
        null_BLD: states of the empty prompt; None: the teacher's own.
    """
    t_B, s_B = paths.start_N.to(index_B.device)[index_B], paths.end_N.to(index_B.device)[index_B]
    alpha, sigma = teacher.schedule.levels(t_B)
    x_t_BCHW = alpha * x1_BCHW + sigma * noise_BCHW
    null_BLD = teacher.null(len(x1_BCHW)) if null_BLD is None else null_BLD
    dtype = next(teacher.unet.parameters()).dtype
    both = [null_BLD.to(states_BLD).to(dtype), states_BLD.to(dtype)]
    together = x1_BCHW.device.type != "cpu"

    def predicted(x_BCHW: Tensor, tau_B: Tensor, text_BLD: Tensor) -> Tensor:
        return teacher.unet(x_BCHW, tau_B, text_BLD, return_dict=False)[0].float()

    def guided(x_BCHW: Tensor, tau_B: Tensor) -> Tensor:
        x_BCHW = x_BCHW.to(dtype)
        if together:
            twice = torch.cat([x_BCHW, x_BCHW])
            null_BCHW, text_BCHW = predicted(twice, torch.cat([tau_B, tau_B]), torch.cat(both)).chunk(2)
        else:
            null_BCHW, text_BCHW = (predicted(x_BCHW, tau_B, text_BLD) for text_BLD in both)
        return text_BCHW + w_B.view(-1, 1, 1, 1) * (text_BCHW - null_BCHW)

    x_s_BCHW, _ = ddim_step(guided, teacher.schedule, x_t_BCHW, t_B, s_B)
    return SubPath(t_B, s_B, x_t_BCHW, x_s_BCHW)


def distance(prediction_BCHW: Tensor, target_BCHW: Tensor, kind: str = "huber", c: float = 1e-3) -> Tensor:
    """Pseudo-Huber distance sqrt(d^2 + c^2) - c, or the squared error: mean over all elements."""
    square_BCHW = (prediction_BCHW.float() - target_BCHW.float()).square()
    return square_BCHW.mean() if kind == "l2" else ((square_BCHW + c**2).sqrt() - c).mean()


def subpath_loss(
    student: Student,
    target: Student,
    path: SubPath,
    gamma_B: Tensor,
    states_BLD: Tensor,
    loss: LossConfig,
    w_B: Tensor | None = None,
) -> Tensor:
    """Steps 5 to 7: d(f(x_gamma, gamma, t), f_target(x_s, 1, s)); gamma = 1 throughout is consistency distillation.

    Args:
        target: the averaged student, or the student itself; no gradient goes through it.
        w_B: LCM's own recipe, which embeds its guidance.
    """
    with torch.no_grad():
        target_BCHW = target(path.x_s_BCHW, path.s_B, states_BLD, w_B=w_B)
    x_BCHW = student.paths.point(path.x_t_BCHW, path.x_s_BCHW, gamma_B, path.t_B, path.s_B)
    prediction_BCHW = student(x_BCHW, path.t_B, states_BLD, gamma_B, path.s_B, w_B)
    return distance(prediction_BCHW, target_BCHW, loss.kind, loss.huber_c)


def is_consistency(options: SubPathConfig) -> bool:
    """Whether these options are LCM's: the noisy end only."""
    return options.gamma == "one"
