"""The step of both generators, on codes that lie ready.

Everything random in a step is a function of (seed, step), drawn for the global batch. Shape suffixes: b rows of a
micro-batch on this process, P bytes, K tokens, D bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.optimisers import rise_then, scheduled
from common.steps import StepTraining
from instella_t2i.autoregression import autoregression_loss
from instella_t2i.codes import unpack_bits
from instella_t2i.config import DiffusionConfig, GeneratorConfig
from instella_t2i.diffusion import add_noise, diffusion_loss, training_times
from instella_t2i.generators import Autoregressor, Denoiser, Text
from instella_t2i.trainer import optimiser_of


class GeneratorTraining(StepTraining):
    """Trains `generator` on packed codes (column `code`) with the captions of their numbers (`caption`).

    Args:
        texts: caption numbers [b], -1 for the empty one, to text.
        seed: of noise, times and dropped captions.
        accumulate: micro-batches of a step.
    """

    def __init__(
        self,
        generator: Denoiser | Autoregressor,
        texts: Callable[[Tensor], Text],
        options: GeneratorConfig,
        *,
        seed: int,
        accumulate: int = 1,
    ) -> None:
        super().__init__(seed=seed, steps=options.steps, batch_size=options.batch_size, accumulate=accumulate)
        self.generator, self.texts, self.options = generator, texts, options

    def configure_optimizers(self) -> Any:
        options = self.options
        optimiser = optimiser_of(options.optimiser, self.generator, options.lr, options.weight_decay, (0.9, 0.999))
        return scheduled(optimiser, rise_then(options.schedule, options.warmup, options.steps))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        options, shape = self.options, self.generator.shape
        draws = self.draws(batch_idx)
        x0_bKD = unpack_bits(batch["code"], shape.tokens, shape.bits)
        # The same draws whatever the options are, so that arms differ in nothing else.
        kept_b, time_b = draws.uniform() >= options.uncond, draws.uniform()
        text = self.texts(torch.where(kept_b, batch["caption"], -1)).to(self.device)
        if isinstance(self.generator, Denoiser):
            assert isinstance(options, DiffusionConfig)
            t_b = training_times(time_b, options.times, options.shift)
            flat = draws.uniform(shape.tokens * shape.bits)
            x_bKD = add_noise(x0_bKD, t_b, flat.T.unflatten(1, (shape.tokens, shape.bits)))
            loss, accuracy = diffusion_loss(self.generator(x_bKD, t_b, text), x_bKD, x0_bKD, options.target)
        else:
            loss, accuracy = autoregression_loss(self.generator(x0_bKD[:, :-1], text), x0_bKD)
        self.means.log(self, {"loss": loss, "accuracy": accuracy}, draws.part, self.accumulate)
        return loss
