"""The steps of training: autoencoder against discriminator, denoiser, classifier of noisy latents.

Everything random in a step is a function of (seed, step), drawn for the global batch and shared out among processes and
micro-batches (`common.steps`), so that resuming, caching latents, adding processes and accumulating gradients change
nothing. Shape suffixes: B batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.batch_norm import synchronised_statistics
from common.ema import Ema
from common.images import to_unit
from common.metrics.perceptual import perceptual_distance
from common.muon import MuonAdam
from common.optimisers import adamw, scheduled
from common.steps import BatchMeans, StepDraws
from ldm.autoencoder import AutoencoderKL, VQModel
from ldm.config import ClassifierConfig, FirstStageConfig, LdmConfig, TrainerConfig
from ldm.diffusion import LatentDiffusion, draw_latents
from ldm.losses import KLPerceptualLoss, PatchDiscriminator, VQPerceptualLoss
from ldm.lr_schedules import scaled_lr, warmup_then
from ldm.model import EncoderUNet
from ldm.tasks import raw_condition


def draws_of(module: pl.LightningModule, batch_idx: int, options: TrainerConfig, seed: int) -> StepDraws:
    """The random numbers of the step that `module` is in."""
    return StepDraws.of(module, batch_idx, batch_size=options.batch_size, accumulate=options.accumulate, seed=seed)


class FirstStageTrainer(pl.LightningModule):
    """Two optimisers, stepped by hand: autoencoder, then discriminator, on the same batch.

    `step_count` counts autoencoder steps. Lightning's global_step counts both optimisers, which is why disc_start is
    compared with the former (in the authors' code under newer Lightning versions disc_start arrives at half the steps).
    On several processes the discriminator's BatchNorm and its adaptive weight see the global batch (in the authors'
    code each process's own share), so that the losses are those of one process.
    """

    def __init__(
        self, autoencoder: AutoencoderKL | VQModel, config: FirstStageConfig, seed: int, batch_size: int
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if config.train == "decoder":
            autoencoder.requires_grad_(False)
            for part in (autoencoder.post_quant_conv, autoencoder.decoder):
                part.requires_grad_(True)
        self.ema = Ema(autoencoder, config.ema_decay) if config.ema_decay > 0 else None
        autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a sixth faster on CPU
        self.autoencoder, self.config, self.seed, self.batch_size = autoencoder, config, seed, batch_size
        options: dict[str, Any] = {
            "lpips": perceptual_distance(config.perceptual_trunk) if config.perceptual > 0 else None,
            "perceptual_weight": config.perceptual,
            "disc_start": config.disc_start,
            "disc_weight": config.disc_weight,
            "disc_loss": config.disc_loss,
        }
        self.discriminator = (
            PatchDiscriminator(ndf=config.disc_width, n_layers=config.disc_layers) if config.disc_weight > 0 else None
        )
        self.loss: KLPerceptualLoss | VQPerceptualLoss
        if isinstance(autoencoder, AutoencoderKL):
            self.loss = KLPerceptualLoss(kl_weight=config.kl_weight, **options)
        else:
            self.loss = VQPerceptualLoss(n_embed=config.n_embed, **options)
        self.register_buffer("_steps", torch.zeros((), dtype=torch.long))

    @property
    def step_count(self) -> int:
        """Autoencoder steps done."""
        return int(self._steps)

    def averaged(self) -> AbstractContextManager[Any]:
        """Inside, the autoencoder has the moving average of its weights, if one is kept."""
        return self.ema.swapped_into(self.autoencoder) if self.ema is not None else nullcontext()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        lr = self.config.lr
        generator = [p for p in self.autoencoder.parameters() if p.requires_grad]
        optimisers: list[torch.optim.Optimizer] = [
            MuonAdam(self.autoencoder, lr)
            if self.config.optimiser == "muon"
            else torch.optim.Adam(generator, lr=lr, betas=(0.5, 0.9))
        ]
        if self.discriminator is not None:
            optimisers.append(torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=(0.5, 0.9)))
        return optimisers

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        step = self.step_count
        x_BCHW = to_unit(batch["image"]).contiguous(memory_format=torch.channels_last)
        optimizers: Any = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        regulariser: Any
        if isinstance(self.autoencoder, AutoencoderKL):
            regulariser = self.autoencoder.encode(x_BCHW)
            draws = StepDraws.of(self, batch_idx, batch_size=self.batch_size, seed=self.seed)
            noise_BCHW = draws.normal(*regulariser.mean.shape[1:])
            reconstruction = self.autoencoder.decode(regulariser.sample(noise_BCHW))
        else:
            reconstruction, regulariser = self.autoencoder(x_BCHW)
        if self.discriminator is not None:  # its parameters take no part in the autoencoder's step
            self.discriminator.requires_grad_(False)
        with self._whole_batch():
            loss, logs = self.loss.autoencoder(
                x_BCHW, reconstruction, regulariser, self.discriminator, self.autoencoder.last_layer, step
            )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * decayed(step, self.config.steps, self.config.decay)
        self._step(optimizers[0], loss, self.autoencoder.parameters())
        if self.ema is not None:
            self.ema.update(self.autoencoder)
        if self.discriminator is not None and step >= self.config.disc_start:
            self.discriminator.requires_grad_(True)
            with self._whole_batch():
                disc_loss, disc_logs = self.loss.discriminator(
                    x_BCHW, reconstruction.detach(), self.discriminator, step
                )
            self._step(optimizers[1], disc_loss, self.discriminator.parameters())
            logs = {**logs, **disc_logs}
        self._steps += 1
        named = {f"first_stage/{k}": v for k, v in logs.items()} | {"step_count": float(step)}
        self.log_dict(named, sync_dist=self.trainer.world_size > 1)
        return loss.detach()

    def _whole_batch(self) -> AbstractContextManager[None]:
        """Inside, batch statistics are those of all processes' images."""
        return synchronised_statistics() if self.trainer.world_size > 1 else nullcontext()

    def _step(self, optimizer: Any, loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def decayed(step: int, steps: int, last: float) -> float:
    """Learning-rate multiplier: 1, then falling linearly to 0.1 over the `last` fraction of the steps."""
    start = steps * (1 - last)
    return 1.0 if step < start else 1.0 - 0.9 * (step - start) / max(1.0, steps - start)


class StopAtCount(pl.Callback):
    """Ends training after `steps` autoencoder steps (global_step counts both optimisers)."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.should_stop = pl_module.step_count >= self.steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.step_count >= self.steps:
            trainer.should_stop = True


class DiffusionTrainer(pl.LightningModule):
    """Equations 2 and 3: denoise latents.

    Args:
        holes: inpainting masks [N, 1, H, W] to pick from.

    Everything random in a step is a function of (seed, step), drawn for the global batch and shared out among processes
    and micro-batches, so that resuming, caching latents, adding processes and accumulating gradients change nothing.
    """

    holes: Tensor | None

    def __init__(self, ldm: LatentDiffusion, config: LdmConfig, holes: Tensor | None = None) -> None:
        super().__init__()
        self.ldm, self.config = ldm, config
        self.ema = Ema(ldm, config.optimiser.ema_decay) if config.optimiser.ema_decay > 0 else None
        self.register_buffer("holes", holes, persistent=False)
        self._means = BatchMeans()

    def configure_optimizers(self) -> Any:
        options, trainer = self.config.optimiser, self.config.trainer
        lr = scaled_lr(options.lr, trainer.batch_size) if options.scale_lr else options.lr
        optimiser: torch.optim.Optimizer
        if options.name == "muon":
            optimiser = MuonAdam(self.ldm, lr, options.weight_decay)
        else:
            parameters = self.ldm.trainable_parameters()
            optimiser = adamw(parameters, lr, options.weight_decay)
        return scheduled(optimiser, warmup_then(options.schedule, options.warmup, trainer.max_steps))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        draws = draws_of(self, batch_idx, self.config.trainer, self.config.seed)
        if self.config.unet.dropout > 0:
            draws.seed_dropout()
        z_BCHW, t_B, noise_BCHW, uniform_2B = draw_latents(self.ldm, batch, draws)
        columns = dict(batch)
        if self.holes is not None:
            columns["hole"] = self.holes[draws.integers(len(self.holes))]
        cond = self.ldm.conditioning(raw_condition(self.config.task, columns, uniform_2B[0]), uniform_2B[1])
        loss, logs = self.ldm.loss(z_BCHW, t_B, noise_BCHW, cond)
        self._means.log(self, logs, draws.part, self.config.trainer.accumulate)
        return loss

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        # Not in on_train_batch_end, which comes after the callback that writes the checkpoint.
        super().optimizer_step(*args, **options)
        if self.ema is not None:
            self.ema.update(self.ldm)
        # Lightning would keep the gradients until after the next forward pass, beside its activations.
        self.zero_grad(set_to_none=True)


class ClassifierTrainer(pl.LightningModule):
    """Cross entropy of the class of noisy latents, at steps t drawn uniformly (appendix D.4)."""

    def __init__(self, classifier: EncoderUNet, ldm: LatentDiffusion, config: ClassifierConfig) -> None:
        super().__init__()
        self.classifier, self.config = classifier, config
        self.frozen = (ldm.requires_grad_(False).eval(),)  # in a tuple: neither trained nor kept in checkpoints
        self._means = BatchMeans()

    def on_fit_start(self) -> None:
        self.frozen[0].to(self.device)

    def configure_optimizers(self) -> Any:
        config = self.config
        optimiser = adamw(self.parameters(), config.lr, config.weight_decay)
        return scheduled(optimiser, warmup_then("cosine", config.warmup, config.trainer.max_steps))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        (ldm,) = self.frozen
        draws = draws_of(self, batch_idx, self.config.trainer, self.config.seed)
        if self.config.network.dropout > 0:
            draws.seed_dropout()
        z_BCHW, t_B, noise_BCHW, _ = draw_latents(ldm, batch, draws)
        logits_BK = self.classifier(ldm.schedule.q_sample(z_BCHW, t_B, noise_BCHW), t_B).float()
        loss = F.cross_entropy(logits_BK, batch["label"])
        right = (logits_BK.argmax(1) == batch["label"]).float().mean()
        self._means.log(self, {"loss": loss, "accuracy": right}, draws.part, self.config.trainer.accumulate)
        return loss
