"""LCM with low-rank adaptors on the frozen teacher (Luo et al., arXiv 2311.05556)."""

from __future__ import annotations

from benchmarks.acceleration.methods._subpaths import LCM, RANK, distilled
from benchmarks.acceleration.protocol import Bench, Budget, Method, Sampler
from slam.config import StudentConfig


def build(bench: Bench, budget: Budget, lr: float, seed: int) -> Sampler:
    return distilled(bench, budget, lr, seed, LCM, StudentConfig(kind="lora", rank=RANK))


METHOD = Method("LCM-LoRA", (1, 2, 4), "LoRA", "learning rate", build)
