"""Options of `train.py` as plain dataclasses; nothing heavy is imported here. Defaults are the paper's on CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from common.cli import parse_config
from common.errors import UserError
from common.options import (
    Count,
    Decay,
    NotNegative,
    PictureOptions,
    Portion,
    Range,
    RunOptions,
    Seed,
    Share,
    Whole,
    check_ranges,
    free_options,
)

CONFIGS = Path(__file__).parent / "configs"
SMALL = CONFIGS / "small.yaml"
Stem = Literal["cifar", "imagenet"]


@dataclass(frozen=True)
class DataConfig(PictureOptions):
    """Which pictures are classified.

    Args:
        validation: share of the training pictures on which networks are compared. The authors compare on the test
            pictures, which are looked at only once here.
        padding: random crops of the picture padded by so many pixels; 0 is off.
        flip: mirror half of the pictures.
    """

    validation: Annotated[float, Range(0, 0.9, above=True)] = 0.1
    padding: Annotated[int, Range(0, 4096)] = 4
    flip: bool = True


@dataclass(frozen=True)
class SpaceOptions:
    """Which cells there are.

    Args:
        blocks: of a cell; the paper writes 4, every cell that it publishes has 5.
        operations: 9 (table 2), or 10 with the 7x1-1x7 convolution of the authors' code.
        concat: a cell gives out the blocks that no later one reads (all published cells), or all (the paper's text).
    """

    blocks: Annotated[int, Range(1, 12)] = 5
    operations: Literal[9, 10] = 9
    concat: Literal["unused", "all"] = "unused"


@dataclass(frozen=True)
class NetworkShape:
    """A stack of cells.

    Args:
        channels: width of the first cell.
        layers: number of cells; those at a third and at two thirds halve the sides.
        stem: cifar (one 3x3 convolution) or imagenet (three of stride 2).
        se: squeeze-and-excitation and a light non-local block behind every cell (`--se` of the authors' code).
        increment: channels that each cell has more than the one before, in place of doubling at reductions; 0 is off.
    """

    channels: Count = 36
    layers: Count = 20
    stem: Stem = "cifar"
    se: bool = False
    increment: Whole = 0


@dataclass(frozen=True)
class NetworkConfig(NetworkShape):
    """A network's shape with what its pictures decide, and whether it has an auxiliary head."""

    classes: Count = 10
    in_channels: Count = 3
    auxiliary: bool = False


@dataclass(frozen=True)
class SgdOptions:
    """How a network is trained.

    Args:
        batch_size: pictures of a step.
        lr: learning rate of SGD at the start; it falls to zero as a cosine.
        momentum: of SGD.
        nesterov: Nesterov's momentum (the authors' search).
        weight_decay: of SGD.
        grad_clip: largest norm of the gradient; 0 does not clip.
        cutout: side in pixels of the square that is blanked out; 0 is off.
    """

    batch_size: Count = 96
    lr: NotNegative = 0.025
    momentum: Decay = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 3e-4
    grad_clip: NotNegative = 5.0
    cutout: Whole = 16


@dataclass(frozen=True)
class CellTraining(SgdOptions, NetworkShape):
    """How a network of cells is trained.

    Args:
        auxiliary: weight of the auxiliary head's loss; 0 builds no such head.
    """

    auxiliary: NotNegative = 0.4

    def network(self, classes: int, in_channels: int) -> NetworkConfig:
        """The network for such pictures."""
        shape = {shared.name: getattr(self, shared.name) for shared in fields(NetworkShape)}
        return NetworkConfig(**shape, classes=classes, in_channels=in_channels, auxiliary=self.auxiliary > 0)


@dataclass(frozen=True)
class ProxyOptions(CellTraining):
    """How a network of the search is trained from scratch before it is compared (section 4.1.1).

    Args:
        steps: of training; 0 is one pass over the training pictures.
    """

    channels: Count = 32
    layers: Count = 8
    batch_size: Count = 128
    lr: NotNegative = 0.05
    steps: Whole = 0


@dataclass(frozen=True)
class RetrainOptions(CellTraining):
    """How the chosen networks are trained from scratch (section 4.1.2).

    Args:
        epochs: passes over the training pictures.
        drop_path: probability of dropping a path in the last epoch, rising linearly from 0.
        autoaugment: AutoAugment's CIFAR-10 policy behind crop and flip (table 4).
        cutmix: probability that a batch is mixed by CutMix; the authors' flag means 0.5.
    """

    epochs: Count = 600
    drop_path: Decay = 0.2
    autoaugment: bool = False
    cutmix: Share = 0.0


@dataclass(frozen=True)
class LargeOptions:
    """The network whose parameters and MACs are objectives, and which `beta` bounds.

    Args:
        channels: width of the first cell (36 gives the published counts; the paper writes 32).
        layers: number of cells.
        size: side of the pictures for MACs.
        classes: of its classifier.
    """

    channels: Count = 36
    layers: Count = 20
    size: Annotated[int, Range(8, 4096)] = 32
    classes: Count = 10


@dataclass(frozen=True)
class EvolutionOptions:
    """The evolution (algorithm 1).

    Args:
        population: networks of a generation.
        generations: with the first.
        survivors: share of a generation that lives on; the others are children (the authors' `crossover_prob`).
        mutation: probability that a child has one pair drawn anew.
        inversion: probability that two neighbouring pairs of a child change places.
        beta: only networks of at most so many million parameters enter the first generation (equation 6); 0: any.
        filter_children: a child above `beta` is not trained and gets error 1, as in the authors' program.
        selection: textbook (NSGA-II on three objectives) or official_compat, which looks at error and parameters only
            and mixes up crowding distances as the authors' program does.
        seeds: published cells or genotype files that join the first generation (the authors' god mode).
        keep: networks that are chosen from the Pareto front, far apart, to be trained.
    """

    population: Annotated[int, Range(4, 10**5)] = 40
    generations: Count = 30
    survivors: Portion = 0.1
    mutation: Share = 0.1
    inversion: Share = 0.1
    beta: NotNegative = 5.0
    filter_children: bool = False
    selection: Literal["textbook", "official_compat"] = "textbook"
    seeds: list[str] = field(default_factory=list)
    keep: Count = 3


@dataclass(frozen=True)
class ElasticOptions(SgdOptions):
    """The once-for-all space (`--space once_for_all`, section 4.2): its elastic network and the search over it.

    Args:
        design: imagenet (the paper's: five stages, 16 to 160 channels) or small (three stages for small pictures).
        kernels: sides of the depthwise kernels that a block may have.
        expands: how many times wider than its input a block may be inside.
        depths: numbers of blocks that a stage may have.
        resolutions: sides of the pictures; the largest is the one that they are kept at.
        epochs: of each phase of progressive shrinking.
        members: drawn and trained in each step.
        distil: weight of the distance to the largest member's answers, once that is trained.
        calibration: training pictures that a member's batch norms take their statistics from.
        initial: members that are measured before the first surrogate is fitted (NSGANetV2: 100).
        rounds: of fitting a surrogate and measuring what it proposes (30).
        proposals: members of a round (8).
    """

    design: Literal["imagenet", "small"] = "imagenet"
    kernels: list[Annotated[int, Range(1, 15)]] = field(default_factory=lambda: [3, 5, 7])
    expands: list[Annotated[int, Range(2, 16)]] = field(default_factory=lambda: [3, 4, 6])
    depths: list[Annotated[int, Range(1, 16)]] = field(default_factory=lambda: [2, 3, 4])
    resolutions: list[Annotated[int, Range(8, 4096)]] = field(default_factory=lambda: [192, 208, 224, 240, 256])
    batch_size: Count = 256
    lr: NotNegative = 0.1
    epochs: Count = 25
    members: Count = 2
    distil: NotNegative = 1.0
    calibration: Count = 2000
    initial: Annotated[int, Range(4, 10**5)] = 100
    rounds: Count = 30
    proposals: Count = 8


@dataclass(frozen=True)
class CompareOptions:
    """What stands beside the search in the table.

    Args:
        unfiltered: the same evolution without `beta`.
        random_search: as many random networks.
        genotypes: published cells or files (also pc_darts'), trained at the parameters of our most accurate network.
    """

    unfiltered: bool = True
    random_search: bool = True
    genotypes: list[str] = field(default_factory=lambda: ["PC_DARTS"])


@dataclass
class RunConfig(RunOptions):
    """One run: evolve, choose from the front, draw, train, compare.

    Args:
        run_dir: everything is written there.
        seed: of the populations, the weights' start, the split and the order of the data.
        resume: auto continues an unfinished run of the same options; never refuses a used folder.
        space: cells (section 4.1), or once_for_all (section 4.2).
        genotype: no search: train this published cell or genotype file.
        device: auto, cpu or cuda.
        engine: where networks are evaluated: here, in processes of this machine, or on a Ray cluster.
        workers: processes of the engine `processes`; 0 is one for each core.
    """

    checkpoint_every: Count = 50
    log_every: Count = 10
    run_dir: str = "runs/eeea_net"
    seed: Seed = 0
    resume: Literal["auto", "never"] = "auto"
    space: Literal["cells", "once_for_all"] = "cells"
    genotype: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    engine: Literal["here", "processes", "ray"] = "here"
    workers: Annotated[int, Range(0, 1024)] = 0
    data: DataConfig = field(default_factory=DataConfig)
    cell: SpaceOptions = field(default_factory=SpaceOptions)
    large: LargeOptions = field(default_factory=LargeOptions)
    evolution: EvolutionOptions = field(default_factory=EvolutionOptions)
    proxy: ProxyOptions = field(default_factory=ProxyOptions)
    retrain: RetrainOptions = field(default_factory=RetrainOptions)
    elastic: ElasticOptions = field(default_factory=ElasticOptions)
    compare: CompareOptions = field(default_factory=CompareOptions)

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("kernels", "expands", "depths", "resolutions"):
            values = getattr(self.elastic, name)
            if not values or len(set(values)) < len(values) or (name == "kernels" and not all(v % 2 for v in values)):
                odd = "odd " if name == "kernels" else ""
                raise UserError(f"--elastic.{name} {values}: expected different {odd}numbers, at least one")
        if self.space == "once_for_all" and self.genotype is not None:
            raise UserError("--genotype trains a cell: it needs --space cells")
        if self.evolution.filter_children and not self.evolution.beta:
            raise UserError("--evolution.filter_children true needs --evolution.beta above 0")


# How a run is executed and reported, not what it computes: these may differ between two starts of it.
FREE_OPTIONS = free_options("device", "engine", "workers", section="")


def read_config(argv: Sequence[str] | None, description: str, default: Path | None = SMALL) -> tuple[RunConfig, str]:
    """The configuration of a command line and its YAML text (`--config FILE`, then `--section.option value`)."""
    return parse_config(RunConfig, default, description, argv)
