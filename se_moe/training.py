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

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError
from se_moe.clipping import Parts, clip_global_norm, global_norm
from se_moe.communication import (
    GradientBuckets,
    ParallelGroups,
    Transport,
    direct_transport,
    initialized,
    make_groups,
)
from se_moe.config import OptimiserConfig, TrainConfig
from se_moe.data import TextData
from se_moe.homes import STATE_BYTES, DenseOptimiser, ResidentHome, TieredHome, reduce_expert_gradients
from se_moe.model import ModelConfig, MoELanguageModel, initialise
from se_moe.moe import GateConfig
from se_moe.storage import DeviceArena, ExpertKey, read_record
from se_moe.zero import DenseSharding, shard_model


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
