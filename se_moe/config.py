"""Options of the trainer as plain dataclasses; nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.cli import parse_config
from common.errors import UserError

CONFIGS = Path(__file__).parent / "configs"
SMALL = CONFIGS / "small.yaml"
ARMS = ("ours", "resident", "deepspeed", "naive")


@dataclass
class DataConfig:
    """Which text is learned.

    Args:
        tasks: one corpus or a mix of several: sotu (all State of the Union messages), sotu:1790-1900 (those of some
            years), brown or brown:ca (all or some texts of the Brown corpus, `make data-text`), a .txt file or a
            folder of them.
        shares: sequences of each task in a step, in any unit; [] gives every task the same.
        vocabulary: entries of the byte-pair vocabulary that is trained on the tasks' own text.
        sequence: tokens of a training sequence.
    """

    tasks: list[str] = field(default_factory=lambda: ["sotu"])
    shares: list[int] = field(default_factory=list)
    vocabulary: int = 2000
    sequence: int = 64


@dataclass
class ModelOptions:
    """Sizes of the language model.

    Args:
        hidden, layers, heads: of the transformer; dense_hidden: width of its dense feed-forward layers.
        experts: of every MoE layer, over all ranks; expert_hidden: their width.
        moe_every: every so many layers one is a mixture of experts.
        top_k: experts of a token. capacity_factor: tokens an expert takes beside the mean, if tokens may be dropped.
        drop_tokens: false serves every token.
        noise: none, jitter or rsample (see `moe.GateConfig`).
        residual: a dense expert beside every mixture.
        aux_weight, z_weight: of the load-balancing loss and of the gate's z loss.
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    dense_hidden: int = 512
    experts: int = 32
    expert_hidden: int = 256
    moe_every: int = 2
    top_k: int = 2
    capacity_factor: float = 1.25
    drop_tokens: bool = False
    noise: Literal["none", "jitter", "rsample"] = "none"
    residual: bool = False
    aux_weight: float = 0.01
    z_weight: float = 0.0


@dataclass
class Switches:
    """The paper's parts, each of which can be switched off; none of them changes what is learned.

    Args:
        tiers: experts live in files with their optimizer state, host memory is a cache; false keeps all on the device.
        prefetch: fetch experts (and dense slices) ahead of their use, on a thread of their own.
        cache: keep experts in host memory by Algorithm 2; false reads the file at every use.
        fusion: pack many tensors into one collective.
        overlap: send gradient buckets while the backward pass still runs.
        partition: split the embedding table by columns over the ranks.
        hierarchical: AlltoAll in two phases, within a node and between nodes.
        shard_dense: slices of the dense parameters and of their optimizer state on every rank (as in ZeRO-3).
    """

    tiers: bool = True
    prefetch: bool = True
    cache: bool = True
    fusion: bool = True
    overlap: bool = True
    partition: bool = True
    hierarchical: bool = True
    shard_dense: bool = False

    @classmethod
    def naive(cls) -> Switches:
        """Every part off: experts all resident, a collective per tensor, nothing overlaps."""
        return cls(**dict.fromkeys(cls.__dataclass_fields__, False))


@dataclass
class StorageConfig:
    """Budgets of the tiers, for every rank.

    Args:
        device_mb: device memory for dense parameters with their states and for the experts in use; 0 takes what the
            dense parameters need and half of what all experts with their states would.
        cached_share: part of the rank's experts that host memory holds.
        rule: which expert leaves the cache (`cache.RULES`). beta, period, threshold: of Algorithm 2.
        folder: where the file tier lies; default: below run_dir. Put it on the fastest local drive.
        read_mb_s, latency_ms: pretend that the drive is slower (0: as it is).
        predict: which experts are prefetched: previous (those of the last step) or all.
    """

    device_mb: float = 0.0
    cached_share: float = 0.5
    rule: Literal["repaired", "text", "pseudocode", "lfu", "lru"] = "repaired"
    beta: float = 0.5
    period: int = 256
    threshold: float = 0.0
    folder: str | None = None
    read_mb_s: float = 0.0
    latency_ms: float = 0.0
    predict: Literal["previous", "all"] = "previous"


@dataclass
class OptimiserConfig:
    """AdamW with warm-up and cosine decay.

    Args:
        lr, final_lr: highest and last learning rate; warmup: steps to reach the highest.
        clip: global gradient norm; 0 switches clipping off.
    """

    lr: float = 1e-3
    final_lr: float = 1e-4
    warmup: int = 20
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0


@dataclass
class ParallelConfig:
    """Processes.

    Args:
        ranks: processes that `train.py` starts on this machine by itself; under torchrun the launcher decides.
        expert_ranks: ranks that share one set of experts; 0: all of them.
        per_node: ranks of a node for the hierarchical AlltoAll; 0: the launcher's ranks per node, but a node per rank
            where there is one node only, so that both phases run.
        bucket_mb: size of a gradient bucket.
        device: auto, cpu or cuda.
        zero_stage: of the DeepSpeed arm.
    """

    ranks: int = 2
    expert_ranks: int = 0
    per_node: int = 0
    bucket_mb: float = 4.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    zero_stage: Literal[0, 2] = 2


@dataclass
class TrainConfig:
    """One run.

    Args:
        run_dir: everything is written there.
        arms: what stands in the table: ours, resident (ours with all experts on the device), deepspeed (needs the
            optional package), naive (every switch off).
        steps: optimizer steps; batch: sequences of a step over all ranks.
        checkpoint_every, keep: steps between checkpoints, and how many of them stay.
        log_every: steps between printed lines. resume: auto continues an unfinished run, never starts anew.
        threads: CPU threads of a rank.
    """

    run_dir: str = "runs/se_moe"
    seed: int = 0
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    steps: int = 600
    batch: int = 32
    checkpoint_every: int = 100
    keep: int = 2
    log_every: int = 20
    eval_sequences: int = 128
    resume: Literal["auto", "never"] = "auto"
    threads: int = 1
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelOptions = field(default_factory=ModelOptions)
    switches: Switches = field(default_factory=Switches)
    storage: StorageConfig = field(default_factory=StorageConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.checkpoint_every < 1 or self.keep < 1:
            raise UserError("--steps, --batch, --checkpoint_every and --keep must be at least 1")
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown:
            raise UserError(f"--arms: {unknown[0]!r} is unknown; choose from {', '.join(ARMS)}")
        if self.data.shares and len(self.data.shares) != len(self.data.tasks):
            raise UserError(
                f"--data.shares has {len(self.data.shares)} numbers and --data.tasks {len(self.data.tasks)} names; "
                "give one number for every task"
            )
        if not 0 < self.storage.cached_share <= 1:
            raise UserError(f"--storage.cached_share is {self.storage.cached_share}; it must lie in (0, 1]")


# What decides the numbers of a run; everything else (budgets, switches, processes, paths) may change when it continues.
FIXED_OPTIONS = ("seed", "steps", "batch", "data", "model", "optimiser")


def read_config(argv: Sequence[str] | None, description: str) -> tuple[TrainConfig, str]:
    """The configuration of a command line and its YAML text (`--config FILE`, then `--section.option value`)."""
    return parse_config(TrainConfig, SMALL, description, argv)
