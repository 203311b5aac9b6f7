"""The step: a plain one, because here it is the paper's subject.

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
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError
from common.ledger import peak_resident
from common.weights import read_weights
from se_moe.clipping import Parts, clip_global_norm, global_norm
from se_moe.communication import GradientBuckets, ParallelGroups, Transport, direct_transport
from se_moe.config import OptimiserConfig, TrainConfig
from se_moe.data import TextData
from se_moe.homes import STATE_BYTES, DenseOptimiser, ResidentHome, TieredHome, reduce_expert_gradients
from se_moe.model import LossOutput, MoELanguageModel, initialise
from se_moe.storage import DeviceArena, ExpertKey
from se_moe.zero import DenseSharding, shard_model


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


class ArmTrainer(ABC):
    """What all arms of the table share around their own step: batches, seeds, mean losses, held-out loss, times.

    Args:
        config: of the run. data: the text. groups: of the processes. device: where the model lies.
    """

    def __init__(self, config: TrainConfig, data: TextData, device: torch.device, groups: ParallelGroups) -> None:
        if config.batch % groups.world_size:
            raise UserError(f"--batch is {config.batch}: it must be a multiple of the {groups.world_size} ranks")
        self.config, self.data, self.device, self.groups = config, data, device, groups
        self.done = 0

    @abstractmethod
    def update(self, ids_BL: Tensor, targets_BL: Tensor, lr: float) -> tuple[LossOutput, float]:
        """Forward, backward, optimizer; the losses of this rank and the norm of the gradient before clipping."""

    @abstractmethod
    def losses(self, ids_BL: Tensor, targets_BL: Tensor) -> LossOutput:
        """Of this rank, in evaluation."""

    def step(self, ids_BL: Tensor | None = None, targets_BL: Tensor | None = None) -> StepLog:
        """One optimizer step, on the run's own batch by default."""
        number, groups = self.done, self.groups
        wall, cpu = time.perf_counter(), time.process_time()
        if ids_BL is None or targets_BL is None:
            ids_BL, targets_BL = self.batch(number)
        torch.manual_seed(((self.config.seed * 1_000_003 + number) * 4099 + groups.rank) % 2**63)
        lr = learning_rate(self.config.optimiser, number, self.config.steps)
        found, norm = self.update(ids_BL, targets_BL, lr)
        losses = torch.stack([found.loss.detach(), found.lm_loss.detach(), found.aux_loss.detach()]).float()
        if groups.world_size > 1:
            dist.all_reduce(losses, group=groups.world)
            losses /= groups.world_size
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

    @torch.no_grad()
    def evaluate(self, sequences: int) -> float:
        """Mean cross-entropy a token on held-out sequences of all tasks, over all ranks."""
        ids_NL, targets_NL = self.data.held_out(sequences, self.groups.rank, self.groups.world_size)
        total = torch.zeros(2)
        rows = max(1, self.config.batch // self.groups.world_size)
        for first in range(0, len(ids_NL), rows):
            ids_BL, targets_BL = ids_NL[first : first + rows], targets_NL[first : first + rows]
            found = self.losses(ids_BL.to(self.device), targets_BL.to(self.device))
            total += torch.tensor([float(found.lm_loss) * targets_BL.numel(), targets_BL.numel()])
        if self.groups.world_size > 1:
            dist.all_reduce(total, group=self.groups.world)
        return float(total[0] / total[1])

    def host_pointers(self) -> list[int]:
        """Storages that are host memory, which on a CPU only looks like device memory."""
        return []

    def highest(self, value: int) -> int:
        """The largest `value` of all ranks; a collective call."""
        if self.groups.world_size == 1:
            return value
        found = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.groups.world)
        return int(found)

    def metrics(self) -> dict[str, Any]:
        """What the arm held and moved; a collective call."""
        return {"peak_resident_bytes": self.highest(peak_resident()), "ranks": self.groups.world_size}

    def close(self) -> None:  # noqa: B027 (some arms hold nothing)
        """Let go of files and threads."""


