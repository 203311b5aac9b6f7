"""The training step of a stage: predict noise and its variance in latents.

Logged in every step, as means over the global batch:
    train/loss   train/mse + train/vb
    train/mse    squared error of the predicted noise
    train/vb     bits per dimension of the variational bound, which trains the variance alone
    train/lr     after warm-up and the batch-size rule

Shape suffixes: B batch, C latent channels, H W latent grid, L caption tokens, D width of the text encoder.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from common.ema import Ema
from common.errors import UserError
from common.muon import MuonAdam
from common.optimisers import adamw, scheduled
from common.steps import BatchMeans, StepDraws
from pixart.config import StageConfig
from pixart.controlnet import ControlPixArt
from pixart.diffusion import Diffusion
from pixart.features import Codec
from pixart.model import DiT, PixArt

Network = DiT | PixArt | ControlPixArt


class StageModule(pl.LightningModule):
    """Learns to predict noise and its variance in latents (section 2.3; loss of iDDPM), conditioned on class or text.

    Everything random in a step is a function of (seed, step), drawn for the global batch and shared out among processes
    and micro-batches, so that resuming, caching features, adding processes and accumulating gradients change nothing.
    """

    def __init__(self, network: Network, codec: Codec, config: StageConfig) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.codec = codec  # no module of this one: its weights are no part of checkpoints
        self.diffusion = Diffusion()
        decay = config.optimiser.ema_decay
        self.ema = Ema(network, decay, warmup=False) if decay > 0 else None
        self._means = BatchMeans()
        parts = (network, network.base_model) if isinstance(network, ControlPixArt) else (network,)
        for part in parts:
            part.gradient_checkpointing = config.trainer.gradient_checkpointing  # type: ignore[assignment]

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, the network is in evaluation mode and has its averaged weights; nothing shows in the random state."""
        state = torch.get_rng_state()
        self.eval()
        try:
            with self.ema.swapped_into(self.network) if self.ema is not None else contextlib.nullcontext():
                yield
        finally:
            self.train()
            torch.set_rng_state(state)

    def averaged(self) -> Network:
        """The network to sample from, for good: with its averaged weights, in evaluation mode."""
        if self.ema is not None:
            self.ema.copy_to(self.network)
        return self.network.eval()

    def configure_optimizers(self) -> Any:
        options, batch = self.config.optimiser, self.config.trainer.batch_size
        if not 0.0 <= options.cooldown <= 1.0:
            raise UserError(f"optimiser.cooldown {options.cooldown}: expected a fraction of the steps, 0 to 1")
        # The official code's auto_lr: its base batch is 256.
        lr = options.lr * math.sqrt(batch / 256) if options.auto_lr == "sqrt" else options.lr
        optimiser: torch.optim.Optimizer
        if options.name == "muon":
            optimiser = MuonAdam(self.network, lr, options.weight_decay)
        else:
            trained = [p for p in self.network.parameters() if p.requires_grad]
            optimiser = adamw(trained, lr, options.weight_decay, options.eps)
        rate = partial(rate_factor, options.warmup, options.cooldown, self.config.trainer.max_steps)
        return scheduled(optimiser, rate)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        options = self.config.trainer
        draws = StepDraws.of(
            self, batch_idx, batch_size=options.batch_size, accumulate=options.accumulate, seed=self.config.seed
        )
        uniform_2B = draws.uniform(2)
        moments = batch["moments"]
        posterior_noise, noise_BCHW = draws.normals(2, moments.shape[1] // 2, *moments.shape[2:])
        x0_BCHW = self.codec.latents(moments, posterior_noise)
        t_B = (uniform_2B[0] * self.diffusion.steps).long()
        drop_B = uniform_2B[1] < self.config.optimiser.drop
        losses = self.diffusion.training_losses(
            lambda x, t: self.predict(x, t, batch, drop_B), x0_BCHW, t_B, noise_BCHW, self.config.optimiser.snr_loss
        )
        means = {name: values.mean() for name, values in losses.items()}
        self._means.log(self, means, draws.part, options.accumulate)
        if draws.part == options.accumulate - 1:
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return means["loss"]

    def predict(self, x_BCHW: Tensor, t_B: Tensor, batch: dict[str, Tensor], drop_B: Tensor) -> Tensor:
        """The network's output for a batch of the feature table; conditions marked in drop_B are left out."""
        network: Any = self.network
        if self.config.kind == "class":
            return network(x_BCHW, t_B, torch.where(drop_B, network.config.classes, batch["label"]))
        conditions: dict[str, Tensor] = {"drop_B": drop_B}
        if network.config.multi_scale:
            conditions |= {"size_B2": batch["size"], "ratio_B1": batch["ratio"]}
        if self.config.kind == "controlnet":
            conditions["control_BCHW"] = self.codec.scaling_factor * batch["edges"]
        return network(x_BCHW, t_B, batch["caption"].float(), batch["mask"], **conditions)

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        # Not in on_train_batch_end, which comes after the callback that writes the checkpoint.
        super().optimizer_step(*args, **options)
        if self.ema is not None:
            self.ema.update(self.network)
        # Lightning would keep the gradients until after the next forward pass, beside its activations.
        self.zero_grad(set_to_none=True)


def rate_factor(warmup: int, cooldown: float, steps: int, step: int) -> float:
    """Multiplier of the learning rate in a step: a linear rise, 1, and a linear fall over the last `cooldown` steps."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    return rise if cooldown == 0 else min(rise, max(0.0, (steps - step) / (cooldown * steps)))
