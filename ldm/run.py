"""What a run's folder holds: its configuration, the task's data, cached latents, the finished model, a pipeline."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.cli import read_run_config
from common.data.cache import MODEL, FeatureCache, fingerprint_module, fingerprint_path, fingerprint_strings, names_of
from common.data.sampling import TensorTable
from common.errors import UserError
from common.files import read_object
from common.images import to_unit
from common.metrics.evaluate import say_few
from common.metrics.perceptual import perceptual_distance
from common.options import Range, free_options, refuse_large_batch
from common.pretrained import from_folder
from common.processes import is_main_process
from common.training import Inputs, check_trainer, holds_work, open_run, say_other_inputs
from common.weights import check_weights, load_weights, read_notes, read_weights, save_weights
from ldm.autoencoder import AutoencoderKL, FirstStage, VQModel
from ldm.config import LdmConfig
from ldm.convert import autoencoder_from_diffusers_dir, described, unet_from_diffusers_dir, write_pipeline
from ldm.diffusion import LatentDiffusion, NoiseSchedule
from ldm.first_stage import (
    adopted,
    build_described,
    build_first_stage,
    describe,
    freeze,
    given_options,
    load_first_stage,
)
from ldm.kept import keep_items, kept_items
from ldm.layouts import first_stage_to_diffusers, unet_to_diffusers
from ldm.model import ConditionedUNet, UNet
from ldm.samplers import ddim_timesteps
from ldm.streaming import ShardStream
from ldm.tasks import BertConditioner, Task, build_task, null_input, prepare, whole_folder

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


def build_denoiser(config: LdmConfig, task: Task, first_stage: FirstStage) -> UNet:
    """The U-Net for a task's conditions in the latent space of a first stage.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    channels = first_stage.embed_dim
    extra = task.concat_channels if task.name != "inpaint" else channels + 1
    crossattn = task.conditioning_key == "crossattn"
    return UNet(
        config.unet,
        channels + extra,
        channels,
        use_spatial_transformer=crossattn,
        context_dim=task.context_dim if crossattn else None,
        num_classes=task.num_classes if task.conditioning_key == "adm" else None,
        image_size=config.data.size // first_stage.downsampling,
    )


def build_latent_diffusion(config: LdmConfig, task: Task, first_stage: FirstStage) -> LatentDiffusion:
    """Denoiser and conditioner for a task, around a frozen first stage."""
    unet = build_denoiser(config, task, first_stage)
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


# Options that only say where an input lies, by what messages call it.
PLACES = {
    "data": ["data.path", "data.eval_path"],
    "first stage": ["first_stage.weights"],
    "first stage's starting weights": ["first_stage.init_from"],
    "starting weights": ["init_from"],
    "text encoder": ["conditioner.encoder"],
}


def inputs_of(config: LdmConfig, task: Task) -> Inputs:
    """Fingerprints of what a run learns from."""
    given = {
        "first stage": config.first_stage.weights,
        "first stage's starting weights": config.first_stage.init_from,
        "starting weights": config.init_from,
        "text encoder": config.conditioner.encoder if config.conditioner.kind == "frozen" else None,
    }
    inputs: dict[str, Callable[[], str] | str] = {
        name: partial(fingerprint_path, Path(path), MODEL)
        for name, path in given.items()
        if path and Path(path).exists()
    }
    inputs["data"] = task.fingerprint
    if task.classes:
        inputs["classes"] = names_of(task.classes)
    if task.tokenizer is not None:
        inputs["tokenizer"] = fingerprint_strings([task.tokenizer.backend_tokenizer.to_str()])
    return inputs


