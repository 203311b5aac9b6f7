"""InstaFlow: reflow, then one-step distillation of the straightened flow (L2, then perceptual)."""

from __future__ import annotations

from benchmarks.acceleration.methods._flows import FLOW_STEPS, copied, distil, flow_sampler, rectify
from benchmarks.acceleration.protocol import Bench, Budget, Method, Sampler
from instaflow.flow import FlowSource


def build(bench: Bench, budget: Budget, lr: float, seed: int) -> Sampler:
    flow = rectify(bench, budget, lr, seed, 0.3, 0.3)
    data = bench.pairs(budget, 0.1, FlowSource(flow, bench.teacher, FLOW_STEPS, 1.0), seed=1)
    return flow_sampler(distil(bench, copied(flow), data, budget, lr, seed, 0.22, 0.08))


METHOD = Method("InstaFlow", (1,), "full U-Net", "learning rate", build)
