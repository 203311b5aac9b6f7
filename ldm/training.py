"""One training run of a latent diffusion model, from data to metrics; `train.py` is its command line."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.data.cache import FeatureCache, fingerprint_module
from common.data.sampling import (
    StepBatchSampler,
    Table,
    TensorTable,
    derive_seed,
    step_generator,
)
from common.ema import Ema
from common.errors import UserError
from common.files import write_atomically, write_json
from common.options import check_trainer, free_options
from common.processes import is_main_process
from common.training import EveryNSteps, open_run_folder, train
from ldm.autoencoder import FirstStage
from ldm.config import LdmConfig, TrainerConfig
from ldm.diffusion import LatentDiffusion, NoiseSchedule
from ldm.first_stage import build_first_stage, freeze, load_first_stage, to_unit, train_first_stage
from ldm.lr_schedules import scaled_lr, warmup_then
from ldm.model import ConditionedUNet, UNet
from ldm.optimisers import MuonAdam
from ldm.streaming import ShardStream, data_module
from ldm.tasks import BertConditioner, StateTable, Task, mask_bank, prepare

MASKS = 2000  # inpainting masks drawn once and picked from at random
# What two starts of one run may disagree on: none of it changes the trained weights.
FREE_OPTIONS = free_options(
    "stages",
    "export_pipeline",
    "sampling",
    "data.cache_latents",
    "data.workers",
    "data.max_memory_gb",
    "data.eval_images",
)


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


def share_of_step(
    module: pl.LightningModule, batch_idx: int, options: TrainerConfig, seed: int
) -> tuple[torch.Generator, int, slice]:
    """Generator of everything random in this optimiser step, number of this micro-batch, and which rows of what is
    drawn for the global batch belong to this micro-batch of this process."""
    part = batch_idx % options.accumulate
    size = options.batch_size // options.accumulate
    mine = slice(part * size + module.trainer.global_rank, (part + 1) * size, module.trainer.world_size)
    return step_generator(seed, module.trainer.global_step, module.device), part, mine


def draw_latents(
    ldm: LatentDiffusion, batch: Mapping[str, Tensor], generator: torch.Generator, batch_size: int, mine: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled posterior samples z [B, C, H, W] of a batch's images (or cached moments), steps t [B], noise like z, and
    two more uniform numbers a sample [2, B]; drawn for the global batch, returned for the rows `mine`."""
    device = generator.device
    uniform_3B = torch.rand(3, batch_size, generator=generator, device=device)[:, mine]
    with torch.no_grad():
        if "moments" in batch:
            moments = batch["moments"]
        else:
            moments = ldm.first_stage_model.moments(to_unit(batch["image"]))  # type: ignore[operator]
    latent_shape = (batch_size, ldm.first_stage_model.embed_dim, *moments.shape[2:])
    posterior_noise, noise_BCHW = torch.randn(2, *latent_shape, generator=generator, device=device)[:, mine]
    z_BCHW = ldm.scale_factor * ldm.first_stage_model.latent_from_moments(moments, posterior_noise)  # type: ignore[operator]
    return z_BCHW, (uniform_3B[0] * ldm.schedule.timesteps).long(), noise_BCHW, uniform_3B[1:]


