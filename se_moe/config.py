"""Options of the trainer as plain dataclasses; nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from common.cli import parse_config
from common.errors import UserError
from common.options import (
    Count,
    Decay,
    NotNegative,
    Portion,
    Positive,
    Range,
    RunOptions,
    Seed,
    Threads,
    Whole,
    check_ranges,
    free_options,
)

CONFIGS = Path(__file__).parent / "configs"
SMALL = CONFIGS / "small.yaml"
ARMS = ("ours", "resident", "deepspeed", "naive")

Noise = Literal["none", "jitter", "rsample"]
DropPolicy = Literal["position", "probs"]


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
    shares: list[Count] = field(default_factory=list)
    vocabulary: Annotated[int, Range(300, 10**6)] = 2000
    sequence: Annotated[int, Range(2, 10**6)] = 64


@dataclass(frozen=True)
class GateConfig:
    """How tokens choose experts.

    Attributes:
        top_k: experts of a token: 1 Switch, 2 GShard, more: top-k.
        capacity_factor, eval_capacity_factor: capacity beside the mean load, in training and in evaluation.
        min_capacity: tokens of a rank that an expert takes at least.
        drop_tokens: False (dropless): every token is served, no capacity applies.
        use_rts: top-1 only: an overflowing expert keeps random tokens instead of the first ones, in training.
        noise: "jitter" multiplies the gate's input by U(0.99, 1.01); "rsample" adds Gumbel noise to the choice of the
            first expert (top-1); both in training only.
        second_sampling: top-2 only: the second expert is sampled by Gumbel noise in training.
        drop_policy: top-k only: which tokens an overflowing expert keeps.
        batch_prioritized: Tutel's routing instead: the tokens with the largest score are served first, capacities and
            weights are Tutel's.
    """

    top_k: int = 2
    capacity_factor: float = 1.0
    eval_capacity_factor: float = 1.0
    min_capacity: int = 4
    drop_tokens: bool = False
    use_rts: bool = True
    noise: Noise = "none"
    second_sampling: bool = False
    drop_policy: DropPolicy = "probs"
    batch_prioritized: bool = False


@dataclass(frozen=True)
class ModelOptions:
    """The language model.

    Args:
        hidden: width of the transformer.
        layers: of the transformer.
        heads: of each attention, into which the width is divided.
        dense_hidden: width of the dense feed-forward layers.
        experts: of every MoE layer, over all ranks.
        expert_hidden: width of an expert.
        moe_every: every so many layers one is a mixture of experts; 0: none.
        top_k: experts of a token: 1 Switch, 2 GShard, more: top-k.
        capacity_factor: capacity of an expert beside the mean load, in training and in evaluation.
        drop_tokens: false (dropless): every token is served, no capacity applies.
        noise: jitter multiplies the gate's input by U(0.99, 1.01); rsample adds Gumbel noise to the choice of the first
            expert (top-1); both in training only.
        residual: a dense expert beside every mixture.
        aux_weight: weight of the load-balancing loss.
        z_weight: weight of the gate's z loss.
    """

    hidden: Count = 128
    layers: Count = 4
    heads: Count = 4
    dense_hidden: Count = 512
    experts: Count = 32
    expert_hidden: Count = 256
    moe_every: Whole = 2
    top_k: Count = 2
    capacity_factor: Positive = 1.25
    drop_tokens: bool = False
    noise: Noise = "none"
    residual: bool = False
    aux_weight: NotNegative = 0.01
    z_weight: NotNegative = 0.0

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise UserError(f"hidden is {self.hidden}: it must be a multiple of heads, {self.heads}")

    @property
    def gate(self) -> GateConfig:
        """Of every mixture."""
        return GateConfig(
            self.top_k,
            self.capacity_factor,
            self.capacity_factor,
            drop_tokens=self.drop_tokens,
            noise=self.noise,
        )

    def has_experts(self, layer: int) -> bool:
        """Whether transformer layer `layer` (from 0) is a mixture of experts."""
        return self.moe_every > 0 and (layer + 1) % self.moe_every == 0


@dataclass(frozen=True)
class ModelConfig(ModelOptions):
    """The language model with the two sizes that its text decides: V and the largest L."""

    vocabulary: int = 2000
    sequence: int = 64

    def plain(self) -> dict[str, Any]:
        """As model files have it: the gate apart."""
        flat = {name: value for name, value in asdict(self).items() if name not in GateConfig.__dataclass_fields__}
        return {**flat, "gate": asdict(self.gate)}

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> ModelConfig:
        """What `plain` gave. Raises KeyError or TypeError when it is something else."""
        flat = {name: value for name, value in content.items() if name != "gate"}
        gate = {name: content["gate"][name] for name in ("top_k", "capacity_factor", "drop_tokens", "noise")}
        return cls(**flat, **gate)


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
        device_mb: device memory in MB for dense parameters with their states and for the experts in use; 0 takes what
            the dense parameters need and half of what all experts with their states would.
        cached_share: part of the rank's experts that host memory holds.
        rule: which expert leaves the cache (`cache.RULES`).
        beta: factor on all hits at the end of a period (Algorithm 2); 1: no decay.
        period: requests of a period (Algorithm 2); 0: no periods.
        threshold: hits that an expert needs before it may leave (Algorithm 2, step 3).
        folder: where the file tier lies; None: below run_dir. Put it on the fastest local drive.
        read_mb_s: pretend that the drive reads so many MB a second; 0: as it is.
        latency_ms: pretend that the drive takes so many milliseconds to answer; 0: as it is.
        predict: which experts are prefetched: previous (those of the last step) or all.
    """

    device_mb: NotNegative = 0.0
    cached_share: Portion = 0.5
    rule: Literal["repaired", "text", "pseudocode", "lfu", "lru"] = "repaired"
    beta: Portion = 0.5
    period: Whole = 256
    threshold: NotNegative = 0.0
    folder: str | None = None
    read_mb_s: NotNegative = 0.0
    latency_ms: NotNegative = 0.0
    predict: Literal["previous", "all"] = "previous"


