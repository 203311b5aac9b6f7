"""SLAM with low-rank adaptors on the frozen teacher; gamma reaches them through the effective time."""

from __future__ import annotations

from benchmarks.acceleration.methods._subpaths import RANK, SLAM, distilled
from benchmarks.acceleration.protocol import Bench, Budget, Method, Sampler
from slam.config import StudentConfig


def build(bench: Bench, budget: Budget, lr: float, seed: int) -> Sampler:
    return distilled(bench, budget, lr, seed, SLAM, StudentConfig(kind="lora", rank=RANK))


METHOD = Method("SLAM-LoRA", (1, 2, 4), "LoRA", "learning rate", build)
