"""Everything a run of `instaflow/train.py` can be told, as plain dataclasses; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common.options import Count, NotNegative, Positive, Range, Seed, Share, TrainerOptions, Whole

STAGES = ("pairs", "reflow", "distil", "perceptual", "evaluate")


@dataclass
class PairsConfig:
    """What is drawn from the teacher (paper section 3.1; SD 1.5: 25-step DPM-Solver, guidance 5).

    Args:
        prompts: shapes or emoji (captions of the repository's training sets), or a text file, one prompt a line
            (or a table: .jsonl, .csv, .tsv, .parquet). Of a file of 20 prompts or more, one in ten is held out.
        text_column: the column of the prompts in a table; None takes `text`, or the one that may be it.
        count: pairs for the first reflow; for distillation see `distil.pairs`.
        solver: any scheduler class of diffusers by name.
        steps: of the solver.
        guidance: scale of the teacher's classifier-free guidance; 1 draws without it.
        batch_size: pairs drawn at once.
        shard_size: pairs of a file.
        online: reflow on pairs that are drawn afresh in every step, by the same solver, instead of kept on disk
            (RectifiedFlow repository).
        folder: where pairs are kept; None: the cache, shared by every run and method that asks for the same ones.
    """

    prompts: str = "shapes"
    text_column: str | None = None
    count: Count = 2048
    solver: str = "DPMSolverMultistepScheduler"
    steps: Annotated[int, Range(1, 1000)] = 25
    guidance: NotNegative = 5.0
    batch_size: Count = 64
    shard_size: Count = 256
    online: bool = False
    folder: str | None = None


@dataclass
class StageConfig:
    """One optimisation by AdamW.

    Args:
        steps: of the optimiser.
        batch_size: global batch of a step, in pairs.
        lr: highest learning rate, after the optimiser's warm-up.
    """

    steps: Count = 400
    batch_size: Count = 32
    lr: NotNegative = 3e-4


@dataclass
class ReflowConfig(StageConfig):
    """Section 2, reflow: v_{k+1} regresses X1 - X0 on the pairs of v_k.

    Args:
        rounds: of reflow: 1 gives the 2-rectified flow, 2 the 3-rectified flow; 0 leaves it out (direct distillation).
        then: a second phase of every round on the same pairs (the paper: batch 64, then 1024).
        later_lr: learning rate of the rounds after the first (the paper needed a tenth); None: the same.
        loss: mean over elements (the reflow configs of the authors), or half the sum (their other reduction).
    """

    rounds: Annotated[int, Range(0, 100)] = 1
    then: StageConfig | None = None
    later_lr: Positive | None = None
    loss: Literal["mean", "halfsum"] = "mean"


@dataclass
class DistilConfig(StageConfig):
    """Distillation of the last flow at a fixed time (section 3.2), L2 here, then `perceptual`.

    Args:
        pairs: new pairs drawn from the flow that is distilled.
        teacher_steps: Euler steps of that flow per pair.
        alpha: guidance scale of its velocity (paper: 1.5 for the 2-rectified flow); 1 is no guidance.
        k: steps that the student takes: k > 1 trains the k times 0, 1/k, ... (RectifiedFlow repository).
    """

    pairs: Count = 2048
    teacher_steps: Annotated[int, Range(1, 10**4)] = 25
    alpha: NotNegative = 1.0
    k: Annotated[int, Range(1, 1000)] = 1


@dataclass
class PerceptualConfig(StageConfig):
    """The second distillation: LPIPS form on decoded images.

    Args:
        steps: of the optimiser; 0 leaves this stage out.
        trunk: trained (the repository's own small network), or the path of official LPIPS weights.
    """

    steps: Whole = 100
    trunk: str = "trained"


@dataclass
class StudentConfig:
    """The network that learns; it starts from the teacher's U-Net.

    Args:
        init: raw (the teacher's weights as they are), negate (last layer turned over), wrapped (v = x1^ - eps^ around
            the teacher's prediction, which stays a diffusion network).
        stack: two U-Nets in series from the distillation on (1.7B model): separate weights, or one set twice.
        pruning: none, or drop_out_in (the first one's output head and the second's input convolution go).
    """

    init: Literal["raw", "negate", "wrapped"] = "negate"
    stack: Literal["none", "separate", "shared"] = "none"
    pruning: Literal["none", "drop_out_in"] = "drop_out_in"


@dataclass
class OptimiserConfig:
    """AdamW, shared by all stages.

    Args:
        weight_decay: of all weights.
        warmup: steps of each stage over which the rate rises linearly.
        schedule: of the rate: constant (the paper), or cosine to zero at the stage's last step.
        grad_clip: largest norm of the gradient; 0 does not clip.
        ema_decay: of the averaged weights, after step n at most (1 + n) / (10 + n); the paper's 0.9999 is far too slow
            for hundreds of steps; 0 takes the last weights.
    """

    weight_decay: NotNegative = 0.01
    warmup: Whole = 20
    schedule: Literal["constant", "cosine"] = "cosine"
    grad_clip: NotNegative = 1.0
    ema_decay: Share = 0.99


@dataclass
class TrainerConfig(TrainerOptions):
    """How to run; batch sizes, of the stages, are global (all processes and accumulated micro-batches together).

    Args:
        sample_every: steps between sample grids; 0 draws none on the way.
        cache_text_gb: text states up to this size in gigabytes are computed once and kept; larger sets are encoded
            step by step.
    """

    checkpoint_every: Count = 100
    sample_every: Whole = 200
    cache_text_gb: NotNegative = 2.0


@dataclass
class EvaluationConfig:
    """What is measured at the end.

    Args:
        images: samples of every arm, on the same prompts and noises.
        judge: shapes64 (features of the attribute classifier), lite0, or inception:FILE; None: shapes64 for the prompts
            `shapes`, else lite0.
        batch_size: pictures drawn at once.
        grid: prompts shown side by side.
    """

    images: Count = 512
    judge: str | None = None
    batch_size: Count = 64
    grid: Count = 8


@dataclass
class InstaFlowConfig:
    """One run: pairs, reflow, distillation (L2, then perceptual), one-step pipeline, metrics.

    Args:
        teacher: a diffusers text-to-image directory: a small one of this repository, or a Stable Diffusion by path.
        run_dir: folder of this run's checkpoints, logs, samples, metrics and pipelines.
        seed: of the pairs' noises, the order of the data and the samples.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder.
        stages: which parts to run, in their order.
        dtype: numbers of the frozen teacher while pairs are drawn.
    """

    teacher: str = "ldm/pretrained/shapes32-v"
    run_dir: str = "runs/instaflow"
    seed: Seed = 0
    resume: Literal["auto", "never"] = "auto"
    stages: list[Literal["pairs", "reflow", "distil", "perceptual", "evaluate"]] = field(
        default_factory=lambda: list(STAGES)  # type: ignore[arg-type]
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    pairs: PairsConfig = field(default_factory=PairsConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    reflow: ReflowConfig = field(default_factory=ReflowConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
