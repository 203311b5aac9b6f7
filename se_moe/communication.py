"""Process groups, AlltoAll of rows (flat or hierarchical), fused parameter slices and gradient buckets.

Everything stands on torch.distributed: gloo on CPUs, NCCL on GPUs. Without an initialised process group all functions
work as the only rank.

Shapes: R ranks of a group, n nodes, p ranks of a node, rows x features for everything that travels.
Ranks are numbered node by node: rank = node * p + local rank (paper §4.2).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError

Group = Any  # torch.distributed.ProcessGroup; None stands for "this rank alone"


def initialized() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized()


def barrier() -> None:
    if initialized():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """A plain value of every rank, on all of them; a collective call."""
    if not initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def group_size(group: Group) -> int:
    """Ranks of `group`; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    """This process' place in `group`; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


# torch 2.13 renames these two and warns about the old names; 2.11 knows only those.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Topology:
    """The two groups of a hierarchical AlltoAll over n nodes of p ranks."""

    nodes: int
    per_node: int
    intra: Group  # the ranks of this rank's node, by local rank
    inter: Group  # the ranks with this rank's local rank, by node


@dataclass(frozen=True)
class ParallelGroups:
    """Expert and data parallelism of one process.

    Attributes:
        world: all ranks: dense parameters are replicated (or sliced) over them.
        expert: ranks that hold the E experts between them, E / size each; tokens travel inside it.
        expert_data: ranks that hold copies of this rank's experts; their gradients are summed.
        topology: of the expert group, for the hierarchical AlltoAll; None sends flat.
    """

    world: Group = None
    expert: Group = None
    expert_data: Group = None
    topology: Topology | None = None

    @property
    def world_size(self) -> int:
        return group_size(self.world)

    @property
    def rank(self) -> int:
        return group_rank(self.world)

    @property
    def expert_size(self) -> int:
        return group_size(self.expert)

    @property
    def expert_rank(self) -> int:
        return group_rank(self.expert)


def make_groups(expert_size: int | None = None, per_node: int | None = None) -> ParallelGroups:
    """Groups of the running world; every rank must call it, in the same order.

    Args:
        expert_size: ranks that share one set of experts: consecutive ones, as in DeepSpeed. None: all ranks.
        per_node: ranks of a node; given and smaller than `expert_size`, AlltoAll runs in two phases.

    Raises:
        UserError: where the numbers do not divide each other.
    """
    if not initialized():
        if expert_size not in (None, 1):
            raise UserError(
                f"expert_size is {expert_size}, but there is one process: start {expert_size} with torchrun"
            )
        return ParallelGroups()
    world, rank = dist.get_world_size(), dist.get_rank()
    expert_size = world if expert_size is None else expert_size
    if expert_size < 1 or world % expert_size:
        raise UserError(f"expert_size is {expert_size}: it must divide the number of processes, {world}")
    expert = _own_group([list(range(i, i + expert_size)) for i in range(0, world, expert_size)], rank)
    copies = _own_group([list(range(i, world, expert_size)) for i in range(expert_size)], rank)
    everyone = dist.new_group(list(range(world)))
    topology = None
    if per_node is not None and per_node < expert_size:
        topology = make_topology(per_node, expert_size)
    return ParallelGroups(everyone, expert, copies, topology)


def make_topology(per_node: int, expert_size: int | None = None) -> Topology:
    """Intra- and inter-node groups inside every run of `expert_size` consecutive ranks; all ranks must call it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    expert_size = world if expert_size is None else expert_size
    if per_node < 1 or expert_size % per_node:
        raise UserError(f"per_node is {per_node}: it must divide the {expert_size} ranks that share the experts")
    firsts = range(0, world, expert_size)
    nodes = [list(range(i, i + per_node)) for i in range(0, world, per_node)]
    spines = [list(range(f + a, f + expert_size, per_node)) for f in firsts for a in range(per_node)]
    return Topology(expert_size // per_node, per_node, _own_group(nodes, rank), _own_group(spines, rank))


def _own_group(members: list[list[int]], rank: int) -> Group:
    own: Group = None
    for ranks in members:
        group = dist.new_group(ranks)
        if rank in ranks:
            own = group
    return own


class Transport(Protocol):
    """How rows of one AlltoAll travel: `dist.all_to_all_single` or something that stands in for a slower network."""

    def __call__(
        self, output: Tensor, input: Tensor, receive: Sequence[int], send: Sequence[int], group: Group
    ) -> None: ...


def direct_transport(output: Tensor, input: Tensor, receive: Sequence[int], send: Sequence[int], group: Group) -> None:
    """torch.distributed as it is."""
    dist.all_to_all_single(output, input, list(receive), list(send), group=group)


@dataclass
class SlowLinks:
    """A transport that counts messages between nodes and makes each cost `latency` seconds at its sender.

    Stands in for a cluster's spine switch on one machine; what arrives is what `direct_transport` delivers.
    """

    per_node: int
    latency: float = 0.0
    messages: int = field(default=0, init=False)

    def __call__(
        self, output: Tensor, input: Tensor, receive: Sequence[int], send: Sequence[int], group: Group
    ) -> None:
        node = dist.get_rank() // self.per_node
        peers = dist.get_process_group_ranks(group)
        crossing = sum(1 for peer in peers if peer // self.per_node != node)
        self.messages += crossing
        if self.latency:
            time.sleep(self.latency * crossing)
        direct_transport(output, input, receive, send, group)


def _exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group, transport: Transport) -> Tensor:
    output = x.new_empty((sum(receive), *x.shape[1:]))
    transport(output, x.contiguous(), receive, send, group)
    return output


@dataclass(frozen=True)
class RowPlan:
    """Row counts of one AlltoAll, per peer of the expert group.

    Attributes:
        send, receive: rows for and from every rank.
        gathered: `gathered[a][m]` is the number of rows that this rank forwards in phase 2 from the node mate with
            local rank a to node m; None: unknown, and asked for where a hierarchical exchange needs it.
        returning: the rows of the plan `reverse()` go home, through the same phases in the opposite order.
    """

    send: list[int]
    receive: list[int]
    gathered: list[list[int]] | None = None
    returning: bool = False

    def reverse(self) -> RowPlan:
        """The plan that brings every row back to where it came from."""
        return RowPlan(self.receive, self.send, self.gathered, not self.returning)


def plan_from_counts(counts_RX: Tensor, group: Group, topology: Topology | None) -> tuple[RowPlan, Tensor]:
    """Exchange how many rows go where; one small AlltoAll (two for a hierarchical one, and then no other is needed).

    Args:
        counts_RX: int64 [R, X]: rows for each of X queues (experts) of every rank.

    Returns:
        the plan (empty for a rank alone), and the rows that this rank receives, [R, X] by source rank.
    """
    if group is None or group_size(group) == 1:
        return RowPlan([], []), counts_RX  # nothing travels, so a GPU need not be asked for the numbers
    send = counts_RX.sum(1).tolist()
    if topology is None:
        received_RX = torch.empty_like(counts_RX)
        dist.all_to_all_single(received_RX, counts_RX.contiguous(), group=group)
        return RowPlan(send, received_RX.sum(1).tolist()), received_RX
    nodes, per_node, queues = topology.nodes, topology.per_node, counts_RX.shape[1]
    by_local = counts_RX.view(nodes, per_node, queues).transpose(0, 1).contiguous()  # [local, node, queue]
    middle = torch.empty_like(by_local)  # [source local, destination node, queue]
    dist.all_to_all_single(middle, by_local, group=topology.intra)
    outgoing = middle.transpose(0, 1).contiguous()  # [destination node, source local, queue]
    arrived = torch.empty_like(outgoing)  # [source node, source local, queue]
    dist.all_to_all_single(arrived, outgoing, group=topology.inter)
    received_RX = arrived.view(nodes * per_node, queues)
    return RowPlan(send, received_RX.sum(1).tolist(), middle.sum(2).tolist()), received_RX


def _blocks(x: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """Consecutive blocks of `sizes` rows, put together in `order`."""
    parts = torch.split(x, list(sizes))
    return torch.cat([parts[i] for i in order]) if len(order) > 1 else x


def hierarchical_exchange(
    x: Tensor, plan: RowPlan, topology: Topology, transport: Transport = direct_transport
) -> tuple[Tensor, Tensor]:
    """AlltoAll in two phases: within the node to the destination's local rank, then among equal local ranks (§4.2).

    A rank sends n - 1 messages to other nodes instead of p (n - 1), each p times as large. Only copies: the result is
    the flat exchange's bit by bit. A returning plan runs the phases of its outward plan backwards.

    Returns:
        rows ordered by source rank, and the rows held between the phases, by (source local rank, destination node) of
        the outward direction.
    """
    n, p = topology.nodes, topology.per_node
    out = plan.reverse() if plan.returning else plan
    by_local = [node * p + local for local in range(p) for node in range(n)]
    by_node = [local * n + node for node in range(n) for local in range(p)]
    gathered = out.gathered
    if gathered is None:
        announced = torch.tensor([out.send[i] for i in by_local], device=x.device)
        heard = torch.empty_like(announced)
        dist.all_to_all_single(heard, announced, group=topology.intra)
        gathered = heard.view(p, n).tolist()
    held = [count for row in gathered for count in row]  # by (source local, destination node)
    to_local = [sum(out.send[node * p + local] for node in range(n)) for local in range(p)]
    from_local = [sum(row) for row in gathered]
    to_node = [sum(row[node] for row in gathered) for node in range(n)]
    from_node = [sum(out.receive[node * p : (node + 1) * p]) for node in range(n)]
    if plan.returning:
        middle = _exchange(x, from_node, to_node, topology.inter, transport)
        middle = _blocks(middle, [held[i] for i in by_node], _inverse(by_node))
        home = _exchange(middle, from_local, to_local, topology.intra, transport)
        return _blocks(home, [out.send[i] for i in by_local], _inverse(by_local)), middle
    middle = _exchange(_blocks(x, out.send, by_local), to_local, from_local, topology.intra, transport)
    return _exchange(_blocks(middle, held, by_node), to_node, from_node, topology.inter, transport), middle


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plan: RowPlan, group: Group, topology: Topology | None, transport: Transport
    ) -> Tensor:
        ctx.rest = plan, group, topology, transport
        return _send(x, plan, group, topology, transport)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        plan, group, topology, transport = ctx.rest
        return _send(grads[0], plan.reverse(), group, topology, transport), None, None, None, None


def _send(x: Tensor, plan: RowPlan, group: Group, topology: Topology | None, transport: Transport) -> Tensor:
    if topology is not None:
        return hierarchical_exchange(x, plan, topology, transport)[0]
    return _exchange(x, plan.send, plan.receive, group, transport)


def all_to_all_rows(
    x: Tensor,
    plan: RowPlan,
    group: Group,
    topology: Topology | None = None,
    transport: Transport = direct_transport,
) -> Tensor:
    """Differentiable AlltoAll: rows of x, ordered by destination rank, arrive ordered by source rank.

    Args:
        x: [sum(plan.send), ...].
        plan: rows for and from every rank; zeros are allowed.
        topology: given, the exchange runs in two phases.
    """
    if group is None or group_size(group) == 1:
        return x
    return _AllToAll.apply(x, plan, group, topology, transport)


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a set lies in one flat buffer."""

    shapes: list[torch.Size]
    starts: list[int]  # one more than there are tensors: the last is the buffer's size without padding

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Layout:
        """The layout that puts the tensors one after another."""
        shapes = [t.shape for t in tensors]
        return cls(shapes, [0, *accumulate(shape.numel() for shape in shapes)])

    @property
    def size(self) -> int:
        """Elements of all tensors."""
        return self.starts[-1]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors as views of a buffer with at least `size` elements."""
        return [flat[a:b].view(shape) for a, b, shape in zip(self.starts, self.starts[1:], self.shapes)]

    def pack(self, tensors: Iterable[Tensor], flat: Tensor) -> Tensor:
        """Copy the tensors into the buffer, which is returned."""
        for view, tensor in zip(self.views(flat), tensors):
            view.copy_(tensor)
        return flat


def gather_slices(slices: Sequence[Tensor], group: Group, fused: bool = True) -> list[Tensor]:
    """AllGather of every tensor's slices: tensors [s, ...] of R ranks -> [R, s, ...] each (§2.3).

    `fused` packs the slices into one buffer, so that one collective replaces one per tensor. Only copies: both ways
    give the same bits.
    """
    ranks = group_size(group)
    if ranks == 1:
        return [t[None].clone() for t in slices]
    if not fused:
        found = []
        for t in slices:
            out = t.new_empty((ranks * t.numel(),))
            all_gather_flat(out, t.reshape(-1), group=group)
            found.append(out.view(ranks, *t.shape))
        return found
    layout = Layout.of(slices)
    flat = layout.pack(slices, slices[0].new_empty(layout.size))
    out = flat.new_empty(ranks * layout.size)
    all_gather_flat(out, flat, group=group)
    rows = out.view(ranks, layout.size)
    spans = zip(layout.starts, layout.starts[1:], layout.shapes)
    return [rows[:, a:b].view(ranks, *shape) for a, b, shape in spans]


@dataclass
class _Bucket:
    """Parameters whose gradients travel together: a flat buffer with one flag per parameter at its end."""

    parameters: list[nn.Parameter]
    layout: Layout
    flat: Tensor
    views: list[Tensor]
    waiting: set[int] = field(default_factory=set)  # places whose gradient is still to come
    touched: set[int] = field(default_factory=set)  # places with a gradient on this rank
    work: Any = None

    @property
    def flags(self) -> Tensor:
        return self.flat[self.layout.size :]


class GradientBuckets:
    """Sums gradients over a group in flat buckets while backward still runs (§2.3).

    Hooks copy each gradient to its place as soon as it exists and leave `grad` as a view of that place. A full bucket
    is reduced at once on another thread (gloo) or stream (NCCL). Buckets are launched in their order, which is the
    same on every rank, whatever order the gradients come in. Sparse and dense parameters get buckets and groups of
    their own: make one object for each.

    A parameter that got no gradient on any rank (an expert without tokens) keeps None, so that an optimizer leaves it
    alone; the flags that tell travel in the bucket itself.

    Args:
        parameters: in the order of the forward pass; buckets fill from the last.
        group: ranks over which gradients are summed.
        divisor: what the sums are divided by: the world size for dense and for expert parameters alike (an expert's
            gradient already sums the tokens of every rank that reached it).
        bucket_bytes: size at which a bucket is closed; 0: every parameter travels alone (no fusion).
        overlap: False: nothing is sent before `finish`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: Group,
        divisor: int,
        bucket_bytes: int = 4 << 20,
        overlap: bool = True,
    ) -> None:
        self.group, self.divisor, self.overlap = group, divisor, overlap
        self.buckets = [_make_bucket(part) for part in _cut(list(parameters)[::-1], bucket_bytes)]
        self._place = {id(p): (b, i) for b in self.buckets for i, p in enumerate(b.parameters)}
        self._next = 0
        self._paused = False
        self._handles = [
            p.register_post_accumulate_grad_hook(self._arrived) for b in self.buckets for p in b.parameters
        ]
        self._reset()

    @property
    def bytes(self) -> int:
        """Size of all buffers."""
        return sum(b.flat.numel() * b.flat.element_size() for b in self.buckets)

    def _reset(self) -> None:
        self._next = 0
        for bucket in self.buckets:
            bucket.waiting = set(range(len(bucket.parameters)))
            bucket.touched = set()
            bucket.work = None

    def _arrived(self, parameter: Tensor) -> None:
        bucket, i = self._place[id(parameter)]
        grad = parameter.grad
        if grad is not None:  # None: an expert that no token reached
            if grad.data_ptr() != bucket.views[i].data_ptr():
                bucket.views[i].copy_(grad)
                parameter.grad = bucket.views[i]
            bucket.touched.add(i)
        if self._paused:
            return
        bucket.waiting.discard(i)
        if self.overlap:
            while self._next < len(self.buckets) and not self.buckets[self._next].waiting:
                self._launch(self.buckets[self._next])
                self._next += 1

    def _launch(self, bucket: _Bucket) -> None:
        if len(bucket.touched) == len(bucket.parameters):
            bucket.flags.fill_(1.0)
        else:
            bucket.flags.zero_()
            for i, view in enumerate(bucket.views):
                if i in bucket.touched:
                    bucket.flags[i] = 1.0
                else:
                    view.zero_()
        if group_size(self.group) > 1:
            bucket.work = dist.all_reduce(bucket.flat, group=self.group, async_op=True)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside only add to the local gradients; the next one outside reduces the sum."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def finish(self) -> None:
        """Reduce what is left, wait, divide; afterwards every `grad` is the mean over ranks, or None for untouched."""
        for bucket in self.buckets[self._next :]:
            self._launch(bucket)
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
        flags = torch.cat([bucket.flags for bucket in self.buckets]).tolist() if self.buckets else []
        for bucket in self.buckets:
            if self.divisor != 1:
                bucket.flat[: bucket.layout.size].div_(self.divisor)
            for parameter, view, flag in zip(bucket.parameters, bucket.views, flags):
                parameter.grad = view if flag else None
            flags = flags[len(bucket.parameters) :]
        self._reset()

    def zero(self) -> None:
        """Forget the gradients; the next backward writes into the buckets."""
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.grad = None

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()


def _make_bucket(parameters: list[nn.Parameter]) -> _Bucket:
    layout = Layout.of(parameters)
    flat = parameters[0].new_zeros(layout.size + len(parameters), requires_grad=False)
    return _Bucket(parameters, layout, flat, layout.views(flat))


def _cut(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Runs of parameters of one dtype that reach `bucket_bytes`."""
    found: list[list[nn.Parameter]] = []
    filled = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if found and filled + size <= bucket_bytes and found[-1][0].dtype == parameter.dtype:
            found[-1].append(parameter)
            filled += size
        else:
            found.append([parameter])
            filled = size
    return found
