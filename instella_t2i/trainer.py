"""The steps of both stages: tokenizer (or its decoder alone) against a discriminator.

Everything random in a step is a function of (seed, step), drawn for the global batch, so that resuming, more processes
and micro-batches change nothing (the batch entropies of the lfq and bsq baselines are those of a micro-batch).
Shape suffixes: B batch, b rows of a micro-batch, C channels, H, W pictures; K tokens, D bits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from common.data.sampling import derive_seed
from common.images import resize_clean, to_unit
from common.metrics.perceptual import perceptual_distance
from common.muon import MuonAdam
from common.optimisers import adamw, rise_then
from common.steps import StepDraws
from instella_t2i.config import DataConfig, DecoderConfig, TokenizerConfig, TrainerConfig
from instella_t2i.losses import (
    Discriminator,
    code_usage,
    dying,
    gan_weight,
    hinge_loss,
    pixel_loss,
    temperature,
)
from instella_t2i.tokenizer import Tokenizer

Logs = dict[str, Tensor]


def optimiser_of(
    name: str, network: nn.Module, lr: float, decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """What trains `network`: adamw, or muon, which takes its step for the matrices of transformer blocks alone."""
    if name == "muon":
        return MuonAdam(network, lr, decay, betas=betas, choose=_in_blocks)
    return adamw([p for p in network.parameters() if p.requires_grad], lr, decay, betas=betas)


def _in_blocks(name: str, weight: Tensor) -> bool:
    return "transformer_blocks." in name and weight.dim() == 2


class TokenizerTraining(pl.LightningModule):
    """Trains `tokenizer` on pictures (column `image`), stepping two optimisers by hand.

    `step_count` counts the tokenizer's steps; Lightning's global_step counts both optimisers.

    Args:
        losses: weights of the terms, and the recipe of the noise and of the discriminator.
        stage: steps, batch, learning rate; with `sizes` (stage 2) encoder and quantizer are frozen.
        data: size that the encoder sees, and whether pictures are mirrored.
    """

    _steps: Tensor

    def __init__(
        self,
        tokenizer: Tokenizer,
        losses: TokenizerConfig,
        stage: TokenizerConfig | DecoderConfig,
        data: DataConfig,
        trainer: TrainerConfig,
        seed: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tokenizer, self.losses, self.stage, self.data = tokenizer, losses, stage, data
        self.options, self.seed = trainer, seed
        self.sizes: Sequence[int] = stage.sizes if isinstance(stage, DecoderConfig) else []
        tokenizer.requires_grad_(True)
        if self.sizes:
            tokenizer.encoder.requires_grad_(False)
            tokenizer.quantizer.requires_grad_(False)
        torch.manual_seed(derive_seed(seed, 1))
        self.discriminator = Discriminator(losses.gan_width) if losses.gan > 0 else None
        distance = perceptual_distance(losses.perceptual_trunk) if losses.perceptual > 0 else None
        self.frozen = (distance,)  # in a tuple: neither trained nor kept in checkpoints
        self.gan_start = round(stage.gan_start * stage.steps)
        self.warned = False
        self.register_buffer("_steps", torch.zeros((), dtype=torch.long))

    @property
    def step_count(self) -> int:
        """Steps of the tokenizer done."""
        return int(self._steps)

    def on_fit_start(self) -> None:
        for module in self.frozen:
            if module is not None:
                module.to(self.device)

    def on_train_start(self) -> None:
        self.trainer.should_stop = self.step_count >= self.stage.steps

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW; with `optimiser: muon` the blocks' matrices have Muon, by steps as long as AdamW's. The
        discriminator's comes last."""
        lr, decay = self.stage.lr, self.losses.weight_decay
        optimisers = [optimiser_of(self.losses.optimiser, self.tokenizer, lr, decay, betas=(0.9, 0.99))]
        if self.discriminator is not None:
            optimisers.append(adamw(self.discriminator.parameters(), self.losses.gan_lr, betas=(0.5, 0.9)))
        return optimisers

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        step, parts = self.step_count, self.options.accumulate
        draws = StepDraws.of(self, batch_idx, batch_size=self.stage.batch_size, seed=self.seed)
        image_bCHW = batch["image"]
        mirror_b, size = draws.uniform() < 0.5, self._size(draws)
        if self.data.flip:
            image_bCHW = torch.where(mirror_b[:, None, None, None], image_bCHW.flip(-1), image_bCHW)
        config = self.tokenizer.config
        uniform_bKD = draws.uniform(config.tokens * config.bits).T.unflatten(1, (config.tokens, config.bits))
        pieces = list(zip(image_bCHW.chunk(parts), uniform_bKD.chunk(parts)))
        given: Any = self.optimizers()
        optimisers = [*given] if isinstance(given, list) else [given]  # a list of its own, from which one is taken
        against = optimisers.pop() if self.discriminator is not None else None
        weight = 0.0
        if self.discriminator is not None:
            weight = self.losses.gan * gan_weight(step, self.gan_start, self.stage.gan_warmup)
            self.discriminator.requires_grad_(False)  # takes no part in the tokenizer's step
        sums: Logs = {}
        fakes, codes = [], []
        self.zero_grad()
        for piece_bCHW, piece_bKD in pieces:
            loss, y_bCHW, codes_bKD, logs = self.tokenizer_loss(piece_bCHW, piece_bKD, size, step, weight)
            self.manual_backward(loss / parts)
            fakes.append(y_bCHW.detach())
            codes.append(codes_bKD)
            sums = {name: sums.get(name, 0.0) + value.detach() / parts for name, value in logs.items()}
        self._update(optimisers, step, self.stage.lr, self.tokenizer.parameters())
        self.tokenizer.quantizer.after_step(draws.generator)
        if self.discriminator is not None and step >= self.gan_start:
            self.discriminator.requires_grad_(True)
            for (piece_bCHW, _), y_bCHW in zip(pieces, fakes):
                real = self.discriminator(self._target(piece_bCHW, size)).float()
                fake = self.discriminator(y_bCHW).float()
                loss = hinge_loss(real, fake)
                self.manual_backward(loss / parts)
                found = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
                sums |= {name: sums.get(name, 0.0) + value.detach() / parts for name, value in found.items()}
            self._update([against], step, self.losses.gan_lr, self.discriminator.parameters())
        self._steps += 1
        self._log(sums, torch.cat(codes), step)
        if self.step_count >= self.stage.steps:
            self.trainer.should_stop = True
        return sums["loss"]

    def tokenizer_loss(
        self, image_bCHW: Tensor, uniform_bKD: Tensor, size: int, step: int, gan: float
    ) -> tuple[Tensor, Tensor, Tensor, Logs]:
        """(loss, reconstruction, codes, terms) of a micro-batch of uint8 pictures."""
        x_bCHW, losses, tokenizer = self._target(image_bCHW, size), self.losses, self.tokenizer
        terms: Logs = {}
        if self.sizes:
            codes_bKD = tokenizer.encode(self._target(image_bCHW, self.data.size))
            y_bCHW = tokenizer.paint(tokenizer.quantizer.values(codes_bKD), size)
            loss = x_bCHW.new_zeros(())
        else:
            tau = temperature(step, self.stage.steps, losses.tau_start, losses.tau_end, losses.tau_share)
            y_bCHW, quantized = tokenizer(x_bCHW, uniform_bKD if losses.noise else None, tau)
            codes_bKD, loss, terms = quantized.codes_BLD, losses.code * quantized.loss, dict(quantized.terms)
            terms["tau"] = x_bCHW.new_tensor(tau)
            if "logits" in terms:
                loss = loss + losses.logit * terms["logits"]
        y_bCHW = y_bCHW.float()
        terms["pixel_loss"] = pixel_loss(x_bCHW, y_bCHW, losses.pixel_beta)
        loss = loss + terms["pixel_loss"]
        (distance,) = self.frozen
        if distance is not None:
            terms["perceptual_loss"] = distance(x_bCHW, y_bCHW).mean()
            loss = loss + losses.perceptual * terms["perceptual_loss"]
        if gan > 0 and self.discriminator is not None:
            terms["gan_loss"] = -self.discriminator(y_bCHW).float().mean()
            loss = loss + gan * terms["gan_loss"]
        return loss, y_bCHW, codes_bKD, {"loss": loss, "gan_weight": x_bCHW.new_tensor(gan), **terms}

    def _size(self, draws: StepDraws) -> int:
        """Of this step's reconstructions, the same on all processes."""
        if not self.sizes:
            return self.data.size
        generator = draws.generator
        return self.sizes[int(torch.randint(len(self.sizes), (), generator=generator, device=generator.device))]

    def _target(self, image_bCHW: Tensor, size: int) -> Tensor:
        """uint8 pictures at a size, in [-1, 1]."""
        return to_unit(resize_clean(image_bCHW, size))

    def _update(self, optimisers: Sequence[Any], step: int, lr: float, parameters: Iterable[nn.Parameter]) -> None:
        if self.losses.grad_clip > 0:
            nn.utils.clip_grad_norm_([p for p in parameters if p.requires_grad], self.losses.grad_clip)
        rate = rise_then("cosine", self.stage.warmup, self.stage.steps)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * rate(step)
            optimiser.step()

    def _log(self, values: Logs, codes_BKD: Tensor, step: int) -> None:
        many = self.trainer.world_size > 1
        self.log_dict({f"train/{name}": value for name, value in values.items()}, sync_dist=many)
        if (step + 1) % self.options.log_every:
            return
        usage = code_usage(codes_BKD)
        self.log_dict({f"codes/{name}": value for name, value in usage.items()}, sync_dist=many)
        # Of few pictures a bit may be constant by chance, and a network that has hardly begun has one code for all.
        warned = step > self.stage.warmup and len(codes_BKD) >= 16 and dying(usage)
        if warned and not self.warned and self.trainer.is_global_zero:
            self.warned = True
            print(f"step {step + 1}: {warned}", file=sys.stderr)
