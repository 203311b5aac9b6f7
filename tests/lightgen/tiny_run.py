"""A run on a teacher, an autoencoder and a text encoder of a few thousand random weights that takes seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from common.training import read_logs
from tests.common.tiny_teacher import save_teacher
from tests.drills import words

CONFIG = """
data: {name: teacher, captions: shapes, world: small, images: 24, teacher_steps: 2}
text: {length: 6}
network: {width: 16, encoder_depth: 1, decoder_depth: 1, cross_depth: 1, text_depth: 1, encoder_heads: 2,
  decoder_heads: 2, cross_heads: 2, dropout: 0.1, grid: 2, head_width: 16, head_depth: 1}
stages: {sizes: [8, 16], steps: [3, 4], lr: [0.002, 0.001], batch_mul: 2}
preferences: {pairs: 12, steps: 3, batch_size: 4, lr: 0.001, beta: 100}
optimiser: {warmup: 1, ema_decay: 0.9}
sampling: {iterations: 3, head_steps: 2, clip: 3.0}
trainer: {batch_size: 8, precision: 32-true, accelerator: cpu, checkpoint_every: 2, sample_every: 0, log_every: 1,
  progress: false}
evaluation: {per_task: 2, grid: 3}
"""


def inputs(folder: Path) -> tuple[Path, Path]:
    """(a teacher, whose vae/ makes the latents; a text encoder)."""
    teacher, encoder = folder / "teacher", folder / "encoder"
    if not teacher.is_dir():
        save_teacher(teacher, "v_prediction")
        encoder.mkdir(parents=True, exist_ok=True)
        for part in ("text_encoder", "tokenizer"):
            shutil.copytree(teacher / part, encoder, dirs_exist_ok=True)
    return teacher, encoder


def arguments(folder: Path, beside: Path | None = None, **options: Any) -> list[str]:
    """Command line of the tiny run in `folder`, whose inputs lie `beside` it; options with `__` for the dot."""
    place = beside or folder.parent
    place.mkdir(parents=True, exist_ok=True)
    teacher, encoder = inputs(place)
    config = place / "tiny.yaml"
    config.write_text(CONFIG)
    return [
        *("--config", str(config), "--teacher", str(teacher), "--autoencoder", str(teacher)),
        *("--text.encoder", str(encoder), "--run_dir", str(folder), *words(**options)),
    ]


def command(folder: Path) -> list[str]:
    """A whole run, for `tests.drills`."""
    return arguments(folder)


def train(folder: Path, beside: Path | None = None, **options: Any) -> Path:
    """One start of the trainer."""
    from lightgen.train import main

    main(arguments(folder, beside, **options))
    return folder


def losses(folder: Path, part: str = "stage1", name: str = "loss") -> dict[int, float]:
    """A logged quantity by step over all starts of a part."""
    return read_logs(folder / part).get(f"train/{name}", {})
