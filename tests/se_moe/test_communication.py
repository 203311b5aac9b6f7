"""Groups, AlltoAll, fused slices, gradient buckets and clipping over gloo ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError
from se_moe.clipping import Parts, clip_global_norm, global_norm
from se_moe.communication import (
    GradientBuckets,
    Layout,
    ParallelGroups,
    RowPlan,
    SlowLinks,
    all_to_all_rows,
    gather_slices,
    make_groups,
    make_topology,
    plan_from_counts,
)
from se_moe.moe import MoELayer
from tests.se_moe.ranks import run_ranks


def _groups_on_rank(rank: int) -> dict[str, Any]:
    groups = make_groups(2, None)
    errors = []
    for call in (
        lambda: make_groups(3),
        lambda: make_topology(3),
        lambda: MoELayer(4, 4, 3, groups=groups),
    ):
        try:
            call()
        except UserError as error:
            errors.append(str(error))
    return {
        "expert": dist.get_process_group_ranks(groups.expert),
        "copies": dist.get_process_group_ranks(groups.expert_data),
        "world": groups.world_size,
        "errors": errors,
    }


def test_expert_groups_are_consecutive_and_copies_stand_apart() -> None:
    found = run_ranks(4, _groups_on_rank)
    assert [f["expert"] for f in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [f["copies"] for f in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(f["world"] == 4 for f in found)
    texts = ("must divide the number of processes, 4", "must divide the 4 ranks", "multiple of the 2 ranks")
    for f in found:
        assert len(f["errors"]) == 3 and all(t in e for t, e in zip(texts, f["errors"]))


def test_one_process_needs_no_groups() -> None:
    assert make_groups() == ParallelGroups() and ParallelGroups().expert_size == 1
    with pytest.raises(UserError, match="start 2 with torchrun"):
        make_groups(2)
    x = torch.randn(4, 3)
    assert all_to_all_rows(x, RowPlan([4], [4]), None) is x


def _counts(ranks: int) -> Tensor:
    """Routes [from, to, expert]; some ranks send nothing somewhere, and rank 1 sends nothing at all."""
    counts = torch.randint(0, 4, (ranks, ranks, 2), generator=torch.Generator().manual_seed(7))
    counts[1] = 0
    return counts


def _exchange_on_rank(rank: int, per_node: int) -> dict[str, Any]:
    counts = _counts(dist.get_world_size())
    groups = make_groups(None, per_node)
    flat_plan, flat_received = plan_from_counts(counts[rank], groups.expert, None)
    plan, received = plan_from_counts(counts[rank], groups.expert, groups.topology)
    assert torch.equal(received, flat_received) and torch.equal(received, counts[:, rank])
    assert (plan.send, plan.receive) == (flat_plan.send, flat_plan.receive) and plan.gathered is not None
    flat_links, phased_links = SlowLinks(per_node), SlowLinks(per_node)
    x = torch.arange(int(counts[rank].sum())) + 1000 * rank  # int64, as ids travel
    flat = all_to_all_rows(x, flat_plan, groups.expert, None, flat_links)
    phased = all_to_all_rows(x, plan, groups.expert, groups.topology, phased_links)
    assert torch.equal(flat, phased) and flat.dtype == torch.int64
    home = all_to_all_rows(phased, plan.reverse(), groups.expert, groups.topology, phased_links)
    assert torch.equal(home, x)
    return {"flat": flat_links.messages, "phased": phased_links.messages}


@pytest.mark.parametrize(("ranks", "per_node"), [(4, 2), (6, 3)])
def test_two_phases_send_fewer_messages_between_nodes_and_the_same_rows(ranks: int, per_node: int) -> None:
    nodes = ranks // per_node
    for found in run_ranks(ranks, _exchange_on_rank, per_node):
        assert found["flat"] == per_node * (nodes - 1)
        assert found["phased"] == 2 * (nodes - 1)  # there and back


def _slices(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (), (2, 1, 3))]


def _slices_on_rank(rank: int) -> list[list[Tensor]]:
    return [gather_slices(_slices(rank), dist.group.WORLD, fused) for fused in (True, False)]


def test_one_fused_gather_equals_a_gather_per_tensor() -> None:
    for fused, single in run_ranks(3, _slices_on_rank):
        assert [t.shape for t in fused] == [(3, 3, 4), (3, 5), (3,), (3, 2, 1, 3)]
        assert all(torch.equal(a, b) for a, b in zip(fused, single))
        assert all(torch.equal(t[2], own) for t, own in zip(fused, _slices(2)))


def test_a_layout_gives_views_of_one_buffer() -> None:
    tensors = [torch.randn(2, 3), torch.randn(4)]
    layout = Layout.of(tensors)
    flat = layout.pack(tensors, torch.zeros(layout.size + 2))
    assert layout.size == 10 and torch.equal(flat[6:10], tensors[1]) and torch.equal(flat[10:], torch.zeros(2))
    assert all(view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for view in layout.views(flat))


class _Paths(nn.Module):
    """Four linear maps, of which a call uses some."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        for i in used:
            x = torch.tanh(self.maps[i](x))
        return x


