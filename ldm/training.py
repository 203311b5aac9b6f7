"""One training run of a latent diffusion model, from data to metrics; `train.py` is its command line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.data.cache import FeatureCache, fingerprint_module
from common.data.sampling import StepBatchSampler, StepDataModule, TensorTable, step_generator
from common.errors import UserError
from common.files import write_atomically, write_json
from common.training import EveryNSteps, build_trainer, latest_checkpoint, open_run_folder
from ldm.autoencoder import FirstStage
from ldm.config import LdmConfig
from ldm.diffusion import Ema, LatentDiffusion, NoiseSchedule
from ldm.first_stage import build_first_stage, freeze, to_unit, train_first_stage
from ldm.lr_schedules import scaled_lr, warmup_then
from ldm.model import ConditionedUNet, UNet
from ldm.tasks import BertConditioner, StateTable, Task, mask_bank, prepare

MASKS = 2000  # inpainting masks drawn once and picked from at random


def build_latent_diffusion(config: LdmConfig, task: Task, first_stage: FirstStage) -> LatentDiffusion:
    """Denoiser and conditioner for a task, around a frozen first stage."""
    options = config.unet
    channels = first_stage.embed_dim
    extra = task.concat_channels if task.name != "inpaint" else channels + 1
    crossattn = task.conditioning_key == "crossattn"
    unet = UNet(
        in_channels=channels + extra,
        out_channels=channels,
        model_channels=options.model_channels,
        channel_mult=list(options.channel_mult),
        num_res_blocks=options.num_res_blocks,
        attention_resolutions=list(options.attention_resolutions),
        num_heads=options.num_heads,
        num_head_channels=options.num_head_channels,
        dropout=options.dropout,
        use_scale_shift_norm=options.use_scale_shift_norm,
        resblock_updown=options.resblock_updown,
        use_spatial_transformer=crossattn,
        transformer_depth=options.transformer_depth,
        context_dim=task.context_dim if crossattn else None,
        num_classes=task.num_classes if task.conditioning_key == "adm" else None,
        image_size=config.data.size // first_stage.downsampling,
        norm_groups=options.norm_groups,
    )
    conditioner: Any = task.conditioner
    if task.name == "inpaint":
        conditioner = "first_stage"
    elif task.conditioning_key is not None and conditioner is None:
        conditioner = nn.Identity()
    diffusion = config.diffusion
    return LatentDiffusion(
        first_stage,
        ConditionedUNet(unet, task.conditioning_key),  # type: ignore[arg-type]
        conditioner,
        conditioning_key=task.conditioning_key,
        cond_stage_key="condition",
        schedule=NoiseSchedule(
            diffusion.schedule,
            diffusion.timesteps,
            diffusion.linear_start,
            diffusion.linear_end,
            v_posterior=diffusion.v_posterior,
            prediction=diffusion.prediction,
        ),
        loss=diffusion.loss,
        elbo_weight=diffusion.elbo_weight,
        learn_logvar=diffusion.learn_logvar,
        scale_factor=diffusion.scale_factor,
        cond_drop=config.conditioner.drop if task.name in ("class", "text", "layout") else 0.0,
        null_input=null_input(task),
    )


def null_input(task: Task) -> Tensor | None:
    """The raw condition that means "none": the empty caption, the null class; None means zeros."""
    if task.name == "class":
        assert task.num_classes is not None
        return torch.tensor([task.num_classes - 1])
    if task.name == "text":
        if isinstance(task.conditioner, StateTable):
            return torch.tensor([task.conditioner.null])
        from ldm.tasks import tokenize

        return tokenize(task.tokenizer, [""])
    return None


def raw_condition(task_name: str, columns: Mapping[str, Tensor], pick_B: Tensor | None = None) -> dict[str, Tensor]:
    """The batch entries that `LatentDiffusion.conditioning` reads, from a table's columns.

    Args:
        pick_B: numbers in [0, 1) that choose among the phrasings of each caption; None takes the first.
    """
    if task_name == "text":
        tokens = columns["tokens"]
        if pick_B is None:
            return {"condition": tokens[:, 0]}
        rows = (pick_B * tokens.shape[1]).long().clamp_(max=tokens.shape[1] - 1)
        return {"condition": tokens[torch.arange(len(tokens), device=tokens.device), rows]}
    if task_name == "class":
        return {"condition": columns["label"]}
    if task_name == "layout":
        return {"condition": columns["layout"]}
    if task_name == "semantic":
        return {"condition": columns["label_map"]}
    if task_name == "superres":
        return {"condition": to_unit(columns["low"])}
    if task_name == "inpaint":
        hole_B1HW = columns["hole"]
        # Unknown pixels are black before encoding; the mask itself enters as -1 (known) and +1 (to be painted).
        return {"condition": torch.where(hole_B1HW > 0.5, -1.0, to_unit(columns["image"])), "mask": hole_B1HW * 2 - 1}
    return {}


class DiffusionTrainer(pl.LightningModule):
    """Eq. 2 and 3: denoise latents. Everything random in a step is a function of (seed, step), drawn for the global batch
    and shared out among the processes, so that resuming, caching latents and adding processes change nothing."""

    def __init__(self, ldm: LatentDiffusion, config: LdmConfig, holes: Tensor | None = None) -> None:
        super().__init__()
        self.ldm, self.config = ldm, config
        self.ema = Ema(ldm, config.optimiser.ema_decay) if config.optimiser.ema_decay > 0 else None
        self.register_buffer("holes", holes, persistent=False)
        if config.trainer.compile:
            ldm.model.diffusion_model.compile()  # type: ignore[union-attr,operator]

    def configure_optimizers(self) -> Any:
        options, trainer = self.config.optimiser, self.config.trainer
        lr = scaled_lr(options.lr, trainer.batch_size) if options.scale_lr else options.lr
        optimiser = torch.optim.AdamW(
            self.ldm.trainable_parameters(), lr=lr, weight_decay=options.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, warmup_then(options.schedule, options.warmup, trainer.max_steps)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        accumulate = self.config.trainer.accumulate
        micro_step = self.trainer.global_step * accumulate + batch_idx % accumulate
        generator = step_generator(self.config.seed, micro_step, self.device)
        global_batch = self.config.trainer.batch_size // accumulate
        mine = slice(self.trainer.global_rank, None, self.trainer.world_size)
        uniform_3B = torch.rand(3, global_batch, generator=generator, device=self.device)[:, mine]
        with torch.no_grad():
            if "moments" in batch:
                moments = batch["moments"]
            else:
                moments = self.ldm.first_stage_model.moments(to_unit(batch["image"]))  # type: ignore[operator]
        latent_shape = (global_batch, self.ldm.model.diffusion_model.out_channels, *moments.shape[2:])  # type: ignore[union-attr]
        posterior_noise, noise = torch.randn(2, *latent_shape, generator=generator, device=self.device)[:, mine]
        z_BCHW = self.ldm.scale_factor * self.ldm.first_stage_model.latent_from_moments(moments, posterior_noise)  # type: ignore[operator]
        t_B = (uniform_3B[0] * self.ldm.schedule.timesteps).long()
        columns = dict(batch)
        if self.holes is not None:
            rows = torch.randint(len(self.holes), (global_batch,), generator=generator, device=self.device)[mine]  # type: ignore[arg-type]
            columns["hole"] = self.holes[rows]  # type: ignore[index]
        cond = self.ldm.conditioning(raw_condition(self.config.task, columns, uniform_3B[1]), uniform_3B[2])
        loss, logs = self.ldm.loss(z_BCHW, t_B, noise, cond)
        self.log_dict({f"train/{k}": v for k, v in logs.items()})
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.ema is not None and (batch_idx + 1) % self.config.trainer.accumulate == 0:
            self.ema.update(self.ldm)


def first_batch_scale(config: LdmConfig, train: TensorTable, first_stage: FirstStage) -> Tensor:
    """Unscaled latents of the run's first batch, from which `scale_by_std` takes the factor (appendix G)."""
    rows = StepBatchSampler(len(train), config.trainer.batch_size, 1, config.seed).batch(0)
    with torch.no_grad():
        moments = first_stage.moments(to_unit(train.columns["image"][torch.as_tensor(rows)]))
        shape = (len(rows), first_stage.embed_dim, *moments.shape[2:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(config.seed))
        return first_stage.latent_from_moments(moments, noise)


@dataclass
class Run:
    """A run folder and what is in it."""

    config: LdmConfig
    folder: Path
    task: Task
    first_stage: FirstStage | None = None
    ldm: LatentDiffusion | None = None
    is_main: bool = True
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, config: LdmConfig, config_yaml: str) -> Run:
        """Create or continue `config.run_dir`; opens the data and its task."""
        if config.trainer.threads:
            torch.set_num_threads(config.trainer.threads)
        if "fsdp" in config.trainer.strategy and config.optimiser.ema_decay > 0:
            raise UserError(
                "--trainer.strategy fsdp shards the weights that the EMA follows: set --optimiser.ema_decay 0"
            )
        folder = Path(config.run_dir)
        open_run_folder(folder, config.resume, config_yaml)
        tokenizer = None
        if (folder / "tokenizer").is_dir():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        task = prepare(config, tokenizer)
        if task.tokenizer is not None and tokenizer is None:
            task.tokenizer.save_pretrained(folder / "tokenizer")
        return cls(config, folder, task)

    def train_first_stage(self) -> None:
        """Train, resume or load the autoencoder."""
        started = time.perf_counter()
        config = self.config
        self.first_stage = train_first_stage(
            config.first_stage,
            config.trainer,
            self.task.train,
            config.data.size,
            self.folder / "first_stage",
            config.seed,
            resume=config.resume != "never",
        )
        self.seconds["first_stage"] = time.perf_counter() - started

    def latents(self, first_stage: FirstStage) -> TensorTable:
        """The training table with images replaced by their moments, encoded once and kept on disk."""
        images = self.task.train.columns["image"]

        def encode(indices: Any) -> dict[str, Tensor]:
            with torch.no_grad():
                return {"moments": first_stage.moments(to_unit(images[torch.as_tensor(indices)])).float()}

        cache = FeatureCache.open_or_build(
            self.folder / "latents",
            len(images),
            fingerprint_module(first_stage),
            table_fingerprint(images),
            encode,
            shard_size=4096,
        )
        columns = {k: v for k, v in self.task.train.columns.items() if k != "image" or self.config.task == "inpaint"}
        return TensorTable({**columns, **cache[slice(None)]})

    def train_diffusion(self, callbacks: list[pl.Callback] | None = None) -> None:
        """Train or resume the denoiser; afterwards `self.ldm` has the averaged weights."""
        started = time.perf_counter()
        assert self.first_stage is not None
        config, trainer_config = self.config, self.config.trainer
        torch.manual_seed(config.seed)
        ldm = build_latent_diffusion(config, self.task, self.first_stage)
        cached = config.data.cache_latents and config.first_stage.kind != "pixels"
        table = self.latents(self.first_stage) if cached else self.task.train
        if config.diffusion.scale_by_std and config.first_stage.kind != "pixels":
            ldm.set_scale_factor(first_batch_scale(config, self.task.train, self.first_stage))
        holes = mask_bank(config.data.size, MASKS, config.seed) if config.task == "inpaint" else None
        module = DiffusionTrainer(ldm, config, holes)
        folder = self.folder / "diffusion"

        def draw(step: int) -> None:
            from ldm.sample import task_grid

            with module.ema.swapped_into(ldm) if module.ema else torch.no_grad():
                task_grid(ldm, self.task, config, folder / "samples" / f"step_{step:06d}.png")

        grids = [EveryNSteps(trainer_config.sample_every, draw)] if trainer_config.sample_every else []
        trainer = build_trainer(
            folder,
            steps=trainer_config.max_steps,
            batch_size=trainer_config.batch_size,
            precision=trainer_config.precision,
            accumulate=trainer_config.accumulate,
            accelerator=trainer_config.accelerator,
            devices=trainer_config.devices,
            num_nodes=trainer_config.num_nodes,
            strategy=trainer_config.strategy,
            grad_clip=config.optimiser.grad_clip or None,
            checkpoint_every=trainer_config.checkpoint_every,
            log_every=trainer_config.log_every,
            progress=trainer_config.progress,
            callbacks=[*grids, *(callbacks or [])],
        )
        data = StepDataModule(
            table,
            trainer_config.batch_size,
            trainer_config.max_steps,
            config.seed,
            workers=config.data.workers,
            accumulate=trainer_config.accumulate,
        )
        checkpoint: Path | None = None
        if config.resume == "auto":
            checkpoint = latest_checkpoint(folder)
        elif config.resume != "never":
            checkpoint = Path(config.resume)
        trainer.fit(module, data, ckpt_path=checkpoint)
        self.is_main = trainer.is_global_zero
        if module.ema is not None:
            module.ema.copy_to(ldm)
        self.ldm = ldm.cpu().eval()
        self.seconds["diffusion"] = time.perf_counter() - started
        if self.is_main:
            weights = {k: v.detach().cpu().contiguous().clone() for k, v in self.ldm.state_dict().items()}
            write_atomically(self.folder / "model.safetensors", lambda temporary: save_file(weights, str(temporary)))
            if config.export_pipeline and exportable(self.task, config):
                export_pipeline(self.ldm, self.task, config, self.folder / "pipeline")

    def load(self) -> LatentDiffusion:
        """The finished model of this folder (averaged weights)."""
        weights = self.folder / "model.safetensors"
        if not weights.is_file():
            raise UserError(f"{weights}: no such file; train first (python train.py --run_dir {self.folder})")
        first_stage = freeze(build_first_stage(self.config.first_stage, self.config.data.size))
        ldm = build_latent_diffusion(self.config, self.task, first_stage)
        ldm.load_state_dict(load_file(weights))
        self.first_stage, self.ldm = first_stage, ldm.eval()
        return self.ldm

    def evaluate(self, seconds: float) -> dict[str, Any]:
        """Sample, compare with held-out images, write metrics.json and the final grid."""
        from ldm.evaluate import evaluate_run

        ldm = self.ldm if self.ldm is not None else self.load()
        metrics = evaluate_run(ldm, self.task, self.config, self.folder)
        metrics["seconds"] = {**{k: round(v, 1) for k, v in self.seconds.items()}, "total": round(seconds, 1)}
        write_json(self.folder / "metrics.json", metrics)
        return metrics


