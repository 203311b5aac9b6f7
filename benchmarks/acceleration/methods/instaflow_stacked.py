"""InstaFlow with two U-Nets in series from the distillation on (the 1.7B model); its steps cost twice as much."""

from __future__ import annotations

from benchmarks.acceleration.methods._flows import FLOW_STEPS, distil, flow_sampler, rectify
from benchmarks.acceleration.protocol import Bench, Budget, Method, Sampler
from instaflow.flow import FlowSource
from instaflow.student import stack


def build(bench: Bench, budget: Budget, lr: float, seed: int) -> Sampler:
    flow = rectify(bench, budget, lr, seed, 0.3, 0.3)
    data = bench.pairs(budget, 0.1, FlowSource(flow, bench.teacher, FLOW_STEPS, 1.0), seed=1)
    student = distil(bench, stack(flow), data, budget, lr, seed, 0.22, 0.08, factor=2)
    return flow_sampler(student, factor=2)


METHOD = Method("InstaFlow, stacked", (1,), "two U-Nets", "learning rate", build)
