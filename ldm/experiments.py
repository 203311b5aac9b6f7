"""What the claims of `reproduce.py` are made of: arms trained for a budget of CPU seconds, and their measurements."""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.sampling import StepDataModule, TensorTable, step_generator
from common.images import to_uint8, to_unit
from common.metrics.distribution import fid, kid, precision_recall
from common.metrics.features import extract, load_extractor
from common.metrics.image import psnr, ssim
from common.paths import cache_dir
from common.training import CpuBudget, build_trainer
from ldm.autoencoder import FirstStage, IdentityFirstStage
from ldm.config import (
    ConditionerConfig,
    DataConfig,
    DiffusionConfig,
    FirstStageConfig,
    LdmConfig,
    OptimiserConfig,
    SamplingConfig,
    TrainerConfig,
    UNetOptions,
)
from ldm.diffusion import LatentDiffusion
from ldm.first_stage import freeze, reconstruct
from ldm.model import UNet
from ldm.run import build_latent_diffusion
from ldm.sample import condition_columns, draw
from ldm.tasks import Task, mask_bank, prepare
from ldm.train import MASKS, first_batch_scale, train_first_stage
from ldm.trainer import DiffusionTrainer

ENDLESS = 10**6  # steps: the CPU budget ends training
AUTOENCODER_SHARE = 0.5  # of an arm's budget, in L1 and L2


def base_config(task: str, data: DataConfig, f: int = 4, z: int = 4, seed: int = 0, **changes: Any) -> LdmConfig:
    """The configuration from which all arms are made: they differ in what a claim compares and in nothing else."""
    levels = {1: [1], 2: [1, 2], 4: [1, 2, 2], 8: [1, 2, 2, 2]}[f]
    config = LdmConfig(
        task=task,  # type: ignore[arg-type]
        seed=seed,
        data=data,
        first_stage=FirstStageConfig(
            kind="pixels" if f == 1 else "kl",
            ch=16,
            ch_mult=levels,
            z_channels=z,
            attention=False,
            perceptual=0.0,
            disc_weight=0.0,
            batch_size=8,
            lr=1e-3,
        ),
        unet=UNetOptions(model_channels=32, channel_mult=[1, 2, 2], attention_resolutions=[2, 4], norm_groups=8),
        conditioner=ConditionerConfig(width=64, layers=2, tokens=20, caption_variants=1),
        diffusion=DiffusionConfig(),
        optimiser=OptimiserConfig(lr=1e-3, schedule="constant", warmup=50, ema_decay=0.999),
        trainer=TrainerConfig(
            max_steps=ENDLESS, batch_size=16, precision="bf16-mixed", accelerator="cpu", threads=1, progress=False
        ),
        sampling=SamplingConfig(steps=20, guidance=1.0, batch_size=100),
    )
    return dataclasses.replace(config, **changes)


@dataclass
class Arm:
    """A trained model and what it cost."""

    config: LdmConfig
    task: Task
    ldm: LatentDiffusion
    steps: int
    train_seconds: float
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        """Training throughput of the denoiser, images per CPU second."""
        return self.steps * self.config.trainer.batch_size / self.train_seconds

    def samples(
        self, count: int, seed: int = 1, guidance: float = 1.0, side: int | None = None
    ) -> tuple[Tensor, float]:
        """uint8 images for the first `count` held-out conditions, and images per CPU second."""
        columns = condition_columns(self.task, self.config, count)
        sampling = dataclasses.replace(self.config.sampling, guidance=guidance)
        size = side or self.config.data.size
        started = time.process_time()
        images = draw(self.ldm, self.task.name, columns, count, (size, size), sampling, seed)
        return images, count / (time.process_time() - started)


def autoencoder(config: LdmConfig, images: TensorTable, seconds: float) -> tuple[FirstStage, dict[str, float]]:
    """A first stage trained for so many CPU seconds, and its held-in facts (`steps`, `seconds`)."""
    if config.first_stage.kind == "pixels":
        return IdentityFirstStage(), {"ae_steps": 0.0, "ae_seconds": 0.0}
    budget = CpuBudget(seconds)
    steps = {"n": 0}

    options = dataclasses.replace(config.first_stage, steps=ENDLESS)

    class Count(pl.Callback):
        """Counts steps, and tells the learning-rate decay how many the budget will allow."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            steps["n"] += 1
            options.steps = int(steps["n"] * seconds / max(budget.used, 1e-3))

    stage = train_first_stage(
        options,
        config.trainer,
        images,
        config.data.size,
        cache_dir("experiments"),
        config.seed,
        callbacks=[budget, Count()],
        save=False,
    )
    return stage, {"ae_steps": float(steps["n"]), "ae_seconds": budget.used}


def train_denoiser(config: LdmConfig, task: Task, stage: FirstStage, seconds: float) -> Arm:
    """Train the denoiser on cached latents for so many CPU seconds (the time of caching counts)."""
    started = time.process_time()
    torch.manual_seed(config.seed)
    task = dataclasses.replace(task)
    ldm = build_latent_diffusion(config, task, stage)
    train = in_memory(task.train)
    images = train.columns["image"]
    if config.first_stage.kind == "pixels" or task.name == "inpaint":
        table = train
    else:
        with torch.no_grad():
            moments = torch.cat([stage.moments(to_unit(part)).float() for part in images.split(128)])
        table = TensorTable({**{k: v for k, v in train.columns.items() if k != "image"}, "moments": moments})
    if config.diffusion.scale_by_std and config.first_stage.kind != "pixels":
        ldm.set_scale_factor(first_batch_scale(config, train, stage))
    holes = mask_bank(config.data.size, MASKS // 4, config.seed) if task.name == "inpaint" else None
    module = DiffusionTrainer(ldm, config, holes)
    budget = CpuBudget(seconds - (time.process_time() - started))
    trainer = build_trainer(
        cache_dir("experiments"),
        config.trainer,
        steps=ENDLESS,
        batch_size=config.trainer.batch_size,
        grad_clip=config.optimiser.grad_clip,
        logs=False,
        callbacks=[budget],
    )
    trainer.fit(module, StepDataModule(table, config.trainer.batch_size, ENDLESS, config.seed))
    assert module.ema is not None
    module.ema.copy_to(ldm)
    return Arm(config, task, ldm.eval(), trainer.global_step, budget.used)


@cache
def shared_task(task: str, data: tuple[tuple[str, Any], ...], f_levels: int) -> Task:
    """The data of a task, opened once per process: arms and seeds differ in their networks, not in their data."""
    config = base_config(task, DataConfig(**dict(data)))
    config.first_stage.kind = "pixels" if f_levels == 1 else "kl"
    config.first_stage.ch_mult = [1] * f_levels
    return prepare(config)


def in_memory(table: object) -> TensorTable:
    """The claims' data sets are small: they are tables, not read from disk batch by batch."""
    assert isinstance(table, TensorTable)
    return table


