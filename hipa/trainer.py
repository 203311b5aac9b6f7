"""The step: one evaluation from a pair's noise, the adaptation loss against the pair's picture.

Shape suffixes: b rows of a micro-batch on this process, C channels, H height, W width, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from common.ema import Ema
from common.optimisers import adamw, rise_then, scheduled
from common.steps import StepOptions, StepTraining
from common.teacher import NoiseSchedule
from hipa.config import OptimiserConfig
from hipa.losses import AdaptationLoss
from hipa.model import OneStep

States = Callable[[Tensor], Tensor]  # prompt numbers [b] to text states [b, L, D] (of the frozen encoder)


class HipaTraining(StepTraining):
    """Trains a student's adaptors; its frozen weights are no part of the checkpoint.

    Args:
        loss: of latents and the pair's latents.
        fresh_noise: draw the noise anew in every step (targets that are data), instead of the pair's own.
    """

    def __init__(
        self,
        student: OneStep,
        loss: AdaptationLoss,
        states: States,
        options: OptimiserConfig,
        *,
        fresh_noise: bool = False,
        **given: Unpack[StepOptions],
    ) -> None:
        super().__init__(**given)
        self.student, self.loss, self.states, self.options = student, loss, states, options
        self.fresh_noise = fresh_noise
        self.ema = Ema(student, options.ema_decay) if options.ema_decay > 0 else None

    def configure_optimizers(self) -> Any:
        options = self.options
        trained = [p for p in self.student.parameters() if p.requires_grad]
        optimiser = adamw(trained, options.lr, options.weight_decay)
        return scheduled(optimiser, rise_then(options.schedule, options.warmup, self.steps))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        draws = self.draws(batch_idx)
        x_bCHW, x1_bCHW = batch["x0"].float(), batch["x1"].float()
        if self.fresh_noise:
            x_bCHW = torch.cat([draws.normal(*x1_bCHW.shape[1:]), x_bCHW[:, x1_bCHW.shape[1] :]], 1)
        parts = self.loss(self.student(x_bCHW, self.states(batch["prompt"])), x1_bCHW, batch.get("picture"))
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


class BaseTraining(StepTraining):
    """Trains a widened U-Net on: its own denoising loss, with the picture's channels behind the noisy latents.

    Args:
        null: states of the empty prompt, [1, L, D], which one prompt in ten becomes, for guidance.
    """

    DROPPED = 0.1

    def __init__(
        self,
        unet: Any,
        schedule: NoiseSchedule,
        states: States,
        null: Tensor,
        *,
        lr: float,
        **given: Unpack[StepOptions],
    ) -> None:
        super().__init__(**given)
        self.unet, self.schedule, self.states, self.null = unet, schedule, states, null
        self.lr = lr

    def configure_optimizers(self) -> Any:
        return scheduled(adamw(self.unet.parameters(), self.lr), rise_then("cosine", 20, self.steps))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        draws = self.draws(batch_idx)
        x1_bCHW, states_bLD = batch["x1"], self.states(batch["prompt"])
        t_b, dropped_b = draws.integers(self.schedule.steps), draws.uniform() < self.DROPPED
        noise_bCHW = draws.normal(*x1_bCHW.shape[1:])
        states_bLD = torch.where(dropped_b.view(-1, 1, 1), self.null.to(states_bLD), states_bLD)
        alpha, sigma = self.schedule.levels(t_b)
        z_bCHW = torch.cat([alpha * x1_bCHW + sigma * noise_bCHW, batch["beside"]], 1)
        output_bCHW = self.unet(z_bCHW, t_b, states_bLD, return_dict=False)[0].float()
        wanted_bCHW = {
            "epsilon": noise_bCHW,
            "v_prediction": alpha * noise_bCHW - sigma * x1_bCHW,
            "sample": x1_bCHW,
        }[self.schedule.prediction_type]
        loss = (output_bCHW - wanted_bCHW).square().mean()
        self.means.log(self, {"loss": loss}, draws.part, self.accumulate)
        return loss
