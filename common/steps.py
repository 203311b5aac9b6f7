"""The random numbers of a training step, and its means, over the global batch.

Everything random in a step is a function of (seed, step), drawn for the global batch and shared out among processes and
micro-batches, so that resuming, caching, adding processes and accumulating gradients change nothing.

Shape suffix: b rows of this micro-batch on this process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from common.data.sampling import derive_seed, generator_step, step_generator


@dataclass(frozen=True)
class StepDraws:
    """Random numbers of one training step: drawn for the global batch, of which this process takes its rows.

    Args:
        generator: of everything random in the step; the order of the calls below decides what is drawn.
        batch: rows of the global batch.
        mine: which of them are this micro-batch of this process.
        part: number of the micro-batch.
        seed: for what draws from torch's global generator.
    """

    generator: torch.Generator
    batch: int
    mine: slice
    part: int = 0
    seed: int = 0

    @classmethod
    def of(
        cls, module: pl.LightningModule, batch_idx: int, *, batch_size: int, accumulate: int = 1, seed: int
    ) -> StepDraws:
        """Those of the step that `module` is in."""
        trainer = module.trainer
        step, part, size = generator_step(trainer), batch_idx % accumulate, batch_size // accumulate
        mine = slice(part * size + trainer.global_rank, (part + 1) * size, trainer.world_size)
        own = derive_seed(seed, step, part, trainer.global_rank)
        return cls(step_generator(seed, step, module.device), batch_size, mine, part, own)

    def uniform(self, count: int | None = None) -> Tensor:
        """[b] in [0, 1), or [count, b]."""
        shape = (self.batch,) if count is None else (count, self.batch)
        return torch.rand(shape, generator=self.generator, device=self.generator.device)[..., self.mine]

    def normal(self, *shape: int) -> Tensor:
        """[b, *shape], unit normal."""
        return self.normals(1, *shape)[0]

    def normals(self, count: int, *shape: int) -> Tensor:
        """[count, b, *shape], unit normal, in one draw."""
        size = (count, self.batch, *shape)
        return torch.randn(size, generator=self.generator, device=self.generator.device)[:, self.mine]

    def integers(self, high: int) -> Tensor:
        """[b] in 0 .. high - 1."""
        return torch.randint(high, (self.batch,), generator=self.generator, device=self.generator.device)[self.mine]

    def seed_dropout(self) -> None:
        """Dropout draws from the global generator, which no checkpoint holds."""
        torch.manual_seed(self.seed)


class StepOptions(TypedDict):
    """The steps of a stage; `accumulate`: micro-batches per step."""

    seed: int
    steps: int
    batch_size: int
    accumulate: NotRequired[int]


def steps_of(config: Any) -> StepOptions:
    """Those of a run with a single stage, by its `seed` and `trainer`."""
    trainer = config.trainer
    return StepOptions(
        seed=config.seed, steps=trainer.max_steps, batch_size=trainer.batch_size, accumulate=trainer.accumulate
    )


class StepTraining(pl.LightningModule):
    """A module whose steps draw random numbers and log means (`self.means`) for the global batch."""

    def __init__(self, *, seed: int, steps: int, batch_size: int, accumulate: int = 1) -> None:
        super().__init__()
        self.seed, self.steps, self.batch_size, self.accumulate = seed, steps, batch_size, accumulate
        self.means = BatchMeans()

    def draws(self, batch_idx: int) -> StepDraws:
        """The random numbers of a step."""
        return StepDraws.of(self, batch_idx, batch_size=self.batch_size, accumulate=self.accumulate, seed=self.seed)


def mean_over_processes(values: Tensor) -> Tensor:
    """What every process has, averaged (no gradients); where there is one process, its own."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class BatchMeans:
    """Logs means over the whole global batch: over micro-batches here, over processes by Lightning."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self.last: dict[str, Tensor] = {}

    def log(self, module: pl.LightningModule, values: Mapping[str, Tensor], part: int, parts: int) -> None:
        """Take in a micro-batch's values; the last one of a step logs `train/NAME` and keeps the means in `last`."""
        if part == 0:
            self._sums = {}
        self._sums = {k: self._sums.get(k, 0.0) + v.detach() for k, v in values.items()}
        if part == parts - 1:
            self.last = {k: v / parts for k, v in self._sums.items()}
            module.log_dict({f"train/{k}": v for k, v in self.last.items()}, sync_dist=module.trainer.world_size > 1)
