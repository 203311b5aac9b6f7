"""The search step of PC-DARTS: batched mixed operations beside one after the other, K = 4 beside DARTS, and nni.

    python -m benchmarks.pc_darts               # writes results/bench_pc_darts.json; about 15 minutes on 2 cores
    python -m benchmarks.pc_darts --sizes small --rounds 3

Every arm is a process of its own that waits for its turn, so that arms alternate (A B C A B C ...) and each has its own
peak memory. A step is one of the search: the first-order architecture step on one batch, then forward, backward,
clipping and SGD on another; images count once a step. Both forms of our network start from the same weights, alphas and
images, and their gradients are compared before the clock runs. "op by op" is our plain form (`fused=False`), which
computes one operation after the other as the authors' code does, with torch's convolutions; its architecture step, like
ours, asks for no gradients of weights; it is timed with channels last as well, and compiled edge by edge (as one graph,
a single cell took more than nine minutes). nni's DARTS (where nni is installed) is its one-shot supernet on its own
DARTS space, K = 1, forward and backward of both batches and both optimiser steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.arms import (
    Pace,
    Step,
    Timing,
    Turns,
    at_its_best,
    bench_parser,
    faster,
    leaner,
    measure,
    noted,
    parse,
    take_turns,
    where_of,
)
from benchmarks.torch_forms import torchs_convolutions
from common.errors import run_main
from common.ledger import bench_row

BEST = 1.15  # against the faster of the peer's forms, on CPUs
GRADIENT_TOLERANCE = 1e-5  # of the norm of the whole gradient


class Size(NamedTuple):
    channels: int
    cells: int
    side: int
    batch: int
    filling: int  # batch of K = 4 that keeps about as much for the backward pass as DARTS does


SIZES = {
    "tiny": Size(8, 1, 8, 2, 4),
    "small": Size(8, 4, 8, 32, 96),
    "medium": Size(16, 5, 16, 32, 96),
    "cifar": Size(16, 8, 32, 16, 48),
}


def build(size: str, partial: int, fused: bool) -> Any:
    """A search network with the same weights in every process."""
    from pc_darts.config import SearchConfig
    from pc_darts.search_space import SearchNetwork

    torch.manual_seed(0)
    spec = SIZES[size]
    return SearchNetwork(SearchConfig(spec.channels, spec.cells, partial=partial), fused)


def images(size: str, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two batches of images and classes, the same for all arms."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, batch, 3, SIZES[size].side, SIZES[size].side, generator=generator).to(device)
    y = torch.randint(0, 10, (2, batch), generator=generator).to(device)
    return x[0], y[0], x[1], y[1]


@dataclass(frozen=True)
class Arm:
    """One process: `side` is "fused", "plain" (op by op) or "nni"."""

    side: str
    size: str
    device: str
    partial: int = 4
    batch: int = 0
    compiled: bool = False
    last: bool = False  # channels last


class Switch:
    """Of frozen statistics, as `torch.compile` can follow it; a context variable would end its graph at every norm."""

    def __init__(self) -> None:
        self.on = False

    def get(self) -> bool:
        return self.on

    def set(self, on: bool) -> bool:
        before, self.on = self.on, on
        return before

    reset = set


def traceable() -> None:
    """Let edges of this process's networks be whole graphs: a single process has no group of statistics."""
    from pc_darts import operations

    operations._frozen = Switch()  # type: ignore[assignment]
    operations.statistics_group = lambda: None  # type: ignore[attr-defined]


def search_step(arm: Arm) -> Step:
    """An architecture step and a weight step; returns the training loss."""
    from pc_darts import operations
    from pc_darts.architect import Architect
    from pc_darts.search_space import MixedOp

    network = build(arm.size, arm.partial, arm.side == "fused").to(arm.device).train()
    x_train, y_train, x_val, y_val = images(arm.size, arm.batch or SIZES[arm.size].batch, arm.device)
    if arm.last:
        network = network.to(memory_format=torch.channels_last)
        x_train, x_val = (x.contiguous(memory_format=torch.channels_last) for x in (x_train, x_val))
    weights = network.weights()
    optimiser = torch.optim.SGD(weights, 0.01, momentum=0.9, weight_decay=3e-4)
    architect = Architect(network, optimiser)
    if arm.compiled:
        traceable()
        for part in network.modules():
            if isinstance(part, MixedOp):
                part.compile(dynamic=False)

    def step(index: int) -> Tensor:
        with torchs_convolutions(operations) if arm.side == "plain" else nullcontext():
            architect.step(None, None, x_val, y_val)
            loss = F.cross_entropy(network(x_train), y_train)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 5.0)
        optimiser.step()
        return loss.detach()

    return step


def nni_step(arm: Arm) -> Step:
    """The same with nni's supernet: DARTS on its own space of the same width, depth and operations."""
    from nni.nas.hub.pytorch import DARTS
    from nni.nas.strategy import DARTS as Strategy

    spec = SIZES[arm.size]
    torch.manual_seed(0)
    space = DARTS(width=spec.channels, num_cells=spec.cells, dataset="cifar")
    network = Strategy().mutate_model(space).to(arm.device).train()
    logits = [p for name, p in network.named_parameters() if "alpha" in name]
    known = {id(p) for p in logits}
    weights = [p for p in network.parameters() if id(p) not in known]
    optimiser = torch.optim.SGD(weights, 0.01, momentum=0.9, weight_decay=3e-4)
    architect = torch.optim.Adam(logits, 6e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    x_train, y_train, x_val, y_val = images(arm.size, arm.batch or spec.batch, arm.device)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        out = network(x)
        return F.cross_entropy(out[0] if isinstance(out, tuple) else out, y)

    def step(index: int) -> Tensor:
        architect.zero_grad()
        loss_of(x_val, y_val).backward()
        architect.step()
        optimiser.zero_grad()
        loss = loss_of(x_train, y_train)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 5.0)
        optimiser.step()
        return loss.detach()

    return step


