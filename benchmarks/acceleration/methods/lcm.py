"""Latent consistency distillation (Luo et al., arXiv 2310.04378) at one fixed guidance, from real latents."""

from __future__ import annotations

from benchmarks.acceleration.methods._subpaths import LCM, distilled
from benchmarks.acceleration.protocol import Bench, Budget, Method, Sampler
from slam.config import StudentConfig


def build(bench: Bench, budget: Budget, lr: float, seed: int) -> Sampler:
    return distilled(bench, budget, lr, seed, LCM, StudentConfig())


METHOD = Method("LCM", (1, 2, 4, 8), "full U-Net", "learning rate", build)
