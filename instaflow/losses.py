"""The losses of one step: reflow, distillation, perceptual distillation (section 2, item 4, and section 3.2).

Shape suffixes: B batch, C channels, H height, W width (of the latents), L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.data.pairs import PairSource
from common.errors import UserError
from common.steps import StepDraws
from common.teacher import Teacher
from instaflow.flow import Velocity, conditioned, interpolate

# A loss of one (micro-)batch: (flow, {"x0", "x1", "states"}, draws) -> scalar.
Loss = Callable[[nn.Module, dict[str, Tensor], StepDraws], Tensor]


def rectified_flow_loss(
    velocity: Velocity, x0_BCHW: Tensor, x1_BCHW: Tensor, t_B: Tensor, reduction: str = "mean"
) -> Tensor:
    """|| (X1 - X0) - v(X_t, t) ||^2 (section 2): the 1-flow with independent pairs, reflow with coupled ones.

    Args:
        reduction: `mean` over everything, or `halfsum`: half the sum over dimensions, averaged over the batch.
    """
    v_BCHW = velocity(interpolate(x0_BCHW, x1_BCHW, t_B), t_B)
    square_BCHW = (v_BCHW.float() - (x1_BCHW - x0_BCHW).float()).square()
    if reduction == "mean":
        return square_BCHW.mean()
    if reduction == "halfsum":
        return 0.5 * square_BCHW.flatten(1).sum(1).mean()
    raise UserError(f"reduction {reduction!r}: expected mean or halfsum")


def sample_times(
    count: int,
    schedule: str = "uniform",
    eps: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Training times [count] in the paper's direction.

    Args:
        schedule: `uniform` (reflow), `t0` (one-step distillation: always the noise end), `t1` (always the data end:
            one step from an image to its noise), or a number k as text (k-step distillation: {0, 1/k, .., (k-1)/k}).
        eps: times are squeezed into [eps, 1]. 0 here, so that training and sampling see the same time; the CIFAR-10
            code of Rectified Flow has 1e-3.
    """
    if schedule == "uniform":
        t_B = torch.rand(count, generator=generator, device=device)
    elif schedule == "t0":
        t_B = torch.zeros(count, device=device)
    elif schedule == "t1":
        t_B = torch.ones(count, device=device)
    elif schedule.isdigit() and int(schedule) > 0:
        k = int(schedule)
        t_B = torch.randint(0, k, (count,), generator=generator, device=device).float() / k
    else:
        raise UserError(f"time schedule {schedule!r}: expected uniform, t0, t1 or a number of steps such as 4")
    return t_B * (1 - eps) + eps


def step_times(draws: StepDraws, schedule: str) -> Tensor:
    """`sample_times` of this process's rows."""
    times = sample_times(draws.batch, schedule, generator=draws.generator, device=draws.generator.device)
    return times[draws.mine]


def reflow_loss(reduction: str = "mean") -> Loss:
    """Section 2: regress X1 - X0 at uniform times."""

    def loss(flow: nn.Module, batch: dict[str, Tensor], draws: StepDraws) -> Tensor:
        velocity = conditioned(flow, batch["states"])
        return rectified_flow_loss(velocity, batch["x0"], batch["x1"], step_times(draws, "uniform"), reduction)

    return loss


def distillation_loss(k: int = 1) -> Loss:
    """Section 3.2 with D = L2: the same regression at t = 0 alone, or at the k times i/k."""

    def loss(flow: nn.Module, batch: dict[str, Tensor], draws: StepDraws) -> Tensor:
        velocity = conditioned(flow, batch["states"])
        t_B = step_times(draws, "t0" if k == 1 else str(k))
        return rectified_flow_loss(velocity, batch["x0"], batch["x1"], t_B)

    return loss


def perceptual_loss(teacher: Teacher, distance: Any, k: int = 1) -> Loss:
    """Section 3.2 with D = LPIPS on decoded images: the gradient passes the frozen decoder."""

    def loss(flow: nn.Module, batch: dict[str, Tensor], draws: StepDraws) -> Tensor:
        t_B = step_times(draws, "t0" if k == 1 else str(k))
        x_BCHW = interpolate(batch["x0"], batch["x1"], t_B)
        # The line from x_t along v, up to t = 1.
        z1_BCHW = x_BCHW + (1 - t_B.view(-1, 1, 1, 1)) * flow(x_BCHW, t_B, batch["states"])
        with torch.no_grad():
            target_BCHW = teacher.decode_differentiable(batch["x1"])
        return distance(teacher.decode_differentiable(z1_BCHW), target_BCHW).mean()

    return loss


def online(loss: Loss, source: PairSource) -> Loss:
    """The same loss on pairs that `source` makes anew in every step, each used once (RectifiedFlow repository)."""

    def wrapped(flow: nn.Module, batch: dict[str, Tensor], draws: StepDraws) -> Tensor:
        x0_BCHW = draws.normal(*source.teacher.latent_shape)
        # Inference-mode tensors cannot enter a graph.
        x1_BCHW = source(x0_BCHW, batch["states"]).clone()
        return loss(flow, {**batch, "x0": x0_BCHW, "x1": x1_BCHW}, draws)

    return wrapped
