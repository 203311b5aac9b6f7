"""Options of train.py as plain dataclasses; nothing heavy is imported here."""

from dataclasses import dataclass, field
from typing import Literal

from common.options import Count, NotNegative, Positive, Seed, Share, TrainerOptions


@dataclass
class NetworkConfig:
    """The network.

    Args:
        width: channels of the hidden layers.
        depth: number of layers.
    """

    width: Count = 32
    depth: Count = 4


@dataclass
class NewpaperTrainer(TrainerOptions):
    """How to run.

    Args:
        max_steps: optimiser steps.
        batch_size: global batch, in pictures.
    """

    max_steps: Count = 1500
    batch_size: Count = 64


@dataclass
class NewpaperRun:
    """One training.

    Args:
        run_dir: folder of this run's checkpoints, logs, weights and metrics.
        seed: of the weights' start, the order of the pictures and the noise.
        resume: auto goes on where it stopped; never refuses a used folder; or the path of a .ckpt file.
        targets: noisy (the paper's) or clean.
        sigma: standard deviation of the noise; pictures lie in [0, 1].
        lr: learning rate.
        ema_decay: of the moving average of the weights that is kept; 0 takes the last weights.
    """

    run_dir: str = "runs/newpaper"
    seed: Seed = 0
    resume: str = "auto"
    targets: Literal["noisy", "clean"] = "noisy"
    sigma: Positive = 0.3
    lr: NotNegative = 1e-3
    ema_decay: Share = 0.99
    network: NetworkConfig = field(default_factory=NetworkConfig)
    trainer: NewpaperTrainer = field(default_factory=NewpaperTrainer)
