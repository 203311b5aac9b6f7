"""Everything a run of `hipa/train.py` can be told, as plain dataclasses; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common.options import Count, Decay, NotNegative, Portion, Positive, Range, Seed, TrainerOptions, Whole

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
PLACEMENTS = {
    "qv": ("to_q", "to_v"),
    "attention": ATTENTION,
    "attention_ff": (*ATTENTION, *FEED_FORWARD),
    "attention_conv": (*ATTENTION, *CONVOLUTIONS),
    "everywhere": (*ATTENTION, *FEED_FORWARD, *CONVOLUTIONS, "proj_in", "proj_out", "time_emb_proj"),
}


@dataclass
class TaskConfig:
    """What is drawn in one step (section 2.8); each task has an adaptor of its own.

    Args:
        name: text (from noise), editing (from a noisy picture, with a new prompt), inpainting (a hole in a picture), or
            superres (a small picture made larger).
        strength: of editing: the share of all noise that the picture is given, 1 is pure noise.
        scale: of superres: how many times larger the picture becomes.
        base_steps: optimiser steps in which a plain teacher learns to take the picture beside the noise (inpainting,
            superres), where it is no such base already.
        base_lr: learning rate of these steps.
    """

    name: Literal["text", "editing", "inpainting", "superres"] = "text"
    strength: Portion = 0.8
    scale: Annotated[int, Range(2, 8)] = 2
    base_steps: Count = 1000
    base_lr: Positive = 5e-4


@dataclass
class PairsConfig:
    """Pictures of the frozen model with many steps, that one step is to draw from the same noise (section 2.3).

    Args:
        prompts: shapes or emoji (captions of the repository's training sets), or a text file, one prompt a line.
        pictures: shapes, emoji, or an image folder with captions, for `target: data` and for tasks that begin with a
            picture; their captions are then the prompts. None: those of the set `prompts`.
        count: how many pairs.
        solver: any deterministic scheduler class of diffusers.
        steps: of the solver.
        guidance: usual scale of classifier-free guidance; 1 is without. It ends up inside the adaptor.
        batch_size: pairs drawn at once.
        shard_size: pairs in a file.
        target: teacher, or data: real pictures, each with noise that has nothing to do with it.
        folder: where pairs are kept; None: the cache, shared with the other accelerators.
    """

    prompts: str = "shapes"
    pictures: str | None = None
    count: Count = 2048
    solver: str = "DPMSolverMultistepScheduler"
    steps: Annotated[int, Range(1, 1000)] = 25
    guidance: Annotated[float, Range(0, 100)] = 5.0
    batch_size: Count = 64
    shard_size: Count = 256
    target: Literal["teacher", "data"] = "teacher"
    folder: str | None = None


@dataclass
class AdaptorConfig:
    """Low-rank adaptors of the one time step T.

    Args:
        rank: 16 on attention is the paper's 3.3 M parameters.
        alpha: strength of the adaptors, alpha / rank; None: as large as the rank.
        placement: qv, attention (query, key, value, output), attention_ff, attention_conv (small U-Nets need it), or
            everywhere; full trains every weight instead (the upper line).
    """

    rank: Annotated[int, Range(1, 4096)] = 16
    alpha: Positive | None = None
    placement: Literal["qv", "attention", "attention_ff", "attention_conv", "everywhere", "full"] = "attention"


@dataclass
class LossConfig:
    """L = L_spatial + weight L_high-freq (section 2.4).

    Args:
        spatial: the loss of whole pictures: dists, lpips, or mse.
        trunk: of dists and lpips: trained (the repository's own), or a file of VGG16's weights; with DISTS' own channel
            weights (alpha, beta) in a second file: vgg16.pth,weights.pt.
        weight: lambda of the high-frequency loss; 0 leaves it out.
        fourier: mse of high-pass pictures, l1_complex, l1_amplitude, or none.
        edge: mse of Sobel magnitudes, dists of edge maps, or none.
        radius: frequencies above H * radius are high; 0.125 is H / 8.
        mask: ideal circle, or gaussian (for `fourier: mse` only).
        space: pixels, or latents (no decoder; for `spatial: mse` only).
        at_once: pictures that are decoded and compared at once, forward and back; fewer take less memory. 0: all of
            a batch.
        recompute: compute the decoder a second time in the backward pass; takes less memory and more time.
    """

    spatial: Literal["dists", "lpips", "mse"] = "dists"
    trunk: str = "trained"
    weight: NotNegative = 1.0
    fourier: Literal["mse", "l1_complex", "l1_amplitude", "none"] = "mse"
    edge: Literal["mse", "dists", "none"] = "mse"
    radius: Annotated[float, Range(0, 0.7, above=True)] = 0.125
    mask: Literal["ideal", "gaussian"] = "ideal"
    space: Literal["pixels", "latents"] = "pixels"
    at_once: Whole = 32
    recompute: bool = False


@dataclass
class OptimiserConfig:
    """AdamW on the adaptors.

    Args:
        lr: learning rate after warm-up.
        weight_decay: of AdamW.
        warmup: steps over which the rate rises linearly.
        schedule: constant, or cosine to zero at the last step.
        grad_clip: largest norm of the gradient, 0 does not clip; an epsilon model's are amplified by sigma / alpha.
        ema_decay: of the averaged adaptors, which are kept; 0 keeps the last ones.
    """

    lr: NotNegative = 1e-4
    weight_decay: NotNegative = 0.0
    warmup: Whole = 20
    schedule: Literal["constant", "cosine"] = "constant"
    grad_clip: NotNegative = 1.0
    ema_decay: Decay = 0.0


@dataclass
class TrainerConfig(TrainerOptions):
    """How to run.

    Args:
        max_steps: optimiser steps of each arm.
        batch_size: of a step, over all processes and accumulated micro-batches.
        sample_every: steps between sample grids; 0 draws none on the way.
        cache_text_gb: text states up to this many GB are computed once and kept.
        cache_pictures_gb: decoded pictures of the pairs up to this many GB are kept; more are decoded in every step.
    """

    max_steps: Count = 20000
    batch_size: Count = 16
    checkpoint_every: Count = 100
    sample_every: Whole = 200
    cache_text_gb: NotNegative = 2.0
    cache_pictures_gb: NotNegative = 1.0


@dataclass
class EvaluationConfig:
    """What is measured at the end.

    Args:
        images: pictures of every arm.
        judge: shapes64, lite0, or inception:FILE; None: shapes64 for the prompts `shapes`, else lite0.
        batch_size: drawn at once.
        grid: prompts shown side by side.
    """

    images: Annotated[int, Range(2)] = 512
    judge: str | None = None
    batch_size: Count = 64
    grid: Count = 8


@dataclass
class HipaConfig:
    """One run: pairs, the adaptor, arms beside it that leave parts of the loss out, spectra, metrics.

    Args:
        teacher: a diffusers text-to-image directory that predicts epsilon, v or x0; for the tasks inpainting and
            superres also one whose U-Net takes a picture beside the noise.
        run_dir: folder of this run's checkpoints, logs, samples, metrics and adaptors.
        seed: of everything drawn.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder.
        arms: which adaptors are trained: hipa, spatial (without the high-frequency loss), pixel (mean squared error).
        dtype: of the frozen model.
    """

    teacher: str = "ldm/pretrained/shapes32-v"
    run_dir: str = "runs/hipa"
    seed: Seed = 0
    resume: Literal["auto", "never"] = "auto"
    arms: list[Literal["hipa", "spatial", "pixel"]] = field(default_factory=lambda: ["pixel", "spatial", "hipa"])
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    task: TaskConfig = field(default_factory=TaskConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    adaptor: AdaptorConfig = field(default_factory=AdaptorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
