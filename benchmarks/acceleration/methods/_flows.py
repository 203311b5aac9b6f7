"""Reflow and distillation with shares of one budget: what direct distillation, 2-RF and InstaFlow have in common."""

from __future__ import annotations

import copy

from torch import Tensor

from benchmarks.acceleration.protocol import Bench, Budget, Sampler, trained_parameters
from common.data.pairs import PairDataset
from common.data.sampling import derive_seed
from common.metrics.perceptual import perceptual_distance
from instaflow.flow import UNetFlow, conditioned, euler
from instaflow.losses import distillation_loss, perceptual_loss, reflow_loss
from instaflow.student import make_student

INIT = "negate"
FLOW_STEPS = 10  # Euler steps of the rectified flow in its own pairs; it is nearly straight


def flow_sampler(flow: UNetFlow, factor: float = 1.0) -> Sampler:
    """Euler steps of a flow, guidance off: it is inside the pairs."""

    def draw(noise_BCHW: Tensor, states_BLD: Tensor, steps: int) -> Tensor:
        return euler(conditioned(flow, states_BLD), noise_BCHW, steps)

    return Sampler(draw, lambda steps: steps * factor, trained_parameters([flow]))


def rectify(bench: Bench, budget: Budget, lr: float, seed: int, pairs: float, steps: float) -> UNetFlow:
    """The 2-rectified flow; `pairs` and `steps` are shares of the whole budget."""
    flow = make_student(bench.teacher, INIT)
    data = bench.pairs(budget, pairs)
    bench.fit(flow, reflow_loss(), data, budget, lr, derive_seed(seed, 1), steps, what="reflow")
    return flow


def distil(
    bench: Bench,
    student: UNetFlow,
    data: PairDataset,
    budget: Budget,
    lr: float,
    seed: int,
    l2: float,
    perceptual: float,
    factor: float = 1.0,
) -> UNetFlow:
    """One-step distillation in place, L2 first, then perceptual on decoded images (decoding is no U-Net cost)."""
    bench.fit(student, distillation_loss(), data, budget, lr, derive_seed(seed, 2), l2, factor=factor, what="L2")
    loss = perceptual_loss(bench.teacher, perceptual_distance("trained").to(bench.teacher.device))
    bench.fit(student, loss, data, budget, lr, derive_seed(seed, 3), perceptual, factor=factor, what="perceptual")
    return student


def copied(flow: UNetFlow) -> UNetFlow:
    return copy.deepcopy(flow)