def open_task(config: LdmConfig) -> Task:
    """`shared_task` for a config, with a fresh conditioner for every arm."""
    data = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(vars(config.data).items()))
    levels = 1 if config.first_stage.kind == "pixels" else len(config.first_stage.ch_mult)
    task = shared_task(config.task, data, levels)
    conditioner = task.conditioner
    if conditioner is None:
        return dataclasses.replace(task)
    fresh = copy.deepcopy(conditioner)
    torch.manual_seed(config.seed)
    for module in fresh.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return dataclasses.replace(task, conditioner=fresh)


@cache
def judge() -> Any:
    return load_extractor("lite0")


_features: dict[int, Tensor] = {}


def real_features(images: Tensor) -> Tensor:
    """Judge's features of a real set, computed once per set."""
    key = images.data_ptr()
    if key not in _features:
        _features[key] = extract(images, judge())
    return _features[key]


def distances(fake: Tensor, real: Tensor) -> dict[str, float]:
    """FID and KID (x 1000) of uint8 images on the judge's features; n is the same for every arm of a claim."""
    a, b = real_features(real), extract(fake, judge())
    manifold = precision_recall(a, b)
    return {
        "fid": fid(a, b),
        "kid_x1000": 1000 * kid(a, b).value,
        "precision": manifold.precision,
        "recall": manifold.recall,
    }


def reconstruction(stage: FirstStage, real: Tensor) -> dict[str, float]:
    """PSNR in dB, SSIM and r-FID of the first stage on held-out images."""
    if isinstance(stage, IdentityFirstStage):
        return {"psnr": 99.0, "ssim": 1.0, "rfid": 0.0}
    restored = reconstruct(stage, real)
    a, b = real_features(real), extract(restored, judge())
    return {"psnr": float(psnr(restored, real).mean()), "ssim": float(ssim(restored, real).mean()), "rfid": fid(a, b)}


class Regression(nn.Module):
    """The super-resolution baseline of table 5: the same U-Net, predicting the image instead of noise, in one pass."""

    def __init__(self, config: LdmConfig) -> None:
        super().__init__()
        self.unet = UNet(dataclasses.replace(config.unet, norm_groups=32), in_channels=3, out_channels=3)

    def forward(self, low_BCHW: Tensor, size: int) -> Tensor:
        """Low-resolution image in [-1, 1] to [B, 3, size, size]: the bicubic enlargement plus a learned residual."""
        x_BCHW = F.interpolate(low_BCHW, size, mode="bicubic")
        return x_BCHW + self.unet(x_BCHW, torch.zeros(len(x_BCHW), dtype=torch.long))


def train_regression(config: LdmConfig, task: Task, seconds: float) -> Regression:
    """Minimise the squared error for so many CPU seconds, same optimiser and batch as the diffusion arms."""
    torch.manual_seed(config.seed)
    network = Regression(config)
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.optimiser.lr)
    columns = in_memory(task.train).columns
    images, low = columns["image"], columns["low"]
    started, step = time.process_time(), 0
    while time.process_time() - started < seconds:
        rows = torch.randint(len(images), (config.trainer.batch_size,), generator=step_generator(config.seed, step))
        loss = F.mse_loss(network(to_unit(low[rows]), config.data.size), to_unit(images[rows]))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.optimiser.grad_clip)
        optimiser.step()
        step += 1
    return network.eval()


@torch.no_grad()
def regress(network: Regression, low: Tensor, size: int) -> Tensor:
    return torch.cat([to_uint8(network(to_unit(part), size)) for part in low.split(100)])


def foreground(images: Tensor) -> Tensor:
    """Pixels that are no background, bool [N, H, W]: more than 60 (L1, of 765) from the border's median colour."""
    x = images.float()
    border = torch.cat([x[..., 0, :], x[..., -1, :], x[..., :, 0], x[..., :, -1]], dim=-1)
    background = border.median(dim=-1).values[..., None, None]
    return (x - background).abs().sum(1) > 60


def shapes_first_stage() -> tuple[FirstStage, FirstStageConfig]:
    """The committed autoencoder of the Shapes teachers, shared by the claims on Shapes (its cost is in its card)."""
    from ldm.convert import autoencoder_from_diffusers_dir

    stage = autoencoder_from_diffusers_dir(Path(__file__).parent / "pretrained" / "shapes32-v")
    options = FirstStageConfig(ch=32, ch_mult=[1, 1, 2], z_channels=8)
    return freeze(stage), options
