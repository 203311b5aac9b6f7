"""Elastic multi-task training (section 4.1): which ranks train which tasks, Task-MoE, and gradients that do not depend
on the answer.

With one task per rank a step lasts as long as the heaviest task. `allocate` gives heavy tasks several ranks (data
parallel inside the task) and puts light tasks together on one. `Layout` says who trains what and which ranks share an
exclusive expert; `reduce_gradients` sums gradients in those groups. Every rank weighs its samples by 1 / (samples of
all tasks), so the parameters after k steps are the same for every layout of the same task batches.

Shapes: B samples, T tokens, D hidden size, F expert hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.kernels.products import Linear


@dataclass(frozen=True)
class Allocation:
    """`shares[rank]` maps a task to the samples of its batch that the rank computes.

    `makespan` is the largest load of a rank, `optimal` is False when the search for the best packing was cut short.
    """

    shares: tuple[dict[int, int], ...]
    optimal: bool = True

    @property
    def loads(self) -> list[int]:
        return [sum(share.values()) for share in self.shares]

    @property
    def makespan(self) -> int:
        return max(self.loads)

    @property
    def utilisation(self) -> float:
        """Samples / (ranks x makespan): 1 when no rank waits for another."""
        return sum(self.loads) / (len(self.shares) * self.makespan)

    def ranks_of(self, task: int) -> list[int]:
        return [rank for rank, share in enumerate(self.shares) if task in share]


def _pack(work: Sequence[int], bins: int, budget: int = 200_000) -> tuple[list[int], bool]:
    """The bin of each item so that the fullest bin is as empty as possible: branch and bound from the greedy packing.

    Returns (bins, whether the search ended by itself).
    """
    order = sorted(range(len(work)), key=lambda i: -work[i])
    loads, greedy = [0] * bins, [0] * len(work)
    for item in order:
        greedy[item] = min(range(bins), key=loads.__getitem__)
        loads[greedy[item]] += work[item]
    best, best_value = greedy, max(loads)
    bound = max(max(work), math.ceil(sum(work) / bins))
    current, loads = [0] * len(work), [0] * bins
    left = budget

    def place(depth: int) -> None:
        nonlocal best, best_value, left
        left -= 1
        if best_value == bound or left < 0:
            return
        if depth == len(order):
            best, best_value = current.copy(), max(loads)
            return
        item = order[depth]
        tried: set[int] = set()
        for b in range(bins):
            # Bins of equal load are interchangeable.
            if loads[b] in tried or loads[b] + work[item] >= best_value:
                continue
            tried.add(loads[b])
            loads[b] += work[item]
            current[item] = b
            place(depth + 1)
            loads[b] -= work[item]

    place(0)
    return best, best_value == bound or left >= 0


def _split(samples: int, parts: int) -> list[int]:
    """`samples` as evenly as whole numbers allow, the larger parts first."""
    return [samples // parts + (i < samples % parts) for i in range(parts)]


def _ranks_needed(batches: Sequence[int], makespan: int) -> int:
    return sum(math.ceil(batch / makespan) for batch in batches)


def _split_heavy(batches: Sequence[int], ranks: int) -> Allocation:
    """At least as many ranks as tasks: each rank serves one task, the largest share is as small as possible."""
    low, high = 1, max(batches)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _ranks_needed(batches, middle) <= ranks else (middle + 1, high)
    widths = [math.ceil(batch / low) for batch in batches]
    for _ in range(ranks - sum(widths)):  # ranks left over go where the shares are largest
        heaviest = max(range(len(batches)), key=lambda t: (batches[t] / widths[t], -t))
        widths[heaviest] += 1
    shares = [{task: part} for task, width in enumerate(widths) for part in _split(batches[task], width)]
    return Allocation(tuple(shares))


def _combine_light(batches: Sequence[int], ranks: int) -> Allocation:
    """Fewer ranks than tasks: whole tasks share ranks."""
    bins, optimal = _pack(batches, ranks)
    shares: list[dict[int, int]] = [{} for _ in range(ranks)]
    for task, rank in enumerate(bins):
        shares[rank][task] = batches[task]
    return Allocation(tuple(shares), optimal)


def _split_and_combine(batches: Sequence[int], ranks: int) -> Allocation:
    """Tasks heavier than the makespan get ranks of their own, the others share what is left."""

    def at(makespan: int) -> Allocation | None:
        heavy = [t for t, batch in enumerate(batches) if batch > makespan]
        light = [t for t, batch in enumerate(batches) if batch <= makespan]
        needed = _ranks_needed([batches[t] for t in heavy], makespan)
        if needed + bool(light) > ranks:
            return None
        shares: list[dict[int, int]] = [
            {t: part} for t in heavy for part in _split(batches[t], math.ceil(batches[t] / makespan))
        ]
        packed: list[dict[int, int]] = [{} for _ in range(ranks - needed)]
        optimal = True
        if light:
            bins, optimal = _pack([batches[t] for t in light], len(packed))
            for t, b in zip(light, bins):
                packed[b][t] = batches[t]
        found = Allocation(tuple([*shares, *packed]), optimal)
        return found if found.makespan <= makespan else None

    low, high = 1, sum(batches)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) else (middle + 1, high)
    found = at(low)
    assert found is not None  # everything on one rank fits the sum
    return found


def allocate(batches: Sequence[int], ranks: int, mix: bool = False) -> Allocation:
    """Ranks for tasks with `batches` samples a step, so that the busiest rank has as few samples as possible.

    As many ranks as tasks or more: every task gets its own ranks (heavy ones several). Fewer: whole tasks share ranks.
    `mix` allows both at once (split the heavy, combine the light); the better of the two is returned.

    Raises:
        UserError: no tasks, an empty task or no ranks.
    """
    if not batches or min(batches) < 1 or ranks < 1:
        raise UserError(f"expected tasks with at least one sample each and at least one rank, got {batches}, {ranks}")
    plain = _split_heavy(batches, ranks) if ranks >= len(batches) else _combine_light(batches, ranks)
    if not mix:
        return plain
    return min(plain, _split_and_combine(batches, ranks), key=lambda allocation: allocation.makespan)


@dataclass(frozen=True)
class Layout:
    """Who trains what: an allocation with the order of each task's samples.

    A task's samples are numbered; its ranks take consecutive ranges in rank order, so every layout sees the same batch.
    """

    allocation: Allocation
    tasks: int

    @classmethod
    def of(cls, batches: Sequence[int], ranks: int, mix: bool = False) -> Layout:
        return cls(allocate(batches, ranks, mix), len(batches))

    @classmethod
    def from_vimer(cls, task_of_rank: Sequence[int], batches: Sequence[int]) -> Layout:
        """The published notation (`globalrank2taskid`): a task per rank, ids from 100 on are further ranks of a task.

        Raises:
            UserError: a rank names an unknown task, or a task has no rank.
        """
        owners = [task % 100 for task in task_of_rank]
        if any(task >= len(batches) for task in owners) or set(owners) != set(range(len(batches))):
            raise UserError(f"{list(task_of_rank)} must name every task of 0..{len(batches) - 1} (or 100 + task)")
        parts = {task: iter(_split(batches[task], owners.count(task))) for task in range(len(batches))}
        return cls(Allocation(tuple({task: next(parts[task])} for task in owners)), len(batches))

    @property
    def ranks(self) -> int:
        return len(self.allocation.shares)

    @property
    def samples(self) -> int:
        """Samples of a step over all tasks and ranks: the divisor of every gradient."""
        return sum(self.allocation.loads)

    def work(self, rank: int) -> dict[int, range]:
        """Per task the sample numbers that `rank` computes (tasks without samples here are left out)."""
        ranges = {}
        for task, count in self.allocation.shares[rank].items():
            start = sum(self.allocation.shares[r].get(task, 0) for r in range(rank))
            if count:
                ranges[task] = range(start, start + count)
        return ranges

    def group(self, task: int) -> list[int]:
        """Ranks that hold the exclusive experts of a task."""
        return self.allocation.ranks_of(task)

    def moves(self, other: Layout) -> dict[int, list[tuple[int, int]]]:
        """Per task the (source rank, destination rank) copies of its experts when the layout changes to `other`."""
        found: dict[int, list[tuple[int, int]]] = {}
        for task in range(self.tasks):
            held = self.group(task)
            found[task] = [(held[0], rank) for rank in other.group(task) if rank not in held]
        return found


@dataclass(frozen=True)
class GradientGroup:
    """Ranks whose gradients of a parameter are summed, and the number the sum is divided by."""

    ranks: tuple[int, ...]
    divisor: float


def gradient_group(layout: Layout, task: int | None, rule: str = "samples") -> GradientGroup:
    """How the gradient of a shared (`task` None) or task-exclusive parameter is reduced.

    Args:
        rule: "samples": losses are sums over samples and every gradient is divided by the samples of all tasks, which
            makes the result independent of the layout. "ranks": the published code's rule, for losses that are means
            over a rank's samples: the divisor is the number of ranks, for exclusive experts too although fewer ranks
            are summed. Both agree when every rank has equally many samples.
    """
    if rule not in ("samples", "ranks"):
        raise UserError(f"gradient rule {rule!r} is unknown; expected samples or ranks")
    ranks = tuple(range(layout.ranks)) if task is None else tuple(layout.group(task))
    return GradientGroup(ranks, float(layout.samples if rule == "samples" else layout.ranks))


class TaskGroups:
    """The process groups of a layout (made once by all ranks together) and the reduction of gradients in them."""

    def __init__(self, layout: Layout) -> None:
        if dist.get_world_size() != layout.ranks:
            raise UserError(
                f"the layout is for {layout.ranks} ranks and {dist.get_world_size()} are running; start the program "
                f"with as many processes, or make a layout for them"
            )
        self.layout = layout
        self._groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        for task in range(layout.tasks):
            ranks = tuple(layout.group(task))
            if ranks not in self._groups:
                # new_group is collective: ranks outside the group take part too.
                self._groups[ranks] = dist.new_group(list(ranks)) if len(ranks) > 1 else None

    def reduce_gradients(self, parameters: Iterable[tuple[nn.Parameter, int | None]], rule: str = "samples") -> None:
        """All-reduce and scale the gradients of (parameter, its task or None for shared), in place.

        Gradients that share a group travel in one flat buffer. A rank without samples of a task that it hosts sends
        zeros; exclusive parameters of tasks hosted elsewhere are skipped.
        """
        rank = dist.get_rank()
        buckets: dict[tuple[int, ...], list[tuple[nn.Parameter, float]]] = {}
        for parameter, task in parameters:
            group = gradient_group(self.layout, task, rule)
            if rank in group.ranks:
                buckets.setdefault(group.ranks, []).append((parameter, group.divisor))
        for ranks in sorted(buckets):
            members = buckets[ranks]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p, _ in members])
            if len(ranks) > 1:
                everyone = len(ranks) == self.layout.ranks
                dist.all_reduce(flat, group=None if everyone else self._groups[ranks])
            offset = 0
            for parameter, divisor in members:
                size = parameter.numel()
                parameter.grad = (flat[offset : offset + size] / divisor).view_as(parameter)
                offset += size

    def broadcast_parameters(self, parameters: Iterable[tuple[nn.Parameter, int | None]]) -> None:
        """Make every rank of a parameter's group hold the values of the group's first rank."""
        rank = dist.get_rank()
        for parameter, task in parameters:
            ranks = tuple(range(self.layout.ranks)) if task is None else tuple(self.layout.group(task))
            if rank in ranks and len(ranks) > 1:
                everyone = len(ranks) == self.layout.ranks
                dist.broadcast(parameter.data, ranks[0], group=None if everyone else self._groups[ranks])


def gumbel_hard(logits: Tensor, tau: float, uniform: Tensor | None = None) -> Tensor:
    """A one-hot choice from `logits` (last dimension) with Gumbel noise; its gradient is the soft choice's.

    Args:
        uniform: numbers in (0, 1) of the logits' shape that make the noise; None: no noise (evaluation).
    """
    noise = 0.0 if uniform is None else -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
    soft = F.softmax((logits + noise) / tau, dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())


def policy_uniform(seed: int, step: int, block: int, task: int) -> Tensor:
    """The two uniforms of a task's policy at a step: the same on every rank and in every layout."""
    mixed = (((seed * 1_000_003 + step) * 1_009 + block) * 1_013 + task) % (1 << 63)
    generator = torch.Generator().manual_seed(mixed)
    return torch.rand(2, generator=generator)


