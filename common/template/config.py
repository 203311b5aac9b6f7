"""Options of train.py as plain dataclasses; nothing heavy is imported here."""

from dataclasses import dataclass, field
from typing import Literal

from common.options import TrainerOptions


@dataclass
class NetworkConfig:
    width: int = 32  # channels of the hidden layers
    depth: int = 4  # how many there are


@dataclass
class NewpaperTrainer(TrainerOptions):
    max_steps: int = 1500
    batch_size: int = 64


@dataclass
class NewpaperRun:
    """One training. targets: noisy (the paper's) or clean. sigma: of the noise; pictures lie in [0, 1]."""

    run_dir: str = "runs/newpaper"
    seed: int = 0
    resume: str = "auto"
    targets: Literal["noisy", "clean"] = "noisy"
    sigma: float = 0.3
    lr: float = 1e-3
    ema_decay: float = 0.99
    network: NetworkConfig = field(default_factory=NetworkConfig)
    trainer: NewpaperTrainer = field(default_factory=NewpaperTrainer)
