"""The teacher itself with few solver steps; what is tuned is its guidance."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.acceleration.protocol import Bench, Budget, Sampler
from common.solvers import DiffusionSource


def solver(bench: Bench, name: str, guidance: float, options: dict[str, Any]) -> Sampler:
    """A diffusers scheduler as a sampler."""

    def source(steps: int) -> DiffusionSource:
        return DiffusionSource(bench.teacher, name, steps, guidance, options=options)

    def draw(noise_BCHW: Tensor, states_BLD: Tensor, steps: int) -> Tensor:
        return source(steps)(noise_BCHW, states_BLD)

    return Sampler(draw, lambda steps: source(steps).evaluations)


def ddim(bench: Bench, budget: Budget, guidance: float, seed: int) -> Sampler:
    """DDIM from the last training step on: with diffusers' default spacing one step would start almost at the data."""
    return solver(bench, "DDIMScheduler", guidance, {"timestep_spacing": "trailing"})


def dpm(bench: Bench, budget: Budget, guidance: float, seed: int) -> Sampler:
    """DPM-Solver++ 2M."""
    return solver(bench, "DPMSolverMultistepScheduler", guidance, {})
