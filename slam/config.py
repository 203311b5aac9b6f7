"""Everything a run of `slam/train.py` can be told, as plain dataclasses; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common.options import Count, NotNegative, Positive, Range, Seed, Share, TrainerOptions, Whole


@dataclass
class DataConfig:
    """Real pictures with captions, from whose latents the sub-paths start (step 1 of the algorithm).

    Args:
        name: shapes (drawn scenes), emoji (captioned artwork), or folder (the user's pictures, at `path`).
        path: an image folder with captions, a parquet file or a data set's name; for name folder.
        image_column: of a table, with the pictures; found by itself where there is one candidate.
        text_column: of a table, with the captions; found by itself where there is one candidate.
        images: how many training pictures are drawn (shapes), or at most taken (the others); 0 takes all.
        eval_images: held-out captions, with their pictures, that the metrics are taken on.
        cache_text_gb: text states up to this many GB are computed once and kept; more are encoded step by step.
    """

    name: Literal["shapes", "emoji", "folder"] = "shapes"
    path: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    images: Whole = 4000
    eval_images: Annotated[int, Range(2)] = 512
    cache_text_gb: NotNegative = 2.0


@dataclass
class SubPathConfig:
    """Which points of a sub-path are trained on, and what noise they are taken to hold (equations 10 to 14).

    Args:
        solver_steps: N, steps of the teacher's grid; a sub-path is k = T / N training steps long (k = 20 for N = 50).
        gamma: uniform in [0, 1] (the paper), ends (0 or 1), or one (1 only: latent consistency distillation).
        drift: multiply the cleaner end by alpha_t / alpha_s before mixing; without it the mean is wrong (ablation).
        sigma: quadrature (released code: independent increments) or linear (exact for an end that DDIM has reached).
        time: released (the network is told t whatever gamma is) or effective (extension: the input is normalised and
            given the fractional time at which the schedule has its signal-to-noise ratio).
        embedding_scale: factor before the sinusoids of 10 - 10 gamma; 1000 in the released code, 0.1 is smooth.
    """

    solver_steps: Annotated[int, Range(1, 1000)] = 50
    gamma: Literal["uniform", "ends", "one"] = "uniform"
    drift: bool = True
    sigma: Literal["quadrature", "linear"] = "quadrature"
    time: Literal["released", "effective"] = "released"
    embedding_scale: NotNegative = 1000.0


@dataclass
class StudentConfig:
    """The network that learns; it starts from the teacher's U-Net.

    Args:
        kind: full (every weight) or lora (low-rank adaptors on the frozen U-Net, without an embedding of gamma).
        rank: of the adaptors.
        alpha: strength of the adaptors, alpha / rank; None: as large as the rank.
        targets: names of the layers that get an adaptor (endings of module names).
        embedding_width: sinusoids of the gamma embedding (256 in the published models).
        zero_init: start the new projection of the embedding at zero, so that the student starts as the teacher.
    """

    kind: Literal["full", "lora"] = "full"
    rank: Annotated[int, Range(1, 4096)] = 16
    alpha: Positive | None = None
    targets: list[str] = field(
        default_factory=lambda: [
            *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
            *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
        ]
    )
    embedding_width: Annotated[int, Range(4, 4096)] = 256
    zero_init: bool = True


@dataclass
class LossConfig:
    """The distance between f(x_gamma, gamma, t) and the target.

    Args:
        kind: huber, sqrt(d^2 + c^2) - c, or l2.
        huber_c: the c of huber, below which the distance is quadratic.
        guidance: w, added to the teacher's conditional output as w (c - u): the usual guidance scale less 1.
        w_range: two numbers: LCM's own recipe, w drawn from this range and embedded instead of gamma (with `gamma:
            one`); empty keeps w fixed.
    """

    kind: Literal["huber", "l2"] = "huber"
    huber_c: Positive = 1e-3
    guidance: Annotated[float, Range(0, 100)] = 8.0
    w_range: list[Annotated[float, Range(0, 100)]] = field(default_factory=list)


@dataclass
class OptimiserConfig:
    """AdamW on the student.

    Args:
        lr: learning rate after warm-up.
        weight_decay: of AdamW.
        warmup: steps over which the learning rate rises linearly.
        schedule: constant (released) or cosine to zero at the last step.
        grad_clip: largest norm of the gradient; 0 does not clip.
        ema_decay: of the target network, which is also what is exported; 0 regresses onto the student itself.
    """

    lr: NotNegative = 8e-6
    weight_decay: NotNegative = 0.0
    warmup: Whole = 500
    schedule: Literal["constant", "cosine"] = "constant"
    grad_clip: NotNegative = 1.0
    ema_decay: Share = 0.95


@dataclass
class TrainerConfig(TrainerOptions):
    """How to run.

    Args:
        max_steps: optimiser steps of each student.
        batch_size: of a step, over all processes and accumulated micro-batches.
        sample_every: steps between sample grids; 0 draws none on the way.
    """

    max_steps: Count = 1000
    batch_size: Count = 12
    checkpoint_every: Count = 100
    sample_every: Whole = 200


@dataclass
class EvaluationConfig:
    """What is measured at the end.

    Args:
        judge: shapes64 (features of the attribute classifier), lite0, or inception:FILE; None: shapes64 for the data
            `shapes`, else lite0.
        teacher_steps: of the guided teacher that everything is compared with.
        steps: of the students.
        batch_size: pictures drawn at once.
        grid: prompts shown side by side.
    """

    judge: str | None = None
    teacher_steps: Annotated[int, Range(1, 1000)] = 25
    steps: list[Annotated[int, Range(1, 1000)]] = field(default_factory=lambda: [1, 2, 4, 8])
    batch_size: Count = 64
    grid: Count = 8


@dataclass
class SlamConfig:
    """One run: latents, SLAM, the LCM that it is compared with, few-step pipelines, metrics.

    Args:
        teacher: a diffusers text-to-image directory that predicts epsilon, v or x0.
        run_dir: folder of this run's checkpoints, logs, samples, metrics and pipelines.
        seed: of the order of the data and of everything drawn in training.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder.
        baseline: train the same student with gamma = 1 (LCM) as well, with equal steps, data order and draws.
        dtype: of the frozen teacher.
    """

    teacher: str = "ldm/pretrained/shapes32-v"
    run_dir: str = "runs/slam"
    seed: Seed = 0
    resume: Literal["auto", "never"] = "auto"
    baseline: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    data: DataConfig = field(default_factory=DataConfig)
    subpath: SubPathConfig = field(default_factory=SubPathConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
