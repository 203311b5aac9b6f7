"""What a method is to the benchmark, and what it is given: teacher, shared pairs, data, a budget and a learning rate.

A method joins by one file in `methods/` that defines `METHOD = Method(...)`. Its `build` trains within the budget and
returns a `Sampler`; everything else (tuning, seeds, metrics, tables, pictures) is the runner's.

The unit of cost is one U-Net forward of one sample. A training step costs 3 a sample (backward = 2 forwards), further
forwards (teacher, averaged model) come on top, and so do pairs, also when another method has made the same ones before.

Shape suffixes: B batch, C channels, H W height and width (latents), L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.acceleration.fitting import Loss, Minimiser, minimise
from common.data.pairs import PairDataset, PairSource, StateTable, make_pairs, prompt_list
from common.data.sampling import TensorTable
from common.errors import UserError
from common.solvers import DiffusionSource
from common.teacher import Teacher

BUDGETS = {"B1": 20_000, "B2": 200_000, "B3": 2_000_000}  # U-Net forward-equivalent samples
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
GUIDANCES = (1.0, 2.0, 3.0, 5.0)
TRAIN_STEP = 3  # forward-equivalents of one sample's forward and backward
# Solver steps of the shared pairs: 25 as in the paper, except where that would eat the whole budget.
PAIR_STEPS = {"B1": 10, "B2": 25, "B3": 25}
PROMPT_POOL = 20_000  # training captions that pairs and data are drawn from
DATA_IMAGES = 4_000  # training images for the methods that learn from data
BATCH = 32


class OverBudgetError(UserError):
    """A method charged more than it had."""


@dataclass
class Budget:
    """Forward-equivalent samples that a method may spend, and what it spent them on."""

    total: float
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.total - sum(self.spent.values())

    def charge(self, what: str, forwards: float) -> None:
        """Book a cost before it is incurred.

        Raises:
            OverBudgetError: there is not that much left.
        """
        if forwards > self.left + 1e-6:
            raise OverBudgetError(
                f"{what}: {forwards:g} forward-equivalents asked for, {self.left:g} of {self.total:g} left"
            )
        self.spent[what] = self.spent.get(what, 0.0) + forwards

    def steps(self, share: float, per_sample: float, batch: int) -> int:
        """Optimiser steps that `share` of the whole budget pays for (at least one)."""
        return max(1, int(min(share * self.total, self.left) / (per_sample * batch)))


@dataclass
class Sampler:
    """A trained (or frozen) few-step generator.

    Args:
        draw: (noise [B, C, H, W], text states [B, L, D], steps) -> latents [B, C, H, W].
        forwards: U-Net forward-equivalents per image for so many steps (guidance doubles them).
        trained: trained parameters.
    """

    draw: Callable[[Tensor, Tensor, int], Tensor]
    forwards: Callable[[int], float]
    trained: int = 0


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        title: as the table shows it.
        steps: the columns in which it has an entry.
        trains: what is trained, in words.
        tuned: which grid its one free number comes from; both have four entries: equally many tries for all.
        build: (bench, budget, the tuned number, seed) -> Sampler.
    """

    title: str
    steps: tuple[int, ...]
    trains: str
    tuned: Literal["learning rate", "guidance"]
    build: Callable[[Bench, Budget, float, int], Sampler]

    @property
    def grid(self) -> tuple[float, ...]:
        return LEARNING_RATES if self.tuned == "learning rate" else GUIDANCES


@dataclass
class Bench:
    """What every method is given.

    Args:
        guidance: of the teacher in the shared pairs and wherever a method asks the guided teacher.
        level: name of the budget class, which fixes the solver steps of the shared pairs.
    """

    teacher: Teacher
    level: str
    guidance: float
    device: str = "cpu"

    @cached_property
    def prompts(self) -> list[str]:
        return prompt_list("shapes", PROMPT_POOL)

    @cached_property
    def null(self) -> Tensor:
        """Text states of the empty prompt, [1, L, D]."""
        return self.teacher.null(1).float()

    @cached_property
    def states(self) -> Callable[[Tensor], Tensor]:
        """Numbers of training prompts to their text states [B, L, D]."""
        return StateTable(self.teacher).numbered(self.prompts)

    def teacher_source(self, steps: int | None = None) -> DiffusionSource:
        """The guided teacher by DPM-Solver++ 2M: the source of the shared pairs."""
        return DiffusionSource(
            self.teacher, "DPMSolverMultistepScheduler", steps or PAIR_STEPS[self.level], self.guidance
        )

    def pairs(self, budget: Budget, share: float, source: PairSource | None = None, seed: int = 0) -> PairDataset:
        """As many pairs as `share` of the budget pays for: the shared ones of the teacher, or those of `source`.

        Args:
            seed: of the noises; another than 0 for pairs of a student, so that they are new ones.
        """
        source = source or self.teacher_source()
        count = max(BATCH, int(min(share * budget.total, budget.left) / source.evaluations))
        budget.charge("pairs", count * source.evaluations)
        return make_pairs(source, self.prompts, count, seed, 64, 128, progress=False)

    @cached_property
    def data(self) -> TensorTable:
        """Latents of real training images with their prompt numbers: columns x1 and prompt."""
        from common.data.shapes import Shapes

        images = Shapes("train", PROMPT_POOL, self.teacher.image_size[0]).images[:DATA_IMAGES]
        x_NCHW = torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1
        return TensorTable({"x1": self.teacher.encode_images(x_NCHW).cpu(), "prompt": torch.arange(len(x_NCHW))})

    def fit(
        self,
        network: nn.Module,
        loss: Loss,
        data: Dataset,
        budget: Budget,
        lr: float,
        seed: int,
        share: float,
        extra: float = 0.0,
        factor: float = 1.0,
        what: str = "training",
    ) -> None:
        """Train a network in place for what `share` of the budget pays for; it ends with its averaged weights.

        Args:
            extra: forwards a sample besides the student's own (teacher, averaged model).
            factor: cost of the student's forward in U-Nets (2 for a stack).
        """
        per_sample = TRAIN_STEP * factor + extra
        steps = budget.steps(share, per_sample, BATCH)
        budget.charge(what, steps * BATCH * per_sample)
        minimise(Minimiser(network, loss, self.states, steps, BATCH, lr, seed), data, self.device)
        network.to(self.teacher.device)  # Lightning leaves it on the CPU


def trained_parameters(modules: Sequence[torch.nn.Module]) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for module in modules for p in module.parameters())