@dataclass
class OptimiserConfig:
    """AdamW with warm-up and cosine decay.

    Args:
        lr: highest learning rate.
        final_lr: learning rate of the last step.
        warmup: steps over which the rate rises linearly.
        betas: decays of AdamW's two averages.
        eps: AdamW's epsilon.
        weight_decay: of AdamW.
        clip: largest global norm of the gradient; 0 does not clip.
    """

    lr: NotNegative = 1e-3
    final_lr: NotNegative = 1e-4
    warmup: Whole = 20
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.01
    clip: NotNegative = 1.0


@dataclass
class ParallelConfig:
    """Processes.

    Args:
        ranks: processes that `train.py` starts on this machine by itself; under torchrun the launcher decides.
        expert_ranks: ranks that share one set of experts; 0: all of them.
        per_node: ranks of a node for the hierarchical AlltoAll; 0: the launcher's ranks per node, but a node per rank
            where there is one node only, so that both phases run.
        bucket_mb: size of a gradient bucket in MB.
        device: auto, cpu or cuda.
        zero_stage: ZeRO stage of the DeepSpeed arm.
    """

    ranks: Annotated[int, Range(1, 4096)] = 2
    expert_ranks: Whole = 0
    per_node: Whole = 0
    bucket_mb: Positive = 4.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    zero_stage: Literal[0, 2] = 2


@dataclass
class TrainConfig(RunOptions):
    """One run.

    Args:
        threads: CPU threads of a rank; 0 leaves torch's default.
        run_dir: everything is written there.
        seed: of the weights' start and the order of the data.
        arms: what stands in the table: ours, resident (ours with all experts on the device), deepspeed (needs the
            optional package), naive (every switch off).
        steps: of the optimizer.
        batch: sequences of a step over all ranks.
        keep: checkpoints that stay.
        eval_sequences: held-out sequences that an arm is judged on.
        resume: auto continues an unfinished run, never starts anew.
    """

    checkpoint_every: Count = 100
    threads: Threads = 1
    run_dir: str = "runs/se_moe"
    seed: Seed = 0
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    steps: Count = 600
    batch: Count = 32
    keep: Count = 2
    eval_sequences: Count = 128
    resume: Literal["auto", "never"] = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelOptions = field(default_factory=ModelOptions)
    switches: Switches = field(default_factory=Switches)
    storage: StorageConfig = field(default_factory=StorageConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        check_ranges(self)
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown:
            raise UserError(f"--arms: {unknown[0]!r} is unknown; choose from {', '.join(ARMS)}")
        if self.data.shares and len(self.data.shares) != len(self.data.tasks):
            raise UserError(
                f"--data.shares has {len(self.data.shares)} numbers and --data.tasks {len(self.data.tasks)} names; "
                "give one number for every task"
            )

    def check_ranks(self, world: int) -> None:
        """Refuse what the processes would refuse one after the other.

        Args:
            world: number of processes.

        Raises:
            UserError: naming the option.
        """
        shared, model = self.parallel.expert_ranks or world, self.model
        if not self.arms:
            raise UserError(f"--arms is empty; choose from {', '.join(ARMS)}")
        if self.batch % world:
            raise UserError(f"--batch {self.batch}: it must be a multiple of the {world} ranks")
        if world % shared:
            raise UserError(f"--parallel.expert_ranks {shared}: it must divide the number of processes, {world}")
        nodes = self.parallel.per_node
        if self.switches.hierarchical and 0 < nodes < shared and shared % nodes:
            raise UserError(f"--parallel.per_node {nodes}: it must divide the {shared} ranks that share the experts")
        if any(model.has_experts(layer) for layer in range(model.layers)):
            if model.experts % shared:
                raise UserError(f"--model.experts {model.experts}: it must be a multiple of the {shared} ranks")
            if model.top_k > model.experts:
                raise UserError(f"--model.top_k {model.top_k}: there are {model.experts} experts to choose from")

    def network(self, vocabulary: int) -> ModelConfig:
        """The network of this run's text."""
        return ModelConfig(**asdict(self.model), vocabulary=vocabulary, sequence=self.data.sequence)

    def of_arm(self, arm: str) -> TrainConfig:
        """This run with the switches of one arm of the table."""
        switches = self.switches
        if arm == "resident":
            switches = replace(switches, tiers=False)
        if arm == "naive":
            switches = Switches.naive()
        return replace(self, switches=switches, arms=[arm])


# What decides the numbers of a run; budgets, switches, processes and paths may change when it continues.
FIXED_OPTIONS = ("seed", "steps", "batch", "data", "model", "optimiser")
FREE_OPTIONS = free_options("arms", "keep", "eval_sequences", "switches", "storage", "parallel", section="")


def read_config(argv: Sequence[str] | None, description: str) -> tuple[TrainConfig, str]:
    """The configuration of a command line and its YAML text (`--config FILE`, then `--section.option value`)."""
    return parse_config(TrainConfig, SMALL, description, argv)
