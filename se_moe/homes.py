"""Where the experts of a rank live with their optimizer states: all on the device, or in tiers. The same numbers.

Shapes: of a parameter as the expert's module has it; its moments alike.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from se_moe.cache import SparseCache
from se_moe.communication import ParallelGroups, group_size
from se_moe.config import OptimiserConfig, TrainConfig
from se_moe.model import MoELanguageModel
from se_moe.prefetch import ExpertStore, OffloadedExperts, RoutePredictor
from se_moe.storage import MOMENTS, DeviceArena, ExpertKey, FileTier, HostTier, RecordLayout, Throttle

Gradients = dict[ExpertKey, dict[str, Tensor]]
STATE_BYTES = 16  # of a float32 parameter in training: weight, gradient, two moments


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
                for moment in MOMENTS
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

    def metrics(self) -> dict[str, Any]:
        """Nothing: no tier moved anything."""
        return {}

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

    def metrics(self) -> dict[str, Any]:
        """What the tiers did on this rank."""
        store, files = self.store, self.files
        found: dict[str, Any] = {
            "bytes_read": files.statistics.bytes_read,
            "bytes_written": files.statistics.bytes_written,
            "fetch_seconds": store.statistics.fetch_seconds,
            "wait_seconds": store.statistics.wait_seconds,
            "hidden_fraction": store.statistics.hidden_fraction,
            "predicted": store.statistics.predicted,
            "missed": store.statistics.missed,
            "unused": store.statistics.unused,
            "host_bytes": self.host.peak_bytes,
            "file_bytes": files.live_bytes,
        }
        if self.cache is not None:
            found["cache_hit_rate"] = self.cache.statistics.hit_rate
        return found

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
