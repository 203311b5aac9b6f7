"""The classifier of noisy latents, for classifier guidance (LDM-8-G, appendix D.4).

It shares data, first stage, latent scale and noise schedule with a finished class-conditional run.

Shape suffixes: B batch, C channels, H and W latent height and width, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.cli import read_run_config
from common.data.cache import fingerprint_module, fingerprint_strings
from common.data.sampling import TensorTable, step_generator
from common.errors import UserError
from common.steps import StepDraws
from common.weights import load_weights
from ldm.config import ClassifierConfig, ClassifierNetwork, LdmConfig
from ldm.diffusion import LatentDiffusion, draw_latents
from ldm.model import EncoderUNet
from ldm.run import Run

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
    return EncoderUNet(network, side, first_stage.embed_dim, classes)


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
            draws = StepDraws(generator, len(rows), slice(None))
            z_BCHW, _, noise_BCHW, uniform_2B = draw_latents(ldm, {"image": images[rows]}, draws)
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


def load_classifier(folder: Path, run: Run, ldm: LatentDiffusion) -> EncoderUNet:
    """A trained classifier for the latents of a class-conditional run.

    Raises:
        UserError: not a classifier's folder, damaged, or trained for another first stage, scale or schedule.
    """
    weights = folder / "model.safetensors"
    config = read_run_config(ClassifierConfig, folder, "--classifier")
    if run.task.num_classes is None:
        raise UserError(f"--classifier: the model was trained for task {run.config.task}, which has no classes")
    classifier = build_classifier(config.network, run.config, ldm, run.task.num_classes - 1)
    notes = load_weights(classifier, weights, against=str(folder / "config.yaml"), option="--classifier")
    if notes.get("latent_space") != latent_space(ldm):
        raise UserError(
            f"--classifier {folder} was trained on latents of another model: its first stage, scale factor or noise "
            f"schedule differ; train one with train_classifier.py --model {run.folder}"
        )
    return classifier.eval().requires_grad_(False)
