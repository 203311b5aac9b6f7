"""A run on three rooms that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.training import read_logs
from tests.drills import words

CONFIG = """
data: {rooms: 3, eval_rooms: 1, density: 30, views: 2, view_size: 32, voxel: 0.2}
text: {width: 12}
network: {strides: [2], enc_depths: [1, 1], enc_channels: [8, 16], enc_heads: [1, 2], enc_patch: [32, 32],
  dec_depths: [1], dec_channels: [12], dec_heads: [2], dec_patch: [32], drop_path: 0.1, norm_momentum: 0.1}
loss: {least: 5}
optimiser: {lr: 0.006, block_lr: 0.002}
trainer: {max_steps: 6, batch_size: 2, precision: 32-true, accelerator: cpu, checkpoint_every: 2, log_every: 1,
  progress: false}
evaluation: {fragments: 1, neighbours: 3, queries: [a chair]}
"""


def command(folder: Path, **options: Any) -> list[str]:
    """A whole run, for `tests.drills`; options are written with `__` for the dot."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.parent / "tiny.yaml"
    config.write_text(CONFIG)
    return ["--config", str(config), "--run_dir", str(folder), *words(**options)]


def train(folder: Path, **options: Any) -> Path:
    """One start of the trainer."""
    from scenesplat.train import main

    main(command(folder, **options))
    return folder


def losses(folder: Path) -> dict[int, float]:
    """Loss by step over all starts."""
    return read_logs(folder / "pretraining").get("train/loss", {})
