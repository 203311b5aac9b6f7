"""Elastic training: allocations, the policy, and layouts that do not change the result."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.errors import UserError
from se_moe.elastic import (
    Layout,
    TaskGroups,
    TaskMoE,
    allocate,
    gradient_group,
    gumbel_hard,
    hosted_state,
    policy_uniform,
    rank_step,
    tagged_parameters,
)
from tests.se_moe.ranks import run_ranks

BATCHES = [16, 8, 4, 4]  # 512/256/128/128 of the paper, scaled


def brute_force(batches: list[int], ranks: int) -> int:
    if ranks >= len(batches):
        widths = (w for w in itertools.product(range(1, ranks + 1), repeat=len(batches)) if sum(w) <= ranks)
        return min(max(math.ceil(b / w) for b, w in zip(batches, width)) for width in widths)
    best = sum(batches)
    for bins in itertools.product(range(ranks), repeat=len(batches)):
        best = min(best, max(sum(b for b, i in zip(batches, bins) if i == r) for r in range(ranks)))
    return best


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 6))
def test_allocations_are_optimal(batches: list[int], ranks: int) -> None:
    found = allocate(batches, ranks)
    assert found.optimal and found.makespan == brute_force(batches, ranks)
    assert sum(found.loads) == sum(batches) and len(found.loads) == ranks


def test_splitting_and_combining_at_once_beats_either() -> None:
    batches = [100, 3, 2, 1]
    assert allocate(batches, 4).makespan == 100
    mixed = allocate(batches, 4, mix=True)
    assert mixed.makespan == 34 and sorted(mixed.loads) == [6, 33, 33, 34]


def test_the_papers_allocation_doubles_the_utilisation() -> None:
    imbalanced, balanced = allocate([512, 256, 128, 128], 4), allocate([512, 256, 128, 128], 8)
    assert (imbalanced.utilisation, balanced.utilisation) == (0.5, 1.0)
    assert [len(balanced.ranks_of(task)) for task in range(4)] == [4, 2, 1, 1]


def test_every_sample_is_computed_once_in_every_layout() -> None:
    for ranks, mix in [(1, False), (2, False), (3, True), (4, False), (8, False), (11, False)]:
        layout = Layout.of(BATCHES, ranks, mix)
        seen: dict[int, list[int]] = {task: [] for task in range(len(BATCHES))}
        for rank in range(ranks):
            for task, numbers in layout.work(rank).items():
                seen[task] += list(numbers)
        assert {task: sorted(numbers) for task, numbers in seen.items()} == {
            task: list(range(batch)) for task, batch in enumerate(BATCHES)
        }


def test_the_published_notation_is_understood() -> None:
    layout = Layout.from_vimer([0, 100, 100, 100, 1, 2, 102, 3], [2048, 512, 1024, 512])
    assert layout.group(0) == [0, 1, 2, 3] and set(layout.allocation.loads) == {512}
    with pytest.raises(UserError, match="must name every task"):
        Layout.from_vimer([0, 0, 1, 1], [1, 1, 1])


def test_exclusive_gradients_are_summed_in_the_task_and_divided_by_everything() -> None:
    layout = Layout.of([4, 2, 1, 1], 8)
    shared, exclusive = gradient_group(layout, None), gradient_group(layout, 0)
    assert shared.ranks == tuple(range(8)) and exclusive.ranks == (0, 1, 2, 3)
    assert shared.divisor == exclusive.divisor == 8.0
    assert gradient_group(layout, 0, "ranks").divisor == 8.0
    with pytest.raises(UserError, match="samples or ranks"):
        gradient_group(layout, 0, "mean")


def test_a_change_of_layout_copies_experts_to_their_new_hosts() -> None:
    moves = Layout.of(BATCHES, 4).moves(Layout.of(BATCHES, 8))
    assert moves[0] == [(0, 1), (0, 2), (0, 3)] and moves[3] == [(3, 7)]


def test_the_policy_is_hard_and_learns_through_the_soft_choice() -> None:
    logits = torch.tensor([0.3, -0.2], requires_grad=True)
    uniform = torch.tensor([0.9, 0.2])
    pick = gumbel_hard(logits, 5.0, uniform)
    assert torch.equal(pick.detach(), torch.tensor([1.0, 0.0]))
    (pick * torch.tensor([1.0, 2.0])).sum().backward()
    soft = torch.softmax((logits.detach() - torch.log(-torch.log(uniform))) / 5, 0)
    expected = (soft[0] * soft[1] / 5) * torch.tensor([-1.0, 1.0])
    assert logits.grad is not None and torch.allclose(logits.grad, expected, atol=1e-6)


def test_with_equal_logits_both_ways_are_taken_equally_often() -> None:
    picks = [gumbel_hard(torch.zeros(2), 5.0, policy_uniform(0, step, 0, 0)) for step in range(2000)]
    share = float(torch.stack(picks)[:, 0].mean())
    assert 0.45 < share < 0.55


def test_the_fixed_policies_take_one_branch() -> None:
    x = torch.randn(3, 8)
    for policy in ("exclusive", "shared"):
        block = TaskMoE(8, 16, tasks=2, policy=policy)
        branch = block.shared if policy == "shared" else block.exclusive["1"]
        assert torch.equal(block(x, 1), branch(x))
    with pytest.raises(UserError, match="task 3 is not hosted here"):
        block(x, 3)


class MultiTask(nn.Module):
    """A shared input layer, a Task-MoE block and a shared output."""

    def __init__(self, hosted: list[int] | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        full = TaskMoE(8, 16, tasks=4)
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 1)
        self.block = TaskMoE(8, 16, tasks=4, hosted=hosted)
        self.block.load_state_dict(hosted_state([full.state_dict()], list(hosted or range(4))))

    def loss_sum(self, x_BI: Tensor, task: int) -> Tensor:
        return (self.outer(self.block(self.inner(x_BI), task)) - task).square().sum()


def batch_of(step: int, task: int) -> Tensor:
    return torch.randn(BATCHES[task], 6, generator=torch.Generator().manual_seed(100 * step + task))


def train(rank: int, layout: Layout, steps: int = 20) -> dict[str, Tensor]:
    model = MultiTask(hosted=sorted(layout.allocation.shares[rank]))
    groups = TaskGroups(layout)
    groups.broadcast_parameters(tagged_parameters(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        model.block.step = step
        rank_step(layout, rank, {task: batch_of(step, task) for task in range(4)}, model.loss_sum)
        groups.reduce_gradients(tagged_parameters(model))
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train_alone(steps: int = 20) -> dict[str, Tensor]:
    """One process computes everything with plain autograd."""
    model = MultiTask()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        model.block.step = step
        total = sum(model.loss_sum(batch_of(step, task), task) for task in range(4))
        (total / sum(BATCHES)).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_parameters_after_20_steps_do_not_depend_on_the_layout(ranks: int) -> None:
    expected = train_alone()
    states = run_ranks(ranks, train, Layout.of(BATCHES, ranks))
    hosted = set()
    for state in states:
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=f"{name} differs")
            hosted.add(name)
    assert hosted == set(expected)


def test_a_checkpoint_of_one_layout_serves_another() -> None:
    full = MultiTask().state_dict()
    parts = [MultiTask(hosted=[task]).state_dict() for task in range(4)]
    merged = hosted_state(parts, [1, 3])
    assert {name for name in full if ".0." not in name and ".2." not in name} >= set(merged)
    MultiTask(hosted=[1, 3]).load_state_dict(merged)
    with pytest.raises(UserError, match=r"no experts of task\(s\) \[7\]"):
        hosted_state(parts, [7])


def test_impossible_allocations_are_refused() -> None:
    for batches, ranks in (([], 2), ([0, 3], 2), ([3], 0)):
        with pytest.raises(UserError, match="at least one"):
            allocate(batches, ranks)