class FeedForward(nn.Module):
    """D -> F -> D with GELU."""

    def __init__(self, hidden: int, expert_hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(hidden, expert_hidden)
        self.fc2 = Linear(expert_hidden, hidden)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_TD)))


class TaskMoE(nn.Module):
    """An FFN per task and a shared one; a policy per task picks which of the two its tokens take.

    The policy is a pair of logits (start: 0) turned into a hard choice by the Gumbel trick with temperature tau = 5
    and a straight-through gradient, as in the published UFO code. Evaluation takes the larger logit.

    Args:
        tasks: number of tasks of the whole model.
        hosted: tasks whose exclusive FFN this rank holds (default: all).
        policy: "gumbel", or "exclusive"/"shared" to fix the choice.
        block: number of this block in the model, part of the noise's seed.
    """

    def __init__(
        self,
        hidden: int,
        expert_hidden: int,
        tasks: int,
        hosted: Sequence[int] | None = None,
        policy: str = "gumbel",
        tau: float = 5.0,
        seed: int = 0,
        block: int = 0,
    ) -> None:
        super().__init__()
        if policy not in ("gumbel", "exclusive", "shared"):
            raise UserError(f"policy {policy!r} is unknown; expected gumbel, exclusive or shared")
        self.policy, self.tau, self.seed, self.block, self.step = policy, tau, seed, block, 0
        hosted = range(tasks) if hosted is None else hosted
        self.shared = FeedForward(hidden, expert_hidden)
        self.exclusive = nn.ModuleDict({str(task): FeedForward(hidden, expert_hidden) for task in hosted})
        self.policy_logits = nn.ParameterDict({str(task): nn.Parameter(torch.zeros(2)) for task in hosted})

    def choice(self, task: int) -> Tensor:
        """(exclusive, shared) as a one-hot pair."""
        logits = self.policy_logits[str(task)]
        if self.policy != "gumbel":
            return torch.tensor([1.0, 0.0] if self.policy == "exclusive" else [0.0, 1.0], device=logits.device)
        uniform = policy_uniform(self.seed, self.step, self.block, task).to(logits) if self.training else None
        return gumbel_hard(logits, self.tau, uniform)

    def forward(self, x_TD: Tensor, task: int) -> Tensor:
        """Tokens of one task.

        Raises:
            UserError: this rank does not host the task.
        """
        if str(task) not in self.exclusive:
            raise UserError(f"task {task} is not hosted here (hosted: {', '.join(self.exclusive)}); check the layout")
        pick = self.choice(task)
        # Both branches run, so that the straight-through gradient reaches the branch that was not picked.
        return pick[0] * self.exclusive[str(task)](x_TD) + pick[1] * self.shared(x_TD)

    def tagged_parameters(self) -> list[tuple[nn.Parameter, int | None]]:
        """(parameter, its task; None: shared), in a fixed order."""
        tagged: list[tuple[nn.Parameter, int | None]] = [(p, None) for p in self.shared.parameters()]
        for task in sorted(self.exclusive, key=int):
            tagged += [(p, int(task)) for p in self.exclusive[task].parameters()]
            tagged.append((self.policy_logits[task], int(task)))
        return tagged