@dataclass
class Run:
    """A run folder and what is in it."""

    config: LdmConfig
    folder: Path
    task: Task

    @classmethod
    def open(cls, config: LdmConfig, config_yaml: str) -> Run:
        """Create or continue `config.run_dir`; opens the data and its task.

        Raises:
            UserError: the folder holds another run or cannot be written, an option is wrong, or the data are.
        """
        config.first_stage = given_options(config.first_stage, config.data.size)
        check_options(config)
        opened = open_run(config, config_yaml, FREE_OPTIONS, PLACES)
        folder = opened.path
        tokenizer = saved_tokenizer(folder) if holds_work(folder) else None
        start = None if config.init_from is None or tokenizer is not None else Path(config.init_from)
        task = prepare(config, tokenizer if start is None else tokenizer_beside(start, config))
        if "evaluate" in config.stages and is_main_process():
            say_few(min(config.sampling.metric_images, len(task.reference)))
        run = cls(config, folder, task)
        if not run.finished:
            check_networks(config, task)
            if not isinstance(task.train, ShardStream):
                refuse_large_batch("trainer.batch_size", config.trainer.batch_size, len(task.train))
                if needs_first_stage(config):
                    refuse_large_batch("first_stage.batch_size", config.first_stage.batch_size, len(task.train))
        inputs = inputs_of(config, task)
        if start is not None:
            say_other_inputs(start.parent, inputs, ["classes"])
        opened.begin(inputs)
        if task.tokenizer is not None and tokenizer is None and is_main_process():
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
            task.tokenizer.save_pretrained(folder / ".tokenizer")
            (folder / ".tokenizer").rename(folder / "tokenizer")
        return run

    @classmethod
    def existing(cls, folder: Path, data: bool = True, images: Path | None = None) -> Run:
        """A run that `train.py` has finished, for sampling and metrics; writes nothing.

        Args:
            data: open the data that it was trained on; sampling needs only what the folder keeps of them.
            images: pictures of the user's to measure with, in place of those held out.
        """
        config = read_run_config(LdmConfig, folder)
        config.run_dir = str(folder)
        if about := first_stage_note(folder):
            config.first_stage = adopted(config.first_stage, about)
        tokenizer = saved_tokenizer(folder)
        kept = None if data and images is None else kept_items(folder)
        if images is None:
            task = prepare(config, tokenizer) if kept is None else build_task(config, kept, kept, tokenizer)
            return cls(config, folder, task)
        config.data = replace(config.data, name="folder", path=str(images))
        own = whole_folder(config.data)
        if kept is not None and config.task == "class" and own.classes and list(own.classes) != kept.classes:
            raise UserError(
                f"--images {images} has the classes {', '.join(own.classes[:3])}, ...; {folder} was trained on "
                f"{', '.join(kept.classes[:3])}, ...: expected the same, in the same order"
            )
        return cls(config, folder, build_task(config, kept or own, own, tokenizer))

    @property
    def latent_factor(self) -> int:
        """f: by which the first stage makes a picture's sides smaller."""
        stage = self.config.first_stage
        return 1 if stage.kind == "pixels" else 2 ** (len(stage.ch_mult) - 1)

    @property
    def finished(self) -> bool:
        """Whether the trained model is there already."""
        return self.config.resume == "auto" and (self.folder / "model.safetensors").is_file()

    def latents(self, first_stage: FirstStage, folder: Path | None = None) -> TensorTable:
        """The training table with images replaced by their moments, encoded once and kept on disk.

        Args:
            folder: whose latents/ keeps them; None is this run's own.
        """
        assert isinstance(self.task.train, TensorTable)
        images = self.task.train.columns["image"]

        def encode(indices: Any) -> dict[str, Tensor]:
            rows = images[torch.as_tensor(indices)]
            with torch.no_grad():
                return {"moments": torch.cat([first_stage.moments(to_unit(part)).float() for part in rows.split(128)])}

        cache = FeatureCache.open_or_build(
            (folder or self.folder) / "latents",
            len(images),
            fingerprint_module(first_stage),
            table_fingerprint(images),
            encode,
            shard_size=4096,
            progress=self.config.trainer.progress and is_main_process(),
        )
        columns = {k: v for k, v in self.task.train.columns.items() if k != "image" or self.config.task == "inpaint"}
        return TensorTable({**columns, **cache[slice(None)]})

    def load(self) -> LatentDiffusion:
        """The finished model of this folder (averaged weights)."""
        weights = self.folder / "model.safetensors"
        if not weights.is_file():
            raise UserError(f"{weights}: no such file; train first (python train.py --run_dir {self.folder})")
        options, size = self.config.first_stage, self.config.data.size
        if about := first_stage_note(self.folder):
            first_stage: FirstStage = build_described(about)
        elif options.weights and Path(options.weights).is_dir():  # a run from before the file said it
            first_stage = load_first_stage(Path(options.weights), options, size)
        else:
            first_stage = build_first_stage(options, size)
        ldm = build_latent_diffusion(self.config, self.task, freeze(first_stage))
        load_weights(ldm, weights, against=str(self.folder / "config.yaml"), wanted=own_state(ldm))
        return ldm.eval()

    def save(self, ldm: LatentDiffusion) -> None:
        """Write the finished model, and for stock diffusers a pipeline where it can carry the model."""
        keep_items(self.task, self.folder)
        save_weights(
            self.folder / "model.safetensors", own_state(ldm), {"config": json.dumps(about_model(ldm, self.config))}
        )
        self.export(ldm)

    @property
    def exported(self) -> bool:
        """Whether the pipeline is there already, or is not to be."""
        wanted = self.config.export_pipeline and self.task.name == "text"
        return not wanted or (self.folder / "pipeline" / "model_index.json").is_file()

    def export(self, ldm: LatentDiffusion) -> None:
        """Write the pipeline for stock diffusers where it can carry the model."""
        if self.config.export_pipeline and not_exportable(ldm, self.task) is None:
            export_pipeline(ldm, self.task, self.config, self.folder / "pipeline")


