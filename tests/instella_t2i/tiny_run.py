"""A run of a few thousand weights on 16 px scenes that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.training import read_logs
from tests.drills import words
from tests.instella_t2i.tiny_text import save_language_model

CONFIG = """
stages: [tokenizer, decoder]
data: {name: shapes, size: 16, images: 48, eval_images: 12}
network: {patch: 4, tokens: 4, bits: 8, encoder_layers: 1, encoder_heads: 1, encoder_head_dim: 16, decoder_layers: 1,
  decoder_heads: 1, decoder_head_dim: 16, down_after: [0], up_after: [0], axes: [4, 6, 6], theta: 30,
  rotary: pairs, scale: 32}
tokenizer: {steps: 6, batch_size: 8, aimed: true, optimiser: muon, lr: 2.0e-3, warmup: 2, perceptual: 0.1,
  gan_start: 0.5, gan_warmup: 1, gan_width: 4}
decoder: {steps: 4, batch_size: 8, warmup: 1, sizes: [16, 24], gan_start: 0.25, gan_warmup: 1}
trainer: {precision: 32-true, accelerator: cpu, checkpoint_every: 2, sample_every: 0, log_every: 1, progress: false}
evaluation: {grid: 4, generated: 12}
stages: [tokenizer, decoder]
stream: {layers: 2, heads: 1, head_dim: 16}
diffusion: {steps: 6, batch_size: 8, lr: 5.0e-3, warmup: 2}
autoregression: {steps: 6, batch_size: 8, lr: 5.0e-3, warmup: 2}
sampling: {steps: 3, guidance: 1, ar_guidance: 1}
"""
ALL = "[tokenizer, decoder, diffusion, autoregression]"


def arguments(folder: Path, **options: Any) -> list[str]:
    """Command line of the tiny run in `folder`; options are written with `__` for the dot."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.parent / "tiny.yaml"
    config.write_text(CONFIG)
    encoder = save_language_model(folder.parent / "language_model")
    return ["--config", str(config), "--run_dir", str(folder), "--text.encoder", str(encoder), *words(**options)]


def command(folder: Path) -> list[str]:
    """A whole run, for `tests.drills`."""
    return arguments(folder, stages=ALL)


def train(folder: Path, **options: Any) -> Path:
    """One start of the trainer."""
    from instella_t2i.train import main

    main(arguments(folder, **options))
    return folder


def losses(folder: Path, stage: str = "tokenizer", name: str = "train/loss") -> dict[int, float]:
    """A logged quantity by step over all starts of a stage."""
    return read_logs(folder / stage).get(name, {})