def tagged_parameters(model: nn.Module) -> list[tuple[nn.Parameter, int | None]]:
    """(parameter, task or None) of a whole model: what is not inside a TaskMoE's exclusive part is shared."""
    task_of: dict[Hashable, int | None] = {}
    for module in model.modules():
        if isinstance(module, TaskMoE):
            task_of |= {id(parameter): task for parameter, task in module.tagged_parameters()}
    return [(parameter, task_of.get(id(parameter))) for parameter in model.parameters()]


def hosted_state(states: Sequence[Mapping[str, Tensor]], hosted: Sequence[int]) -> dict[str, Tensor]:
    """Library. The state of a rank that hosts `hosted`, taken from the states of all ranks of another layout.

    Raises:
        UserError: no rank has the expert of a task.
    """
    merged: dict[str, Tensor] = {}
    for state in states:
        for name, tensor in state.items():
            merged.setdefault(name, tensor)

    def task_of(name: str) -> int | None:
        parts = name.split(".")
        for marker in ("exclusive", "policy_logits"):
            if marker in parts:
                return int(parts[parts.index(marker) + 1])
        return None

    available = {task for name in merged if (task := task_of(name)) is not None}
    if missing := sorted(set(hosted) - available):
        raise UserError(f"the checkpoint has no experts of task(s) {missing}; it has {sorted(available)}")
    return {name: tensor for name, tensor in merged.items() if task_of(name) is None or task_of(name) in hosted}


def rank_step(
    layout: Layout,
    rank: int,
    batches: Mapping[int, Tensor],
    loss_sum: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Forward and backward of one rank: sums over its samples of every task it works on (gradients accumulate).

    Args:
        batches: per task its whole batch [B, ...] of this step; the rank takes its own range.
        loss_sum: (samples, task) -> the sum of the losses of the samples.

    Returns:
        The sum of the rank's losses, detached.
    """
    total = torch.zeros(())
    for task, numbers in layout.work(rank).items():
        loss = loss_sum(batches[task][numbers.start : numbers.stop], task)
        loss.backward()
        total = total + loss.detach()
    return total
