"""One-step distillation of the teacher without reflow: L2, then perceptual (InstaFlow's baseline)."""

from __future__ import annotations

from benchmarks.acceleration.methods._flows import INIT, distil, flow_sampler
from benchmarks.acceleration.protocol import Bench, Budget, Method, Sampler
from instaflow.student import make_student


def build(bench: Bench, budget: Budget, lr: float, seed: int) -> Sampler:
    data = bench.pairs(budget, 0.4)
    student = distil(bench, make_student(bench.teacher, INIT), data, budget, lr, seed, 0.5, 0.1)
    return flow_sampler(student)


METHOD = Method("direct distillation", (1,), "full U-Net", "learning rate", build)