USED = [[0, 1, 3], [0, 1]]  # by rank: map 2 is used by nobody, map 3 by rank 0 alone


def _run_paths(model: _Paths, rank: int, step: int = 0) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * step + rank))
    model(x, USED[rank]).square().sum().backward()


def _buckets_on_rank(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, options in {
        "fused": {},
        "small": {"bucket_bytes": 200},
        "single": {"bucket_bytes": 0},
        "late": {"overlap": False},
    }.items():
        torch.manual_seed(0)
        model = _Paths()
        buckets = GradientBuckets(model.parameters(), dist.group.WORLD, 2, **options)  # type: ignore[arg-type]
        _run_paths(model, rank)
        launched = buckets._next
        buckets.finish()
        grads = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
        results[name] = {"grads": grads, "launched": launched, "buckets": len(buckets.buckets)}
        buckets.zero()
        with buckets.accumulate():
            _run_paths(model, rank)
        _run_paths(model, rank, step=1)
        buckets.finish()
        results[name]["sum"] = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
        buckets.remove()
    return results


def test_buckets_give_the_mean_over_ranks_bit_for_bit_however_they_are_cut() -> None:
    torch.manual_seed(0)
    model = _Paths()
    expected: list[list[Tensor | None]] = []
    for steps in ([0], [0, 1]):
        model.zero_grad()
        for step in steps:
            for rank in range(2):
                _run_paths(model, rank, step)
        expected.append([None if p.grad is None else p.grad / 2 for p in model.parameters()])
    results = run_ranks(2, _buckets_on_rank)
    assert results[0]["fused"]["buckets"] == 1 and results[0]["single"]["buckets"] == 8
    assert 1 < results[0]["small"]["buckets"] < 8
    for found in results:
        for name, result in found.items():
            for kind, wanted in (("grads", expected[0]), ("sum", expected[1])):
                for a, b, reference in zip(result[kind], wanted, results[0]["fused"][kind]):
                    assert (a is None) == (b is None), name
                    if a is not None and b is not None:
                        assert torch.allclose(a, b, atol=1e-6) and torch.equal(a, reference), name
        assert [g is None for g in found["fused"]["grads"]] == [False] * 4 + [True] * 2 + [False] * 2


def _overlap_on_rank(rank: int) -> list[int]:
    model = _Paths()
    seen = []
    for overlap in (True, False):
        buckets = GradientBuckets(model.maps[:2].parameters(), dist.group.WORLD, 2, 0, overlap)
        model(torch.randn(3, 6), [0, 1]).sum().backward()
        seen.append(buckets._next)
        buckets.finish()
        buckets.zero()
        buckets.remove()
    return seen


def test_full_buckets_are_sent_while_backward_runs() -> None:
    assert run_ranks(2, _overlap_on_rank) == [[4, 0], [4, 0]]


def _clip_on_rank(rank: int) -> dict[str, Any]:
    dense = [nn.Parameter(torch.zeros(4))]
    dense[0].grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expert = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    expert[0].grad = torch.full((3,), float(rank + 1))  # expert[1] was not used
    parts = [Parts(expert, dist.group.WORLD)]
    before = global_norm(dense, parts)
    norm = clip_global_norm(dense, parts, 1.0)
    return {"before": before, "norm": norm, "after": global_norm(dense, parts), "none": expert[1].grad is None}


def test_the_clipping_norm_counts_every_expert_once() -> None:
    expected = (1.0 + 4 + 9 + 16 + 3 * (1 + 4)) ** 0.5
    for found in run_ranks(2, _clip_on_rank):
        assert float(found["before"]) == pytest.approx(expected)
        assert float(found["norm"]) == pytest.approx(expected)
        assert float(found["after"]) == pytest.approx(1.0, abs=1e-5) and found["none"]


def test_clipping_leaves_small_gradients_alone() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([0.3, 0.4])
    assert float(clip_global_norm([parameter], max_norm=1.0)) == pytest.approx(0.5)
    assert torch.equal(parameter.grad, torch.tensor([0.3, 0.4]))
