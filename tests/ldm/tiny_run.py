"""A run of the LDM trainer that takes a second: what the tests of training, tasks and sampling share."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from ldm.config import LdmConfig
from ldm.train import main
from tests.drills import words

CONFIG = """
task: text
data: {name: shapes, size: 16, train_images: 48, eval_images: 24}
first_stage:
  {ch: 8, ch_mult: [1, 2], z_channels: 2, norm_groups: 4, attention: false, perceptual: 0.0, steps: 8, batch_size: 4,
   disc_start: 3, disc_width: 8}
unet: {model_channels: 16, channel_mult: [1, 1], norm_groups: 4, num_head_channels: 8}
conditioner: {width: 32, layers: 1, tokens: 12, vocabulary: 128}
optimiser: {lr: 1.0e-4, warmup: 2, ema_decay: 0.9}
trainer:
  {max_steps: 8, batch_size: 8, precision: 32-true, accelerator: cpu, checkpoint_every: 3, sample_every: 0,
   log_every: 1, progress: false}
sampling: {steps: 2, grid: 4, metric_images: 24}
stages: [first_stage, diffusion]
"""


def config_file(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def arguments(folder: Path, **options: Any) -> list[str]:
    """Command line of the tiny run in `folder`; options are written with `__` for the dot."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return ["--config", str(config_file(folder.parent)), "--run_dir", str(folder), *words(**options)]


def train(folder: Path, **options: Any) -> Path:
    main(arguments(folder, **options))
    return folder


def logged(stage: Path, column: str, by: str = "step") -> dict[int, float]:
    """A logged quantity by step, over all starts of the run (a later start replaces what it did again)."""
    found: dict[int, float] = {}
    for path in sorted(stage.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        for row in csv.DictReader(path.open()):
            if row.get(column):
                found[int(float(row[by]))] = float(row[column])
    return found


def losses(folder: Path) -> dict[int, float]:
    """Loss of every step of the diffusion stage."""
    return logged(folder / "diffusion", "train/loss")


def config_of(folder: Path) -> LdmConfig:
    from ldm.run import Run

    return Run.existing(folder).config
