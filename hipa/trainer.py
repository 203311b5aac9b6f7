"""The step: one evaluation from a pair's noise, the adaptation loss against the pair's picture.

Shape suffixes: b rows of a micro-batch on this process, L text tokens, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from common.ema import Ema
from common.steps import BatchMeans, StepDraws
from hipa.config import OptimiserConfig
from hipa.losses import AdaptationLoss
from hipa.model import OneStep


class HipaTraining(pl.LightningModule):
    """Trains a student's adaptors; its frozen weights are no part of the checkpoint.

    Args:
        loss: of latents and the pair's latents.
        states: prompt numbers [b] to text states [b, L, D] (of the frozen encoder).
        fresh_noise: draw the noise anew in every step (targets that are data), instead of the pair's own.
    """

    def __init__(
        self,
        student: OneStep,
        loss: AdaptationLoss,
        states: Callable[[Tensor], Tensor],
        options: OptimiserConfig,
        *,
        seed: int,
        steps: int,
        batch_size: int,
        accumulate: int = 1,
        fresh_noise: bool = False,
    ) -> None:
        super().__init__()
        self.student, self.loss, self.states, self.options = student, loss, states, options
        self.seed, self.steps, self.batch_size, self.accumulate = seed, steps, batch_size, accumulate
        self.fresh_noise = fresh_noise
        self.ema = Ema(student, options.ema_decay) if options.ema_decay > 0 else None
        self.means = BatchMeans()

    def configure_optimizers(self) -> Any:
        options = self.options
        trained = [p for p in self.student.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=options.lr, weight_decay=options.weight_decay, foreach=True)

        def factor(step: int) -> float:
            rise = min(1.0, (step + 1) / max(1, options.warmup))
            if options.schedule == "constant":
                return rise
            return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        draws = StepDraws.of(self, batch_idx, batch_size=self.batch_size, accumulate=self.accumulate, seed=self.seed)
        noise_bCHW = draws.normal(*batch["x1"].shape[1:]) if self.fresh_noise else batch["x0"]
        parts = self.loss(self.student(noise_bCHW, self.states(batch["prompt"])), batch["x1"].float())
        self.means.log(self, parts, draws.part, self.accumulate)
        return parts["loss"]

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        # Not in on_train_batch_end, which comes after the callback that writes the checkpoint.
        super().optimizer_step(*args, **options)
        if self.ema is not None:
            self.ema.update(self.student)
        self.zero_grad(set_to_none=True)

    def final(self) -> OneStep:
        """The student with its averaged adaptors, where they are averaged."""
        if self.ema is not None:
            self.ema.copy_to(self.student)
        return self.student.eval()

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Without the weights that are not trained, which the teacher has."""
        frozen = {f"student.{name}" for name, p in self.student.named_parameters() if not p.requires_grad}
        return {k: v for k, v in super().state_dict(*args, **options).items() if k not in frozen}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({**super().state_dict(), **state_dict}, strict=strict, assign=assign)