def table_fingerprint(images: Tensor) -> str:
    """Checksum of the training images themselves."""
    import hashlib

    return hashlib.sha256(images.numpy().tobytes() + str(tuple(images.shape)).encode()).hexdigest()


def exportable(task: Task, config: LdmConfig) -> bool:
    """Whether stock diffusers can carry the model: a KL first stage and a text condition through a BertModel."""
    return task.name == "text" and isinstance(task.conditioner, BertConditioner) and config.first_stage.kind == "kl"


def export_pipeline(
    ldm: LatentDiffusion, task: Task, config: LdmConfig, folder: Path, dtype: torch.dtype = torch.float16
) -> None:
    """Write the model as a stock StableDiffusionPipeline directory (the teacher contract)."""
    from ldm.convert import write_pipeline

    diffusion = config.diffusion
    write_pipeline(
        folder,
        unet=ldm.model.diffusion_model,  # type: ignore[arg-type]
        vae=ldm.first_stage_model,  # type: ignore[arg-type]
        text_encoder=ldm.cond_stage_model.bert,  # type: ignore[union-attr]
        tokenizer=task.tokenizer,
        scaling_factor=float(ldm.scale_factor),
        beta_start=diffusion.linear_start,
        beta_end=diffusion.linear_end,
        timesteps=diffusion.timesteps,
        prediction={"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[diffusion.prediction],
        sample_size=config.data.size // ldm.first_stage_model.downsampling,  # type: ignore[operator]
        dtype=dtype,
    )
