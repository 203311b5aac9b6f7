"""HiPA: adaptors of the one step, by a perceptual and a high-frequency loss on the teacher's pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.acceleration.fitting import Loss
from benchmarks.acceleration.protocol import Bench, Budget, Method, Sampler
from common.data.sampling import derive_seed
from common.steps import StepDraws
from hipa.config import AdaptorConfig, LossConfig
from hipa.losses import AdaptationLoss
from hipa.model import make_student, trained_parameters

# The rank of every row that trains adaptors. They reach attention and convolutions, as theirs do: in a small U-Net
# attention alone is too little.
ADAPTOR = AdaptorConfig(rank=16, placement="attention_conv")
PAIRS = 0.4  # of the budget, as direct distillation


def loss_of(bench: Bench) -> Loss:
    """The adaptation loss of a pair in pictures; decoding is no U-Net cost."""
    adaptation = AdaptationLoss(LossConfig(), bench.teacher.decode_differentiable, bench.teacher.device)

    def loss(student: nn.Module, batch: dict[str, Tensor], draws: StepDraws) -> Tensor:
        return adaptation(student(batch["x0"], batch["states"]), batch["x1"])["loss"]

    return loss


def build(bench: Bench, budget: Budget, lr: float, seed: int) -> Sampler:
    torch.manual_seed(derive_seed(seed, 2))  # of the adaptors' first weights
    student = make_student(bench.teacher, ADAPTOR)
    data = bench.pairs(budget, PAIRS)
    bench.fit(student, loss_of(bench), data, budget, lr, derive_seed(seed, 1), 1.0)
    return Sampler(lambda noise, states, steps: student(noise, states), float, trained_parameters(student))


METHOD = Method("HiPA", (1,), "LoRA", "learning rate", build)