class BatchMeans:
    """Logs the means over the whole global batch: micro-batches here, processes by Lightning."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}

    def log(self, module: pl.LightningModule, logs: Mapping[str, Tensor], part: int, parts: int) -> None:
        if part == 0:
            self._sums = {}
        self._sums = {k: self._sums.get(k, 0.0) + v.detach() for k, v in logs.items()}
        if part == parts - 1:
            means = {f"train/{k}": v / parts for k, v in self._sums.items()}
            module.log_dict(means, sync_dist=module.trainer.world_size > 1)


class DiffusionTrainer(pl.LightningModule):
    """Eq. 2 and 3: denoise latents.

    Everything random in a step is a function of (seed, step), drawn for the global batch and shared out among processes
    and micro-batches, so that resuming, caching latents, adding processes and accumulating gradients change nothing.
    """

    def __init__(self, ldm: LatentDiffusion, config: LdmConfig, holes: Tensor | None = None) -> None:
        super().__init__()
        self.ldm, self.config = ldm, config
        self.ema = Ema(ldm, config.optimiser.ema_decay) if config.optimiser.ema_decay > 0 else None
        self.register_buffer("holes", holes, persistent=False)
        self._means = BatchMeans()
        if config.trainer.compile:
            ldm.model.diffusion_model.compile()  # type: ignore[union-attr,operator]

    def configure_optimizers(self) -> Any:
        options, trainer = self.config.optimiser, self.config.trainer
        lr = scaled_lr(options.lr, trainer.batch_size) if options.scale_lr else options.lr
        optimiser: torch.optim.Optimizer
        if options.name == "muon":
            optimiser = MuonAdam(self.ldm, lr, options.weight_decay)
        else:
            optimiser = torch.optim.AdamW(
                self.ldm.trainable_parameters(), lr=lr, weight_decay=options.weight_decay, foreach=True
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, warmup_then(options.schedule, options.warmup, trainer.max_steps)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        options = self.config.trainer
        generator, part, mine = share_of_step(self, batch_idx, options, self.config.seed)
        if self.config.unet.dropout > 0:  # it draws from the global generator, which no checkpoint holds
            torch.manual_seed(derive_seed(self.config.seed, self.trainer.global_step, part, self.trainer.global_rank))
        z_BCHW, t_B, noise, uniform_2B = draw_latents(self.ldm, batch, generator, options.batch_size, mine)
        columns = dict(batch)
        if self.holes is not None:
            rows = torch.randint(len(self.holes), (options.batch_size,), generator=generator, device=self.device)[mine]  # type: ignore[arg-type]
            columns["hole"] = self.holes[rows]  # type: ignore[index]
        cond = self.ldm.conditioning(raw_condition(self.config.task, columns, uniform_2B[0]), uniform_2B[1])
        loss, logs = self.ldm.loss(z_BCHW, t_B, noise, cond)
        self._means.log(self, logs, part, options.accumulate)
        return loss

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        # Not in on_train_batch_end, which comes after the callback that writes the checkpoint.
        super().optimizer_step(*args, **options)
        if self.ema is not None:
            self.ema.update(self.ldm)
        # Lightning would keep the gradients until after the next forward pass, beside its activations.
        self.zero_grad(set_to_none=True)


def first_batch_scale(config: LdmConfig, train: Table | ShardStream, first_stage: FirstStage) -> Tensor:
    """Unscaled latents of the run's first batch, from which `scale_by_std` takes the factor (appendix G)."""
    size = config.trainer.batch_size
    if isinstance(train, ShardStream):
        images = train.head(size)["image"]
    else:
        images = train.__getitems__(StepBatchSampler(len(train), size, 1, config.seed).batch(0))["image"]
    with torch.no_grad():
        moments = first_stage.moments(to_unit(images))
        shape = (len(images), first_stage.embed_dim, *moments.shape[2:])
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
        """Create or continue `config.run_dir`; opens the data and its task.

        Raises:
            UserError: the folder holds another run or cannot be written, an option is wrong, or the data are.
        """
        trainer = config.trainer
        if trainer.threads:
            torch.set_num_threads(trainer.threads)
        check_trainer(
            trainer,
            {"trainer.batch_size": trainer.batch_size},
            resume=config.resume,
            ema_decay=config.optimiser.ema_decay,
            grad_clip=config.optimiser.grad_clip,
        )
        halvings = 0 if config.first_stage.kind == "pixels" else len(config.first_stage.ch_mult) - 1
        if config.data.size < 1 or config.data.size % 2 ** (halvings + len(config.unet.channel_mult) - 1):
            raise UserError(
                f"--data.size {config.data.size} cannot be halved {halvings} times by the first stage and "
                f"{len(config.unet.channel_mult) - 1} times by the denoiser; "
                f"use a multiple of {2 ** (halvings + len(config.unet.channel_mult) - 1)}"
            )
        folder = Path(config.run_dir)
        open_run_folder(folder, config.resume, config_yaml, FREE_OPTIONS)
        tokenizer = saved_tokenizer(folder)
        task = prepare(config, tokenizer)
        if task.tokenizer is not None and tokenizer is None and is_main_process():
            task.tokenizer.save_pretrained(folder / ".tokenizer")
            (folder / ".tokenizer").rename(folder / "tokenizer")
        return cls(config, folder, task, is_main=is_main_process())

    @classmethod
    def existing(cls, folder: Path) -> Run:
        """A run that `train.py` has finished, for sampling and metrics; writes nothing."""
        from common.cli import parse_config

        config_file = folder / "config.yaml"
        if not config_file.is_file():
            raise UserError(f"{folder}: no config.yaml there; expected the folder of a finished run")
        config, _ = parse_config(LdmConfig, None, "", ["--config", str(config_file)])
        config.run_dir = str(folder)
        return cls(config, folder, prepare(config, saved_tokenizer(folder)))

    @property
    def finished(self) -> bool:
        """Whether the trained model is there already."""
        return self.config.resume == "auto" and (self.folder / "model.safetensors").is_file()

    def train_first_stage(self) -> None:
        """Train, resume or load the autoencoder."""
        started = time.perf_counter()
        config = self.config
        trained = self.folder / "first_stage" / "first_stage.safetensors"
        needed = config.first_stage.kind != "pixels" and not config.first_stage.weights
        if needed and "first_stage" not in config.stages and not trained.is_file():
            raise UserError(
                f"--stages lacks first_stage, but {trained} does not exist: add it, or give --first_stage.weights"
            )
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
        assert isinstance(self.task.train, TensorTable)
        images = self.task.train.columns["image"]

        def encode(indices: Any) -> dict[str, Tensor]:
            rows = images[torch.as_tensor(indices)]
            with torch.no_grad():
                return {"moments": torch.cat([first_stage.moments(to_unit(part)).float() for part in rows.split(128)])}

        cache = FeatureCache.open_or_build(
            self.folder / "latents",
            len(images),
            fingerprint_module(first_stage),
            table_fingerprint(images),
            encode,
            shard_size=4096,
            progress=self.config.trainer.progress and self.is_main,
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
        in_memory = isinstance(self.task.train, TensorTable)
        if config.init_from:
            load_weights(ldm, Path(config.init_from))
        cached = config.data.cache_latents and config.first_stage.kind != "pixels" and in_memory
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
        trainer = fit_stage(
            folder,
            module,
            table,
            trainer_config,
            config.seed,
            config.resume,
            grad_clip=config.optimiser.grad_clip,
            workers=config.data.workers,
            callbacks=[*grids, *(callbacks or [])],
        )
        self.is_main = trainer.is_global_zero
        if module.ema is not None:
            module.ema.copy_to(ldm)
        self.ldm = ldm.cpu().eval()
        self.seconds["diffusion"] = time.perf_counter() - started
        if self.is_main:
            save_state(self.folder / "model.safetensors", own_state(self.ldm))
            if config.export_pipeline and exportable(self.task, config):
                export_pipeline(self.ldm, self.task, config, self.folder / "pipeline")

    def load(self) -> LatentDiffusion:
        """The finished model of this folder (averaged weights)."""
        weights = self.folder / "model.safetensors"
        if not weights.is_file():
            raise UserError(f"{weights}: no such file; train first (python train.py --run_dir {self.folder})")
        options, size = self.config.first_stage, self.config.data.size
        if options.weights and Path(options.weights).is_dir():  # its own config.json says how it is built
            first_stage = load_first_stage(Path(options.weights), options, size)
        else:
            first_stage = build_first_stage(options, size)
        ldm = build_latent_diffusion(self.config, self.task, freeze(first_stage))
        load_state(ldm, weights, self.folder / "config.yaml", own_state(ldm))
        self.first_stage, self.ldm = first_stage, ldm.eval()
        return self.ldm

    def evaluate(self, seconds: float) -> dict[str, Any]:
        """Sample, compare with held-out images, write metrics.json and the final grid."""
        from ldm.evaluate import evaluate_run

        ldm = self.ldm if self.ldm is not None else self.load()
        metrics = evaluate_run(ldm, self.task, self.config, self.folder)
        metrics["seconds"] = {**{k: round(v, 1) for k, v in self.seconds.items()}, "total": round(seconds, 1)}
        earlier = self.folder / "metrics.json"
        if not self.seconds and earlier.is_file():  # nothing was trained now: the training's own times stand
            metrics["seconds"] = json.loads(earlier.read_text()).get("seconds", metrics["seconds"])
        write_json(earlier, metrics)
        return metrics


def fit_stage(
    folder: Path,
    module: pl.LightningModule,
    table: Table | ShardStream,
    options: TrainerConfig,
    seed: int,
    resume: str,
    *,
    grad_clip: float,
    workers: int = 0,
    callbacks: list[pl.Callback] | None = None,
) -> pl.Trainer:
    """Train or resume `module` on the rows of `table`; checkpoints and logs go below `folder`.

    Args:
        grad_clip: largest norm of the gradient; 0 does not clip.
        workers: loader processes for data that are not in memory.
    """
    data = data_module(
        table,
        options.batch_size,
        options.max_steps,
        seed,
        workers=0 if isinstance(table, TensorTable) else workers,
        accumulate=options.accumulate,
    )
    return train(
        folder,
        module,
        data,
        options,
        steps=options.max_steps,
        batch_size=options.batch_size,
        resume=resume,
        grad_clip=grad_clip,
        callbacks=callbacks or (),
    )


def save_state(path: Path, state: Mapping[str, Tensor], notes: dict[str, str] | None = None) -> None:
    """Write tensors, and notes about them, as one .safetensors file."""
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    write_atomically(path, lambda temporary: save_file(weights, str(temporary), metadata=notes))


def load_state(module: nn.Module, path: Path, config_file: Path, wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """Fill `module` from a .safetensors file that must hold exactly the tensors `wanted`; returns the file's notes.

    Raises:
        UserError: truncated, or of another network than its config says.
    """
    try:
        with safe_open(path, "pt") as file:
            notes, state = file.metadata() or {}, {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file: {error}") from None
    wrong = wanted.keys() ^ state.keys() or {k for k in wanted if wanted[k].shape != state[k].shape}
    if wrong:
        raise UserError(f"{path} is of another network than {config_file}: {min(wrong)} differs")
    module.load_state_dict(state, strict=False)
    return notes


def own_state(ldm: LatentDiffusion) -> dict[str, Tensor]:
    """The state dict without a second copy of the first stage, which inpainting also uses as its conditioner."""
    shared = ldm.cond_stage_model is ldm.first_stage_model
    return {k: v for k, v in ldm.state_dict().items() if not (shared and k.startswith("cond_stage_model."))}


def saved_tokenizer(folder: Path) -> Any:
    """The tokenizer that a text run has learned, or None."""
    if not (folder / "tokenizer").is_dir():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


def load_weights(ldm: LatentDiffusion, path: Path) -> None:
    """Second-stage weights (denoiser, conditioner) of another run's model.safetensors, or of an exported pipeline."""
    if path.is_dir():
        from ldm.convert import unet_from_diffusers_dir

        text = path / "text_encoder" / "model.safetensors"
        if not text.is_file():
            raise UserError(f"init_from {path}: expected a pipeline folder with unet/ and text_encoder/")
        given = {f"model.diffusion_model.{k}": v for k, v in unet_from_diffusers_dir(path).state_dict().items()}
        given |= {f"cond_stage_model.bert.{k}": v.float() for k, v in load_file(text).items()}
    elif path.is_file():
        given = load_file(path)
    else:
        raise UserError(f"init_from {path}: no such file; expected a run's model.safetensors or a pipeline folder")
    parts = ("model.", "cond_stage_model.")
    given = {k: v for k, v in given.items() if k.startswith(parts)}
    own = {k: v for k, v in ldm.state_dict().items() if k.startswith(parts)}
    wrong = [k for k in own if k not in given or given[k].shape != own[k].shape] + [k for k in given if k not in own]
    if wrong:
        raise UserError(f"init_from {path}: {len(wrong)} tensors do not fit this configuration, e.g. {wrong[0]}")
    ldm.load_state_dict(given, strict=False)


def table_fingerprint(images: Tensor) -> str:
    """Checksum of the training images themselves."""
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
        sample_size=config.data.size // ldm.first_stage_model.downsampling,  # type: ignore[operator,arg-type]
        dtype=dtype,
    )
