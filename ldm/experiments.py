"""What the claims of `reproduce.py` are made of: arms trained for a budget of CPU seconds, and their measurements."""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.sampling import StepDataModule, TensorTable
from common.images import to_uint8, to_unit
from common.ledger import Tier, read_claims
from common.metrics.distribution import fid
from common.metrics.image import psnr, ssim
from common.study import CHECKPOINT_EVERY, ENDLESS, Arm, Judge, Watch, claims_precision, fit_arm
from common.study import Study as CommonStudy
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
from ldm.first_stage import build_first_stage, freeze, reconstruct
from ldm.model import UNet
from ldm.run import build_latent_diffusion
from ldm.sample import condition_columns, draw
from ldm.tasks import Task, mask_bank, prepare
from ldm.train import MASKS, first_batch_scale, train_first_stage
from ldm.trainer import DiffusionTrainer

AUTOENCODER_SHARE = 0.5  # of an arm's budget, in L1 and L2
FACTORS = {1: 3, 2: 3, 4: 4, 8: 16}  # down-sampling factor f to latent channels
EMOJI = DataConfig(name="emoji", size=32, eval_images=1000)
SHAPES = DataConfig(name="shapes", size=32, train_images=12000, eval_images=600)
SCENES = dataclasses.replace(SHAPES, eval_images=1000)


@dataclass(frozen=True)
class Sizes:
    """CPU seconds of an arm, images per measurement, and seconds of the first stages that L4, L6 and L7 share."""

    seconds: float
    images: int
    stage_seconds: float


@dataclass
class Denoiser(Arm[LatentDiffusion]):
    """A trained denoiser with its averaged weights."""

    config: LdmConfig
    task: Task

    @property
    def images_per_second(self) -> float:
        """Training throughput, images per CPU second."""
        return self.steps * self.config.trainer.batch_size / self.seconds

    def samples(
        self, count: int, seed: int = 1, guidance: float = 1.0, side: int | None = None
    ) -> tuple[Tensor, float]:
        """uint8 images for the first `count` held-out conditions, and images per CPU second."""
        columns = condition_columns(self.task, self.config, count)
        sampling = dataclasses.replace(self.config.sampling, guidance=guidance)
        size = side or self.config.data.size
        started = time.process_time()
        images = draw(self.network, self.task.name, columns, count, (size, size), sampling, seed)
        return images, count / (time.process_time() - started)

    @torch.no_grad()
    def caption_losses(self, reference: dict[str, Tensor]) -> tuple[float, float]:
        """Loss on held-out pictures with their own captions and with the next picture's; times and noise fixed."""
        generator = torch.Generator().manual_seed(1)
        z_BCHW = self.network.encode(to_unit(reference["image"]), torch.zeros(len(reference["image"]), 8, 8, 8))
        t_B = torch.randint(300, 900, (len(z_BCHW),), generator=generator)
        noise_BCHW = torch.randn(z_BCHW.shape, generator=generator)
        own = reference["tokens"][:, 0]
        conditions = (self.network.conditioning({"condition": tokens}) for tokens in (own, own.roll(1, 0)))
        right, wrong = (float(self.network.loss(z_BCHW, t_B, noise_BCHW, c)[0]) for c in conditions)
        return right, wrong


