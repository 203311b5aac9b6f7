"""The training loop: a plain one, because here the loop is the paper's subject.

A step is: experts on their way (2D prefetch), forward, backward with gradient buckets that leave while it runs,
clipping over all ranks, AdamW on dense parameters and on the records of the experts that had tokens. Every switch of
`config.Switches` changes where tensors live and how they travel, never what is computed: on a CPU the losses with
tiers, prefetch, cache, fusion, overlap and hierarchical AlltoAll are those of the all-resident run bit by bit. A
partitioned embedding and sliced dense parameters add in another order, which changes the last digits.

Everything random is a function of (seed, step, rank), so a run that continues repeats what it would have done.

Shapes: B sequences of a rank, L tokens of one, E experts, M MoE layers.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from common.data.lines import read_lines
from common.errors import UserError
from common.files import write_json
from common.ledger import peak_resident
from se_moe.cache import SparseCache
from se_moe.clipping import Parts, clip_global_norm, global_norm
from se_moe.communication import (
    GradientBuckets,
    ParallelGroups,
    Transport,
    direct_transport,
    group_size,
    initialized,
    make_groups,
)
from se_moe.config import OptimiserConfig, TrainConfig, existing_path
from se_moe.data import TextData
from se_moe.model import ModelConfig, MoELanguageModel, initialise
from se_moe.moe import GateConfig
from se_moe.prefetch import ExpertStore, OffloadedExperts, RoutePredictor
from se_moe.storage import DeviceArena, ExpertKey, FileTier, HostTier, RecordLayout, Throttle
from se_moe.zero import DenseSharding, shard_model

Gradients = dict[ExpertKey, dict[str, Tensor]]
STATE_BYTES = 16  # of a float32 parameter in training: weight, gradient, two moments


def start_process_group(device: torch.device, seconds: float = 600.0) -> None:
    """Join the other ranks, if there are any: RANK and WORLD_SIZE say so, as torchrun sets them.

    `SE_MOE_RENDEZVOUS` names a file through which ranks of one machine meet without a port. Workers that torchrun
    starts again meet under the number of their attempt: its store still holds the addresses of those that died.
    """
    if initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    rank, ranks, timeout = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    meeting = os.environ.get("SE_MOE_RENDEZVOUS")
    if meeting:
        dist.init_process_group(backend, f"file://{meeting}", timeout=timeout, rank=rank, world_size=ranks)
        return
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        ranks,
        is_master=rank == 0 and not hosted,
        timeout=timeout,
        multi_tenant=not hosted,
    )
    attempt = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=attempt, timeout=timeout, rank=rank, world_size=ranks)


def choose_device(name: str) -> torch.device:
    """auto takes the GPU of this process' local rank where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--parallel.device cuda: this machine has no CUDA device; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def barrier() -> None:
    if initialized():
        dist.barrier()


def make_run_groups(config: TrainConfig) -> ParallelGroups:
    """Expert and data parallelism of a run; two-phase AlltoAll where the switch says so."""
    if not initialized():
        return make_groups()
    expert_size = config.parallel.expert_ranks or dist.get_world_size()
    per_node = None
    if config.switches.hierarchical and expert_size > 1:
        per_node = config.parallel.per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if per_node >= expert_size:
            per_node = 1
    return make_groups(expert_size, per_node)


def model_config(config: TrainConfig, vocabulary: int) -> ModelConfig:
    """The network of a run."""
    options = config.model
    gate = GateConfig(
        top_k=options.top_k,
        capacity_factor=options.capacity_factor,
        eval_capacity_factor=options.capacity_factor,
        drop_tokens=options.drop_tokens,
        noise=options.noise,
    )
    return ModelConfig(
        vocabulary=vocabulary,
        sequence=config.data.sequence,
        hidden=options.hidden,
        layers=options.layers,
        heads=options.heads,
        dense_hidden=options.dense_hidden,
        experts=options.experts,
        expert_hidden=options.expert_hidden,
        moe_every=options.moe_every,
        gate=gate,
        residual=options.residual,
        aux_weight=options.aux_weight,
        z_weight=options.z_weight,
    )


