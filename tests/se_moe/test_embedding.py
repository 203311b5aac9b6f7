"""The partitioned embedding and its tied cross-entropy against one whole table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from se_moe import embedding as module
from se_moe.communication import make_groups
from se_moe.embedding import PartitionedEmbedding, part_bounds, tied_cross_entropy
from tests.se_moe.ranks import run_ranks

VOCABULARY, HIDDEN = 23, 10  # neither divides by 3 or 4


def _table() -> Tensor:
    return torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(1))


def _tokens(rank: int, empty: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank + 5)
    count = 0 if empty else 4 + 3 * rank
    ids = torch.randint(0, VOCABULARY, (count,), generator=generator)
    targets = torch.randint(0, VOCABULARY, (count,), generator=generator)
    if count:
        targets[1] = -100
    return ids, targets


@pytest.mark.parametrize("rows", [3, 256])
def test_tied_cross_entropy_in_blocks_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(module, "LOSS_ROWS", rows)
    hidden = torch.randn(11, HIDDEN, requires_grad=True)
    table = _table().requires_grad_()
    targets = torch.randint(0, VOCABULARY, (11,))
    targets[4] = -100
    ours = tied_cross_entropy(hidden, table, targets)
    expected = F.cross_entropy(hidden @ table.T, targets)
    assert torch.allclose(ours, expected, atol=1e-6)
    for a, b in zip(torch.autograd.grad(3 * ours, (hidden, table)), torch.autograd.grad(3 * expected, (hidden, table))):
        assert torch.allclose(a, b, atol=1e-6)


def test_tied_cross_entropy_without_any_target_is_zero() -> None:
    hidden = torch.randn(3, HIDDEN, requires_grad=True)
    loss = tied_cross_entropy(hidden, _table(), torch.full((3,), -100))
    loss.backward()
    assert float(loss.detach()) == 0 and hidden.grad is not None and not hidden.grad.any()


def test_tied_cross_entropy_survives_large_logits() -> None:
    hidden = 1e4 * torch.randn(5, HIDDEN)
    targets = torch.arange(5)
    assert torch.allclose(tied_cross_entropy(hidden, _table(), targets), F.cross_entropy(hidden @ _table().T, targets))


def test_part_bounds_cover_everything_evenly() -> None:
    assert part_bounds(10, 4) == [0, 3, 6, 8, 10]
    assert part_bounds(8, 2) == [0, 4, 8]


def _partition_on_rank(rank: int, partition: Any, empty_rank: int) -> dict[str, Any]:
    table = PartitionedEmbedding(VOCABULARY, HIDDEN, make_groups().world, partition)
    table.load_full(_table())
    assert torch.equal(table.full(), _table())
    ids, targets = _tokens(rank, rank == empty_rank)
    vectors = table(ids)
    loss = table.cross_entropy(torch.tanh(vectors), targets)
    loss.backward()
    return {
        "vectors": vectors.detach(),
        "loss": loss.detach(),
        "grad": table.weight.grad,
        "span": (table.first, table.last),
        "size": table.weight.numel(),
        "logits": table.logits(vectors.detach()),
    }


@pytest.mark.parametrize("partition", ["columns", "rows"])
@pytest.mark.parametrize(("ranks", "empty_rank"), [(2, -1), (3, 1), (4, -1)])
def test_a_split_table_trains_like_a_whole_one(partition: str, ranks: int, empty_rank: int) -> None:
    table = _table().requires_grad_()
    results = run_ranks(ranks, _partition_on_rank, partition, empty_rank)
    for rank, found in enumerate(results):
        ids, targets = _tokens(rank, rank == empty_rank)
        vectors = F.embedding(ids, table)
        assert torch.equal(found["vectors"], vectors)
        assert torch.allclose(found["logits"], vectors @ table.T)
        if rank == empty_rank:
            assert float(found["loss"]) == 0
            continue
        loss = F.cross_entropy(torch.tanh(vectors) @ table.T, targets)
        assert torch.allclose(found["loss"], loss, atol=1e-6)
        loss.backward()
    assert table.grad is not None
    for found in results:
        first, last = found["span"]
        part = table.grad[:, first:last] if partition == "columns" else table.grad[first:last]
        assert torch.allclose(found["grad"], part, atol=1e-6)
        assert found["size"] <= table.numel() / ranks * 1.2
    assert sum(found["size"] for found in results) == table.numel()


def test_wrong_tables_and_splits_are_named() -> None:
    with pytest.raises(UserError, match='partition is "blocks"'):
        PartitionedEmbedding(8, 4, None, "blocks")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"shape \(4, 8\), expected \(8, 4\)"):
        PartitionedEmbedding(8, 4).load_full(torch.zeros(4, 8))
