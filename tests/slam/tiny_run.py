"""A run on a teacher of a few thousand random weights that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.training import read_logs
from tests.drills import words

CONFIG = """
data: {name: shapes, images: 24, eval_images: 8}
subpath: {solver_steps: 10, sigma: linear, time: effective, embedding_scale: 0.1}
loss: {guidance: 1.0}
optimiser: {lr: 1.0e-3, warmup: 2}
trainer: {max_steps: 6, batch_size: 8, precision: 32-true, accelerator: cpu, checkpoint_every: 2, sample_every: 0,
  log_every: 1, progress: false}
evaluation: {teacher_steps: 3, steps: [1, 2], grid: 4, judge: shapes64}
student: {embedding_width: 16}
"""


def arguments(folder: Path, teacher: Path, **options: Any) -> list[str]:
    """Command line of the tiny run in `folder`; options are written with `__` for the dot."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.parent / "tiny.yaml"
    config.write_text(CONFIG)
    return ["--config", str(config), "--teacher", str(teacher), "--run_dir", str(folder), *words(**options)]


def train(folder: Path, teacher: Path, **options: Any) -> Path:
    """One start of the trainer."""
    from slam.train import main

    main(arguments(folder, teacher, **options))
    return folder


def losses(folder: Path, student: str = "slam") -> dict[int, float]:
    """Loss by step over all starts of a student."""
    return read_logs(folder / student).get("train/loss", {})
