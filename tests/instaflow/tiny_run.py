"""A teacher of a few thousand random weights and a run on it that takes seconds: what the trainer's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.training import read_logs
from tests.common.tiny_teacher import save_teacher
from tests.drills import words

CONFIG = """
pairs: {prompts: PROMPTS, count: 24, solver: DDIMScheduler, steps: 3, guidance: 2.0, batch_size: 8, shard_size: 8}
reflow: {steps: 6, batch_size: 8, lr: 1.0e-3}
distil: {pairs: 16, teacher_steps: 3, alpha: 1.5, steps: 6, batch_size: 8, lr: 1.0e-3}
perceptual: {steps: 4, batch_size: 4, lr: 1.0e-3}
optimiser: {warmup: 2, ema_decay: 0.9}
trainer: {precision: 32-true, accelerator: cpu, checkpoint_every: 2, sample_every: 0, log_every: 1, progress: false}
evaluation: {images: 12, grid: 4, batch_size: 8}
stages: [pairs, reflow, distil, perceptual]
"""
PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("star", "ring", "cross", "heart")]
STAGES = ("reflow_1", "distil", "perceptual")


def arguments(folder: Path, teacher: Path, **options: Any) -> list[str]:
    """Command line of the tiny run in `folder`; options are written with `__` for the dot."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    config = folder.parent / "tiny.yaml"
    config.write_text(CONFIG.replace("PROMPTS", str(prompts)))
    return ["--config", str(config), "--teacher", str(teacher), "--run_dir", str(folder), *words(**options)]


def command(folder: Path) -> list[str]:
    """A whole run, for `tests.drills`."""
    teacher = folder.parent / "teacher"
    return arguments(folder, teacher if teacher.is_dir() else save_teacher(teacher))


def train(folder: Path, teacher: Path, **options: Any) -> Path:
    """One start of the trainer."""
    from instaflow.train import main

    main(arguments(folder, teacher, **options))
    return folder


def losses(folder: Path, stage: str) -> dict[int, float]:
    """Loss by step over all starts of a stage."""
    return read_logs(folder / stage).get("train/loss", {})