def learning_rate(options: OptimiserConfig, step: int, steps: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up, then half a cosine down to `final_lr`."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, steps - options.warmup)
    return options.final_lr + (options.lr - options.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@torch.no_grad()
def adamw_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    step: int,
    lr: float,
    options: OptimiserConfig,
) -> None:
    """One step of torch's fused AdamW in place; `step` counts from 1. A tensor's result does not depend on the list."""
    counters = [torch.tensor(float(step - 1), device=p.device) for p in parameters]
    adamw(
        parameters,
        gradients,
        exp_avg,
        exp_avg_sq,
        [],
        counters,
        fused=True,
        amsgrad=False,
        beta1=options.betas[0],
        beta2=options.betas[1],
        lr=lr,
        weight_decay=options.weight_decay,
        eps=options.eps,
        maximize=False,
    )


class DenseOptimiser:
    """AdamW on parameters that are always there; those without a gradient are left alone."""

    def __init__(self, parameters: list[nn.Parameter], options: OptimiserConfig) -> None:
        self.parameters, self.options, self.step_count = parameters, options, 0
        self.exp_avg = [torch.zeros_like(p) for p in parameters]
        self.exp_avg_sq = [torch.zeros_like(p) for p in parameters]

    def step(self, lr: float) -> None:
        self.step_count += 1
        chosen = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        adamw_step(
            [self.parameters[i] for i in chosen],
            [cast(Tensor, self.parameters[i].grad) for i in chosen],
            [self.exp_avg[i] for i in chosen],
            [self.exp_avg_sq[i] for i in chosen],
            self.step_count,
            lr,
            self.options,
        )


class ExpertHome(Protocol):
    """Where the experts of a rank live, with their optimizer state. Gradients come only from experts with tokens."""

    layout: RecordLayout

    def keys(self) -> list[ExpertKey]: ...

    def begin_pass(self) -> None: ...

    def gradients(self) -> Gradients: ...

    def step(self, lr: float) -> None: ...

    def record(self, key: ExpertKey) -> dict[str, Tensor]: ...

    def close(self) -> None: ...


class ResidentHome:
    """Every expert on the device all the time: parameters, gradients and moments."""

    def __init__(self, model: MoELanguageModel, options: OptimiserConfig, arena: DeviceArena) -> None:
        self.options = options
        self.parameters: dict[ExpertKey, dict[str, nn.Parameter]] = {}
        for index, layer in enumerate(model.moe_layers()):
            first = layer.groups.expert_rank * layer.num_local
            for local, expert in enumerate(layer.local_experts):
                self.parameters[ExpertKey(index, first + local)] = dict(expert.named_parameters())
        self.layout = RecordLayout.of_expert(next(iter(self.parameters.values())))
        self._charge = arena.charge(
            len(self.parameters) * STATE_BYTES // 4 * self.layout.parameter_bytes, "resident experts"
        )
        self.state: dict[ExpertKey, dict[str, Tensor]] = {}
        self.steps = dict.fromkeys(self.parameters, 0)
        for key, named in self.parameters.items():
            self.state[key] = {
                f"{moment}.{name}": torch.zeros_like(p, requires_grad=False)
                for moment in ("exp_avg", "exp_avg_sq")
                for name, p in named.items()
            }

    def keys(self) -> list[ExpertKey]:
        return sorted(self.parameters)

    def begin_pass(self) -> None:
        """Nothing to do."""

    def gradients(self) -> Gradients:
        found: Gradients = {}
        for key in self.keys():
            named = {name: p.grad for name, p in self.parameters[key].items() if p.grad is not None}
            if named:
                found[key] = named
        return found

    def step(self, lr: float) -> None:
        for key, named in self.gradients().items():
            self.steps[key] += 1
            state, parameters = self.state[key], self.parameters[key]
            adamw_step(
                [parameters[name] for name in named],
                list(named.values()),
                [state[f"exp_avg.{name}"] for name in named],
                [state[f"exp_avg_sq.{name}"] for name in named],
                self.steps[key],
                lr,
                self.options,
            )
        for parameters in self.parameters.values():
            for p in parameters.values():
                p.grad = None

    def record(self, key: ExpertKey) -> dict[str, Tensor]:
        """A copy of an expert's record, on the host."""
        fields = {"step": torch.tensor([self.steps[key]])}
        fields |= {name: p.detach().cpu().clone() for name, p in self.parameters[key].items()}
        return fields | {name: t.cpu().clone() for name, t in self.state[key].items()}

    @torch.no_grad()
    def load(self, key: ExpertKey, fields: Mapping[str, Tensor]) -> None:
        """Take over a record."""
        self.steps[key] = int(fields["step"])
        for name, p in self.parameters[key].items():
            p.copy_(fields[name])
        for name, t in self.state[key].items():
            t.copy_(fields[name])

    def close(self) -> None:
        self._charge.free()


class TieredHome:
    """Experts in files with host memory as a cache, on the device only while they are used (section 3.2).

    Args:
        records: files of a checkpoint, by expert; None: the model's present values, moments zero.
    """

    def __init__(
        self,
        model: MoELanguageModel,
        config: TrainConfig,
        arena: DeviceArena,
        folder: Path,
        records: Mapping[ExpertKey, Path] | None = None,
    ) -> None:
        storage, switches = config.storage, config.switches
        self.options = config.optimiser
        layers = model.moe_layers()
        self.layout = RecordLayout.of_expert(dict(layers[0].local_experts[0].named_parameters()))
        count = sum(layer.num_local for layer in layers)
        shutil.rmtree(folder, ignore_errors=True)  # experts come from the checkpoint, never from an earlier process
        folder.mkdir(parents=True)
        throttle = None
        if storage.read_mb_s > 0:
            throttle = Throttle(storage.read_mb_s * 1e6, storage.latency_ms / 1e3)
        self.files = FileTier(folder, self.layout, throttle)
        if records is not None:
            for key, source in records.items():
                link_or_copy(source, self.files.path(key, 1))
            self.files = FileTier(folder, self.layout, throttle, versions=dict.fromkeys(records, 1))
        capacity = max(1, round(storage.cached_share * count)) if switches.cache else 0
        self.cache = None
        if switches.cache:
            period = storage.period
            self.cache = SparseCache[ExpertKey](capacity, storage.rule, storage.threshold, storage.beta, period)
        pinned = arena.device.type == "cuda"
        slots = capacity + ExpertStore.STAGING
        self.host = HostTier(slots * self.layout.slot_bytes, self.layout, pinned)
        self.store = ExpertStore(self.files, self.host, arena, self.cache, background=switches.prefetch)
        predictor = None
        if switches.prefetch:
            predictor = RoutePredictor(range(layers[0].num_local), storage.predict)
        self.offloaded = OffloadedExperts(self.store, layers, predictor, create=records is None)

    def keys(self) -> list[ExpertKey]:
        return self.offloaded.keys()

    def begin_pass(self) -> None:
        self.offloaded.begin_pass()

    def gradients(self) -> Gradients:
        return self.offloaded.gradients

    def step(self, lr: float) -> None:
        def change(fields: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
            fields["step"] += 1
            adamw_step(
                [fields[name] for name in gradients],
                list(gradients.values()),
                [fields[f"exp_avg.{name}"] for name in gradients],
                [fields[f"exp_avg_sq.{name}"] for name in gradients],
                int(fields["step"]),
                lr,
                self.options,
            )

        self.offloaded.update(change)
        self.offloaded.begin_pass()  # of the next step: the drive need not wait for the rest of this one

    def record(self, key: ExpertKey) -> dict[str, Tensor]:
        return self.store.read_record(key)

    def close(self) -> None:
        self.store.close()


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file that nobody writes to again; a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, part)
        os.replace(part, target)


@torch.no_grad()
def reduce_expert_gradients(home: ExpertHome, groups: ParallelGroups, fusion: bool) -> None:
    """Sum expert gradients over the ranks with copies of the same experts and divide by all ranks.

    An expert's gradient already sums the tokens of every rank that sent it some, so the divisor is that of the dense
    gradients: the number of all ranks, once. An expert without tokens in one copy only counts as zero there.
    """
    gradients, copies = home.gradients(), groups.expert_data
    if group_size(copies) > 1:
        keys, names = home.keys(), home.layout.parameter_names
        touched = torch.tensor([float(key in gradients) for key in keys])
        dist.all_reduce(touched, group=copies)
        chosen = [key for key, flag in zip(keys, touched.tolist()) if flag]
        parts: list[Tensor] = []
        for key in chosen:
            held = gradients.get(key, {})
            for name in names:
                dtype, shape = home.layout.fields[name]
                parts.append(held[name] if name in held else torch.zeros(shape, dtype=dtype))
        if fusion and parts:
            flat = torch.cat([part.reshape(-1) for part in parts])
            dist.all_reduce(flat, group=copies)
            sizes = [part.numel() for part in parts]
            parts = [piece.view(part.shape) for piece, part in zip(flat.split(sizes), parts)]
        else:
            for part in parts:
                dist.all_reduce(part, group=copies)
        summed = iter(parts)
        for key in chosen:
            _put_gradients(home, key, {name: next(summed) for name in names})
        gradients = home.gradients()
    if groups.world_size > 1:
        every = [tensor for named in gradients.values() for tensor in named.values()]
        if every:
            torch._foreach_div_(every, groups.world_size)


def _put_gradients(home: ExpertHome, key: ExpertKey, named: dict[str, Tensor]) -> None:
    if isinstance(home, ResidentHome):
        for name, p in home.parameters[key].items():
            p.grad = named[name]
    else:
        home.gradients()[key] = named


@dataclass
class StepLog:
    """One step: losses are means over the ranks, seconds and CPU seconds those of this rank.

    `alpha` is the share of the experts (mean over layers) that had tokens of this rank.
    """

    step: int
    loss: float
    lm_loss: float
    aux_loss: float
    grad_norm: float
    lr: float
    seconds: float
    cpu_seconds: float
    alpha: float


@dataclass
class Trainer:
    """A model with its optimizer states in their tiers, and the step.

    Args:
        config: of the run. data: the text. groups: of the processes; made from the config by default.
        device: where the "device" tier lies. tier_folder: for the files of the experts, one below it per rank.
        records: expert files of a checkpoint to start from (see `checkpoint.load`).
        transport: how AlltoAll rows travel (tests use slower links).
    """

    config: TrainConfig
    data: TextData
    device: torch.device
    tier_folder: Path
    groups: ParallelGroups = field(default_factory=ParallelGroups)
    records: Mapping[ExpertKey, Path] | None = None
    transport: Transport = direct_transport

    def __post_init__(self) -> None:
        config, switches, groups = self.config, self.config.switches, self.groups
        if config.batch % groups.world_size:
            raise UserError(f"--batch is {config.batch}: it must be a multiple of the {groups.world_size} ranks")
        self.model = MoELanguageModel(
            model_config(config, self.data.vocabulary),
            groups,
            partition="columns" if switches.partition and groups.world_size > 1 else None,
            transport=self.transport,
        )
        initialise(self.model, config.seed)
        self.model.to(self.device)
        self.done = 0
        dense, split = self.model.dense_parameters(), self.model.partitioned_parameters()
        sparse = self.model.expert_parameters()
        self.dense_count = sum(p.numel() for p in dense)
        self.split_count = sum(p.numel() for p in split)
        self.sparse_count = sum(p.numel() for p in sparse)
        self.arena = DeviceArena(self.device_budget(), self.device)
        self.sharding: DenseSharding | None = None
        self.buckets: GradientBuckets | None = None
        if switches.shard_dense and groups.world_size > 1:
            self.sharding = shard_model(
                self.model, groups.world, groups.world_size, prefetch=switches.prefetch, fused=switches.fusion
            )
            dense = self.sharding.shards()
        elif groups.world_size > 1:
            bucket_bytes = int(config.parallel.bucket_mb * 2**20) if switches.fusion else 0
            self.buckets = GradientBuckets(dense, groups.world, groups.world_size, bucket_bytes, switches.overlap)
        self.dense, self.split = dense, split
        self.arena.charge(sum(p.numel() for p in (*dense, *split)) * STATE_BYTES, "dense parameters with their states")
        self.optimiser = DenseOptimiser([*dense, *split], config.optimiser)
        self.home: ResidentHome | TieredHome
        if switches.tiers:
            rank = groups.rank
            self.home = TieredHome(self.model, config, self.arena, self.tier_folder / f"rank{rank:04d}", self.records)
        else:
            self.home = ResidentHome(self.model, config.optimiser, self.arena)
            for key, path in (self.records or {}).items():
                from se_moe.checkpoint import read_record

                self.home.load(key, read_record(path))

    def resident_bytes(self) -> int:
        """Bytes of parameters, gradients and moments of this rank with every expert on the device."""
        return STATE_BYTES * (self.dense_count + self.split_count + self.sparse_count)

    def device_budget(self) -> int:
        """The device budget of this rank in bytes."""
        if not self.config.switches.tiers:
            return 2 * self.resident_bytes()
        if self.config.storage.device_mb > 0:
            return int(self.config.storage.device_mb * 1e6)
        # Half of the resident experts, but always room for a layer's experts, their gradients and the next layer's.
        sparse, layers = STATE_BYTES * self.sparse_count, len(self.model.moe_layers())
        return STATE_BYTES * (self.dense_count + self.split_count) + max(sparse // 2, int(0.8 * sparse / layers))

    def step(self, ids_BL: Tensor | None = None, targets_BL: Tensor | None = None) -> StepLog:
        """One optimizer step, on the run's own batch by default."""
        config, number = self.config, self.done
        wall, cpu = time.perf_counter(), time.process_time()
        if ids_BL is None or targets_BL is None:
            ids_BL, targets_BL = self.batch(number)
        torch.manual_seed(((config.seed * 1_000_003 + number) * 4099 + self.groups.rank) % 2**63)
        self.model.train()
        self.home.begin_pass()
        found = self.model(ids_BL, targets_BL)
        found.loss.backward()
        norm = self._reduce()
        lr = learning_rate(config.optimiser, number, config.steps)
        self.home.step(lr)
        self.optimiser.step(lr)
        self._forget_gradients()
        losses = torch.stack([found.loss.detach(), found.lm_loss.detach(), found.aux_loss.detach()]).float()
        if self.groups.world_size > 1:
            dist.all_reduce(losses, group=self.groups.world)
            losses /= self.groups.world_size
        loss, lm_loss, aux_loss = losses.tolist()
        self.done += 1
        alpha = float((found.requested_ME > 0).float().mean()) if found.requested_ME.numel() else 0.0
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        return StepLog(number, loss, lm_loss, aux_loss, norm, lr, seconds, cpu_seconds, alpha)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's part of a step's batch, on the device."""
        ids_BL, targets_BL = self.data.batch(
            self.config.seed, step, self.config.batch, self.groups.rank, self.groups.world_size
        )
        return ids_BL.to(self.device), targets_BL.to(self.device)

    def _reduce(self) -> float:
        """All gradients summed over their ranks, divided and clipped; returns the norm before clipping."""
        groups = self.groups
        if self.buckets is not None:
            self.buckets.finish()
        if self.sharding is not None:
            self.sharding.finish()
        for p in self.split:
            if p.grad is not None:
                p.grad /= groups.world_size
        reduce_expert_gradients(self.home, groups, self.config.switches.fusion)
        replicated = [] if self.sharding is not None else self.dense
        parts = [Parts(self.split, groups.world)] if self.split else []
        if self.sharding is not None:
            parts.append(Parts(self.dense, groups.world))
        gradients = self.home.gradients()
        held = [SimpleNamespace(grad=t) for key in sorted(gradients) for t in gradients[key].values()]
        parts.append(Parts(cast("list[nn.Parameter]", held), groups.expert))
        if self.config.optimiser.clip > 0:
            return float(clip_global_norm(replicated, parts, self.config.optimiser.clip))
        return float(global_norm(replicated, parts))

    def _forget_gradients(self) -> None:
        if self.buckets is not None:
            self.buckets.zero()
        for p in (*self.dense, *self.split):
            p.grad = None

    @torch.no_grad()
    def evaluate(self, sequences: int) -> float:
        """Mean cross-entropy a token on held-out sequences of all tasks, over all ranks."""
        self.model.eval()
        ids_NL, targets_NL = self.data.held_out(sequences, self.groups.rank, self.groups.world_size)
        total = torch.zeros(2)
        rows = max(1, self.config.batch // self.groups.world_size)
        for first in range(0, len(ids_NL), rows):
            self.home.begin_pass()
            ids_BL, targets_BL = ids_NL[first : first + rows], targets_NL[first : first + rows]
            found = self.model(ids_BL.to(self.device), targets_BL.to(self.device))
            total += torch.tensor([float(found.lm_loss) * targets_BL.numel(), targets_BL.numel()])
        if isinstance(self.home, TieredHome):
            self.home.store.drop_prefetched()
        if self.groups.world_size > 1:
            dist.all_reduce(total, group=self.groups.world)
        return float(total[0] / total[1])

    def close(self) -> None:
        self.home.close()
        if self.buckets is not None:
            self.buckets.remove()


def text_data(config: TrainConfig) -> TextData:
    """The run's text; the first process makes the cached files, the others wait for them."""
    data = config.data
    names = [str(existing_path(n)) if existing_path(n).exists() else n for n in data.tasks]
    if initialized() and dist.get_rank() != 0:
        barrier()
    found = TextData(names, data.shares, data.vocabulary, data.sequence)
    if initialized() and dist.get_rank() == 0:
        barrier()
    return found


@contextlib.contextmanager
def log_file(path: Path, first_step: int, write: bool) -> Iterator[Any]:
    """Append to a log of JSON lines, of which steps from `first_step` on (made before an interruption) are dropped."""
    if not write:
        yield lambda entry: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").split("\n"):
            with contextlib.suppress(ValueError):  # the last line of a killed process may be cut off
                if json.loads(line)["step"] < first_step:
                    kept.append(line)
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(part, path)
    with path.open("a", encoding="utf-8") as file:

        def add(entry: Mapping[str, Any]) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        yield add


def run_arm(config: TrainConfig, arm: str = "ours") -> dict[str, Any]:
    """Train one arm of the table to its end (or from its last checkpoint on); returns its metrics.

    Raises:
        UserError: bad options, or a checkpoint in run_dir that belongs to other ones.
    """
    from se_moe import checkpoint
    from se_moe.measuring import peak_tensor_bytes

    torch.set_num_threads(config.threads)
    device = choose_device(config.parallel.device)
    start_process_group(device)
    groups = make_run_groups(config)
    data = text_data(config)
    folder = Path(config.run_dir) / arm
    metrics_file = folder / "metrics.json"
    tiers = existing_path(config.storage.folder) if config.storage.folder else folder
    found = checkpoint.newest(folder / "checkpoints")
    if found is not None and config.resume == "never":
        raise UserError(f"{folder} holds an earlier run; choose another --run_dir or --resume auto")
    trainer = checkpoint.open_trainer(config, data, device, groups, tiers / "tiers", found)
    barrier()
    if metrics_file.is_file() and trainer.done >= config.steps:
        trainer.close()
        return json.loads(metrics_file.read_text(encoding="utf-8"))
    main, tokens = groups.rank == 0, config.batch * config.data.sequence
    peak = 0
    with log_file(folder / "log.jsonl", trainer.done, main) as write:
        while trainer.done < config.steps:
            log: list[StepLog] = []
            if peak == 0 and trainer.done % config.checkpoint_every == 2:
                if isinstance(trainer.home, TieredHome):
                    # Gradients that wait for their update are gone before this step's exist, but on another thread,
                    # whose memory is not seen.
                    trainer.home.store.flush()
                exclude = host_pointers(trainer)
                peak = peak_tensor_bytes(lambda: log.append(trainer.step()), device, exclude)  # noqa: B023
                write(asdict(log[0]) | {"profiled": True})
            else:
                log.append(trainer.step())
                write(asdict(log[0]))
            entry = log[0]
            if main and (entry.step % config.log_every == 0 or trainer.done == config.steps):
                print(
                    f"[{arm}] step {entry.step:5d}  loss {entry.loss:.4f}  lm {entry.lm_loss:.4f}  "
                    f"{tokens / entry.seconds:,.0f} tokens/s  {entry.cpu_seconds:.2f} CPU-s",
                    file=sys.stderr,
                    flush=True,
                )
            if trainer.done % config.checkpoint_every == 0 or trainer.done == config.steps:
                checkpoint.save(trainer, folder / "checkpoints", config.keep)
    held_out = trainer.evaluate(config.eval_sequences)
    metrics = summary(folder / "log.jsonl", tokens, groups.world_size) if main else {}
    metrics |= {
        "arm": arm,
        "held_out_loss": held_out,
        "peak_bytes": highest(peak, groups),
        "peak_resident_bytes": highest(peak_resident(), groups),
        "device_budget_bytes": trainer.arena.budget_bytes,
        "device_peak_bytes": highest(trainer.arena.peak_bytes, groups),
        "parameters": trainer.dense_count + trainer.split_count * groups.world_size,
        "expert_parameters": trainer.sparse_count * groups.expert_size,
        "ranks": groups.world_size,
        **tier_metrics(trainer),
    }
    trainer.close()
    if main:
        checkpoint.export_model(
            folder / "checkpoints",
            Path(config.run_dir) / "model" if arm == "ours" else folder / "model",
            data.tokenizer.to_str(),
        )
        write_json(metrics_file, metrics)
    barrier()
    return metrics


def host_pointers(trainer: Trainer) -> list[int]:
    """Storages of the expert cache: host memory, which on a CPU only looks like device memory."""
    if isinstance(trainer.home, ResidentHome):
        return []
    buffers = trainer.home.store.host_buffers() + [slot.buffer for slot in trainer.home.host._free]
    return [buffer.untyped_storage().data_ptr() for buffer in buffers]


def tier_metrics(trainer: Trainer) -> dict[str, Any]:
    """What the tiers did on this rank."""
    if isinstance(trainer.home, ResidentHome):
        return {}
    store, files = trainer.home.store, trainer.home.files
    found: dict[str, Any] = {
        "bytes_read": files.statistics.bytes_read,
        "bytes_written": files.statistics.bytes_written,
        "fetch_seconds": store.statistics.fetch_seconds,
        "wait_seconds": store.statistics.wait_seconds,
        "hidden_fraction": store.statistics.hidden_fraction,
        "predicted": store.statistics.predicted,
        "missed": store.statistics.missed,
        "unused": store.statistics.unused,
        "host_bytes": trainer.home.host.peak_bytes,
        "file_bytes": files.live_bytes,
    }
    if trainer.home.cache is not None:
        found["cache_hit_rate"] = trainer.home.cache.statistics.hit_rate
    return found


def highest(value: int, groups: ParallelGroups) -> int:
    """The largest `value` of all ranks; a collective call."""
    if groups.world_size == 1:
        return value
    found = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=groups.world)
    return int(found)


def summary(log: Path, tokens: int, ranks: int) -> dict[str, Any]:
    """Speed and loss from a log: medians of the steps after the first ten, mean loss of the last tenth."""
    entries = [json.loads(line) for _, line in read_lines(log)]
    timed = [e for e in entries[10:] if "profiled" not in e] or entries
    seconds = sorted(e["seconds"] for e in timed)[len(timed) // 2]
    cpu = sorted(e["cpu_seconds"] for e in timed)[len(timed) // 2]
    last = entries[-max(1, len(entries) // 10) :]
    return {
        "steps": len(entries),
        "tokens_per_second": tokens / seconds,
        "cpu_seconds_per_1000_tokens": 1000 * cpu * ranks / tokens,
        "loss": sum(e["lm_loss"] for e in last) / len(last),
        "first_loss": entries[0]["lm_loss"],
        "alpha": sum(e["alpha"] for e in entries) / len(entries),
        "losses": [e["loss"] for e in entries],
    }
