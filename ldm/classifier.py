"""The classifier of noisy latents and its training, for classifier guidance (LDM-8-G, appendix D.4).

It shares data, first stage, latent scale and noise schedule with a finished class-conditional run. Training: cross
entropy of the class of z_t at steps t drawn uniformly, so that log p(y | z_t) has a gradient at every noise level.

Shape suffixes: B batch, C channels, H and W latent height and width, K classes.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.cache import fingerprint_module, fingerprint_strings
from common.data.sampling import TensorTable, derive_seed, step_generator
from common.errors import UserError
from common.files import write_json
from common.options import check_trainer
from common.training import open_run_folder
from ldm.config import ClassifierConfig, ClassifierNetwork, LdmConfig
from ldm.diffusion import LatentDiffusion
from ldm.lr_schedules import warmup_then
from ldm.model import EncoderUNet
from ldm.training import (
    FREE_OPTIONS,
    BatchMeans,
    Run,
    draw_latents,
    fit_stage,
    load_state,
    save_state,
    share_of_step,
)

BANDS = 5  # noise levels at which the accuracy is reported: fifths of 0..T-1


def build_classifier(network: ClassifierNetwork, config: LdmConfig, ldm: LatentDiffusion, classes: int) -> EncoderUNet:
    """The classifier for the latents of `ldm`, untrained.

    Raises:
        UserError: a network that does not fit the latents, or whose heads do not fit its width.
    """
    first_stage: Any = ldm.first_stage_model
    side, halvings = config.data.size // first_stage.downsampling, len(network.channel_mult) - 1
    if side % 2**halvings:
        raise UserError(f"--network.channel_mult: latents of {side} x {side} cannot be halved {halvings} times")
    width = network.model_channels * network.channel_mult[-1]
    if network.num_head_channels < 1 or width % network.num_head_channels:
        raise UserError(
            f"--network.num_head_channels: attention of width {width} has no head of {network.num_head_channels} "
            "channels; choose a divisor"
        )
    return EncoderUNet(
        image_size=side,
        in_channels=first_stage.embed_dim,
        model_channels=network.model_channels,
        out_channels=classes,
        num_res_blocks=network.num_res_blocks,
        attention_resolutions=list(network.attention_resolutions),
        dropout=network.dropout,
        channel_mult=list(network.channel_mult),
        num_head_channels=network.num_head_channels,
        pool=network.pool,
        norm_groups=network.norm_groups,
    )


def latent_space(ldm: LatentDiffusion) -> str:
    """Checksum of what a latent means: first stage, scale factor and noise schedule."""
    scale, betas = float(ldm.scale_factor), ldm.schedule.betas.cpu()
    return fingerprint_strings([fingerprint_module(ldm.first_stage_model), f"{scale:.6g}", str(betas.tolist())])


def class_run(folder: Path) -> tuple[Run, LatentDiffusion, int]:
    """A finished class-conditional run, its model and its number of classes (without the null class).

    Raises:
        UserError: not finished, or of another task.
    """
    run = Run.existing(folder)
    if run.config.task != "class" or run.task.num_classes is None:
        raise UserError(
            f"{folder} was trained for task {run.config.task}, which has no classes; a classifier needs a run of task "
            "class (ldm/configs/class.yaml)"
        )
    return run, run.load(), run.task.num_classes - 1


class ClassifierTrainer(pl.LightningModule):
    """Cross entropy on noisy latents; everything random is a function of (seed, step), as in `DiffusionTrainer`."""

    def __init__(self, classifier: EncoderUNet, ldm: LatentDiffusion, config: ClassifierConfig) -> None:
        super().__init__()
        self.classifier, self.config = classifier, config
        self.frozen = (ldm.requires_grad_(False).eval(),)  # in a tuple: neither trained nor kept in checkpoints
        self._means = BatchMeans()

    def on_fit_start(self) -> None:
        self.frozen[0].to(self.device)

    def configure_optimizers(self) -> Any:
        config = self.config
        optimiser = torch.optim.AdamW(self.parameters(), lr=config.lr, weight_decay=config.weight_decay, foreach=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, warmup_then("cosine", config.warmup, config.trainer.max_steps)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        options, (ldm,) = self.config.trainer, self.frozen
        generator, part, mine = share_of_step(self, batch_idx, options, self.config.seed)
        if self.config.network.dropout > 0:  # it draws from the global generator, which no checkpoint holds
            torch.manual_seed(derive_seed(self.config.seed, self.trainer.global_step, part, self.trainer.global_rank))
        z_BCHW, t_B, noise_BCHW, _ = draw_latents(ldm, batch, generator, options.batch_size, mine)
        logits_BK = self.classifier(ldm.schedule.q_sample(z_BCHW, t_B, noise_BCHW), t_B).float()
        loss = F.cross_entropy(logits_BK, batch["label"])
        right = (logits_BK.argmax(1) == batch["label"]).float().mean()
        self._means.log(self, {"loss": loss, "accuracy": right}, part, options.accumulate)
        return loss


@torch.no_grad()
def accuracy_by_noise(
    classifier: EncoderUNet, ldm: LatentDiffusion, held_out: TensorTable, seed: int = 0, batch_size: int = 200
) -> dict[str, Any]:
    """Held-out accuracy in each of `BANDS` ranges of t; every image is noised once per band, at a step drawn in it.

    Returns `bands` (entries t_from, t_to inclusive, accuracy), their mean `accuracy`, `chance` (the share of the
    largest class) and `images`.
    """
    labels, images = held_out.columns["label"], held_out.columns["image"]
    width = ldm.schedule.timesteps // BANDS
    bands = []
    for band in range(BANDS):
        first, last = band * width, ldm.schedule.timesteps - 1 if band == BANDS - 1 else (band + 1) * width - 1
        generator, right = step_generator(seed, band), 0
        for rows in torch.arange(len(images)).split(batch_size):
            z_BCHW, _, noise_BCHW, uniform_2B = draw_latents(
                ldm, {"image": images[rows]}, generator, len(rows), slice(None)
            )
            t_B = first + (uniform_2B[0] * (last + 1 - first)).long()
            logits_BK = classifier(ldm.schedule.q_sample(z_BCHW, t_B, noise_BCHW), t_B)
            right += int((logits_BK.argmax(1) == labels[rows]).sum())
        bands.append({"t_from": first, "t_to": last, "accuracy": right / len(images)})
    return {
        "images": len(images),
        "chance": float(labels.bincount().max()) / len(labels),
        "accuracy": sum(band["accuracy"] for band in bands) / BANDS,
        "bands": bands,
    }


def train_classifier(config: ClassifierConfig, config_yaml: str) -> dict[str, Any]:
    """Train or resume the classifier; writes model.safetensors and metrics.json into `config.run_dir`.

    Returns:
        The metrics; those of the folder as they are where it has been trained already.

    Raises:
        UserError: the model is not a finished class-conditional run, or the folder holds another run.
    """
    started = time.perf_counter()
    options, folder = config.trainer, Path(config.run_dir)
    if options.threads:
        torch.set_num_threads(options.threads)
    check_trainer(options, {"trainer.batch_size": options.batch_size}, resume=config.resume)
    finished = folder / "metrics.json"
    if config.resume == "auto" and finished.is_file():
        open_run_folder(folder, config.resume, config_yaml, FREE_OPTIONS)  # refuses other options
        print(f"{folder}: trained already", file=sys.stderr)
        return json.loads(finished.read_text())
    run, ldm, classes = class_run(Path(config.model))
    open_run_folder(folder, config.resume, config_yaml, FREE_OPTIONS)
    torch.manual_seed(config.seed)
    classifier = build_classifier(config.network, run.config, ldm, classes)
    in_memory = isinstance(run.task.train, TensorTable)
    latents = replace(run, folder=folder).latents(ldm.first_stage_model) if in_memory else run.task.train  # type: ignore[arg-type]
    trainer = fit_stage(
        folder,
        ClassifierTrainer(classifier, ldm, config),
        latents,
        options,
        config.seed,
        config.resume,
        grad_clip=1.0,
        workers=run.config.data.workers,
    )
    seconds = time.perf_counter() - started
    classifier, ldm = classifier.cpu().eval(), ldm.cpu()
    metrics: dict[str, Any] = {
        "classes": classes,
        "steps": options.max_steps,
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        **accuracy_by_noise(classifier, ldm, run.task.reference),
        "seconds": round(seconds, 1),
    }
    if trainer.is_global_zero:
        save_state(folder / "model.safetensors", classifier.state_dict(), {"latent_space": latent_space(ldm)})
        write_json(finished, metrics)
    return metrics


def load_classifier(folder: Path, run: Run, ldm: LatentDiffusion) -> EncoderUNet:
    """A trained classifier for the latents of a class-conditional run.

    Raises:
        UserError: not a classifier's folder, damaged, or trained for another first stage, scale or schedule.
    """
    from common.cli import parse_config

    config_file, weights = folder / "config.yaml", folder / "model.safetensors"
    for path in (config_file, weights):
        if not path.is_file():
            raise UserError(f"--classifier {path}: no such file; expected a finished run of train_classifier.py")
    config, _ = parse_config(ClassifierConfig, None, "", ["--config", str(config_file)])
    if run.task.num_classes is None:
        raise UserError(f"--classifier: the model was trained for task {run.config.task}, which has no classes")
    classifier = build_classifier(config.network, run.config, ldm, run.task.num_classes - 1)
    notes = load_state(classifier, weights, config_file, classifier.state_dict())
    if notes.get("latent_space") != latent_space(ldm):
        raise UserError(
            f"--classifier {folder} was trained on latents of another model: its first stage, scale factor or noise "
            f"schedule differ; train one with train_classifier.py --model {run.folder}"
        )
    return classifier.eval().requires_grad_(False)
