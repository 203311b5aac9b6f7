"""Batches are functions of (seed, step); masks follow the official rules whoever draws them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from electra.config import DataConfig
from electra.data import StepBatches, corpus_counts, draw_columns, held_out_batches, open_examples, open_tokenizer
from electra.examples import ExampleStore
from electra.masking import SpecialIds, choose, slots_per_row
from electra.wordpiece import Tokenizer
from tests.electra.tiny_run import corpus

BATCH = 12


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, ExampleStore]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        text = corpus(tmp_path_factory.mktemp("corpus"))
        config = DataConfig(corpus=str(text), vocabulary_size=120, length=24)
        tokenizer = open_tokenizer(config)
        assert open_tokenizer(config).fingerprint == tokenizer.fingerprint  # the second time from the cache
        return tokenizer, open_examples(config, tokenizer)


def batches(store: ExampleStore, **options: int) -> StepBatches:
    return StepBatches(store, BATCH, 5, 0.15, 24, **options)


def slots(batch: StepBatches, number: int) -> list[tuple[tuple[int, ...], int, int, float, int]]:
    """Every slot of a batch as (row's ids, column, token, uniform number, seed), in any order."""
    item = batch[number]
    positions, replace, seeds = item.draws.positions_M, item.draws.replace_M, item.draws.seeds_M
    assert positions is not None and replace is not None and seeds is not None
    rows = item.batch.ids_N.split(list(item.batch.lengths))
    found = []
    for place, uniform, seed in zip(positions.tolist(), replace.tolist(), seeds.tolist()):
        row = int(item.batch.rows_N[place])
        column = int(item.batch.positions_N[place])
        found.append((tuple(rows[row].tolist()), column, int(item.batch.ids_N[place]), uniform, seed))
    return sorted(found)


@pytest.mark.parametrize(("accumulate", "world"), [(1, 2), (2, 1), (3, 2)])
def test_processes_and_micro_batches_share_out_the_rows_and_draws_of_the_global_batch(
    opened: tuple[Tokenizer, ExampleStore], accumulate: int, world: int
) -> None:
    store = opened[1]
    for step in (0, 4):
        whole = slots(batches(store), step)
        parts = [
            slot
            for rank in range(world)
            for part in range(accumulate)
            for slot in slots(batches(store, accumulate=accumulate, rank=rank, world=world), step * accumulate + part)
        ]
        assert sorted(parts) == whole


def test_batch_of_a_step_does_not_depend_on_what_was_asked_before(opened: tuple[Tokenizer, ExampleStore]) -> None:
    one, other = batches(opened[1]), batches(opened[1])
    for step in (3, 0, 1):
        one[step]
    assert slots(one, 2) == slots(other, 2) != slots(other, 3)


def test_every_row_is_seen_once_an_epoch(opened: tuple[Tokenizer, ExampleStore]) -> None:
    store = opened[1]
    made = batches(store)
    seen = [row for step in range(len(store)) for row in made.rows(step)]  # BATCH epochs
    assert set(np.bincount(seen, minlength=len(store))) == {BATCH}


def test_masked_tokens_are_never_special_and_slots_are_the_official_number(
    opened: tuple[Tokenizer, ExampleStore],
) -> None:
    tokenizer, store = opened
    for step in range(10):
        item = batches(store)[step]
        masked = choose(item.batch, SpecialIds(*tokenizer.special_ids), 0.15, 24, draws=item.draws)
        assert not set(masked.targets_M.tolist()) & {tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id}
        wanted = slots_per_row(item.batch.lengths, 0.15, 24)
        assert np.array_equal(np.bincount(item.batch.rows_N[masked.positions_M], minlength=BATCH), wanted)


def test_weights_are_those_of_the_global_batch(opened: tuple[Tokenizer, ExampleStore]) -> None:
    whole = batches(opened[1])[1]
    assert whole.draws.positions_M is not None
    distinct = len(set(whole.draws.positions_M.tolist()))
    assert whole.weights_W.tolist() == [len(whole.draws.positions_M), len(whole.batch.ids_N), distinct]
    part = batches(opened[1], accumulate=2, world=2, rank=1)[3]
    assert torch.equal(part.weights_W, whole.weights_W)


def test_columns_are_uniform_over_the_ordinary_tokens() -> None:
    # [CLS] a b [SEP] c d e [SEP] and [CLS] a b c [SEP]
    lengths, first = np.array([8, 5]), np.array([4, 5])
    uniform = ((np.arange(3000) + 0.5) / 3000)[None].repeat(2, 0)
    columns = draw_columns(uniform, lengths, first)
    assert np.bincount(columns[0]).tolist() == [0, 600, 600, 0, 600, 600, 600]
    assert np.bincount(columns[1]).tolist() == [0, 1000, 1000, 1000]


def test_types_and_positions_of_packed_rows(opened: tuple[Tokenizer, ExampleStore]) -> None:
    tokenizer, store = opened
    _, batch = next(held_out_batches(store, 20, 100))
    assert list(batch.lengths) == sorted(batch.lengths, reverse=True)
    for ids, types, positions in zip(
        *(t.split(list(batch.lengths)) for t in (batch.ids_N, batch.types_N, batch.positions_N))
    ):
        assert ids[0] == tokenizer.cls_id and positions.tolist() == list(range(len(ids)))
        separators = (ids == tokenizer.sep_id).nonzero().flatten()
        assert types.tolist() == (positions > separators[0]).long().tolist()


def test_corpus_counts_add_up(opened: tuple[Tokenizer, ExampleStore]) -> None:
    tokenizer, store = opened
    counts = corpus_counts(store, tokenizer.size)
    assert counts.sum() == len(store.ids_T) and counts[tokenizer.cls_id] == len(store)


def test_rows_that_cannot_be_divided_are_refused(opened: tuple[Tokenizer, ExampleStore]) -> None:
    with pytest.raises(UserError, match="12 cannot be divided among 5 processes"):
        batches(opened[1], world=5)


def test_held_out_text_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))
    config = DataConfig(corpus=str(corpus(tmp_path)), vocabulary_size=120, length=24)
    tokenizer = open_tokenizer(config)
    train, held_out = (open_examples(config, tokenizer, split) for split in ("train", "held_out"))
    assert 0 < len(held_out) < len(train) and held_out.fingerprint != train.fingerprint
