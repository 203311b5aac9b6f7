"""Options of `pc_darts/train.py` and `evaluate.py` as plain dataclasses; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.cli import parse_config

CONFIGS = Path(__file__).parent / "configs"
SMALL = CONFIGS / "small.yaml"

Schedule = Literal["cosine", "imagenet_search", "imagenet_final"]


@dataclass
class DataConfig:
    """Which pictures are classified.

    Args:
        name: emoji (EmojiGroups, embedded, 9 classes), digits (scikit-learn, 8 px grey), textures (procedural shape x
            texture), fashion-mnist (`make data-fashion-mnist`), cifar10 or cifar100 (binary version, --data.path), or
            folder (your own: one subfolder per class, optionally below train/ and test/).
        path: folder of cifar10, cifar100 or folder.
        size: side of the square pictures in pixels.
        images: at most so many training pictures; None takes all.
        validation: share of the training pictures that no training sees: architectures are chosen on it, never on the
            test pictures.
        halves: shares of the training pictures, drawn per class, for weights and for alphas (ImageNet: 0.1, 0.025).
        padding: random crops of the picture padded by so many pixels; flip: mirror half of the pictures.
        resized_crop: smallest area share of a random resized crop (ImageNet: 0.08); 0 switches it off.
        jitter: strengths of brightness, contrast, saturation and hue changes (ImageNet: 0.4 0.4 0.4 0.2); [] is off.
    """

    name: Literal["emoji", "digits", "textures", "fashion-mnist", "cifar10", "cifar100", "folder"] = "emoji"
    path: str | None = None
    size: int = 32
    images: int | None = None
    validation: float = 0.1
    halves: list[float] = field(default_factory=lambda: [0.5, 0.5])
    padding: int = 4
    flip: bool = True
    resized_crop: float = 0.0
    jitter: list[float] = field(default_factory=list)


@dataclass
class SearchOptions:
    """The search (specification sections 2.1 to 2.5); defaults are the paper's on CIFAR-10.

    Args:
        channels, cells, nodes: of the search network.
        partial: K, the share 1/K of the channels goes through the mixed operation; 1 is DARTS.
        edge_normalisation: learn a weight per edge (beta).
        sampling: which channels are processed: shuffle (the paper's), shift or random.
        stem: cifar (3x3 convolution) or imagenet (three convolutions of stride 2).
        fused: the batched mixed cell; false is the operation-by-operation reference (same gradients, slower).
        warmup_epochs: epochs in which the architecture is frozen.
        lr, minimum_lr, momentum, weight_decay, grad_clip: SGD of the weights.
        lr_schedule, lr_warmup: cosine, or the ImageNet search's cosine after so many epochs of linear warm-up.
        arch_lr, arch_betas, arch_weight_decay: Adam of alphas and betas; arch_grad_clip: 0 is off (ImageNet: 5).
        unrolled: second-order architecture gradient (DARTS, --unrolled).
    """

    channels: int = 16
    cells: int = 8
    nodes: int = 4
    partial: int = 4
    edge_normalisation: bool = True
    sampling: Literal["shuffle", "shift", "random"] = "shuffle"
    stem: Literal["cifar", "imagenet"] = "cifar"
    fused: bool = True
    epochs: int = 50
    warmup_epochs: int = 15
    batch_size: int = 256
    lr: float = 0.1
    minimum_lr: float = 0.0
    lr_schedule: Schedule = "cosine"
    lr_warmup: int = 5
    momentum: float = 0.9
    weight_decay: float = 3e-4
    grad_clip: float = 5.0
    arch_lr: float = 6e-4
    arch_betas: tuple[float, float] = (0.5, 0.999)
    arch_weight_decay: float = 1e-3
    arch_grad_clip: float = 0.0
    unrolled: bool = False


@dataclass
class RetrainOptions:
    """Training the derived network from scratch (section 2.6); defaults are the paper's on CIFAR-10.

    Args:
        channels, layers: of the final network; stem: cifar or imagenet.
        batch_size: pictures of one step over all processes.
        cutout: side of the square that is blanked out; 0 is off.
        drop_path: probability of dropping a path in the last epoch, rising linearly from 0.
        auxiliary: weight of the auxiliary head's loss; 0 builds no such head.
        smoothing: label smoothing (ImageNet: 0.1).
    """

    channels: int = 36
    layers: int = 20
    stem: Literal["cifar", "imagenet"] = "cifar"
    epochs: int = 600
    batch_size: int = 96
    lr: float = 0.025
    minimum_lr: float = 0.0
    lr_schedule: Schedule = "cosine"
    lr_warmup: int = 5
    momentum: float = 0.9
    weight_decay: float = 3e-4
    grad_clip: float = 5.0
    cutout: int = 16
    drop_path: float = 0.3
    auxiliary: float = 0.4
    smoothing: float = 0.0


@dataclass
class CompareOptions:
    """What stands beside PC-DARTS in the table of `train.py`.

    Args:
        darts: search with K = 1 without edge normalisation, with batch / K (about the same memory) and equal time.
        random: random cells that are retrained; their spread is the yardstick.
        random_search: draw cells, train each for `proxy_epochs`, keep the best on the validation pictures, in the time
            of the PC-DARTS search.
        proxy_epochs: of a candidate of random search.
    """

    darts: bool = True
    random: int = 2
    random_search: bool = True
    proxy_epochs: int = 2


@dataclass
class RunConfig:
    """One run: search, derive, draw, retrain, compare.

    Args:
        run_dir: everything is written there.
        resume: auto continues an unfinished run of the same options; never refuses a used folder.
        genotype: skip the search and retrain this cell: a published name (PC_DARTS_cifar, ...) or a JSON file.
        max_parameters, max_macs: derive the best cell whose retrained network stays below (millions; 0: no cap).
        device: auto, cpu or cuda. threads: CPU threads (0 leaves torch's default).
        checkpoint_every: steps between checkpoints. log_every: steps between log lines.
    """

    run_dir: str = "runs/pc_darts"
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"
    genotype: str | None = None
    max_parameters: float = 0.0
    max_macs: float = 0.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    checkpoint_every: int = 50
    log_every: int = 10
    progress: bool = True
    data: DataConfig = field(default_factory=DataConfig)
    search: SearchOptions = field(default_factory=SearchOptions)
    retrain: RetrainOptions = field(default_factory=RetrainOptions)
    compare: CompareOptions = field(default_factory=CompareOptions)


# How a run is executed and reported, not what it computes: these may differ between two starts of it.
FREE_OPTIONS = ("resume", "device", "threads", "checkpoint_every", "log_every", "progress", "run_dir")


def read_config(argv: Sequence[str] | None, description: str, default: Path | None = SMALL) -> tuple[RunConfig, str]:
    """The configuration of a command line and its YAML text (`--config FILE`, then `--section.option value`)."""
    return parse_config(RunConfig, default, description, argv)
