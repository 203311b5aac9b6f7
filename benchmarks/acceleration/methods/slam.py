"""Sub-path linear approximation (arXiv 2404.13903), in the form of `slam/configs/small.yaml`."""

from __future__ import annotations

from benchmarks.acceleration.methods._subpaths import SLAM, distilled
from benchmarks.acceleration.protocol import Bench, Budget, Method, Sampler
from slam.config import StudentConfig


def build(bench: Bench, budget: Budget, lr: float, seed: int) -> Sampler:
    return distilled(bench, budget, lr, seed, SLAM, StudentConfig())


METHOD = Method("SLAM", (1, 2, 4, 8), "full U-Net + gamma projection", "learning rate", build)
