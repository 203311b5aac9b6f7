"""Order of the training data: a function of (seed, step), shared out among processes, unmoved by interruptions."""

from __future__ import annotations

import pytest
import torch

from common.data.sampling import LazyTable, StepBatchSampler, TensorTable, derive_seed, step_generator
from common.errors import UserError


@pytest.mark.parametrize(("n", "batch"), [(12, 4), (10, 4), (3, 8), (1, 2)])
def test_epochs_are_permutations_even_where_batches_cross_them(n: int, batch: int) -> None:
    drawn = [i for rows in StepBatchSampler(n, batch, steps=3 * n, seed=5) for i in rows]
    epochs = [drawn[k * n : (k + 1) * n] for k in range(3 * batch)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n == 12:
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_out_the_batch_of_one(world: int) -> None:
    whole = StepBatchSampler(10, 8, 7, seed=1)
    shares = [StepBatchSampler(10, 8, 7, seed=1, rank=rank, world=world) for rank in range(world)]
    for step in range(7):
        for rank, share in enumerate(shares):
            assert share.batch(step) == whole.batch(step)[rank::world]


def test_starting_late_is_skipping() -> None:
    everything = list(StepBatchSampler(10, 4, 9, seed=3))
    late = StepBatchSampler(10, 4, 9, seed=3, start=lambda: 5)
    assert list(late) == everything[5:]
    assert len(late) == 9, "Lightning needs the length of the whole run"
    assert late.batch(2) == everything[2], "going back past an epoch's border replays it"


def test_order_depends_on_the_seed() -> None:
    assert list(StepBatchSampler(50, 5, 10, seed=0)) != list(StepBatchSampler(50, 5, 10, seed=1))


def test_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(UserError, match=r"batch_size 5 .* 2 processes"):
        StepBatchSampler(10, 5, 1, seed=0, world=2)
    with pytest.raises(UserError, match="empty"):
        StepBatchSampler(0, 5, 1, seed=0)


def test_neighbouring_steps_and_seeds_draw_unrelated_numbers() -> None:
    assert len({derive_seed(seed, step) for seed in range(20) for step in range(-20, 20)}) == 800
    draws = torch.stack([torch.rand(4000, generator=step_generator(0, step)) for step in range(4)])
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.06
    assert torch.equal(draws[2], torch.rand(4000, generator=step_generator(0, 2)))


def test_lazy_table_gives_what_the_table_in_memory_gives() -> None:
    columns = {"image": torch.arange(24).view(6, 4), "label": torch.arange(6)}
    whole = TensorTable(columns)
    asked: list[int] = []

    def row(i: int) -> dict[str, torch.Tensor]:
        asked.append(i)
        return {name: column[i] for name, column in columns.items()}

    lazy = LazyTable(6, row)
    assert len(lazy) == len(whole) == 6 and not asked
    for name, values in lazy.__getitems__([4, 1]).items():
        assert torch.equal(values, whole.__getitems__([4, 1])[name])
    assert asked == [4, 1]
    assert torch.equal(lazy[2]["image"], whole[2]["image"])


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        TensorTable({"a": torch.zeros(2), "b": torch.zeros(3)})