class Study(CommonStudy[dict[str, Sizes]]):
    """The arms of a tier; they differ in what a claim compares and in nothing else.

    Args:
        rung: the budgets are multiplied by it.
    """

    paper = "ldm"

    def __init__(self, tier: Tier, folder: Path, rung: int = 1) -> None:
        claims = read_claims("ldm", tier, rung)
        super().__init__({name: Sizes(**claim.sizes, **claim.budget) for name, claim in claims.items()}, folder)
        self.judge = Judge()

    def f_arm(self, f: int, seed: int, claim: str) -> dict[str, float]:
        """One arm of L1 and L2, which both read it: scenes without captions, all in one time budget."""
        size = self.sizes[claim]

        def measured() -> dict[str, float]:
            config = base_config("unconditional", SCENES, f, FACTORS[f], seed)
            task = open_task(config)
            stage_seconds = AUTOENCODER_SHARE * size.seconds if f > 1 else 0.0
            stage, notes = self.autoencoder(f"f{f}-stage", config, in_memory(task.train), stage_seconds)
            arm = self.denoiser(f"f{f}", config, task, stage, size.seconds - notes["ae_seconds"])
            real = task.reference.columns["image"][: size.images]
            fake, speed = arm.samples(size.images)
            self.show(seed, f"unconditional_f{f}", fake[:32])
            return {
                **self.judge.distances(fake, real),
                **self.reconstruction(stage, real),
                "sample_speed": speed,
                "train_speed": arm.images_per_second,
                "steps": float(arm.steps),
                **notes,
            }

        return self.values(f"f{f}-seed{seed}", measured, dataclasses.asdict(size))

    def emoji_first_stage(self, **options: Any) -> tuple[FirstStage, FirstStageConfig]:
        """A first stage of f = 4 on emoji, trained once per tier and reused by every seed of L4, L6 and L7.

        The paper's economy: one first stage serves many denoisers, so its cost is not counted in theirs (L1 and L2 do
        count it). Weights and cost stay in the study's folder.
        """
        seconds = self.sizes["L4"].stage_seconds
        config = base_config("unconditional", EMOJI)
        config.first_stage = dataclasses.replace(config.first_stage, **options)
        name = "stage-" + ("-".join(f"{key}_{value}" for key, value in sorted(options.items())) or "kl")
        settings = {**options, "seconds": seconds}

        def trained() -> dict[str, Tensor]:
            task = open_task(config)
            stage, notes = self.autoencoder(name, config, in_memory(task.train), seconds)
            real = task.reference.columns["image"][:600]
            self.values(name, lambda: {**notes, **self.reconstruction(stage, real)}, settings)
            return stage.state_dict()

        stage = build_first_stage(config.first_stage, EMOJI.size)
        stage.load_state_dict(self.tensors(name, trained, settings))
        return freeze(stage), config.first_stage

    def autoencoder(
        self, name: str, config: LdmConfig, images: TensorTable, seconds: float
    ) -> tuple[FirstStage, dict[str, float]]:
        """A first stage trained for so many CPU seconds, and its held-in facts (`ae_steps`, `ae_seconds`)."""
        if config.first_stage.kind == "pixels":
            return IdentityFirstStage(), {"ae_steps": 0.0, "ae_seconds": 0.0}

        def train(_: FirstStage, folder: Path) -> tuple[FirstStage, dict[str, Any]]:
            return train_autoencoder(config, images, seconds, folder)

        arm = self.arm(
            name,
            config.seed,
            lambda: build_first_stage(config.first_stage, config.data.size),
            train,
            _settings(config, seconds),
        )
        return freeze(arm.network), {"ae_steps": float(arm.steps), "ae_seconds": arm.seconds}

    def denoiser(self, name: str, config: LdmConfig, task: Task, stage: FirstStage | None, seconds: float) -> Denoiser:
        """A denoiser trained on cached latents (None: on pixels) for so many CPU seconds, caching included."""
        task = dataclasses.replace(task)
        first = IdentityFirstStage() if stage is None else stage

        def build() -> LatentDiffusion:
            torch.manual_seed(config.seed)
            return build_latent_diffusion(config, task, first)

        def train(network: LatentDiffusion, folder: Path) -> tuple[LatentDiffusion, dict[str, Any]]:
            return train_denoiser(network, config, task, first, seconds, folder)

        arm = self.arm(name, config.seed, build, train, _settings(config, seconds))
        return Denoiser(arm.name, arm.network, arm.record, config, task)

    def regression(self, name: str, config: LdmConfig, task: Task, seconds: float) -> Regression:
        """The squared error minimised for so many CPU seconds, same optimiser and batch as the diffusion arms."""

        def build() -> Regression:
            torch.manual_seed(config.seed)
            return Regression(config)

        def train(network: Regression, folder: Path) -> tuple[Regression, dict[str, Any]]:
            columns = {key: in_memory(task.train).columns[key] for key in ("image", "low")}
            watch = _fit(RegressionTrainer(network, config), TensorTable(columns), config, seconds, folder)
            return network, watch.record()

        return self.arm(name, config.seed, build, train, _settings(config, seconds)).network

    def reconstruction(self, stage: FirstStage, real: Tensor) -> dict[str, float]:
        """PSNR in dB, SSIM and r-FID of the first stage on held-out images."""
        if isinstance(stage, IdentityFirstStage):
            return {"psnr": 99.0, "ssim": 1.0, "rfid": 0.0}
        restored = reconstruct(stage, real)
        rfid = fid(self.judge.features_of_real(real), self.judge.features(restored))
        return {"psnr": float(psnr(restored, real).mean()), "ssim": float(ssim(restored, real).mean()), "rfid": rfid}


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
            max_steps=ENDLESS,
            batch_size=16,
            precision=claims_precision("ldm"),
            accelerator="cpu",
            threads=1,
            progress=False,
        ),
        sampling=SamplingConfig(steps=20, guidance=1.0, batch_size=100),
    )
    return dataclasses.replace(config, **changes)


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


def _settings(config: LdmConfig, seconds: float) -> dict[str, Any]:
    """What tells the arms of a tier apart."""
    parts = {key: dataclasses.asdict(getattr(config, key)) for key in ("data", "first_stage", "diffusion")}
    return {"task": config.task, "seconds": seconds, **parts}


