"""What the claims of `reproduce.py` are made of: arms trained for a budget of CPU seconds, and their measurements."""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.sampling import StepDataModule, TensorTable, step_generator
from common.errors import stop_if_not_finite
from common.images import to_uint8, to_unit
from common.ledger import Tier, read_claims
from common.metrics.distribution import fid
from common.metrics.image import psnr, ssim
from common.paths import cache_dir
from common.study import ENDLESS, Arm, Judge, Watch, fit_arm
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
    """The arms of a tier; they differ in what a claim compares and in nothing else."""

    def __init__(self, tier: Tier, folder: Path) -> None:
        claims = read_claims("ldm", tier)
        super().__init__({name: Sizes(**claim.sizes, **claim.budget) for name, claim in claims.items()}, folder)
        self.judge = Judge()

    def f_arm(self, f: int, seed: int, claim: str) -> dict[str, float]:
        """One arm of L1 and L2, which both read it: scenes without captions, all in one time budget."""
        size = self.sizes[claim]

        def measured() -> dict[str, float]:
            config = base_config("unconditional", SCENES, f, FACTORS[f], seed)
            task = open_task(config)
            stage_seconds = AUTOENCODER_SHARE * size.seconds if f > 1 else 0.0
            stage, notes = train_autoencoder(config, in_memory(task.train), stage_seconds)
            arm = train_denoiser(config, task, stage, size.seconds - notes["ae_seconds"])
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
            stage, notes = train_autoencoder(config, in_memory(task.train), seconds)
            real = task.reference.columns["image"][:600]
            self.values(name, lambda: {**notes, **self.reconstruction(stage, real)}, settings)
            return stage.state_dict()

        stage = build_first_stage(config.first_stage, EMOJI.size)
        stage.load_state_dict(self.tensors(name, trained, settings))
        return freeze(stage), config.first_stage

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
            max_steps=ENDLESS, batch_size=16, precision="bf16-mixed", accelerator="cpu", threads=1, progress=False
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


def train_autoencoder(config: LdmConfig, images: TensorTable, seconds: float) -> tuple[FirstStage, dict[str, float]]:
    """A first stage trained for so many CPU seconds, and its held-in facts (`ae_steps`, `ae_seconds`)."""
    if config.first_stage.kind == "pixels":
        return IdentityFirstStage(), {"ae_steps": 0.0, "ae_seconds": 0.0}
    options = dataclasses.replace(config.first_stage, steps=ENDLESS)

    class Decay(Watch):
        """Tells the learning-rate decay how many steps the budget will allow."""

        def on_train_batch_end(self, *arguments: Any) -> None:
            super().on_train_batch_end(*arguments)
            options.steps = int(self.steps * seconds / max(self.seconds, 1e-3))

    watch = Decay(budget=seconds)
    folder = cache_dir("experiments")
    stage = train_first_stage(
        options, config.trainer, images, config.data.size, folder, config.seed, callbacks=[watch], save=False
    )
    return stage, {"ae_steps": float(watch.steps), "ae_seconds": watch.seconds}


def train_denoiser(config: LdmConfig, task: Task, stage: FirstStage | None, seconds: float) -> Denoiser:
    """Train a denoiser on cached latents (None: on pixels) for so many CPU seconds, caching included."""
    started = time.process_time()
    torch.manual_seed(config.seed)
    task = dataclasses.replace(task)
    stage = IdentityFirstStage() if stage is None else stage
    ldm = build_latent_diffusion(config, task, stage)
    train = table = in_memory(task.train)
    if config.first_stage.kind != "pixels" and task.name != "inpaint":
        with torch.no_grad():
            parts = [stage.moments(to_unit(part)).float() for part in train.columns["image"].split(128)]
        columns = {name: column for name, column in train.columns.items() if name != "image"}
        table = TensorTable({**columns, "moments": torch.cat(parts)})
    if config.diffusion.scale_by_std and config.first_stage.kind != "pixels":
        ldm.set_scale_factor(first_batch_scale(config, train, stage))
    holes = mask_bank(config.data.size, MASKS // 4, config.seed) if task.name == "inpaint" else None
    module = DiffusionTrainer(ldm, config, holes)
    watch = Watch(budget=seconds - (time.process_time() - started))
    batch_size = config.trainer.batch_size
    fit_arm(
        module,
        StepDataModule(table, batch_size, ENDLESS, config.seed),
        watch,
        config.trainer,
        batch_size=batch_size,
        grad_clip=config.optimiser.grad_clip,
    )
    assert module.ema is not None
    module.ema.copy_to(ldm)
    return Denoiser(task.name, ldm.eval(), watch.record(), config, task)


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
        stop_if_not_finite(float(loss.detach()), step, advice="a lower optimiser.lr", what="regression's loss")
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


def agreement(images: Tensor, maps: Tensor) -> float:
    """Intersection over union of the drawn objects with the map's (mean over images)."""
    drawn, wanted = foreground(images), maps > 0
    union = (drawn | wanted).sum((1, 2)).clamp(min=1)
    return float(((drawn & wanted).sum((1, 2)) / union).mean())
