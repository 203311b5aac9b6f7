"""The same language model trained by DeepSpeed 0.19.8 (its MoE layer, ZeRO 0 or 2): the arm to compare with.

DeepSpeed is optional and no other module imports it. It starts from the same weights, sees the same batches and steps
the same AdamW; attention, embedding and loss are this project's modules in both arms, so the arms differ in what
DeepSpeed is: gate, dispatch, experts, gradient reduction and optimizer sharding.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError
from se_moe.communication import ParallelGroups
from se_moe.config import TrainConfig
from se_moe.data import TextData
from se_moe.model import LossOutput, MoELanguageModel, initialise
from se_moe.moe import Expert, MoELayer, MoEOutput
from se_moe.trainer import ArmTrainer

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


def build_model(config: TrainConfig, vocabulary: int, groups: ParallelGroups) -> MoELanguageModel:
    """The run's model with its mixtures replaced by DeepSpeed's; collective."""
    if config.model.residual:
        raise UserError("--model.residual true: the DeepSpeed arm compares plain mixtures; leave it out of --arms")
    model = MoELanguageModel(config.network(vocabulary), groups)
    initialise(model, config.seed)
    for block in model.blocks:
        if isinstance(block.moe, MoELayer):
            block.moe = DeepSpeedMoE(block.moe, groups.expert_size)  # type: ignore[assignment]
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


class DeepSpeedTrainer(ArmTrainer):
    """An engine and the step that `trainer.Trainer` makes.

    Raises:
        UserError: DeepSpeed is not installed.
    """

    def __init__(self, config: TrainConfig, data: TextData, device: torch.device, groups: ParallelGroups) -> None:
        super().__init__(config, data, device, groups)
        deepspeed = _import_deepspeed(device)
        if not dist.is_initialized():
            # DeepSpeed wants a process group even for one process.
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        model = build_model(config, data.vocabulary, groups).to(device)
        parameters = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "all", "lr": config.optimiser.lr}
        )
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=parameters, config=engine_config(config, groups.world_size)
        )

    def update(self, ids_BL: Tensor, targets_BL: Tensor, lr: float) -> tuple[LossOutput, float]:
        self.engine.train()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        found = self.engine(ids_BL, targets_BL)
        self.engine.backward(found.loss)
        self.engine.step()
        return found, float(self.engine.get_global_grad_norm() or 0.0)

    def losses(self, ids_BL: Tensor, targets_BL: Tensor) -> LossOutput:
        self.engine.eval()
        return self.engine(ids_BL, targets_BL)

    def metrics(self) -> dict[str, Any]:
        return {**super().metrics(), "zero_stage": self.config.parallel.zero_stage}