class Trainer(ArmTrainer):
    """A model with its optimizer states in their tiers, and the step.

    Args:
        config, data, device, groups: see `ArmTrainer`; "device" is the first tier.
        tier_folder: for the files of the experts, one below it per rank.
        records: expert files of a checkpoint to start from (see `checkpoint.open_trainer`).
        transport: how AlltoAll rows travel (tests use slower links).
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TextData,
        device: torch.device,
        tier_folder: Path,
        groups: ParallelGroups | None = None,
        records: Mapping[ExpertKey, Path] | None = None,
        transport: Transport = direct_transport,
    ) -> None:
        groups, switches = groups or ParallelGroups(), config.switches
        super().__init__(config, data, device, groups)
        self.model = MoELanguageModel(
            config.network(data.vocabulary),
            groups,
            partition="columns" if switches.partition and groups.world_size > 1 else None,
            transport=transport,
        )
        initialise(self.model, config.seed)
        self.model.to(device)
        dense, split = self.model.dense_parameters(), self.model.partitioned_parameters()
        sparse = self.model.expert_parameters()
        self.dense_count = sum(p.numel() for p in dense)
        self.split_count = sum(p.numel() for p in split)
        self.sparse_count = sum(p.numel() for p in sparse)
        self.arena = DeviceArena(self.device_budget(), device)
        self.checksums: dict[tuple[int, int, int], str] = {}  # of versions of experts that a checkpoint holds
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
            self.home = TieredHome(self.model, config, self.arena, tier_folder / f"rank{groups.rank:04d}", records)
        else:
            self.home = ResidentHome(self.model, config.optimiser, self.arena)
            for key, path in (records or {}).items():
                self.home.load(key, read_weights(path)[0])

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

    def update(self, ids_BL: Tensor, targets_BL: Tensor, lr: float) -> tuple[LossOutput, float]:
        self.model.train()
        self.home.begin_pass()
        found = self.model(ids_BL, targets_BL)
        found.loss.backward()
        norm = self._reduce()
        self.home.step(lr)
        self.optimiser.step(lr)
        self._forget_gradients()
        return found, norm

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
        # By name: homes keep their tensors in different orders, and the norm's squares add up in this one.
        held = [
            SimpleNamespace(grad=gradients[key][name]) for key in sorted(gradients) for name in sorted(gradients[key])
        ]
        parts.append(Parts(cast("list[nn.Parameter]", held), groups.expert))
        if self.config.optimiser.clip > 0:
            return float(clip_global_norm(replicated, parts, self.config.optimiser.clip))
        return float(global_norm(replicated, parts))

    def _forget_gradients(self) -> None:
        if self.buckets is not None:
            self.buckets.zero()
        for p in (*self.dense, *self.split):
            p.grad = None

    def losses(self, ids_BL: Tensor, targets_BL: Tensor) -> LossOutput:
        self.model.eval()
        self.home.begin_pass()
        return self.model(ids_BL, targets_BL)

    @torch.no_grad()
    def evaluate(self, sequences: int) -> float:
        found = super().evaluate(sequences)
        if isinstance(self.home, TieredHome):
            self.home.store.drop_prefetched()
        return found

    def host_pointers(self) -> list[int]:
        if isinstance(self.home, ResidentHome):
            return []
        # Gradients that wait for their update are gone before the next step's exist, but on another thread, whose
        # memory is not seen.
        self.home.store.flush()
        buffers = self.home.store.host_buffers() + [slot.buffer for slot in self.home.host._free]
        return [buffer.untyped_storage().data_ptr() for buffer in buffers]

    def metrics(self) -> dict[str, Any]:
        groups = self.groups
        return {
            **super().metrics(),
            "device_budget_bytes": self.arena.budget_bytes,
            "device_peak_bytes": self.highest(self.arena.peak_bytes),
            "parameters": self.dense_count + self.split_count * groups.world_size,
            "expert_parameters": self.sparse_count * groups.expert_size,
            **self.home.metrics(),
        }

    def close(self) -> None:
        self.home.close()
        if self.buckets is not None:
            self.buckets.remove()
