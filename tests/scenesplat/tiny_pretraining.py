"""Runs of pretrain.py and finetune.py on three rooms that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.training import read_logs
from tests.drills import words

CONFIG = """
data: {rooms: 3, eval_rooms: 1, density: 30, views: 2, view_size: 32, voxel: 0.2}
network: {strides: [2], enc_depths: [1, 1], enc_channels: [8, 16], enc_heads: [1, 2], enc_patch: [32, 32],
  dec_depths: [1], dec_channels: [12], dec_heads: [2], dec_patch: [32], drop_path: 0.1, norm_momentum: 0.1,
  pooling: max, mask_token: %s}
trainer: {max_steps: 6, batch_size: 2, precision: 32-true, accelerator: cpu, checkpoint_every: 2, log_every: 1,
  progress: false}
"""
PRETRAIN = """text: {width: 12}
crops: {locals: 2, patch: 0.4}
terms: {hidden: 16, bottleneck: 8, codes: [4]}
optimiser: {lr: 0.01, block_lr: 0.005}
"""
FINETUNE = """optimiser: {lr: 0.01, block_lr: 0.005}
measure: {fragments: 1, neighbours: 3}
"""


def command(folder: Path, tuning: bool = False, **options: Any) -> list[str]:
    """The arguments of a run; options are written with `__` for the dot."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.parent / f"{'finetune' if tuning else 'pretrain'}.yaml"
    config.write_text(CONFIG % ("false" if tuning else "true") + (FINETUNE if tuning else PRETRAIN))
    return ["--config", str(config), "--run_dir", str(folder), *words(**options)]


def pretrain(folder: Path, **options: Any) -> Path:
    """One start of pretrain.py."""
    from scenesplat.pretrain import main

    main(command(folder, **options))
    return folder


def finetune(folder: Path, **options: Any) -> Path:
    """One start of finetune.py."""
    from scenesplat.finetune import main

    main(command(folder, True, **options))
    return folder


def logged(folder: Path, name: str = "loss") -> dict[int, float]:
    """A quantity by step over all starts of a stage."""
    return read_logs(folder).get(f"train/{name}", {})
