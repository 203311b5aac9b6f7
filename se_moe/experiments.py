"""The arms behind the claims: what `reproduce.py` measures, on sizes and budgets from claims.yaml.

Times are medians of repeats that alternate between the arms (A B C A B C ...) on the same machine; where a claim can
be counted in bytes, messages or CPU seconds, it is. A slow drive or link is a sleep of fixed length, the same for all
arms.

Shapes: N rows, D hidden, F expert hidden, V vocabulary, R ranks.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.study import Study as CommonStudy
from se_moe.cache import SparseCache
from se_moe.communication import (
    GradientBuckets,
    SlowLinks,
    all_to_all_rows,
    gather_slices,
    make_groups,
    make_topology,
    plan_from_counts,
)
from se_moe.config import DataConfig, ModelOptions, StorageConfig, Switches, TrainConfig
from se_moe.data import TextData
from se_moe.elastic import Layout, TaskGroups, TaskMoE, rank_step, tagged_parameters
from se_moe.embedding import PartitionedEmbedding
from se_moe.model import Attention
from se_moe.trainer import Trainer

BATCHES = (64, 32, 16, 16)  # the paper's 512/256/128/128 at an eighth


@dataclass(frozen=True)
class Sizes:
    """Sizes and budgets of a tier.

    Args:
        repeats: of alternating timings.
        tier_experts, tier_batch (sequences of 32 tokens), tier_steps (of each arm): of M2.
        trace_steps: of recorded gates, trace_requests: of the shifting Zipf trace (M3).
        elastic_steps, elastic_repeats: of M5; vocabulary, embedding_tokens: of M7; ring_hidden, ring_rows: of M8;
        deepspeed_steps: of M9; teacher_steps, student_steps: of M10.
        corpus: that the language models read.
    """

    repeats: int
    tier_steps: int
    tier_experts: int
    tier_batch: int
    trace_steps: int
    trace_requests: int
    elastic_steps: int
    elastic_repeats: int
    vocabulary: int
    embedding_tokens: int
    ring_hidden: int
    ring_rows: int
    deepspeed_steps: int
    teacher_steps: int
    student_steps: int
    corpus: str


class Study(CommonStudy[Sizes]):
    """The language model of the claims on tiers, and what it asks of them."""

    def config(self, seed: int, switches: Switches, **storage: Any) -> TrainConfig:
        """One rank, two MoE layers."""
        sizes = self.sizes
        return TrainConfig(
            run_dir=str(self.folder),
            seed=seed,
            steps=1000,
            batch=16,
            data=DataConfig(tasks=[sizes.corpus], vocabulary=600, sequence=32),
            model=ModelOptions(
                hidden=96, layers=4, heads=4, dense_hidden=192, experts=sizes.tier_experts, expert_hidden=128
            ),
            switches=switches,
            storage=StorageConfig(**storage),
        )

    def gate_trace(self, seed: int) -> list[int]:
        """Experts in the order in which training asks for them: recorded from a resident run with few tokens a step."""
        config = self.config(seed, Switches(tiers=False))
        config = replace(config, batch=2, model=replace(config.model, top_k=1, experts=2 * self.sizes.tier_experts))
        trace: list[int] = []
        with opened(config) as trainer:
            for step in range(self.sizes.trace_steps):
                ids_BL, targets_BL = trainer.batch(step)
                with torch.no_grad():
                    trainer.model.train()
                    counts_ME = trainer.model(ids_BL[:, :8], targets_BL[:, :8]).requested_ME
                for layer, counts_E in enumerate(counts_ME):
                    trace += [layer * len(counts_E) + int(e) for e in counts_E.nonzero()]
                trainer.step()
        return trace


def _work(rank: int, ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        meeting = f"file://{folder}/ranks"
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=300)
        )
        torch.save(function(*arguments), Path(folder, f"{rank}.pt"))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on `ranks` gloo processes that meet at a file; its results by rank.

    Arguments may be anything (the processes are forked), results are tensors and plain containers of them.

    Raises:
        RuntimeError: one of them failed; with its traceback.
    """
    import torch._dynamo  # an optimizer imports it: once here, not on every rank

    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        workers = [context.Process(target=_work, args=(r, ranks, folder, function, arguments)) for r in range(ranks)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for rank in range(ranks):
            error = Path(folder, f"{rank}.error")
            if error.exists():
                raise RuntimeError(f"rank {rank} of {ranks}:\n{error.read_text()}")
        codes = [worker.exitcode for worker in workers]
        if any(codes):
            raise RuntimeError(f"exit codes of the {ranks} ranks: {codes}")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]


