"""Options of `pc_darts/train.py` and `evaluate.py` as plain dataclasses; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

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

Sampling = Literal["shuffle", "shift", "random"]
Stem = Literal["cifar", "imagenet"]
Schedule = Literal["cosine", "imagenet_search", "imagenet_final"]


@dataclass(frozen=True)
class DataConfig(PictureOptions):
    """Which pictures are classified.

    Args:
        validation: share of the training pictures that no training sees: architectures are chosen on it, never on the
            test pictures.
        halves: shares of the training pictures, drawn per class, for weights and for alphas (ImageNet: 0.1, 0.025).
        padding: random crops of the picture padded by so many pixels; 0 is off.
        flip: mirror half of the pictures.
        resized_crop: smallest area share of a random resized crop (ImageNet: 0.08); 0 switches it off.
        jitter: strengths of brightness, contrast, saturation and hue changes (ImageNet: 0.4 0.4 0.4 0.2); [] is off.
    """

    validation: Annotated[float, Range(0, 0.9, above=True)] = 0.1
    halves: list[Portion] = field(default_factory=lambda: [0.5, 0.5])
    padding: Annotated[int, Range(0, 4096)] = 4
    flip: bool = True
    resized_crop: Share = 0.0
    jitter: list[Share] = field(default_factory=list)


@dataclass(frozen=True)
class SgdOptions:
    """How a network's weights are trained.

    Args:
        epochs: passes over the training pictures.
        batch_size: pictures of one step over all processes.
        lr: learning rate of SGD at the start.
        minimum_lr: learning rate at the end (cosine).
        lr_schedule: cosine, or one of ImageNet's (linear to zero after a warm-up).
        lr_warmup: epochs of linear warm-up (ImageNet's schedules).
        momentum: of SGD.
        weight_decay: of SGD.
        grad_clip: largest norm of the gradient; 0 does not clip.
    """

    epochs: Count = 50
    batch_size: Count = 256
    lr: NotNegative = 0.1
    minimum_lr: NotNegative = 0.0
    lr_schedule: Schedule = "cosine"
    lr_warmup: Whole = 5
    momentum: Decay = 0.9
    weight_decay: NotNegative = 3e-4
    grad_clip: NotNegative = 5.0


@dataclass(frozen=True)
class SearchShape:
    """The search network; defaults: CIFAR-10 (section 4.2).

    Args:
        channels: C, the width of the first cell.
        cells: depth of the network.
        nodes: of a cell, inputs and output not counted.
        partial: K, the share 1/K of the channels goes through the mixed operation; 1 is DARTS.
        edge_normalisation: learn a weight per edge (beta, equation 3).
        sampling: which channels are processed: shuffle (the paper's), shift or random (`MixedOp`).
        stem: cifar (3x3 convolution) or imagenet (three convolutions of stride 2, 224 -> 28).

    Raises:
        UserError: sizes that do not fit each other.
    """

    channels: Count = 16
    cells: Count = 8
    nodes: Count = 4
    partial: Count = 4
    edge_normalisation: bool = True
    sampling: Sampling = "shuffle"
    stem: Stem = "cifar"

    def __post_init__(self) -> None:
        check_ranges(self, "search.")
        if self.channels % self.partial:
            raise UserError(
                f"search network: {self.channels} channels cannot be divided into {self.partial} equal parts; make "
                "channels a multiple of partial"
            )
        _one_of("search network", "sampling", self.sampling, get_args(Sampling))
        _one_of("search network", "stem", self.stem, get_args(Stem))


@dataclass(frozen=True)
class SearchConfig(SearchShape):
    """The search network with what its pictures decide."""

    classes: Count = 10
    in_channels: Count = 3


@dataclass(frozen=True)
class SearchOptions(SgdOptions, SearchShape):
    """The search; defaults are the paper's on CIFAR-10.

    Args:
        fused: the batched mixed cell; false is the operation-by-operation reference (same gradients, slower).
        warmup_epochs: epochs in which the architecture is frozen.
        arch_lr: learning rate of alphas and betas (Adam).
        arch_betas: decays of Adam's two averages.
        arch_weight_decay: of alphas and betas.
        arch_grad_clip: largest norm of their gradient; 0 does not clip (ImageNet: 5).
        unrolled: second-order architecture gradient (DARTS, --unrolled).
    """

    fused: bool = True
    warmup_epochs: Whole = 15
    arch_lr: NotNegative = 6e-4
    arch_betas: tuple[Decay, Decay] = (0.5, 0.999)
    arch_weight_decay: NotNegative = 1e-3
    arch_grad_clip: NotNegative = 0.0
    unrolled: bool = False

    def network(self, classes: int, in_channels: int = 3) -> SearchConfig:
        """The search network for such pictures."""
        return SearchConfig(**_shared(self, SearchShape), classes=classes, in_channels=in_channels)


@dataclass(frozen=True)
class FinalShape:
    """The network of a derived cell; defaults: CIFAR-10.

    Args:
        channels: width of the first cell.
        layers: number of cells.
        stem: cifar (3x3 convolution) or imagenet (three convolutions of stride 2, 224 -> 28).

    Raises:
        UserError: sizes that cannot be.
    """

    channels: Count = 36
    layers: Count = 20
    stem: Stem = "cifar"

    def __post_init__(self) -> None:
        check_ranges(self, "retrain.")
        _one_of("final network", "stem", self.stem, get_args(Stem))


@dataclass(frozen=True)
class FinalConfig(FinalShape):
    """The final network with what its pictures decide, and whether it has an auxiliary head."""

    classes: Count = 10
    auxiliary: bool = False
    in_channels: Count = 3


@dataclass(frozen=True)
class RetrainOptions(SgdOptions, FinalShape):
    """Training the derived network from scratch (section 2.6); defaults are the paper's on CIFAR-10.

    Args:
        cutout: side in pixels of the square that is blanked out; 0 is off.
        drop_path: probability of dropping a path in the last epoch, rising linearly from 0.
        auxiliary: weight of the auxiliary head's loss; 0 builds no such head.
        smoothing: label smoothing (ImageNet: 0.1).
    """

    epochs: Count = 600
    batch_size: Count = 96
    lr: NotNegative = 0.025
    cutout: Whole = 16
    drop_path: Decay = 0.3
    auxiliary: NotNegative = 0.4
    smoothing: Share = 0.0

    def network(self, classes: int, in_channels: int = 3) -> FinalConfig:
        """The final network for such pictures."""
        return FinalConfig(
            **_shared(self, FinalShape), classes=classes, auxiliary=self.auxiliary > 0, in_channels=in_channels
        )


@dataclass
class CompareOptions:
    """What stands beside PC-DARTS in the table of `train.py`.

    Args:
        darts: search with K = 1 without edge normalisation, with batch / K (about the same memory) and equal time.
        random: number of random cells that are retrained; their spread is the yardstick.
        random_search: draw cells, train each for `proxy_epochs`, keep the best on the validation pictures, in the time
            of the PC-DARTS search.
        proxy_epochs: epochs of a candidate of random search.
    """

    darts: bool = True
    random: Whole = 2
    random_search: bool = True
    proxy_epochs: Count = 2


@dataclass
class RunConfig(RunOptions):
    """One run: search, derive, draw, retrain, compare.

    Args:
        run_dir: everything is written there.
        seed: of the weights' start, the split and the order of the data.
        resume: auto continues an unfinished run of the same options; never refuses a used folder.
        genotype: skip the search and retrain this cell: a published name (PC_DARTS_cifar, ...) or a JSON file.
        max_parameters: derive the best cell whose retrained network has fewer, in millions; 0: no cap.
        max_macs: derive the best cell whose retrained network has fewer multiply-adds, in millions; 0: no cap.
        device: auto, cpu or cuda.
    """

    checkpoint_every: Count = 50
    log_every: Count = 10
    run_dir: str = "runs/pc_darts"
    seed: Seed = 0
    resume: Literal["auto", "never"] = "auto"
    genotype: str | None = None
    max_parameters: NotNegative = 0.0
    max_macs: NotNegative = 0.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    search: SearchOptions = field(default_factory=SearchOptions)
    retrain: RetrainOptions = field(default_factory=RetrainOptions)
    compare: CompareOptions = field(default_factory=CompareOptions)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.max_parameters and self.max_macs:
            raise UserError("--max_parameters and --max_macs: give one of them")


# How a run is executed and reported, not what it computes: these may differ between two starts of it.
FREE_OPTIONS = free_options("device", section="")


def _shared(options: Any, shape: type[Any]) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in fields(shape)}


def _one_of(what: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{what}: {name} {value!r}, expected {', '.join(choices[:-1])} or {choices[-1]}")


def read_config(argv: Sequence[str] | None, description: str, default: Path | None = SMALL) -> tuple[RunConfig, str]:
    """The configuration of a command line and its YAML text (`--config FILE`, then `--section.option value`)."""
    return parse_config(RunConfig, default, description, argv)
