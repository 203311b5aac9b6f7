"""The arms behind the claims: what `reproduce.py` measures, with every budget in `PLANS`.

Times are medians of repeats that alternate between the arms (A B C A B C ...) on the same machine; where a claim can
be counted in bytes, messages or CPU seconds, it is. A slow drive or link is a sleep of fixed length, the same for all
arms.

Shapes: N rows, D hidden, F expert hidden, V vocabulary, R ranks.
"""

from __future__ import annotations

import json
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

from common.errors import UserError
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
from se_moe.homes import TieredHome
from se_moe.inference import distil, expert_usage, student_of
from se_moe.model import Attention, MoELanguageModel, initialise
from se_moe.planner import FLOAT32, Machine, storage_plan
from se_moe.ring import RingOffload
from se_moe.storage import DeviceArena, Throttle
from se_moe.training import Trainer, model_config

ERAS = ["sotu:1790-1860", "sotu:1861-1920", "sotu:1921-1970", "sotu:1971-2030"]
BATCHES = (64, 32, 16, 16)  # the paper's 512/256/128/128 at an eighth


@dataclass(frozen=True)
class Plan:
    """Sizes and budgets of a tier."""

    repeats: int  # of alternating timings
    tier_steps: int  # of each arm of M2
    tier_experts: int
    tier_batch: int  # sequences of 32 tokens in M2
    trace_steps: int  # of recorded gates (M3)
    trace_requests: int  # of the shifting Zipf trace
    elastic_steps: int
    elastic_repeats: int
    vocabulary: int  # of the embedding claim
    embedding_tokens: int
    ring_hidden: int
    ring_rows: int
    deepspeed_steps: int
    teacher_steps: int
    student_steps: int
    corpus: str


PLANS = {
    "smoke": Plan(3, 4, 16, 32, 12, 2000, 4, 2, 8192, 256, 128, 256, 12, 30, 15, "sotu:1945-1970"),
    "small": Plan(9, 12, 32, 96, 60, 8000, 20, 7, 50304, 1024, 256, 1024, 50, 400, 200, "sotu"),
}


