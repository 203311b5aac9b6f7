"""Everything a run of `instaflow/train.py` can be told, as plain dataclasses; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from common.options import TrainerOptions

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
        online: reflow on pairs that are drawn afresh in every step, by the same solver, instead of kept on disk
            (RectifiedFlow repository).
        folder: where pairs are kept; None: the cache, shared by every run and method that asks for the same ones.
    """

    prompts: str = "shapes"
    text_column: str | None = None
    count: int = 2048
    solver: str = "DPMSolverMultistepScheduler"
    steps: int = 25
    guidance: float = 5.0
    batch_size: int = 64
    shard_size: int = 256
    online: bool = False
    folder: str | None = None


@dataclass
class StageConfig:
    """One optimisation: so many AdamW steps of `batch_size`, learning rate after `warmup` linear steps."""

    steps: int = 400
    batch_size: int = 32
    lr: float = 3e-4


@dataclass
class ReflowConfig(StageConfig):
    """Section 2, reflow: v_{k+1} regresses X1 - X0 on the pairs of v_k.

    Args:
        rounds: 1 gives the 2-rectified flow, 2 the 3-rectified flow; 0 leaves it out (direct distillation).
        then: a second phase of every round on the same pairs (the paper: batch 64, then 1024).
        later_lr: learning rate of the rounds after the first (the paper needed a tenth); None: the same.
        loss: mean over elements (the reflow configs of the authors), or half the sum (their other reduction).
    """

    rounds: int = 1
    then: StageConfig | None = None
    later_lr: float | None = None
    loss: Literal["mean", "halfsum"] = "mean"


@dataclass
class DistilConfig(StageConfig):
    """Distillation of the last flow at a fixed time (section 3.2), L2 here, then `perceptual`.

    Args:
        pairs: new pairs drawn from the flow that is distilled.
        teacher_steps: Euler steps of that flow per pair.
        alpha: its guided velocity (paper: 1.5 for the 2-rectified flow); 1 is no guidance.
        k: 1 is one step; k > 1 trains the k times 0, 1/k, ... (RectifiedFlow repository).
    """

    pairs: int = 2048
    teacher_steps: int = 25
    alpha: float = 1.0
    k: int = 1


@dataclass
class PerceptualConfig(StageConfig):
    """The second distillation: LPIPS form on decoded images.

    Args:
        trunk: trained (the repository's own small network), or the path of official LPIPS weights.
    """

    steps: int = 100
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
        ema_decay: min(decay, (1 + n) / (10 + n)); 0.9999 is the paper's, far too slow for hundreds of steps.
        schedule: constant (the paper), or cosine to zero at the stage's last step.
    """

    weight_decay: float = 0.01
    warmup: int = 20
    schedule: Literal["constant", "cosine"] = "cosine"
    grad_clip: float = 1.0
    ema_decay: float = 0.99


@dataclass
class TrainerConfig(TrainerOptions):
    """How to run; batch sizes, of the stages, are global (all processes and accumulated micro-batches together).

    Args:
        sample_every: steps between sample grids; 0 draws none on the way.
        cache_text_gb: text states up to this size are computed once and kept; larger sets are encoded step by step.
    """

    checkpoint_every: int = 100
    sample_every: int = 200
    cache_text_gb: float = 2.0


@dataclass
class EvaluationConfig:
    """What is measured at the end.

    Args:
        images: samples of every arm, on the same prompts and noises.
        judge: shapes64 (features of the attribute classifier), lite0, or inception:FILE; None: shapes64 for the prompts
            `shapes`, else lite0.
        grid: prompts shown side by side.
    """

    images: int = 512
    judge: str | None = None
    batch_size: int = 64
    grid: int = 8


@dataclass
class InstaFlowConfig:
    """One run: pairs, reflow, distillation (L2, then perceptual), one-step pipeline, metrics.

    Args:
        teacher: a diffusers text-to-image directory: a small one of this repository, or a Stable Diffusion by path.
        run_dir: folder of this run's checkpoints, logs, samples, metrics and pipelines.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder.
        stages: which parts to run, in their order.
        dtype: of the frozen teacher while pairs are drawn.
    """

    teacher: str = "ldm/pretrained/shapes32-v"
    run_dir: str = "runs/instaflow"
    seed: int = 0
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
