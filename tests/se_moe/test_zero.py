"""Dense slices: training equals that of replicated parameters, whole tensors exist only while they are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from se_moe.clipping import Parts, clip_global_norm
from se_moe.communication import GradientBuckets, make_groups
from se_moe.config import ModelConfig
from se_moe.model import MoELanguageModel, initialise
from se_moe.zero import shard_model
from tests.se_moe.ranks import run_ranks

SMALL = ModelConfig(
    vocabulary=40, sequence=10, hidden=16, layers=4, heads=2, dense_hidden=24, experts=4, expert_hidden=12
)
STEPS, MAX_NORM = 3, 0.5


def _batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 40, (3, 11), generator=torch.Generator().manual_seed(100 * rank + step))
    return ids[:, :-1], ids[:, 1:]


def _train_on_rank(rank: int, sliced: bool, prefetch: bool, fused: bool, micro: int) -> dict[str, Any]:
    groups = make_groups()
    model = MoELanguageModel(SMALL, groups)
    initialise(model, 3)
    experts = model.expert_parameters()
    ranks = groups.world_size
    sparse = GradientBuckets(experts, groups.expert_data, ranks)
    found: dict[str, Any] = {}
    if sliced:
        zero = shard_model(model, groups.world, ranks, prefetch, fused)
        dense, replicated, parts = zero.shards(), [], [Parts(zero.shards(), groups.world)]
        assert zero.full_bytes == 0
    else:
        buckets = GradientBuckets(model.dense_parameters(), groups.world, ranks)
        dense, replicated, parts = model.dense_parameters(), model.dense_parameters(), []
    optimizer = torch.optim.AdamW([*dense, *experts], lr=1e-2)
    losses, norms = [], []
    for step in range(STEPS):
        for part in range(micro):
            result = model(*_batch(rank, micro * step + part))
            if part < micro - 1:
                with sparse.accumulate():
                    if sliced:
                        result.loss.backward()
                        zero.finish()
                    else:
                        with buckets.accumulate():
                            result.loss.backward()
            else:
                result.loss.backward()
        sparse.finish()
        (zero if sliced else buckets).finish()
        norms.append(clip_global_norm(replicated, [*parts, Parts(experts, groups.expert)], MAX_NORM))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(result.lm_loss.detach())
    if sliced:
        found |= {
            "left": zero.full_bytes,
            "peak": zero.peak_full_bytes,
            "shards": sum(shard.nbytes for shard in zero.shards()),
            "prefetched": zero.prefetched,
        }
        with torch.no_grad():
            evaluated = model(*_batch(9, 9)).lm_loss
        zero.finish()
        with zero.whole(write=True):
            table = model.wte.weight.detach().clone()
            model.ln_f.bias.data.fill_(7.0)
        with zero.whole():
            found["bias"] = model.ln_f.bias.detach().clone()
    else:
        with torch.no_grad():
            evaluated = model(*_batch(9, 9)).lm_loss
        table = model.wte.weight.detach().clone()
    return found | {
        "losses": torch.stack(losses), "norms": torch.stack(norms), "evaluated": evaluated, "table": table,
    }  # fmt: skip


@pytest.fixture(scope="module")
def replicated() -> list[dict[str, Any]]:
    return run_ranks(2, _train_on_rank, False, True, True, 1)


@pytest.mark.parametrize(("prefetch", "fused"), [(True, True), (False, True), (True, False)])
def test_sliced_parameters_train_like_replicated_ones(
    replicated: list[dict[str, Any]], prefetch: bool, fused: bool
) -> None:
    results = run_ranks(2, _train_on_rank, True, prefetch, fused, 1)
    for found, expected in zip(results, replicated):
        assert torch.equal(found["losses"][0], expected["losses"][0]), "gathering changed a bit"
        for name in ("losses", "norms", "evaluated", "table"):
            assert torch.allclose(found[name], expected[name], atol=1e-5), name
        assert found["left"] == 0, "whole parameters were not freed"
        assert (found["prefetched"] > 0) == prefetch
        assert torch.equal(found["bias"], torch.full((16,), 7.0))
    whole = sum(p.nbytes for p in MoELanguageModel(SMALL).dense_parameters())
    assert whole / 2 <= results[0]["shards"] <= whole / 2 + 4 * 60
    # Embeddings stay whole, and their gradient too; of four layers about two exist at a time, one with its gradient.
    assert results[0]["peak"] < 0.8 * 2 * whole


def test_micro_batches_add_up_in_slices() -> None:
    sliced = run_ranks(2, _train_on_rank, True, True, True, 2)
    plain = run_ranks(2, _train_on_rank, False, True, True, 2)
    for found, expected in zip(sliced, plain):
        assert torch.allclose(found["losses"], expected["losses"], atol=1e-5)
        assert torch.allclose(found["norms"], expected["norms"], atol=1e-5)


def test_one_process_can_slice_too() -> None:
    model = MoELanguageModel(SMALL)
    initialise(model, 3)
    expected = model(*_batch(0, 0))
    expected.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    zero = shard_model(model, None, 1)
    found = model(*_batch(0, 0))
    assert torch.equal(found.loss, expected.loss)
    found.loss.backward()
    zero.finish()
    flat = torch.cat([shard.grad for shard in zero.shards() if shard.grad is not None])
    dense = torch.cat([grads[n].flatten() for n, _ in model.named_parameters() if n in grads and "experts" not in n])
    assert torch.allclose(flat.sort().values, dense.sort().values)
    zero.remove()
    assert torch.equal(model(*_batch(0, 0)).loss, expected.loss)