def _work(rank: int, ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        meeting = f"file://{folder}/ranks"
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=300)
        )
        Path(folder, f"{rank}.json").write_text(json.dumps(function(*arguments)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on `ranks` gloo processes; its JSON results by rank."""
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
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


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
    return {name: (_median(w for w, _ in times), _median(c for _, c in times)) for name, times in taken.items()}


def _median(values: Any) -> float:
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


def tier_config(plan: Plan, seed: int, folder: Path, switches: Switches, **storage: Any) -> TrainConfig:
    """One rank, two MoE layers."""
    return TrainConfig(
        run_dir=str(folder),
        seed=seed,
        steps=1000,
        batch=16,
        data=DataConfig(tasks=[plan.corpus], vocabulary=600, sequence=32),
        model=ModelOptions(
            hidden=96, layers=4, heads=4, dense_hidden=192, experts=plan.tier_experts, expert_hidden=128
        ),
        switches=switches,
        storage=StorageConfig(**storage),
    )


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


def _timed_steps(trainer: Trainer, steps: int) -> tuple[list[float], list[float]]:
    logs = [trainer.step() for _ in range(steps)]
    return [log.loss for log in logs], [log.seconds for log in logs]


def prefetch_and_cache(plan: Plan, seed: int, folder: Path) -> dict[str, float]:
    """Tokens a second with neither, either and both of prefetch and cache, on a drive as slow as the computation.

    The drive's speed is set so that what the arm without both moves in a step takes as long as a resident step does.
    """
    arms = {"none": (False, False), "prefetch": (True, False), "cache": (False, True), "both": (True, True)}

    def arm_config(switches: Switches, **storage: Any) -> TrainConfig:
        # Many tokens a step: the machine's own drive must be faster than the pretended one.
        return replace(tier_config(plan, seed, folder, switches, **storage), batch=plan.tier_batch)

    tokens = plan.tier_batch * 32
    with opened(arm_config(Switches(tiers=False))) as resident:
        expected, seconds = _timed_steps(resident, plan.tier_steps)
        compute = _median(seconds[1:])
    off = Switches(prefetch=False, cache=False)
    with opened(arm_config(off)) as probe:
        assert isinstance(probe.home, TieredHome)
        probe.step()
        before = probe.home.files.statistics.bytes_read + probe.home.files.statistics.bytes_written
        probe.step()
        moved = probe.home.files.statistics.bytes_read + probe.home.files.statistics.bytes_written - before
    rate = moved / compute / 1e6
    result = {"drive_mb_s": rate, "compute_seconds": compute, "losses_equal": 1.0}
    speed, hidden = {}, {}
    for name, (prefetch, cache) in arms.items():
        switches = Switches(prefetch=prefetch, cache=cache)
        with opened(arm_config(switches, read_mb_s=rate, cached_share=0.5)) as trainer:
            losses, seconds = _timed_steps(trainer, plan.tier_steps)
            assert isinstance(trainer.home, TieredHome)
            statistics_ = trainer.home.store.statistics
            speed[name] = tokens / _median(seconds[1:])
            hidden[name] = statistics_.hidden_fraction
            if losses != expected:
                result["losses_equal"] = 0.0
            if trainer.home.cache is not None:
                result[f"hit_rate_{name}"] = trainer.home.cache.statistics.hit_rate
            result[f"fetch_seconds_{name}"] = statistics_.fetch_seconds
            result[f"wait_seconds_{name}"] = statistics_.wait_seconds
    return {
        "speedup": speed["both"] / speed["none"],
        "hidden": hidden["prefetch"],
        **result,
        "speed_resident": tokens / compute,
        **{f"speed_{name}": value for name, value in speed.items()},
        **{f"hidden_{name}": value for name, value in hidden.items()},
    }


def gate_trace(plan: Plan, seed: int, folder: Path) -> list[int]:
    """Experts in the order in which training asks for them: recorded from a resident run with few tokens a step."""
    config = tier_config(plan, seed, folder, Switches(tiers=False))
    config = replace(config, batch=2, model=replace(config.model, top_k=1, experts=2 * plan.tier_experts))
    trace: list[int] = []
    with opened(config) as trainer:
        for step in range(plan.trace_steps):
            ids_BL, targets_BL = trainer.batch(step)
            with torch.no_grad():
                trainer.model.train()
                counts_ME = trainer.model(ids_BL[:, :8], targets_BL[:, :8]).requested_ME
            for layer, counts_E in enumerate(counts_ME):
                trace += [layer * len(counts_E) + int(e) for e in counts_E.nonzero()]
            trainer.step()
    return trace


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


def cache_rules(plan: Plan, seed: int, folder: Path) -> dict[str, float]:
    """Hit rates and writes of the cache rules on recorded gates and on shifting popularity."""
    traces = {"gates": gate_trace(plan, seed, folder), "shift": zipf_trace(64, plan.trace_requests, seed)}
    result: dict[str, float] = {}
    for name, trace in traces.items():
        capacity = max(2, len(set(trace)) // 2)  # as the tiers do by default
        for rule, options in CACHE_RULES.items():
            rate, writes = replay(trace, capacity, **options)
            result[f"hit_rate_{rule}_{name}"] = rate
            result[f"writes_{rule}_{name}"] = writes / len(trace)
    best = max(result["hit_rate_lfu_gates"], result["hit_rate_lru_gates"])
    return {
        "gain_under_shift": result["hit_rate_decayed_shift"] - result["hit_rate_lfu_shift"],
        "gap_on_gates": result["hit_rate_decayed_gates"] - best,
        "writes_per_request": max(result["writes_decayed_gates"], result["writes_decayed_shift"]),
        **result,
    }


def storage_formula(plan: Plan, seed: int, folder: Path) -> dict[str, float]:
    """Equation (1) against the bytes that the tiers really held, for three models; half the memory, equal losses."""
    result: dict[str, float] = {}
    worst = 0.0
    shapes = {"a": (8, 128, 64), "b": (16, 128, 64), "c": (8, 256, 96)}
    for name, (experts, wide, hidden) in shapes.items():
        base = tier_config(plan, seed, folder, Switches(prefetch=False), cached_share=1.0, period=0)
        model = replace(base.model, experts=experts, expert_hidden=wide, hidden=hidden)
        with opened(replace(base, model=model, batch=32)) as trainer:
            for _ in range(2):
                log = trainer.step()
            assert isinstance(trainer.home, TieredHome)
            layers = len(trainer.model.moe_layers())
            planned = storage_plan(
                trainer.dense_count, trainer.sparse_count, layers, log.alpha, Machine(1e12, 1e12, 1e12), FLOAT32
            )
            home = trainer.home
            gradients = home.store.statistics.gradient_peak_bytes
            used = len(home.cache.keys()) * home.layout.slot_bytes if home.cache is not None else 0
            measured = {
                "device": (trainer.arena.peak_bytes, planned.device_bytes),
                "host": (used + gradients, planned.host_bytes),
                "file": (home.files.live_bytes, planned.file_bytes),
            }
            result[f"alpha_{name}"] = log.alpha
        for tier, (bytes_, formula) in measured.items():
            error = abs(bytes_ / formula - 1)
            result[f"{tier}_megabytes_{name}"], result[f"{tier}_error_{name}"] = bytes_ / 1e6, error
            worst = max(worst, error)
    config = tier_config(plan, seed, folder, Switches(tiers=False))
    with opened(config) as resident:
        expected, _ = _timed_steps(resident, 4)
        half = resident.resident_bytes() / 2
        full = resident.arena.peak_bytes
    budget = tier_config(plan, seed, folder, Switches(), device_mb=half / 1e6)
    with opened(budget) as trainer:
        losses, _ = _timed_steps(trainer, 4)
        peak = trainer.arena.peak_bytes
    return {
        "largest_error": worst,
        "device_share": peak / full,
        "losses_equal": float(losses == expected),
        **result,
    }


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


def _merged_state(folder: Path, name: str, ranks: int) -> dict[str, Tensor]:
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


def elastic(plan: Plan, seed: int, folder: Path) -> dict[str, float]:
    """Samples a second and rank of the layouts, and the parameters that they lead to."""
    layouts = elastic_layouts()
    result: dict[str, float] = {}
    speed = {}
    for name, layout in layouts.items():
        seconds = compute_seconds(layout, plan.elastic_repeats, seed)
        speed[name] = sum(BATCHES) / layout.ranks / max(seconds)
        result[f"samples_per_second_{name}"] = speed[name]
        result[f"utilisation_{name}"] = layout.allocation.utilisation
    with tempfile.TemporaryDirectory(dir=folder) as work:
        states = {}
        for name, layout in layouts.items():
            on_ranks(layout.ranks, train_layout, name, plan.elastic_steps, seed, work)
            states[name] = _merged_state(Path(work), name, layout.ranks)
    first = states["one_each"]
    difference = max(
        float((state[key] - first[key]).abs().max()) for state in states.values() for key in first.keys() & state.keys()
    )
    same_names = all(state.keys() == first.keys() for state in states.values())
    return {
        "gain": speed["balanced"] / speed["one_each"] - 1,
        "parameter_difference": difference if same_names else float("inf"),
        **result,
    }


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


def hierarchical(plan: Plan, seed: int) -> dict[str, float]:
    """Both exchanges on 2 x 2 and 2 x 3 ranks."""
    result: dict[str, float] = {}
    for per_node in (2, 3):
        per_rank = on_ranks(2 * per_node, exchanges, 2, per_node, plan.repeats, seed, 0.002)
        flat, two = (max(r[f"{k}_seconds"] for r in per_rank) for k in ("flat", "two_phase"))
        messages = [sum(r[f"{k}_messages"] for r in per_rank) for k in ("flat", "two_phase")]
        name = f"2x{per_node}"
        result |= {
            f"speedup_{name}": flat / two,
            f"fewer_messages_{name}": messages[0] / messages[1] / per_node,
            f"equal_{name}": min(r["equal"] for r in per_rank),
            f"flat_ms_{name}": 1000 * flat,
            f"two_phase_ms_{name}": 1000 * two,
        }
    return {
        "speedup": min(result["speedup_2x2"], result["speedup_2x3"]),
        "fewer_messages": min(result["fewer_messages_2x2"], result["fewer_messages_2x3"]),
        "equal": min(result["equal_2x2"], result["equal_2x3"]),
        **result,
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


def embedding_partition(plan: Plan, seed: int) -> dict[str, float]:
    """Two ranks, hidden 64."""
    per_rank = on_ranks(2, embeddings, plan.vocabulary, 64, plan.embedding_tokens, plan.repeats, seed)
    worst = {key: max(r[key] for r in per_rank) for key in per_rank[0]}
    return {
        "speedup": worst["cpu_replicated"] / worst["cpu_columns"],
        "speedup_wall": worst["wall_replicated"] / worst["wall_columns"],
        "speedup_rows": worst["cpu_replicated"] / worst["cpu_rows"],
        "memory_share": worst["bytes_columns"] / worst["bytes_replicated"],
        "loss_difference": worst["loss_difference"],
        "milliseconds_replicated": 1000 * worst["wall_replicated"],
        "milliseconds_columns": 1000 * worst["wall_columns"],
    }


def ring_offload(plan: Plan, seed: int, layers: int = 12) -> dict[str, float]:
    """A pass through 12 layers: resident, offloaded one after the other, rings of 2 and 4; copy = half the compute."""
    torch.manual_seed(seed)
    d, f = plan.ring_hidden, 4 * plan.ring_hidden
    host = [{"fc1": torch.randn(f, d) / d**0.5, "fc2": torch.randn(d, f) / f**0.5} for _ in range(layers)]
    x_ND = torch.randn(plan.ring_rows, d)

    def forward(ring: RingOffload) -> Tensor:
        y_ND = x_ND
        with torch.no_grad():
            for index in range(layers):
                with ring.layer(index) as p:
                    y_ND = y_ND + F.linear(F.gelu(F.linear(y_ND, p["fc1"])), p["fc2"])
        return y_ND

    layer_bytes = sum(t.nbytes for t in host[0].values())
    started = DeviceArena(2 * layers * layer_bytes)
    with RingOffload(host, layers, started) as resident:
        expected = forward(resident)
        compute = alternate({"resident": lambda: forward(resident)}, plan.repeats)["resident"][0] / layers
    throttle = {"bytes_per_second": layer_bytes / (0.5 * compute)}
    specs = {"resident": (layers, True), "serial": (1, False), "ring2": (2, True), "ring4": (4, True)}
    arenas = {name: DeviceArena(2 * layers * layer_bytes) for name in specs}
    rings = {
        name: RingOffload(host, k, arenas[name], overlap, None if k == layers else Throttle(**throttle))
        for name, (k, overlap) in specs.items()
    }
    try:
        equal = all(torch.equal(forward(ring), expected) for ring in rings.values())
        arms = {name: (lambda ring=ring: forward(ring)) for name, ring in rings.items()}  # type: ignore[misc]
        wall = {name: t[0] for name, t in alternate(arms, plan.repeats).items()}
    finally:
        for ring in rings.values():
            ring.close()
    exposed = {name: wall[name] - wall["resident"] for name in ("ring2", "ring4")}
    serial = wall["serial"] - wall["resident"]
    return {
        "time_ratio": wall["ring4"] / wall["resident"],
        "hidden": 1 - exposed["ring4"] / serial,
        "device_share": arenas["ring4"].peak_bytes / arenas["resident"].peak_bytes,
        "equal": float(equal),
        "time_ratio_ring2": wall["ring2"] / wall["resident"],
        "time_ratio_serial": wall["serial"] / wall["resident"],
        "hidden_ring2": 1 - exposed["ring2"] / serial,
        "device_share_ring2": arenas["ring2"].peak_bytes / arenas["resident"].peak_bytes,
        "compute_ms": 1000 * compute,
    }


def beside_deepspeed(plan: Plan, seed: int, folder: Path) -> dict[str, float]:
    """The same model by ours (experts resident) and by DeepSpeed, ZeRO 0 and 2, on two ranks; arms take turns.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    from se_moe.deepspeed_arm import INSTALL, available
    from se_moe.train import start_ranks

    if not available():
        raise UserError(f"M9 compares with DeepSpeed. {INSTALL}")
    found: dict[str, list[dict[str, Any]]] = {"resident": [], "zero0": [], "zero2": []}
    for turn in range(3 if plan.deepspeed_steps >= 50 else 1):
        for name, measured in found.items():
            arm = "resident" if name == "resident" else "deepspeed"
            run = TrainConfig(
                run_dir=str(folder / f"M9-{name}-seed{seed}-{turn}"),
                seed=seed,
                steps=plan.deepspeed_steps,
                arms=[arm],
                log_every=10**6,
                checkpoint_every=10**6,
                data=DataConfig(tasks=[plan.corpus]),
                # With a small vocabulary and many tokens a split table costs more than it saves; slices of the dense
                # parameters stand against ZeRO's.
                switches=Switches(partition=False, shard_dense=True),
            )
            run.parallel.zero_stage = 0 if name == "zero0" else 2
            file = Path(run.run_dir) / arm / "metrics.json"
            if not file.is_file():
                start_ranks(run, arm)
            measured.append(json.loads(file.read_text(encoding="utf-8")))
    cpu = {name: _median(m["cpu_seconds_per_1000_tokens"] for m in rows) for name, rows in found.items()}
    speed = {name: _median(m["tokens_per_second"] for m in rows) for name, rows in found.items()}
    peak = {name: _median(m["peak_bytes"] for m in rows) for name, rows in found.items()}
    losses = {name: rows[0]["losses"] for name, rows in found.items()}

    def apart(a: str, b: str, steps: int | None = None) -> float:
        return max(abs(x - y) for x, y in zip(losses[a][:steps], losses[b][:steps], strict=True))

    return {
        "cpu_ratio": cpu["resident"] / min(cpu["zero0"], cpu["zero2"]),
        "memory_ratio": peak["resident"] / min(peak["zero0"], peak["zero2"]),
        "loss_difference": max(apart("resident", "zero0"), apart("resident", "zero2")),
        "loss_difference_first_10_steps": max(apart("resident", "zero0", 10), apart("resident", "zero2", 10)),
        "loss_difference_zero0_zero2": apart("zero0", "zero2"),
        "throughput_gain": speed["resident"] / max(speed["zero0"], speed["zero2"]) - 1,
        **{f"cpu_{name}": value for name, value in cpu.items()},
        **{f"tokens_per_second_{name}": value for name, value in speed.items()},
        **{f"peak_megabytes_{name}": value / 1e6 for name, value in peak.items()},
    }


def distillation(plan: Plan, seed: int) -> dict[str, float]:
    """A teacher of 8 experts, a student of 2 taught by it, and the same student from scratch, at equal steps."""
    options = ModelOptions(hidden=64, layers=4, heads=4, dense_hidden=128, experts=8, expert_hidden=128, top_k=1)
    data = TextData([plan.corpus], [], 600, 32)
    config = TrainConfig(seed=seed, model=options, data=DataConfig(sequence=32, vocabulary=600))

    def batches(first: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        return (data.batch(seed, step, 32) for step in range(first, first + steps))

    def held_out(model: MoELanguageModel) -> float:
        ids_NL, targets_NL = data.held_out(128)
        with torch.no_grad():
            return float(model.eval()(ids_NL, targets_NL).lm_loss)

    def fresh(experts: int, number: int) -> MoELanguageModel:
        small = replace(config, model=replace(options, experts=experts))
        model = MoELanguageModel(model_config(small, data.vocabulary))
        initialise(model, seed * 10 + number)
        return model

    teacher = fresh(8, 0)
    distil(teacher, teacher_student := fresh(8, 0), batches(0, plan.teacher_steps), weight=0.0)
    teacher = teacher_student
    usage_ME = expert_usage(teacher, [ids for ids, _ in batches(10**6, 4)])
    taught = distil(teacher, student_of(teacher, 2, usage_ME), batches(2 * 10**6, plan.student_steps))
    scratch = distil(teacher, fresh(2, 1), batches(2 * 10**6, plan.student_steps), weight=0.0)
    taught_from_scratch = distil(teacher, fresh(2, 1), batches(2 * 10**6, plan.student_steps))
    losses = {
        "teacher": held_out(teacher),
        "student": held_out(taught),
        "scratch": held_out(scratch),
        "student_random_start": held_out(taught_from_scratch),
    }
    gap = losses["scratch"] - losses["teacher"]
    return {
        "gap_closed": (losses["scratch"] - losses["student"]) / gap,
        "gap": gap,
        "gap_closed_random_start": (losses["scratch"] - losses["student_random_start"]) / gap,
        **{f"loss_{name}": value for name, value in losses.items()},
    }
