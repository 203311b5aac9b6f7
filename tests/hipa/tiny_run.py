"""A run on a teacher of a few thousand random weights that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.training import read_logs
from tests.common.tiny_teacher import save_teacher
from tests.drills import words

CONFIG = """
pairs: {prompts: shapes, count: 24, steps: 2, guidance: 1.5, batch_size: 8, shard_size: 16}
adaptor: {rank: 2, alpha: 5.0, placement: attention_conv}
optimiser: {lr: 1.0e-2, warmup: 2, schedule: cosine, ema_decay: 0.5}
trainer: {max_steps: 6, batch_size: 8, precision: 32-true, accelerator: cpu, checkpoint_every: 2, sample_every: 0,
  log_every: 1, progress: false}
evaluation: {images: 8, grid: 4}
task: {base_steps: 4}
arms: [hipa]
"""


def arguments(folder: Path, teacher: Path, **options: Any) -> list[str]:
    """Command line of the tiny run in `folder`; options are written with `__` for the dot."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.parent / "tiny.yaml"
    config.write_text(CONFIG)
    return ["--config", str(config), "--teacher", str(teacher), "--run_dir", str(folder), *words(**options)]


def command(folder: Path) -> list[str]:
    """A whole run, for `tests.drills`."""
    teacher = folder.parent / "teacher"
    return arguments(folder, teacher if teacher.is_dir() else save_teacher(teacher, "v_prediction"))


def train(folder: Path, teacher: Path, **options: Any) -> Path:
    """One start of the trainer."""
    from hipa.train import main

    main(arguments(folder, teacher, **options))
    return folder


def losses(folder: Path, arm: str = "hipa") -> dict[int, float]:
    """Loss by step over all starts of an arm."""
    return read_logs(folder / arm).get("train/loss", {})
