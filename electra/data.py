"""Batches of pre-training examples: packed rows, and the random numbers of their masking, as functions of (seed, step).

    store = open_examples(config.data, tokenizer, "train")
    batches = StepBatches(store, batch_size=128, seed=0)
    batches[7]                   # what this process trains on in step 7 (of micro-batches: 7 * accumulate + part)

Which rows a step has, which tokens are masked and what the generator's noise is, is drawn for the global batch and then
shared out, so that resuming, adding processes and accumulating gradients change nothing.

Shapes: R rows of the store, B rows of the global batch, S slots of a row, N packed tokens, M chosen slots of this
process's rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.data.sampling import StepBatchSampler, generator_step, step_generator
from common.errors import UserError
from common.files import checked_file
from common.paths import cache_dir
from electra.config import DataConfig
from electra.corpora import Split, load_corpus
from electra.examples import ExampleStore, build_store
from electra.masking import Draws, slots_per_row
from electra.model import Batch
from electra.wordpiece import Rules, Tokenizer, load_tokenizer, train_wordpiece

VOCABULARY_RULES = 1  # raise when train_wordpiece makes another vocabulary of the same text


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """The run's vocabulary: the given one, or one trained on the corpus's training part and kept in the cache.

    Raises:
        UserError: no vocabulary there, an unknown corpus, or a size too small for its characters.
    """
    if config.vocabulary is not None:
        if config.characters:
            raise UserError("--data.characters is for a vocabulary that is learned here: leave --data.vocabulary out")
        return load_tokenizer(config.vocabulary)
    corpus = load_corpus(config.corpus)
    key = f"{VOCABULARY_RULES} {corpus.fingerprint} {config.vocabulary_size} {config.max_tokens}"
    key += " characters" if config.characters else ""
    path = cache_dir("electra", "vocabularies") / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.txt"

    def learn(place: Path) -> None:
        texts: list[str] = []
        words = 0
        for document in corpus.documents("train"):
            texts.append(" ".join(document))
            words += texts[-1].count(" ") + 1
            if config.max_tokens is not None and words >= config.max_tokens:  # a stream has no end
                break
        trained = train_wordpiece(texts, config.vocabulary_size, characters=config.characters)
        place.write_text("\n".join(trained.vocabulary) + "\n", encoding="utf-8")

    learned = load_tokenizer(checked_file(path, learn))
    return Tokenizer(learned.vocabulary, Rules(characters=True)) if config.characters else learned


def open_examples(config: DataConfig, tokenizer: Tokenizer, split: Split = "train", seed: int = 0) -> ExampleStore:
    """The examples of one part of the corpus, built once and kept in the cache.

    Args:
        seed: of the builder's draws.

    Raises:
        UserError: an unknown corpus, or no text in it.
    """
    corpus = load_corpus(config.corpus)
    parts = (corpus.fingerprint, tokenizer.fingerprint, split, config.length, seed, config.keep_overflow)
    key = " ".join(map(str, (*parts, config.max_tokens)))
    folder = cache_dir("electra", "examples") / hashlib.sha256(key.encode()).hexdigest()[:16]
    limit = config.max_tokens if split == "train" or config.max_tokens is None else max(1, config.max_tokens // 30)
    return build_store(
        folder,
        corpus.documents(split),
        f"{corpus.fingerprint} {split}",
        tokenizer,
        config.length,
        seed,
        config.keep_overflow,
        limit,
    )


@dataclass(frozen=True)
class StepBatch:
    """A process's share of one micro-batch.

    Args:
        batch: its rows, those of equal length side by side.
        draws: positions, 85 % rule and sampling seeds of its slots.
        weights_W: of the whole global batch (all processes and micro-batches): slots, tokens, and different positions
            among the slots; the losses are sums over this batch divided by these.
    """

    batch: Batch
    draws: Draws
    weights_W: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StepBatch:
        """Copy to a device (what Lightning calls)."""
        return self._with(lambda item: item.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> StepBatch:
        """Copy to pinned memory (what the loader calls)."""
        return self._with(lambda item: item.pin_memory())

    def _with(self, change: Callable[[Any], Any]) -> StepBatch:
        """The batch with every tensor changed."""
        draws = {name: None if value is None else change(value) for name, value in vars(self.draws).items()}
        return StepBatch(change(self.batch), Draws(**draws), change(self.weights_W))


class StepBatches(Dataset):
    """The training data as a sequence: item `step * accumulate + part` is this process's share of that micro-batch.

    Args:
        batch_size: rows of the global batch, over all processes and micro-batches.
        mask_probability: share of a row's tokens that are chosen.
        max_length: longest row that the store was built for.
        rank, world: this process among all.

    Raises:
        UserError: the rows cannot be divided among micro-batches and processes.
    """

    def __init__(
        self,
        store: ExampleStore,
        batch_size: int,
        seed: int,
        mask_probability: float = 0.15,
        max_length: int = 128,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % (accumulate * world):
            raise UserError(
                f"--trainer.batch_size {batch_size} cannot be divided among {world} processes and "
                f"{accumulate} micro-batches"
            )
        self.store, self.batch_size, self.seed = store, batch_size, seed
        self.mask_probability, self.max_length = mask_probability, max_length
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self._order = StepBatchSampler(len(store), batch_size, 1, seed)
        self._global: tuple[int, list[int], _GlobalDraws] | None = None

    def rows(self, step: int) -> list[int]:
        """Rows of the global batch of a step."""
        return self._order.batch(step)

    def __getitem__(self, number: int) -> StepBatch:
        step, part = divmod(number, self.accumulate)
        if self._global is None or self._global[0] != step:  # micro-batches of one step share their draws
            rows = self.rows(step)
            self._global = step, rows, self._draw(step, rows)
        _, rows, drawn = self._global
        size = self.batch_size // self.accumulate
        mine = np.arange(part * size + self.rank, (part + 1) * size, self.world)
        mine = mine[np.argsort(-drawn.lengths_B[mine], kind="stable")]
        batch = pack(self.store, [rows[i] for i in mine], self.max_length)
        used_BS = np.arange(drawn.columns_BS.shape[1]) < drawn.slots_B[mine, None]
        starts_B = np.concatenate([[0], np.cumsum(drawn.lengths_B[mine])[:-1]])
        positions_M = (starts_B[:, None] + drawn.columns_BS[mine])[used_BS]
        draws = Draws(
            torch.from_numpy(positions_M),
            torch.from_numpy(drawn.replace_BS[mine][used_BS]),
            seeds_M=torch.from_numpy(drawn.seeds_BS[mine][used_BS]),
        )
        return StepBatch(batch, draws, torch.from_numpy(drawn.weights_W))

    def _draw(self, step: int, rows: list[int]) -> _GlobalDraws:
        """Everything random of a step (official steps 1 to 3), for the global batch."""
        lengths_B = self.store.lengths[rows]
        first_B = self.store.first_lengths_R[rows].astype(np.int64)
        slots_B = slots_per_row(lengths_B.tolist(), self.mask_probability, self.max_length)
        shape = (len(rows), int(slots_B.max()))
        generator = step_generator(self.seed, step)
        uniform_BS = torch.rand(shape, generator=generator, dtype=torch.float64).numpy()
        replace_BS = torch.rand(shape, generator=generator).numpy()
        seeds_BS = torch.randint(1 << 62, shape, generator=generator).numpy()
        columns_BS = draw_columns(uniform_BS, lengths_B, first_B)
        used_BS = np.arange(shape[1]) < slots_B[:, None]
        distinct = len(np.unique((np.arange(len(rows))[:, None] * self.max_length + columns_BS)[used_BS]))
        weights_W = np.array([slots_B.sum(), lengths_B.sum(), distinct], np.float32)
        return _GlobalDraws(lengths_B, slots_B, columns_BS, replace_BS, seeds_BS, weights_W)


@dataclass(frozen=True)
class _GlobalDraws:
    lengths_B: np.ndarray
    slots_B: np.ndarray
    columns_BS: np.ndarray
    replace_BS: np.ndarray
    seeds_BS: np.ndarray
    weights_W: np.ndarray


def draw_columns(uniform_BS: np.ndarray, lengths_B: np.ndarray, first_B: np.ndarray) -> np.ndarray:
    """Columns of the chosen tokens: uniform over a row's tokens but for [CLS] and the one or two [SEP].

    Args:
        uniform_BS: numbers in [0, 1).
        lengths_B: of the rows; first_B: length of their first segment with [CLS] and [SEP].
    """
    has_second_B = first_B < lengths_B
    candidates_B = lengths_B - 2 - has_second_B
    pick_BS = np.minimum((uniform_BS * candidates_B[:, None]).astype(np.int64), candidates_B[:, None] - 1)
    # Column 0 is [CLS]; a token after the first segment's [SEP] stands one further.
    return pick_BS + 1 + (pick_BS + 1 >= first_B[:, None] - 1)


def pack(store: ExampleStore, rows: Sequence[int], max_length: int = 0) -> Batch:
    """Rows of the store one after the other, types included; `max_length` as in `Batch`."""
    parts = [store[row] for row in rows]
    ids_N = torch.from_numpy(np.concatenate([ids for ids, _ in parts]).astype(np.int64))
    lengths = [len(ids) for ids, _ in parts]
    counts = np.array([[first, length - first] for (_, first), length in zip(parts, lengths)]).ravel()
    types_N = torch.from_numpy(np.repeat(np.tile(np.array([0, 1]), len(parts)), counts))
    return Batch.from_flat(ids_N, types_N, lengths, max_length)


class _FromStep(Sampler[int]):
    """Numbers of the micro-batches still to come; its length is that of the whole run, as Lightning expects."""

    def __init__(self, first: Any, total: int) -> None:
        self.first, self.total = first, total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first(), self.total))

    def __len__(self) -> int:
        return self.total


class PretrainingData(LightningDataModule):
    """Feeds `StepBatches` to a trainer from its current step on.

    Args:
        steps: optimiser steps of the whole run.
        options: of `StepBatches`.
    """

    def __init__(self, store: ExampleStore, steps: int, workers: int = 0, **options: Any) -> None:
        super().__init__()
        self.store, self.steps, self.workers, self.options = store, steps, workers, options

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        batches = StepBatches(self.store, **self.options, rank=trainer.global_rank, world=trainer.world_size)
        accumulate = batches.accumulate
        return DataLoader(
            batches,
            batch_size=None,
            sampler=_FromStep(lambda: generator_step(trainer) * accumulate, self.steps * accumulate),
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )


def corpus_counts(store: ExampleStore, vocabulary: int) -> Tensor:
    """How often each id stands in the store, float64 [V] (the unigram generator's weights)."""
    counts = np.zeros(vocabulary, np.int64)
    for first in range(0, len(store.ids_T), 1 << 22):
        counts += np.bincount(store.ids_T[first : first + (1 << 22)], minlength=vocabulary)
    return torch.from_numpy(counts).double()


def held_out_batches(store: ExampleStore, batch_size: int, most: int) -> Iterator[tuple[int, Batch]]:
    """(number, batch) over the first `most` rows of a store, in their order."""
    count = min(most, len(store))
    for number, first in enumerate(range(0, count, batch_size)):
        rows = range(first, min(first + batch_size, count))
        yield number, pack(store, sorted(rows, key=lambda row: -int(store.lengths[row])))
