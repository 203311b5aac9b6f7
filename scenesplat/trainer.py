"""The step: features of a batch of scenes against the text features that were lifted onto its Gaussians.

Shape suffixes: N voxels of the batch, B scenes, D width of the text space, K classes.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from common.data.sampling import generator_step
from common.optimisers import adamw
from common.steps import BatchMeans, StepDraws
from scenesplat.config import LossConfig, OptimiserConfig
from scenesplat.losses import language_losses
from scenesplat.model import PointTransformer, unit


class LanguagePretraining(pl.LightningModule):
    """Trains `network` to answer with text features (section 3.3).

    Args:
        texts_KD: of the classes, for pseudo-classes of the contrastive loss.
        steps, batch_size: of the run; accumulate: micro-batches per step.
    """

    def __init__(
        self,
        network: PointTransformer,
        texts_KD: Tensor,
        loss: LossConfig,
        optimiser: OptimiserConfig,
        *,
        seed: int,
        steps: int,
        batch_size: int,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.network, self.loss, self.options = network, loss, optimiser
        self.register_buffer("texts_KD", texts_KD, persistent=False)
        self.seed, self.steps, self.batch_size, self.accumulate = seed, steps, batch_size, accumulate
        self.means = BatchMeans()

    def configure_optimizers(self) -> Any:
        optimiser, schedule = optimiser_of(self.network, self.options, self.steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        draws = StepDraws.of(self, batch_idx, batch_size=self.batch_size, accumulate=self.accumulate, seed=self.seed)
        draws.seed_dropout()

        def permute(count: int) -> Tensor:
            return torch.randperm(count, generator=draws.generator, device=draws.generator.device)

        options = self.network.options
        stages = range(len(options.enc_depths))
        orders = [permute(len(options.orders)) for _ in stages] if options.shuffle else None
        structure = self.network.structure(batch["grid_coord"], batch["offset"], orders)
        features_ND = unit(self.network(batch["feat"], structure))
        valid_N, target_ND = batch["valid"], batch["lang_feat"]
        segment_N = batch["label"]
        with torch.autocast(self.device.type, enabled=False):
            target = unit(target_ND[valid_N])
            segment = segment_N[valid_N] if self.loss.classes == "truth" else (target @ self.texts_KD.t()).argmax(1)
            progress = generator_step(self.trainer) / self.steps
            found = language_losses(features_ND[valid_N], target, segment, self.loss, progress, permute)
        self.means.log(self, found, draws.part, self.accumulate)
        return found["loss"]


def optimiser_of(network: PointTransformer, options: OptimiserConfig, steps: int) -> tuple[Any, Any]:
    """AdamW with a lower rate for the blocks, under one cycle (beta1 falls and rises the other way round)."""
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if "block" not in name]},
        {"params": [p for name, p in named if "block" in name]},
    ]
    optimiser = adamw(groups, options.lr, options.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        [options.lr, options.block_lr],
        total_steps=max(2, steps),
        pct_start=options.rise,
        anneal_strategy="cos",
        div_factor=10.0,  # released configs
        final_div_factor=1000.0,
    )
    return optimiser, schedule
