"""Training on shards that do not fit one disk: a stream in place of a table, with exact resume.

Nothing about the whole set is known but its number of rows: no latents are cached, the tokenizer learns from the first
captions, and held out are shards of their own.
"""

from __future__ import annotations

import copy
import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from common.data.rows import LEFT_OUT
from common.data.sampling import StepDataModule, Table, TensorTable, generator_step
from common.data.shards import ShardedImages
from common.errors import UserError
from ldm.config import DataConfig

Row = dict[str, Tensor]


class ShardStream:
    """Training rows of `ShardedImages`: `image` uint8 [3, S, S] and the task's columns.

    Args:
        images: of one process without workers; each process takes its own part of it.
        columns: a task's columns of (item, number); the number is a checksum of the image, since a stream has no rows.
        workers: loader processes.
    """

    def __init__(self, images: ShardedImages, columns: Callable[[dict[str, Any], int], Row], workers: int = 0) -> None:
        self.images, self.columns, self.workers = images, columns, workers

    def row(self, item: dict[str, Any]) -> Row:
        """Image and columns of one item."""
        return {"image": item["image"], **self.columns(item, zlib.crc32(item["image"].numpy().tobytes()))}

    def head(self, n: int) -> Row:
        """The first n rows of the stream, stacked."""
        return default_collate([self.row(item) for item in itertools.islice(iter(self.images), n)])

    def part(self, batch_size: int, rank: int, world: int) -> ShardedImages:
        """The images of one process; batch_size is its own."""
        mine = copy.copy(self.images)
        mine.batch_size, mine.rank, mine.world, mine.workers = batch_size, rank, world, self.workers
        return mine


class _Rows(IterableDataset[Row]):
    def __init__(self, stream: ShardStream, images: ShardedImages) -> None:
        super().__init__()
        self.stream, self.images = stream, images

    def __iter__(self) -> Iterator[Row]:
        return map(self.stream.row, self.images)


class StreamDataModule(pl.LightningDataModule):
    """Feeds a stream; after a resume it goes on at the trainer's step. What the order depends on (number of processes
    and workers, batch size, shards) is kept in the checkpoint and must be the same.

    Args:
        batch_size: samples of one optimiser step over all processes and accumulated micro-batches.
        accumulate: micro-batches per optimiser step.
    """

    def __init__(self, stream: ShardStream, batch_size: int, accumulate: int = 1) -> None:
        super().__init__()
        self.stream, self.batch_size, self.accumulate = stream, batch_size, accumulate
        self._saved: dict[str, Any] | None = None

    def _images(self) -> ShardedImages:
        trainer = self.trainer
        assert trainer is not None
        parts = self.accumulate * trainer.world_size
        if self.batch_size % parts:
            raise UserError(
                f"batch_size {self.batch_size} cannot be divided into {parts} parts of processes and micro-batches"
            )
        return self.stream.part(self.batch_size // parts, trainer.global_rank, trainer.world_size)

    def state_dict(self) -> dict[str, Any]:
        return self._images().state_dict(generator_step(self.trainer) * self.accumulate)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state

    def train_dataloader(self) -> DataLoader:
        images = self._images()
        step = generator_step(self.trainer) * self.accumulate
        images.load_state_dict({**(self._saved or images.state_dict(step)), "step": step})
        return DataLoader(_Rows(self.stream, images), batch_size=images.batch_size, num_workers=self.stream.workers)


def data_module(
    data: Table | ShardStream, batch_size: int, steps: int, seed: int, workers: int = 0, accumulate: int = 1
) -> pl.LightningDataModule:
    """The batches of a table (`StepDataModule`) or of a stream, whose order has its own seed and workers.

    Args:
        workers: loader processes for data that are not in memory.
    """
    if isinstance(data, ShardStream):
        return StreamDataModule(data, batch_size, accumulate)
    return StepDataModule(data, batch_size, steps, seed, 0 if isinstance(data, TensorTable) else workers, accumulate)


def open_shards(data: DataConfig, task: str, seed: int) -> tuple[ShardedImages, list[dict[str, Any]]]:
    """The training stream, and the held-out items in memory.

    Raises:
        UserError: no path, no shard, only one shard and no `data.eval_path`, or a column is missing.
    """
    if data.path is None:
        raise UserError(
            "data.name shards needs --data.path, for example 'shards/*.parquet' or hf://datasets/user/name/*"
        )
    images = ShardedImages(
        [path for path in (data.path, data.eval_path) if path is not None],
        data.size,
        batch_size=1,
        seed=seed,
        image_column=data.image_column,
        caption_column=data.text_column if task == "text" else LEFT_OUT,
        label_column=data.label_column if task == "class" else LEFT_OUT,
        need={"text": ["caption"], "class": ["label"]}.get(task, []),
    )
    if data.eval_path is None and len(images.shards) < 2:
        raise UserError(f"--data.path {data.path}: one shard only, none to hold out; give --data.eval_path")
    train, held_out = images.hold_out(data.eval_path)
    return train, list(itertools.islice(held_out, data.eval_images))
