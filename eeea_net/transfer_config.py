"""Options of `transfer.py` as plain dataclasses; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from common.cli import parse_config, take
from common.errors import UserError
from common.options import (
    Count,
    Decay,
    NotNegative,
    Positive,
    Range,
    RunOptions,
    Seed,
    Share,
    Whole,
    check_ranges,
    free_options,
)
from eeea_net.config import CONFIGS, DataConfig, SgdOptions

Task = Literal["detection", "segmentation", "pose"]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True)
class SceneConfig:
    """Which scenes the heads learn.

    Args:
        name: shapes (drawn, exact) or photos (photographic cut-outs on photographs, `make data-photos`).
        path: with photos: folder that holds usr/share of the packages.
        size: side of the pictures, and of crops for the pose, in pixels.
        train: training pictures.
        test: test pictures.
        turn: crops of shapes for the pose are turned by up to so many degrees, in training and in the test; shapes
            always stand upright otherwise. A quarter of a square's symmetry and more would mix up its corners.
    """

    name: Literal["shapes", "photos"] = "shapes"
    path: str | None = None
    size: Annotated[int, Range(32, 4096)] = 64
    train: Count = 4000
    test: Count = 600
    turn: Annotated[float, Range(0, 35)] = 30.0


@dataclass(frozen=True)
class AugmentOptions:
    """What happens to a training picture of the scenes.

    Args:
        flip: mirror half of them.
        zoom: the window is at most so many times larger or smaller.
        shift: of the window, as a share of its side.
        jitter: largest change of contrast and of brightness.
    """

    flip: bool = True
    zoom: Annotated[float, Range(1, 4)] = 1.25
    shift: Annotated[float, Range(0, 0.5)] = 0.1
    jitter: Share = 0.2


@dataclass(frozen=True)
class HeadOptions:
    """What is put on the backbone's maps; defaults: the authors'.

    Args:
        extras: channels of SSDLite's further maps, each half as large as the one before.
        width: channels of BiSeNet's paths; twice as many behind their fusion.
        deconvolutions: channels of SimpleBaseline's, each doubling the sides.
        sigma: of a keypoint's target, in pixels of the heat map.
    """

    extras: list[Count] = field(default_factory=lambda: [512, 256, 256, 64])
    width: Annotated[int, Range(4, 4096)] = 128
    deconvolutions: list[Count] = field(default_factory=lambda: [256, 256, 256])
    sigma: Positive = 2.0


@dataclass(frozen=True)
class PretrainOptions(SgdOptions):
    """Classification before the transfer, for backbones that come without weights.

    Args:
        data: the pictures that are classified.
        epochs: passes over them; 0 begins the transfer from random weights.
    """

    data: DataConfig = field(default_factory=DataConfig)
    epochs: Whole = 30


@dataclass(frozen=True)
class FitOptions(SgdOptions):
    """Training of backbone and head together.

    Args:
        optimiser: sgd, or adam (the pose; momentum is then unused).
        schedule: cosine to zero; poly (power 0.9); or steps, a tenth from 64 % and a hundredth from 86 % of the
            training on.
        warm_up: steps in which the rate rises linearly.
        epochs: passes over the training pictures (objects, for the pose).
        backbone_rate: the backbone's learning rate over the head's.
    """

    optimiser: Literal["sgd", "adam"] = "sgd"
    schedule: Literal["cosine", "poly", "steps"] = "cosine"
    batch_size: Count = 32
    lr: NotNegative = 0.01
    momentum: Decay = 0.9
    weight_decay: NotNegative = 5e-4
    grad_clip: NotNegative = 0.0
    cutout: Annotated[int, Range(0, 0)] = 0
    warm_up: Whole = 0
    epochs: Count = 200
    backbone_rate: Share = 1.0


@dataclass
class TransferConfig(RunOptions):
    """One run: backbones of equal MACs, each with the task's head, trained and measured alike.

    Args:
        run_dir: everything is written there.
        seed: of weights, scenes, their order and augmentation.
        resume: auto continues an unfinished run of the same options; never refuses a used folder.
        task: detection (SSDLite), segmentation (BiSeNet) or pose (SimpleBaseline).
        backbone: a member that `train.py --space once_for_all` exported (its folder), EEEA_C1, EEEA_C2, mobilenetv3, a
            published cell or a genotype file (also pc_darts').
        weights: of the backbone as a classifier (safetensors, our names; convert.py makes them of the authors').
        beside: backbones trained beside it, widened or narrowed to its MACs.
        inherit: a searched member keeps the weights of its elastic network; false: it is trained anew before the
            transfer, as those beside it are.
        first_stride: of each backbone's first convolution.
        layers: cells of a backbone that is made of cells.
        device: auto, cpu or cuda.
        pictures: test pictures that are drawn with the predictions.
    """

    checkpoint_every: Count = 100
    log_every: Count = 10
    run_dir: str = "runs/eeea_net-transfer"
    seed: Seed = 0
    resume: Literal["auto", "never"] = "auto"
    task: Task = "detection"
    backbone: str = "EEEA_C2"
    weights: str | None = None
    beside: list[str] = field(default_factory=lambda: ["mobilenetv3", "PC_DARTS"])
    inherit: bool = False
    first_stride: Literal[1, 2] = 2
    layers: Annotated[int, Range(3, 100)] = 5
    device: Literal["auto", "cpu", "cuda"] = "auto"
    pictures: Annotated[int, Range(1, 64)] = 8
    data: SceneConfig = field(default_factory=SceneConfig)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    pretrain: PretrainOptions = field(default_factory=PretrainOptions)
    head: HeadOptions = field(default_factory=HeadOptions)
    fit: FitOptions = field(default_factory=FitOptions)

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.head.extras or not self.head.deconvolutions:
            raise UserError("--head.extras and --head.deconvolutions: expected at least one number of channels")
        if self.head.width % 4:
            raise UserError(f"--head.width {self.head.width}: expected a multiple of 4")
        if len({*self.beside, self.backbone}) <= len(self.beside):
            raise UserError(f"--beside {self.beside}: expected different backbones, others than --backbone")


FREE_OPTIONS = free_options("device", "pictures", section="")


def read_config(argv: Sequence[str] | None, description: str) -> tuple[TransferConfig, str]:
    """The configuration of a command line and its YAML text; `--task` decides which defaults apply.

    Raises:
        UserError: a bad option.
    """
    tasks, _ = take("--task", argv)
    task = tasks[-1] if tasks else "detection"
    if task not in TASKS:
        raise UserError(f"--task {task}: expected one of {', '.join(TASKS)}")
    return parse_config(TransferConfig, CONFIGS / "transfer" / f"{task}.yaml", description, argv)
