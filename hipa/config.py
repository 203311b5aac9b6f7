"""Everything a run of `hipa/train.py` can be told, as plain dataclasses; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from common.options import TrainerOptions

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
class PairsConfig:
    """Pictures of the frozen model with many steps, that one step is to draw from the same noise (section 2.3).

    Args:
        prompts: shapes or emoji (captions of the repository's training sets), or a text file, one prompt a line.
        count: pairs.
        solver: any deterministic scheduler class of diffusers.
        steps: of the solver; guidance: usual scale.
        batch_size: drawn at once; shard_size: pairs a file.
        target: teacher, or data: real pictures of the set `prompts`, each with noise that has nothing to do with it.
        folder: where pairs are kept; None: the cache, shared with the other accelerators.
    """

    prompts: str = "shapes"
    count: int = 2048
    solver: str = "DPMSolverMultistepScheduler"
    steps: int = 25
    guidance: float = 5.0
    batch_size: int = 64
    shard_size: int = 256
    target: Literal["teacher", "data"] = "teacher"
    folder: str | None = None


@dataclass
class AdaptorConfig:
    """Low-rank adaptors of the one time step T.

    Args:
        rank: 16 on attention is the paper's 3.3 M parameters.
        alpha: strength, alpha / rank; None: as large as the rank.
        placement: qv, attention (query, key, value, output), attention_ff, attention_conv (small U-Nets need it), or
            everywhere; full trains every weight instead (the upper line).
    """

    rank: int = 16
    alpha: float | None = None
    placement: Literal["qv", "attention", "attention_ff", "attention_conv", "everywhere", "full"] = "attention"


@dataclass
class LossConfig:
    """L = L_spatial + weight L_high-freq (section 2.4).

    Args:
        spatial: dists, lpips, or mse.
        trunk: of dists and lpips: trained (the repository's own), or a file of VGG16's weights.
        weight: lambda of the high-frequency loss; 0 leaves it out.
        fourier: mse of high-pass pictures, l1_complex, l1_amplitude, or none.
        edge: mse of Sobel magnitudes, dists of edge maps, or none.
        radius: frequencies above H * radius are high; 0.125 is H / 8.
        mask: ideal, or gaussian (mse only).
        space: pixels, or latents (no decoder; spatial mse only).
    """

    spatial: Literal["dists", "lpips", "mse"] = "dists"
    trunk: str = "trained"
    weight: float = 1.0
    fourier: Literal["mse", "l1_complex", "l1_amplitude", "none"] = "mse"
    edge: Literal["mse", "dists", "none"] = "mse"
    radius: float = 0.125
    mask: Literal["ideal", "gaussian"] = "ideal"
    space: Literal["pixels", "latents"] = "pixels"


@dataclass
class OptimiserConfig:
    """AdamW on the adaptors.

    Args:
        lr: learning rate after warm-up.
        weight_decay: of AdamW.
        warmup: steps over which the rate rises linearly.
        schedule: constant, or cosine to zero at the last step.
        grad_clip: largest norm of the gradient; an epsilon model's are amplified by sigma / alpha at T.
        ema_decay: of the averaged adaptors, which are kept; 0 keeps the last ones.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    warmup: int = 20
    schedule: Literal["constant", "cosine"] = "constant"
    grad_clip: float = 1.0
    ema_decay: float = 0.0


@dataclass
class TrainerConfig(TrainerOptions):
    """How to run.

    Args:
        max_steps: optimiser steps of each arm.
        batch_size: of a step, over all processes and accumulated micro-batches.
        sample_every: steps between sample grids; 0 draws none on the way.
        cache_text_gb: text states up to this many GB are computed once and kept.
    """

    max_steps: int = 20000
    batch_size: int = 16
    checkpoint_every: int = 100
    sample_every: int = 200
    cache_text_gb: float = 2.0


@dataclass
class EvaluationConfig:
    """What is measured at the end.

    Args:
        images: pictures of every arm.
        judge: shapes64, lite0, or inception:FILE; None: shapes64 for the prompts `shapes`, else lite0.
        batch_size: drawn at once.
        grid: prompts shown side by side.
    """

    images: int = 512
    judge: str | None = None
    batch_size: int = 64
    grid: int = 8


@dataclass
class HipaConfig:
    """One run: pairs, the adaptor, arms beside it that leave parts of the loss out, spectra, metrics.

    Args:
        teacher: a diffusers text-to-image directory that predicts epsilon, v or x0.
        run_dir: folder of this run's checkpoints, logs, samples, metrics and adaptors.
        seed: of everything drawn.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder.
        arms: what is trained: hipa, spatial (without the high-frequency loss), pixel (mean squared error alone).
        dtype: of the frozen model.
    """

    teacher: str = "ldm/pretrained/shapes32-v"
    run_dir: str = "runs/hipa"
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"
    arms: list[Literal["hipa", "spatial", "pixel"]] = field(default_factory=lambda: ["hipa", "spatial", "pixel"])
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    pairs: PairsConfig = field(default_factory=PairsConfig)
    adaptor: AdaptorConfig = field(default_factory=AdaptorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
