"""Training of the first stage: a reconstruction loss, a mild regulariser, and a patch discriminator (appendix G)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from common.data.sampling import Table, step_generator
from common.ema import Ema
from common.errors import UserError
from common.images import save_grid
from common.metrics.perceptual import perceptual_distance
from common.training import EveryNSteps, load_checkpoint, train
from common.weights import check_weights, read_weights, save_weights
from ldm.autoencoder import AutoencoderKL, FirstStage, IdentityFirstStage, VQModel
from ldm.config import FirstStageConfig, TrainerConfig
from ldm.losses import KLPerceptualLoss, PatchDiscriminator, VQPerceptualLoss
from ldm.optimisers import MuonAdam
from ldm.streaming import ShardStream, data_module


def to_unit(image_uint8: Tensor) -> Tensor:
    """uint8 images to float in [-1, 1]."""
    return image_uint8.float().div_(127.5).sub_(1.0)


def to_uint8(x: Tensor) -> Tensor:
    """Float images in [-1, 1] to uint8, rounded and clamped."""
    return x.detach().float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def build_first_stage(config: FirstStageConfig, size: int, channels: int = 3) -> FirstStage:
    """The autoencoder that the config describes (untrained)."""
    if config.kind == "pixels":
        return IdentityFirstStage(channels)
    ddconfig = {
        "double_z": config.kind == "kl",
        "z_channels": config.z_channels,
        "resolution": size,
        "in_channels": channels,
        "out_ch": channels,
        "ch": config.ch,
        "ch_mult": list(config.ch_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": list(config.attn_resolutions),
        "dropout": 0.0,
        "attn_type": "vanilla" if config.attention else "none",
    }
    if config.kind == "kl":
        return AutoencoderKL(ddconfig, config.z_channels, config.norm_groups)
    return VQModel(
        ddconfig, config.z_channels, config.n_embed, legacy=config.legacy_beta, norm_groups=config.norm_groups
    )


class FirstStageTrainer(pl.LightningModule):
    """Two optimisers, stepped by hand: autoencoder, then discriminator, on the same batch.

    `step_count` counts autoencoder steps. Lightning's global_step counts both optimisers, which is why disc_start is
    compared with the former (in the authors' code under newer Lightning versions disc_start arrives at half the steps).
    On several processes the discriminator's BatchNorm and its adaptive weight see each process's own share of the
    batch, as in the authors' code; until disc_start the losses equal those of one process.
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
            generator = step_generator(self.seed, step, x_BCHW.device)
            noise = torch.randn(self.batch_size, *regulariser.mean.shape[1:], generator=generator, device=x_BCHW.device)
            mine = noise[self.trainer.global_rank :: self.trainer.world_size]
            reconstruction = self.autoencoder.decode(regulariser.sample(mine))
        else:
            reconstruction, regulariser = self.autoencoder(x_BCHW)
        if self.discriminator is not None:  # its parameters take no part in the autoencoder's step
            self.discriminator.requires_grad_(False)
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
            disc_loss, disc_logs = self.loss.discriminator(x_BCHW, reconstruction.detach(), self.discriminator, step)
            self._step(optimizers[1], disc_loss, self.discriminator.parameters())
            logs = {**logs, **disc_logs}
        self._steps += 1
        named = {f"first_stage/{k}": v for k, v in logs.items()} | {"step_count": float(step)}
        self.log_dict(named, sync_dist=self.trainer.world_size > 1)
        return loss.detach()

    def _step(self, optimizer: Any, loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def decayed(step: int, steps: int, last: float) -> float:
    """Learning-rate multiplier: 1, then falling linearly to 0.1 over the `last` fraction of the steps."""
    start = steps * (1 - last)
    return 1.0 if step < start else 1.0 - 0.9 * (step - start) / max(1.0, steps - start)


def load_first_stage(
    path: Path, config: FirstStageConfig, size: int, option: str = "first_stage.weights"
) -> FirstStage:
    """Weights from .safetensors or .ckpt in the authors' names, or from a diffusers `vae/` directory."""
    if path.is_dir():
        from ldm.convert import autoencoder_from_diffusers_dir

        return autoencoder_from_diffusers_dir(path)
    model = build_first_stage(config, size)
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file or directory")
    if path.suffix == ".safetensors":
        state, _ = read_weights(path, option)
    else:
        state = load_checkpoint(path)
    tensors: dict[str, Tensor] = state.get("state_dict", state)  # type: ignore[assignment]
    state = {k: v for k, v in tensors.items() if not k.startswith("loss.")}
    check_weights(state, model.state_dict(), f"{option} {path}", "the first_stage options")
    model.load_state_dict(state)
    return model


def train_first_stage(
    config: FirstStageConfig,
    trainer_config: TrainerConfig,
    images: Table | ShardStream,
    size: int,
    folder: Path,
    seed: int,
    resume: bool = True,
    callbacks: list[pl.Callback] | None = None,
    save: bool = True,
) -> FirstStage:
    """Train (or load) the first stage; returns it in eval mode with gradients off.

    Args:
        images: table or stream with a uint8 column `image` [N, 3, H, W].
        folder: gets `first_stage.safetensors`, logs, checkpoints and reconstruction grids.
    """
    weights = folder / "first_stage.safetensors"
    if config.kind == "pixels":
        return IdentityFirstStage()
    if config.weights:
        return freeze(load_first_stage(Path(config.weights), config, size))
    if resume and save and weights.is_file():
        return freeze(load_first_stage(weights, config, size))
    torch.manual_seed(seed)
    if config.init_from:
        model = load_first_stage(Path(config.init_from), config, size, option="first_stage.init_from")
    else:
        model = build_first_stage(config, size)
    assert isinstance(model, (AutoencoderKL, VQModel))
    if config.train == "decoder" and not (config.init_from and isinstance(model, AutoencoderKL)):
        raise UserError(
            "--first_stage.train decoder keeps the encoder as it is: it needs --first_stage.init_from and kind kl"
        )
    module = FirstStageTrainer(model, config, seed, config.batch_size)
    if isinstance(images, ShardStream):
        preview = images.head(16)["image"]
    else:
        preview = images.__getitems__(range(min(16, len(images))))["image"]

    def draw(step: int) -> None:
        with module.averaged(), torch.no_grad():
            restored = model.decode_latent(model.encode_latent(to_unit(preview.to(module.device))))
        save_grid(
            torch.cat([preview, to_uint8(restored).cpu()]),
            folder / "samples" / f"reconstruction_{step:06d}.png",
            columns=16,
        )

    precision = trainer_config.precision if trainer_config.precision != "16-mixed" else "bf16-mixed"
    strategy = _with_unused(trainer_config.strategy) if config.disc_weight > 0 else trainer_config.strategy
    trainer = train(
        folder,
        module,
        data_module(images, config.batch_size, config.steps, seed),
        replace(trainer_config, precision=precision, strategy=strategy),
        steps=config.steps,
        optimisers=1 if config.disc_weight <= 0 else 2,
        batch_size=config.batch_size,
        resume="auto" if resume else "never",
        logs=save,
        callbacks=[
            StopAtCount(config.steps),
            *([EveryNSteps(max(1, config.steps // 4), draw)] if save else []),
            *(callbacks or []),
        ],
    )
    if save and trainer.is_global_zero:
        draw(config.steps)
        with module.averaged():
            save_weights(weights, model.state_dict())
    if module.ema is not None:
        module.ema.copy_to(model)
    # With the strides it would have if read from its file: a resumed run, which reads it, encodes to the same bits.
    for parameter in model.cpu().parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return freeze(model)


def _with_unused(strategy: str) -> str:
    """The discriminator has no gradient before disc_start, which plain DDP would wait for."""
    return "ddp_find_unused_parameters_true" if strategy == "ddp" else strategy


class StopAtCount(pl.Callback):
    """Ends training after `steps` autoencoder steps (global_step counts both optimisers)."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.should_stop = pl_module.step_count >= self.steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.step_count >= self.steps:
            trainer.should_stop = True


def freeze(model: FirstStage) -> FirstStage:
    return model.eval().requires_grad_(False)  # type: ignore[return-value]


@torch.no_grad()
def reconstruct(model: FirstStage, images_uint8: Tensor, batch_size: int = 100) -> Tensor:
    """Encode and decode uint8 images [N, 3, H, W]; deterministic (posterior mean)."""
    parts = []
    for x in images_uint8.split(batch_size):
        moments = model.moments(to_unit(x))
        mean = moments.chunk(2, dim=1)[0] if isinstance(model, AutoencoderKL) else moments
        parts.append(to_uint8(model.decode_latent(mean)))
    return torch.cat(parts)