def _fit(module: pl.LightningModule, table: TensorTable, config: LdmConfig, seconds: float, folder: Path) -> Watch:
    """Train for so many CPU seconds; an interrupted training goes on."""
    watch, batch_size = Watch(budget=seconds), config.trainer.batch_size
    fit_arm(
        module,
        StepDataModule(table, batch_size, ENDLESS, config.seed),
        watch,
        config.trainer,
        batch_size=batch_size,
        grad_clip=config.optimiser.grad_clip,
        folder=folder,
        checkpoint_every=CHECKPOINT_EVERY,
    )
    return watch


def train_autoencoder(
    config: LdmConfig, images: TensorTable, seconds: float, folder: Path
) -> tuple[FirstStage, dict[str, Any]]:
    """A first stage trained for so many CPU seconds, and its record; in `folder` it goes on where it was."""
    options = dataclasses.replace(config.first_stage, steps=ENDLESS)

    class Decay(Watch):
        """Tells the learning-rate decay how many steps the budget will allow."""

        def on_train_start(self, *arguments: Any) -> None:
            super().on_train_start(*arguments)
            if self.steps:
                self._tell()

        def on_train_batch_end(self, *arguments: Any) -> None:
            super().on_train_batch_end(*arguments)
            self._tell()

        def _tell(self) -> None:
            options.steps = int(self.steps * seconds / max(self.seconds, 1e-3))

    watch = Decay(budget=seconds)
    trainer = dataclasses.replace(config.trainer, checkpoint_every=CHECKPOINT_EVERY)
    stage = train_first_stage(
        options,
        trainer,
        images,
        config.data.size,
        folder,
        config.seed,
        callbacks=[watch],
        save=False,
        checkpoints=True,
    )
    return stage, watch.record()


def train_denoiser(
    network: LatentDiffusion, config: LdmConfig, task: Task, stage: FirstStage, seconds: float, folder: Path
) -> tuple[LatentDiffusion, dict[str, Any]]:
    """The network with its averaged weights after so many CPU seconds, caching of latents included, and its record."""
    started = time.process_time()
    train = table = in_memory(task.train)
    latent = config.first_stage.kind != "pixels"
    if latent and task.name != "inpaint":
        with torch.no_grad():
            parts = [stage.moments(to_unit(part)).float() for part in train.columns["image"].split(128)]
        columns = {name: column for name, column in train.columns.items() if name != "image"}
        table = TensorTable({**columns, "moments": torch.cat(parts)})
    if config.diffusion.scale_by_std and latent:
        network.set_scale_factor(first_batch_scale(config, train, stage))
    holes = mask_bank(config.data.size, MASKS // 4, config.seed) if task.name == "inpaint" else None
    module = DiffusionTrainer(network, config, holes)
    watch = _fit(module, table, config, seconds - (time.process_time() - started), folder)
    assert module.ema is not None
    module.ema.copy_to(network)
    return network.eval(), watch.record()


class Regression(nn.Module):
    """The super-resolution baseline of table 5: the same U-Net, predicting the image instead of noise, in one pass."""

    def __init__(self, config: LdmConfig) -> None:
        super().__init__()
        self.unet = UNet(dataclasses.replace(config.unet, norm_groups=32), in_channels=3, out_channels=3)

    def forward(self, low_BCHW: Tensor, size: int) -> Tensor:
        """Low-resolution image in [-1, 1] to [B, 3, size, size]: the bicubic enlargement plus a learned residual."""
        x_BCHW = F.interpolate(low_BCHW, size, mode="bicubic")
        return x_BCHW + self.unet(x_BCHW, torch.zeros(len(x_BCHW), dtype=torch.long))


class RegressionTrainer(pl.LightningModule):
    """Squared error of the image in one pass."""

    def __init__(self, network: Regression, config: LdmConfig) -> None:
        super().__init__()
        self.network, self.config = network, config

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=self.config.optimiser.lr)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self.network(to_unit(batch["low"]), self.config.data.size), to_unit(batch["image"]))


@torch.no_grad()
def regress(network: Regression, low: Tensor, size: int) -> Tensor:
    return torch.cat([to_uint8(network(to_unit(part), size)) for part in low.split(100)])


def shapes_first_stage() -> tuple[FirstStage, FirstStageConfig]:
    """The committed autoencoder of the Shapes teachers, shared by the claims on Shapes (its cost is in its card)."""
    from ldm.convert import autoencoder_from_diffusers_dir

    stage = autoencoder_from_diffusers_dir(Path(__file__).parent / "pretrained" / "shapes32-v")
    options = FirstStageConfig(ch=32, ch_mult=[1, 1, 2], z_channels=8)
    return freeze(stage), options
