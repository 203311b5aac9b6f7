"""The same language model trained by DeepSpeed 0.19.8 (its MoE layer, ZeRO 0 or 2): the arm to compare with.

DeepSpeed is optional and no other module imports it. It starts from the same weights, sees the same batches and steps
the same AdamW; attention, embedding and loss are this project's modules in both arms, so the arms differ in what
DeepSpeed is: gate, dispatch, experts, gradient reduction and optimizer sharding.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError
from common.files import write_json
from common.ledger import peak_resident
from se_moe.arm import highest, log_file, summary, text_data
from se_moe.communication import barrier
from se_moe.config import TrainConfig
from se_moe.measuring import peak_tensor_bytes
from se_moe.model import MoELanguageModel, initialise
from se_moe.moe import Expert, MoELayer, MoEOutput
from se_moe.training import (
    StepLog,
    choose_device,
    learning_rate,
    make_run_groups,
    model_config,
    start_process_group,
)

VERSION = "0.19.8"
INSTALL = f"DeepSpeed is not installed; `make setup EXTRAS=dev,gpu`, or `pip install deepspeed=={VERSION}`"


def available() -> bool:
    """Whether DeepSpeed can be imported."""
    return importlib.util.find_spec("deepspeed") is not None


def _import_deepspeed(device: torch.device) -> Any:
    if not available():
        raise UserError(INSTALL)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", os.environ.get("RANK", "0"))
    import deepspeed

    # Without this the first start compiles a shared-memory library: half a minute, and a compiler must be there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class DeepSpeedMoE(nn.Module):
    """DeepSpeed's MoE layer with the weights of one of ours, answering as ours does."""

    def __init__(self, ours: MoELayer, ep_size: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        config = ours.gate.config
        hidden = ours.gate.wg.in_features
        self.layer = MoE(
            hidden,
            Expert(hidden, ours.expert_hidden),
            ours.num_experts,
            ep_size,
            config.top_k,
            config.capacity_factor,
            config.eval_capacity_factor,
            config.min_capacity,
            noisy_gate_policy={"none": None, "jitter": "Jitter", "rsample": "RSample"}[config.noise],
            drop_tokens=config.drop_tokens,
            use_rts=config.use_rts,
            top2_2nd_expert_sampling=config.second_sampling,
        )
        self.layer.deepspeed_moe.gate.wg.weight.data.copy_(ours.gate.wg.weight)
        experts = self.layer.deepspeed_moe.experts.deepspeed_experts
        for theirs, own in zip(experts, ours.local_experts):
            theirs.load_state_dict(own.state_dict())

    def forward(self, x_BLD: Tensor) -> MoEOutput:
        y_BLD, aux_loss, counts_E = self.layer(x_BLD)
        return MoEOutput(y_BLD, aux_loss, aux_loss.new_zeros(()), torch.as_tensor(counts_E).cpu())


def build_model(config: TrainConfig, vocabulary: int, ranks: int) -> MoELanguageModel:
    """The run's model with its mixtures replaced by DeepSpeed's; collective."""
    if config.model.residual:
        raise UserError("--model.residual true: the DeepSpeed arm compares plain mixtures; leave it out of --arms")
    model = MoELanguageModel(model_config(config, vocabulary), make_run_groups(config))
    initialise(model, config.seed)
    size = config.parallel.expert_ranks or ranks
    for block in model.blocks:
        if isinstance(block.moe, MoELayer):
            block.moe = DeepSpeedMoE(block.moe, size)  # type: ignore[assignment]
    return model


def engine_config(config: TrainConfig, ranks: int) -> dict[str, Any]:
    """DeepSpeed's options: torch's AdamW (nothing is compiled), ZeRO as asked for, clipping by the global norm."""
    options = config.optimiser
    # DeepSpeed's default bucket of 500 million elements would be 2 GB of memory: it gets ours.
    bucket = max(1, int(config.parallel.bucket_mb * 2**20) // 4)
    return {
        "train_batch_size": config.batch,
        "train_micro_batch_size_per_gpu": config.batch // ranks,
        "gradient_clipping": options.clip,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "optimizer": {
            "type": "Adam",
            "params": {
                "torch_adam": True,
                "adam_w_mode": True,
                "lr": options.lr,
                "betas": list(options.betas),
                "eps": options.eps,
                "weight_decay": options.weight_decay,
            },
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class DeepSpeedTrainer:
    """An engine and the step that `training.Trainer` makes."""

    def __init__(self, config: TrainConfig, data: Any, device: torch.device, vocabulary: int) -> None:
        deepspeed = _import_deepspeed(device)
        if not dist.is_initialized():
            # DeepSpeed wants a process group even for one process.
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        self.config, self.data, self.device, self.done = config, data, device, 0
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        model = build_model(config, vocabulary, self.ranks).to(device)
        self.parameter_count = sum(p.numel() for p in model.parameters())
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "all", "lr": config.optimiser.lr}
        )
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=groups, config=engine_config(config, self.ranks)
        )

    def step(self) -> StepLog:
        """One optimizer step on the run's own batch."""
        config, number = self.config, self.done
        wall, cpu = time.perf_counter(), time.process_time()
        ids_BL, targets_BL = self.data.batch(config.seed, number, config.batch, self.rank, self.ranks)
        torch.manual_seed(((config.seed * 1_000_003 + number) * 4099 + self.rank) % 2**63)
        self.engine.train()
        lr = learning_rate(config.optimiser, number, config.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        found = self.engine(ids_BL.to(self.device), targets_BL.to(self.device))
        self.engine.backward(found.loss)
        self.engine.step()
        losses = torch.stack([found.loss.detach(), found.lm_loss.detach(), found.aux_loss.detach()]).float()
        dist.all_reduce(losses)
        loss, lm_loss, aux_loss = (losses / self.ranks).tolist()
        norm = self.engine.get_global_grad_norm()
        self.done += 1
        alpha = float((found.requested_ME > 0).float().mean())
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        return StepLog(number, loss, lm_loss, aux_loss, float(norm or 0.0), lr, seconds, cpu_seconds, alpha)

    @torch.no_grad()
    def evaluate(self, sequences: int) -> float:
        """As `training.Trainer.evaluate`."""
        self.engine.eval()
        ids_NL, targets_NL = self.data.held_out(sequences, self.rank, self.ranks)
        rows, total = max(1, self.config.batch // self.ranks), torch.zeros(2)
        for first in range(0, len(ids_NL), rows):
            ids_BL, targets_BL = ids_NL[first : first + rows], targets_NL[first : first + rows]
            found = self.engine(ids_BL.to(self.device), targets_BL.to(self.device))
            total += torch.tensor([float(found.lm_loss) * targets_BL.numel(), targets_BL.numel()])
        dist.all_reduce(total)
        return float(total[0] / total[1])


def run_deepspeed(config: TrainConfig) -> dict[str, Any]:
    """Train the DeepSpeed arm from the start; returns the metrics of the table.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    torch.set_num_threads(config.threads)
    device = choose_device(config.parallel.device)
    start_process_group(device)
    data = text_data(config)
    trainer = DeepSpeedTrainer(config, data, device, data.vocabulary)
    groups = make_run_groups(config)
    folder, tokens, peak = Path(config.run_dir) / "deepspeed", config.batch * config.data.sequence, 0
    main = groups.rank == 0
    with log_file(folder / "log.jsonl", 0, main) as write:
        while trainer.done < config.steps:
            log: list[StepLog] = []
            if trainer.done == 2:
                peak = peak_tensor_bytes(lambda: log.append(trainer.step()), device)  # noqa: B023
                write(asdict(log[0]) | {"profiled": True})
            else:
                log.append(trainer.step())
                write(asdict(log[0]))
            entry = log[0]
            if main and (entry.step % config.log_every == 0 or trainer.done == config.steps):
                print(
                    f"[deepspeed] step {entry.step:5d}  loss {entry.loss:.4f}  lm {entry.lm_loss:.4f}  "
                    f"{tokens / entry.seconds:,.0f} tokens/s  {entry.cpu_seconds:.2f} CPU-s",
                    file=sys.stderr,
                    flush=True,
                )
    held_out = trainer.evaluate(config.eval_sequences)
    metrics = summary(folder / "log.jsonl", tokens, groups.world_size) if main else {}
    metrics |= {
        "arm": "deepspeed",
        "held_out_loss": held_out,
        "peak_bytes": highest(peak, groups),
        "peak_resident_bytes": highest(peak_resident(), groups),
        "zero_stage": config.parallel.zero_stage,
        "ranks": groups.world_size,
    }
    if main:
        write_json(folder / "metrics.json", metrics)
    barrier()
    return metrics
