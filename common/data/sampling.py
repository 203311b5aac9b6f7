"""Data order as a pure function of (seed, step), so that training resumes exactly and N processes see what one would.

Lightning's own mid-epoch resume replays another order of samples. Here nothing has to be restored: batch `step` holds
the same samples whatever happened before, on however many processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import UserError


def derive_seed(seed: int, *parts: int) -> int:
    """Mix integers into one 63-bit seed (splitmix64 finaliser), so that neighbouring seeds and steps are unrelated."""
    mask = (1 << 64) - 1
    state = 0
    # The seed is mixed before a part is added: else step 1 of seed 0 would be step 0 of seed 1.
    for part in (seed, *parts):
        state = (state + 0x9E3779B97F4A7C15 + (part & mask)) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Generator for everything random in training step `step`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, step))


class StepBatchSampler(Sampler[list[int]]):
    """Yields, for each optimiser step, this rank's share of the global batch.

    Epoch e is `randperm(n)` seeded by (seed, e); global batch s is positions [s*B, (s+1)*B) of the endless
    concatenation of epochs; rank r of W takes every W-th position from r on.

    Args:
        n: number of samples.
        batch_size: samples of one global batch (all ranks together); must be divisible by `world`.
        steps: total number of steps of the run (not the remaining ones, else Lightning ends its epoch early).
        start: called when iteration begins; returns the step to begin with (the restored `global_step`).
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        steps: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start: Callable[[], int] = lambda: 0,
    ) -> None:
        if n < 1:
            raise UserError("the data set is empty")
        if batch_size % world:
            raise UserError(
                f"batch_size {batch_size} (all processes together) cannot be divided among {world} processes"
            )
        self.n, self.batch_size, self.steps, self.seed = n, batch_size, steps, seed
        self.rank, self.world, self.start = rank, world, start
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.n)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.n, generator=step_generator(self.seed, -1 - epoch))
        return int(self._order[offset])

    def batch(self, step: int) -> list[int]:
        """This rank's sample indices for step `step`."""
        first = step * self.batch_size
        return [self._index(first + i) for i in range(self.rank, self.batch_size, self.world)]

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start(), self.steps):
            yield self.batch(step)

    def __len__(self) -> int:
        return self.steps


class TensorTable(Dataset):
    """A data set that fits in memory: named tensors with one row per sample, fetched a batch at a time."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns differ in length: {lengths}")
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(indices)
        return {name: column[rows] for name, column in self.columns.items()}


class LazyTable(Dataset):
    """The interface of `TensorTable` for data that does not fit in memory: `row(i)` makes sample i when asked for."""

    def __init__(self, n: int, row: Callable[[int], dict[str, Tensor]]) -> None:
        self.n, self.row = n, row

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.row(index)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = [self.row(int(i)) for i in indices]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


Table = TensorTable | LazyTable


def _collate(batch: object) -> object:
    """Batches of a table are complete already; lists of samples get torch's default treatment."""
    return torch.utils.data.default_collate(batch) if isinstance(batch, list) else batch


class StepDataModule(LightningDataModule):
    """Feeds a map-style data set in the order of `StepBatchSampler`; works unchanged under DDP and after a resume.

    Args:
        dataset: map-style; a table is fetched a batch at a time.
        batch_size: samples of one optimiser step over all processes and accumulated micro-batches.
        steps: total number of optimiser steps of the run.
        accumulate: micro-batches per optimiser step.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, steps: int, seed: int, workers: int = 0, accumulate: int = 1
    ) -> None:
        super().__init__()
        if batch_size % accumulate:
            raise UserError(f"batch_size {batch_size} cannot be divided into accumulate {accumulate} micro-batches")
        self.dataset, self.batch_size, self.steps = dataset, batch_size, steps
        self.seed, self.workers, self.accumulate = seed, workers, accumulate

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        return DataLoader(
            self.dataset,
            batch_sampler=self.sampler(
                self.batch_size // self.accumulate,
                self.steps * self.accumulate,
                self.seed,
                rank=trainer.global_rank,
                world=trainer.world_size,
                start=lambda: generator_step(trainer) * self.accumulate,
            ),
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )

    def sampler(self, batch_size: int, steps: int, seed: int, **options: Any) -> Sampler[list[int]]:
        """Which samples each step takes; a set with other rules for its batches overrides this."""
        return StepBatchSampler(len(self.dataset), batch_size, steps, seed, **options)  # type: ignore[arg-type]


def generator_step(trainer: object) -> int:
    """Optimiser steps of the main network so far. A module with several optimisers counts its own (`step_count`)."""
    module = getattr(trainer, "lightning_module", None)
    own = getattr(module, "step_count", None)
    return int(own) if own is not None else int(trainer.global_step)  # type: ignore[attr-defined]
