"""The 2-rectified flow, by Euler steps."""

from __future__ import annotations

from benchmarks.acceleration.methods._flows import flow_sampler, rectify
from benchmarks.acceleration.protocol import Bench, Budget, Method, Sampler


def build(bench: Bench, budget: Budget, lr: float, seed: int) -> Sampler:
    return flow_sampler(rectify(bench, budget, lr, seed, 0.4, 0.6))


METHOD = Method("2-rectified flow", (1, 2, 4, 8, 25), "full U-Net", "learning rate", build)