def about_model(ldm: LatentDiffusion, config: LdmConfig) -> dict[str, Any]:
    """What the header of model.safetensors says of the networks; `convert.py` and `Run.existing` read it."""
    unet: Any = ldm.model.diffusion_model
    about = {"unet": unet.config, "schedule": schedule_of(config)}
    first_stage, conditioner = ldm.first_stage_model, ldm.cond_stage_model
    if isinstance(conditioner, BertConditioner):
        about["conditioner"] = conditioner.bert.config.to_dict()
    if isinstance(first_stage, (AutoencoderKL, VQModel)):
        about["first_stage"] = describe(first_stage, config.data.size)
    return about


def schedule_of(config: LdmConfig) -> dict[str, Any]:
    """The noise schedule as `convert.py` names it."""
    diffusion = config.diffusion
    return {
        "kind": diffusion.schedule,
        "linear_start": diffusion.linear_start,
        "linear_end": diffusion.linear_end,
        "timesteps": diffusion.timesteps,
        "prediction": {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[diffusion.prediction],
    }


def first_stage_note(folder: Path) -> dict[str, Any] | None:
    """What a finished run's model.safetensors says of its first stage; None of pixels, or of an older run."""
    weights = folder / "model.safetensors"
    return described(read_notes(weights), weights).get("first_stage") if weights.is_file() else None


def needs_first_stage(config: LdmConfig) -> bool:
    """Whether this run trains its autoencoder."""
    return config.first_stage.kind != "pixels" and not config.first_stage.weights and "first_stage" in config.stages


def check_options(config: LdmConfig) -> None:
    """Refuse what would fail after work has begun.

    Raises:
        UserError: naming the option.
    """
    trainer, stage = config.trainer, config.first_stage
    check_trainer(
        trainer,
        {"trainer.batch_size": trainer.batch_size},
        resume=config.resume,
        ema_decay=config.optimiser.ema_decay,
        grad_clip=config.optimiser.grad_clip,
    )
    halvings = 0 if stage.kind == "pixels" else len(stage.ch_mult) - 1
    smallest = 2 ** (halvings + len(config.unet.channel_mult) - 1)
    if config.data.size % smallest:
        raise UserError(
            f"--data.size {config.data.size} cannot be halved {halvings} times by the first stage and "
            f"{len(config.unet.channel_mult) - 1} times by the denoiser; use a multiple of {smallest}"
        )
    if stage.train == "decoder" and not (stage.init_from and stage.kind == "kl"):
        raise UserError(
            "--first_stage.train decoder keeps the encoder as it is: it needs --first_stage.init_from and kind kl"
        )
    if stage.perceptual and needs_first_stage(config):
        perceptual_distance(stage.perceptual_trunk)
    if config.sampling.sampler != "ddpm":
        Range(1, config.diffusion.timesteps).check("sampling.steps", config.sampling.steps, int)
    if config.sampling.sampler in ("ddim", "plms"):
        ddim_timesteps(config.sampling.steps, config.diffusion.timesteps)
    if config.init_from is not None and not Path(config.init_from).exists():
        raise UserError(f"init_from {config.init_from}: no such file or folder")


def check_networks(config: LdmConfig, task: Task) -> None:
    """Refuse sizes that no network has and weights that do not fit them; nothing is trained.

    Raises:
        UserError: naming what does not fit.
    """
    options, size = config.first_stage, config.data.size
    given = [(name, path) for name in ("weights", "init_from") if (path := getattr(options, name))]
    first_stage: FirstStage
    try:
        if given and options.kind != "pixels":
            first_stage = load_first_stage(Path(given[0][1]), options, size, option=f"first_stage.{given[0][0]}")
        else:
            with torch.device("meta"):
                first_stage = build_first_stage(options, size)
        with torch.device("meta"):
            build_denoiser(config, task, first_stage)
    except ValueError as error:
        raise UserError(f"these options describe no network: {error}") from None


def own_state(ldm: LatentDiffusion) -> dict[str, Tensor]:
    """The state dict without a second copy of the first stage, which inpainting also uses as its conditioner."""
    shared = ldm.cond_stage_model is ldm.first_stage_model
    return {k: v for k, v in ldm.state_dict().items() if not (shared and k.startswith("cond_stage_model."))}


def saved_tokenizer(folder: Path) -> Any:
    """The tokenizer that a text run has learned, or None."""
    if not (folder / "tokenizer").is_dir():
        return None
    from transformers import AutoTokenizer

    return from_folder(AutoTokenizer, folder / "tokenizer")


def tokenizer_beside(start: Path, config: LdmConfig) -> Any:
    """The tokenizer that the weights of `init_from` were trained with: their embeddings mean its words.

    Raises:
        UserError: a text run's weights without one.
    """
    if config.task != "text" or config.conditioner.kind == "frozen" or not start.exists():
        return None
    folder = start if start.is_dir() else start.parent
    tokenizer = saved_tokenizer(folder)
    if tokenizer is None:
        raise UserError(
            f"init_from {start}: {folder / 'tokenizer'} is missing, and without it nobody knows which words its "
            "embeddings stand for; expected a run's model.safetensors in its folder, or a pipeline folder"
        )
    return tokenizer


def load_second_stage(ldm: LatentDiffusion, path: Path) -> None:
    """Denoiser and conditioner of another run's model.safetensors, or of an exported pipeline (`init_from`), and the
    scale of the latents that they were trained on.
    """
    if path.is_dir():
        text = path / "text_encoder" / "model.safetensors"
        if not text.is_file():
            raise UserError(f"init_from {path}: expected a pipeline folder with unet/ and text_encoder/")
        given = {f"model.diffusion_model.{k}": v for k, v in unet_from_diffusers_dir(path).state_dict().items()}
        given |= {f"cond_stage_model.bert.{k}": v.float() for k, v in read_weights(text)[0].items()}
        first_stage = autoencoder_from_diffusers_dir(path / "vae").state_dict()
        given |= {f"first_stage_model.{k}": v for k, v in first_stage.items()}
        vae = read_object(path / "vae" / "config.json", f"init_from {path}")
        # Stable Diffusion's, which diffusers takes where a config does not say it.
        given["scale_factor"] = torch.tensor(float(vae.get("scaling_factor") or 0.18215))
    elif path.is_file():
        given, _ = read_weights(path, "init_from")
    else:
        raise UserError(f"init_from {path}: no such file; expected a run's model.safetensors or a pipeline folder")

    def second_stage(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in state.items() if k.startswith(("model.", "cond_stage_model."))}

    check_weights(second_stage(given), second_stage(ldm.state_dict()), f"init_from {path}", "this configuration")
    ldm.load_state_dict(second_stage(given), strict=False)
    if "scale_factor" in given:
        ldm.scale_factor.copy_(given["scale_factor"])
    own = {k: v for k, v in ldm.state_dict().items() if k.startswith("first_stage_model.")}
    theirs = {k: v for k, v in given.items() if k.startswith("first_stage_model.")}

    def equal(a: Tensor, b: Tensor) -> bool:  # up to half precision, in which pipelines are kept
        return a.shape == b.shape and torch.allclose(a.to(b), b, rtol=2e-3, atol=1e-6)

    same = own.keys() == theirs.keys() and all(equal(theirs[k], v) for k, v in own.items())
    if theirs and not same and is_main_process():
        print(
            f"init_from {path}: its latents are those of another first stage than this run's; to go on in the same "
            "latents give its own with --first_stage.weights",
            file=sys.stderr,
        )


def table_fingerprint(images: Tensor) -> str:
    """Checksum of the training images themselves."""
    return hashlib.sha256(images.numpy().tobytes() + str(tuple(images.shape)).encode()).hexdigest()


def not_exportable(ldm: LatentDiffusion, task: Task) -> str | None:
    """Why stock diffusers cannot carry the model; None where it can: a KL first stage and text through a BertModel."""
    if task.name != "text":
        return f"stock pipelines have no task {task.name}"
    if not isinstance(task.conditioner, BertConditioner):
        return "stock pipelines carry --conditioner.kind bert only"
    first_stage, unet = ldm.first_stage_model, ldm.model.diffusion_model
    if not isinstance(first_stage, AutoencoderKL):
        return "stock pipelines carry --first_stage.kind kl only"
    try:
        unet_to_diffusers(unet.state_dict(), unet.config)  # type: ignore[union-attr,arg-type]
        first_stage_to_diffusers(first_stage.state_dict(), norm_groups=first_stage.norm_groups)
    except UserError as error:
        return str(error)
    return None


def export_pipeline(
    ldm: LatentDiffusion, task: Task, config: LdmConfig, folder: Path, dtype: torch.dtype = torch.float16
) -> None:
    """Write the model as a stock StableDiffusionPipeline directory (the teacher contract)."""
    schedule = schedule_of(config)
    write_pipeline(
        folder,
        unet=ldm.model.diffusion_model,  # type: ignore[arg-type]
        vae=ldm.first_stage_model,  # type: ignore[arg-type]
        text_encoder=ldm.cond_stage_model.bert,  # type: ignore[union-attr]
        tokenizer=task.tokenizer,
        scaling_factor=float(ldm.scale_factor),
        beta_start=schedule["linear_start"],
        beta_end=schedule["linear_end"],
        timesteps=schedule["timesteps"],
        schedule=schedule["kind"],
        prediction=schedule["prediction"],
        sample_size=config.data.size // ldm.first_stage_model.downsampling,  # type: ignore[operator,arg-type]
        dtype=dtype,
    )
