"""The paper's mechanism where it can be seen whole: eight Gaussians to two moons in the plane, with a small MLP."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from instaflow.flow import Velocity, euler, one_step, straightness, transport_cost
from instaflow.losses import rectified_flow_loss

STEPS, BATCH, COUNT = 700, 256, 512


class Plane(nn.Module):
    """v(x, t) for points kept as [B, 2, 1, 1], the shape of latents."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))

    def forward(self, x_B211: Tensor, t_B: Tensor) -> Tensor:
        waves = torch.stack([t_B, (math.pi * t_B).sin(), (math.pi * t_B).cos(), (2 * math.pi * t_B).sin()], 1)
        return self.net(torch.cat([x_B211.flatten(1), waves], 1)).view_as(x_B211)


def eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    angle = torch.randint(0, 8, (n,), generator=generator) * (math.pi / 4)
    centres = 3 * torch.stack([angle.cos(), angle.sin()], 1)
    return (centres + 0.25 * torch.randn(n, 2, generator=generator)).view(n, 2, 1, 1)


def moons(n: int, generator: torch.Generator) -> Tensor:
    angle = math.pi * torch.rand(n, generator=generator)
    lower = torch.randint(0, 2, (n,), generator=generator).bool()
    x = torch.where(lower, 1 - angle.cos(), angle.cos()) - 0.5
    y = torch.where(lower, 0.5 - angle.sin(), angle.sin()) - 0.25
    points = 1.5 * torch.stack([x, y], 1) + 0.06 * torch.randn(n, 2, generator=generator)
    return points.view(n, 2, 1, 1)


def fit(draw: Callable[[torch.Generator], tuple[Tensor, Tensor]], seed: int, schedule: str = "uniform") -> Velocity:
    """A flow regressed on pairs that are drawn anew in every step."""
    torch.manual_seed(seed)
    flow, generator = Plane(), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(flow.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        x0, x1 = draw(generator)
        t_B = torch.rand(len(x0), generator=generator) if schedule == "uniform" else torch.zeros(len(x0))
        loss = rectified_flow_loss(flow, x0, x1, t_B)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    return flow.requires_grad_(False)


def wasserstein(a: Tensor, b: Tensor) -> float:
    """Squared 2-Wasserstein distance of two equally large point sets."""
    cost = torch.cdist(a.flatten(1).double(), b.flatten(1).double()).square().numpy()
    return float(cost[linear_sum_assignment(cost)].mean())


@cache
def chain() -> list[Velocity]:
    """1-, 2- and 3-rectified flow; reflow pairs are end points of the flow before, by 50 Euler steps."""

    def coupled(flow: Velocity) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
        x0 = eight_gaussians(4096, torch.Generator().manual_seed(5))
        x1 = euler(flow, x0, 50)

        def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            rows = torch.randint(len(x0), (BATCH,), generator=generator)
            return x0[rows], x1[rows]

        return draw

    flows = [fit(lambda g: (eight_gaussians(BATCH, g), moons(BATCH, g)), seed=0)]
    for seed in (1, 2):
        flows.append(fit(coupled(flows[-1]), seed))
    return flows


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return eight_gaussians(COUNT, torch.Generator().manual_seed(11))


def test_each_round_of_reflow_straightens(noise: Tensor) -> None:
    values = [float(straightness(flow, noise, 50)) for flow in chain()]
    assert values[1] < 0.2 * values[0] and values[2] < values[1]


def test_reflow_brings_one_step_close_to_the_target(noise: Tensor) -> None:
    target = moons(COUNT, torch.Generator().manual_seed(12))
    one, two, three = (wasserstein(one_step(flow, noise), target) for flow in chain())
    assert two < 0.5 * one and three < 1.1 * two


def test_reflow_keeps_the_marginal_at_the_data_end(noise: Tensor) -> None:
    target = moons(COUNT, torch.Generator().manual_seed(12))
    floor = wasserstein(moons(COUNT, torch.Generator().manual_seed(13)), target)
    for flow in chain()[1:]:
        assert wasserstein(euler(flow, noise, 50), target) < 4 * floor + 0.05


def test_transport_cost_falls_for_every_convex_cost(noise: Tensor) -> None:
    ends = [euler(flow, noise, 100) for flow in chain()]
    independent = moons(COUNT, torch.Generator().manual_seed(14))
    for power in (1.0, 2.0, 4.0):
        costs = [float(transport_cost(noise, end, power)) for end in (independent, *ends)]
        assert costs[1] < costs[0]  # the flow of an independent coupling
        assert costs[2] < 1.02 * costs[1] and costs[3] < 1.02 * costs[2]


def test_distillation_error_is_lower_after_reflow(noise: Tensor) -> None:
    flows = chain()
    errors = []
    for flow in flows[:2]:

        def draw(generator: torch.Generator, flow: Velocity = flow) -> tuple[Tensor, Tensor]:
            x0 = eight_gaussians(BATCH, generator)
            return x0, euler(flow, x0, 10)

        student = fit(draw, seed=3, schedule="t0")
        errors.append(float((one_step(student, noise) - euler(flow, noise, 10)).square().mean()))
    assert errors[1] < 0.5 * errors[0]