def alternate(arms: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """(wall, CPU) seconds of each arm: medians over rounds in which every arm has its turn, after one to warm up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for number in range(repeats + 1):
        for name, arm in arms.items():
            if dist.is_initialized():
                dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            arm()
            if number:
                taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: (median(w for w, _ in times), median(c for _, c in times)) for name, times in taken.items()}


def median(values: Any) -> float:
    return float(statistics.median(values))


def fused_against_per_tensor(repeats: int, seed: int) -> dict[str, float]:
    """AllGather and AllReduce of 120 small tensors: one collective each, or one buffer for all."""
    group = make_groups().world
    torch.manual_seed(seed * 100 + dist.get_rank())
    sizes = [4096] * 40 + [64] * 80
    tensors = [torch.randn(size) for size in sizes]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    found: dict[str, list[Tensor]] = {}
    buckets = GradientBuckets(parameters, group, 1, bucket_bytes=1 << 20, overlap=True)

    def gather(fused: bool) -> None:
        found[f"gather{fused}"] = gather_slices(tensors, group, fused)

    def reduce_fused() -> None:
        buckets.zero()
        torch.autograd.backward([(p * t).sum() for p, t in zip(parameters, tensors)])
        buckets.finish()
        found["reduceTrue"] = [p.grad.clone() for p in parameters if p.grad is not None]

    def reduce_each() -> None:
        leaves = [p.detach().requires_grad_() for p in parameters]
        torch.autograd.backward([(p * t).sum() for p, t in zip(leaves, tensors)])
        for p in leaves:
            assert p.grad is not None
            dist.all_reduce(p.grad, group=group)
        found["reduceFalse"] = [p.grad for p in leaves if p.grad is not None]

    arms: dict[str, Callable[[], object]] = {
        "gather_fused": lambda: gather(True),
        "gather_each": lambda: gather(False),
        "reduce_fused": reduce_fused,
        "reduce_each": reduce_each,
    }
    wall = {name: times[0] for name, times in alternate(arms, repeats).items()}
    equal = all(
        len(found[f"{kind}True"]) == len(sizes)
        and all(torch.equal(a.reshape(-1), b.reshape(-1)) for a, b in zip(found[f"{kind}True"], found[f"{kind}False"]))
        for kind in ("gather", "reduce")
    )
    buckets.remove()
    gather_gain, reduce_gain = wall["gather_each"] / wall["gather_fused"], wall["reduce_each"] / wall["reduce_fused"]
    return {
        "speedup": min(gather_gain, reduce_gain),
        "equal": float(equal),
        "speedup_gather": gather_gain,
        "speedup_reduce": reduce_gain,
        **{f"milliseconds_{name}": 1000 * seconds for name, seconds in wall.items()},
    }


@contextmanager
def opened(config: TrainConfig) -> Iterator[Trainer]:
    """A trainer of one process whose files go away afterwards."""
    data = config.data
    text = TextData(data.tasks, data.shares, data.vocabulary, data.sequence)
    with tempfile.TemporaryDirectory(dir=config.run_dir) as folder:
        trainer = Trainer(config, text, torch.device("cpu"), Path(folder))
        try:
            yield trainer
        finally:
            trainer.close()


def timed_steps(trainer: Trainer, steps: int) -> tuple[list[float], list[float]]:
    logs = [trainer.step() for _ in range(steps)]
    return [log.loss for log in logs], [log.seconds for log in logs]


def zipf_trace(experts: int, requests: int, seed: int, shifts: int = 4) -> list[int]:
    """Zipf popularity whose order is drawn anew `shifts` times."""
    generator = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, experts + 1) ** 1.1
    weights /= weights.sum()
    trace: list[int] = []
    for _ in range(shifts):
        order = generator.permutation(experts)
        trace += [int(order[i]) for i in generator.choice(experts, size=requests // shifts, p=weights)]
    return trace


CACHE_RULES: dict[str, dict[str, Any]] = {
    "decayed": {"rule": "repaired", "beta": 0.5, "period": 128},
    "lfu": {"rule": "lfu"},
    "lru": {"rule": "lru"},
    "pseudocode": {"rule": "pseudocode", "threshold": 1.0, "beta": 0.5, "period": 128},
    "text": {"rule": "text", "threshold": 1.0, "beta": 0.5, "period": 128},
}


def replay(trace: Sequence[int], capacity: int, **options: Any) -> tuple[float, int]:
    """(hit rate, writes to the file) of a rule when every request changes its expert, as training does."""
    cache = SparseCache[int](capacity, **options)
    bypassed = 0

    def flush() -> None:
        for key in cache.dirty_keys():
            cache.mark_written(key)

    cache.on_period = flush
    for key in trace:
        if cache.request(key).bypass:
            bypassed += 1
        else:
            cache.mark_dirty(key)
    flush()
    return cache.statistics.hit_rate, cache.statistics.writes + bypassed


class TaskLanguageModel(nn.Module):
    """Next-token prediction for several tasks: shared embedding and attention, a Task-MoE feed-forward a layer."""

    def __init__(self, vocabulary: int, hidden: int, hosted: Sequence[int], seed: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, hidden)
        self.attention = nn.ModuleList(Attention(hidden, 4) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.moes = nn.ModuleList(
            TaskMoE(hidden, 4 * hidden, len(BATCHES), hosted, seed=seed, block=i) for i in range(2)
        )
        for name, p in self.named_parameters():
            part = name.split(".")
            known = sum(ord(c) * (i + 1) for i, c in enumerate(name))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + known)
            if "policy_logits" not in part:
                value = torch.randn(p.shape, generator=generator) * 0.05
                p.data = value + (1.0 if name.endswith("weight") and name.startswith("norms") else 0.0)

    def loss_sum(self, rows_BL: Tensor, task: int) -> Tensor:
        """Sum over samples of the mean loss a token."""
        ids_BL, targets_BL = rows_BL[:, :-1], rows_BL[:, 1:]
        x_BLD = self.wte(ids_BL)
        for attention, norm, moe in zip(self.attention, self.norms, self.moes):
            x_BLD = x_BLD + attention(norm(x_BLD))[0]
            x_BLD = x_BLD + moe(x_BLD.flatten(0, 1), task).view_as(x_BLD)
        logits_BLV = x_BLD @ self.wte.weight.T
        losses_BL = F.cross_entropy(logits_BLV.transpose(1, 2), targets_BL, reduction="none")
        return losses_BL.mean(1).sum()


def _task_rows(seed: int, step: int, length: int = 17) -> dict[int, Tensor]:
    """Made-up text: each task counts in its own stride, so that there is something to learn."""
    rows = {}
    for task, batch in enumerate(BATCHES):
        generator = torch.Generator().manual_seed((seed * 10_007 + step) * 11 + task)
        start_B1 = torch.randint(0, 64, (batch, 1), generator=generator)
        rows[task] = (start_B1 + torch.arange(length) * (task + 1)) % 64
    return rows


def elastic_layouts() -> dict[str, Layout]:
    """Four ranks with a task each, eight by weight, two with tasks put together."""
    return {
        "one_each": Layout.from_vimer([0, 1, 2, 3], BATCHES),
        "balanced": Layout.of(BATCHES, 8),
        "merged": Layout.of(BATCHES, 2),
    }


def train_layout(name: str, steps: int, seed: int, folder: str) -> float:
    """Train one layout on its ranks; rank 0's file holds the parameters that every rank contributed."""
    layout, rank = elastic_layouts()[name], dist.get_rank()
    model = TaskLanguageModel(64, 32, sorted(layout.work(rank)), seed)
    groups = TaskGroups(layout)
    tagged = tagged_parameters(model)
    groups.broadcast_parameters(tagged)
    # Adam would turn the rounding of a gradient near zero into a step of the learning rate's size.
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        for moe in model.moes:
            moe.step = step  # type: ignore[assignment]
        optimiser.zero_grad()
        rank_step(layout, rank, _task_rows(seed, step), model.loss_sum)
        groups.reduce_gradients(tagged)
        optimiser.step()
    torch.save(dict(model.state_dict()), Path(folder) / f"{name}-{rank}.pt")
    return 0.0


def merged_state(folder: Path, name: str, ranks: int) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for rank in range(ranks):
        for key, tensor in torch.load(folder / f"{name}-{rank}.pt", weights_only=True).items():
            merged.setdefault(key, tensor)
    return merged


def compute_seconds(layout: Layout, repeats: int, seed: int) -> list[float]:
    """CPU seconds of every rank's forward and backward pass, measured alone: the lowest of `repeats` in turns."""
    model = TaskLanguageModel(64, 64, range(len(BATCHES)), seed)
    rows = _task_rows(seed, 0, 33)
    best = [float("inf")] * layout.ranks
    for _ in range(repeats + 1):
        for rank in range(layout.ranks):
            model.zero_grad()
            started = time.process_time()
            rank_step(layout, rank, rows, model.loss_sum)
            best[rank] = min(best[rank], time.process_time() - started)
    return best


def exchanges(nodes: int, per_node: int, repeats: int, seed: int, latency: float) -> dict[str, float]:
    """Flat against two-phase AlltoAll of unequal rows, every message between nodes costing `latency` seconds."""
    groups, topology = make_groups(), make_topology(per_node)
    rank, ranks = dist.get_rank(), nodes * per_node
    table_RR = torch.randint(0, 40, (ranks, ranks), generator=torch.Generator().manual_seed(seed))
    # How many rows travel is exchanged beforehand, in both arms by as many phases.
    plans = {
        name: plan_from_counts(table_RR[rank][:, None], groups.expert, used)[0]
        for name, used in (("flat", None), ("two_phase", topology))
    }
    x_ND = torch.randn(int(table_RR[rank].sum()), 64, generator=torch.Generator().manual_seed(seed * 31 + rank))
    links = {"flat": SlowLinks(per_node, latency), "two_phase": SlowLinks(per_node, latency)}
    found: dict[str, Tensor] = {}

    def run(name: str) -> None:
        used = topology if name == "two_phase" else None
        found[name] = all_to_all_rows(x_ND, plans[name], groups.expert, used, links[name])

    times = alternate({name: (lambda name=name: run(name)) for name in links}, repeats)  # type: ignore[misc]
    return {
        "flat_seconds": times["flat"][0],
        "two_phase_seconds": times["two_phase"][0],
        "flat_messages": links["flat"].messages / (repeats + 1),
        "two_phase_messages": links["two_phase"].messages / (repeats + 1),
        "equal": float(torch.equal(found["flat"], found["two_phase"])),
    }


def embeddings(vocabulary: int, hidden: int, tokens: int, repeats: int, seed: int) -> dict[str, float]:
    """A step (lookup, exchange, backward, Adam) of the replicated, the column- and the row-partitioned table."""
    group, ranks, rank = make_groups().world, dist.get_world_size(), dist.get_rank()
    table_VH = torch.randn(vocabulary, hidden, generator=torch.Generator().manual_seed(seed))
    weight_TH = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed * 7 + rank))
    ids_ST = torch.randint(0, vocabulary, (repeats + 1, tokens), generator=torch.Generator().manual_seed(seed + rank))
    replicated = nn.Parameter(table_VH.clone())
    modules: dict[str, PartitionedEmbedding] = {}
    for partition in ("columns", "rows"):
        modules[partition] = PartitionedEmbedding(vocabulary, hidden, group, partition)  # type: ignore[arg-type]
        modules[partition].load_full(table_VH)
    weights = {"replicated": replicated} | {name: module.weight for name, module in modules.items()}
    optimisers = {name: torch.optim.Adam([p], lr=1e-2, fused=True) for name, p in weights.items()}
    losses: dict[str, list[float]] = {name: [] for name in weights}

    def step(name: str) -> None:
        ids_T = ids_ST[len(losses[name])]
        optimisers[name].zero_grad()
        vectors_TH = F.embedding(ids_T, replicated) if name == "replicated" else modules[name](ids_T)
        loss = (vectors_TH * weight_TH).square().mean()
        loss.backward()
        gradient = weights[name].grad
        assert gradient is not None
        if name == "replicated":
            dist.all_reduce(gradient, group=group)
        gradient /= ranks
        optimisers[name].step()
        losses[name].append(float(loss.detach()))

    times = alternate({name: (lambda name=name: step(name)) for name in weights}, repeats)  # type: ignore[misc]
    bytes_ = {
        name: sum(t.nbytes for t in optimisers[name].state[p].values() if t.ndim) + p.nbytes
        for name, p in weights.items()
    }
    apart = max(abs(a - b) for n in modules for a, b in zip(losses[n], losses["replicated"]))
    return {
        "loss_difference": apart,
        **{f"bytes_{name}": float(value) for name, value in bytes_.items()},
        **{f"wall_{name}": times[name][0] for name in times},
        **{f"cpu_{name}": times[name][1] for name in times},
    }