def make_step(arm: Arm) -> Step:
    from common.cpu import tune_allocator

    if arm.side == "fused":
        tune_allocator()
    return nni_step(arm) if arm.side == "nni" else search_step(arm)


def gradient_difference(size: str, partial: int, device: str) -> float:
    """Norm of the difference of both forms' gradients over the norm of the gradient.

    In float64: in float32 rounding alone moves single values across the kinks of ReLUs and pools.
    """
    gradients = []
    for fused in (False, True):
        network = build(size, partial, fused).to(device).double()
        x, y, _, _ = images(size, SIZES[size].batch, device)
        F.cross_entropy(network(x.double()), y).backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in network.parameters() if p.grad is not None]))
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


def kept_bytes(size: str, partial: int, batch: int) -> int:
    """Bytes that one forward pass of the batched form keeps for its backward pass."""
    from common.costs import kept_bytes

    network = build(size, partial, True)
    x, y, _, _ = images(size, batch, "cpu")
    return kept_bytes(lambda: F.cross_entropy(network(x), y), network.parameters())


def rows_of(size: str, device: str, folder: Path, pace: Pace) -> Iterator[dict[str, Any]]:
    """All rows of one size.

    Raises:
        RuntimeError: the gradients of the two forms differ.
    """
    spec = SIZES[size]
    for partial in (4, 1):
        difference = gradient_difference(size, partial, device)
        if not difference <= GRADIENT_TOLERANCE:
            raise RuntimeError(f"{size}, K = {partial}: gradients differ by {difference:.2g} of their norm")
    arms = {
        "K=4": Arm("fused", size, device),
        "K=4 op by op": Arm("plain", size, device),
        "K=4 op by op, channels last": Arm("plain", size, device, last=True),
        "K=4 op by op compiled": Arm("plain", size, device, compiled=True),
        "K=1": Arm("fused", size, device, 1),
        "K=1 op by op": Arm("plain", size, device, 1),
        "K=4 filling": Arm("fused", size, device, 4, spec.filling),
    }
    if find_spec("nni") is not None:
        arms["nni"] = Arm("nni", size, device, 1)
    found = take_turns("benchmarks.pc_darts", arms, pace, 2, folder)
    where = where_of(device)
    what = f"{size}: C={spec.channels}, {spec.cells} cells, {spec.side} px, batch {spec.batch}"
    note = "architecture and weight step; same weights and images; gradients equal to 1e-5 of their norm in float64"

    def row(label: str, ours: str, peer: str, target: float | None, about: str = note) -> dict[str, Any]:
        # Images per second: of different batches, too.
        scaled = found[ours]
        count = arms[ours].batch or spec.batch
        share = spec.batch / count
        scaled = Timing(scaled.wall * share, scaled.cpu * share, scaled.memory, scaled.losses, scaled.best * share)
        return faster(f"{where}{label} ({what})", scaled, found[peer], spec.batch, target, about)

    yield row("search step, K=4, batched against op by op", "K=4", "K=4 op by op", 1.5)

    def in_float32(label: str, mine: Timing, theirs: Timing, bar: float | None) -> dict[str, Any]:
        return faster(f"{where}search step, K=4, {label} ({what})", mine, theirs, spec.batch, bar, note)

    last = found["K=4 op by op, channels last"]
    eager = min(found["K=4 op by op"], last, key=lambda timing: timing.wall)
    yield in_float32("batched against op by op with channels last", found["K=4"], last, None)
    target = BEST if device == "cpu" else None
    yield from at_its_best("fp32", in_float32, target, found["K=4"], eager, found["K=4 op by op compiled"])
    yield row("search step, DARTS (K=1), batched against op by op", "K=1", "K=1 op by op", None)
    yield row("search step, K=4 against DARTS (K=1), both batched, same batch", "K=4", "K=1", None, "the same program")
    yield row(
        f"search step, K=4 at batch {spec.filling} against DARTS (K=1) at batch {spec.batch}, about the same memory",
        "K=4 filling",
        "K=1",
        None,
        "the paper's argument: the memory that is saved goes into a larger batch",
    )
    if "nni" in found:
        about = "nni's space differs: K = 1, no edge normalisation, its own cell's preprocessing"
        yield row("search step, our DARTS (K=1) against nni's DARTS", "K=1", "nni", None, about)
        yield row("search step, K=4 against nni's DARTS", "K=4", "nni", None, about)
    for ours, peer in (("K=4", "K=1"), ("K=4", "K=4 op by op"), ("K=4 filling", "K=1")):
        name = f"{where}peak memory of the search step, {ours} against {peer} ({what})"
        yield leaner(name, found[ours], found[peer], device, target=None)
    if device == "cpu":
        yield noted(
            bench_row(
                f"memory kept for the backward pass, K=4 against DARTS (K=1), same batch ({what})",
                kept_bytes(size, 4, spec.batch) / 2**20,
                kept_bytes(size, 1, spec.batch) / 2**20,
                "MiB",
                target=2.5,  # at most 0.4 times
                higher_is_better=False,
            ),
            "tensors that autograd saves in one forward pass, parameters not counted, both batched",
        )


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    sizes = [size for size in SIZES if size != "tiny"]
    options = parse(bench_parser(__doc__, "bench_pc_darts.json", SIZES, sizes, steps=3), argv)
    if options.arm:
        arm = Arm(**options.arm)
        Turns(arm.device).serve(make_step(arm))
        return []
    return measure(options, lambda *given: iter([list(rows_of(*given))]))


if __name__ == "__main__":
    run_main(main)
