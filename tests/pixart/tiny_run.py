"""A recipe of the trainer that takes seconds: what the tests of training, data and sampling share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from common.training import read_logs
from tests.drills import words

SHARED = """
run_dir: runs/tiny
vae: {vae}
stages: [stage1.yaml, stage2.yaml, stage3.yaml]
data: {{images: 48, eval_images: 24, size: 16, shapes: [circle, square], colours: [red, green, blue]}}
network: {{width: 24, depth: 2, heads: 2, caption_tokens: 40}}
optimiser: {{lr: 1.0e-4, warmup: 2, ema_decay: 0.9, grad_clip: 0.01}}
trainer:
  {{max_steps: 6, batch_size: 8, precision: 32-true, accelerator: cpu, checkpoint_every: 2, log_every: 1,
   progress: false}}
sampling: {{steps: 2, guidance: 2.0, grid: 2, metric_images: 24, per_task: 2}}
"""
STAGES = {
    "stage1": "kind: class\ndata: {scenes: one}\n",
    "stage2": "kind: text\ninit_from: stage1\ndata: {scenes: few}\n",
    "stage3": """
kind: text
init_from: stage2
data: {scenes: hq, captions: mixed, size: 32, ratios: [0.5, 1.0, 2.0]}
network: {multi_scale: true, interpolation_scale: 2.0}
trainer: {max_steps: 4, batch_size: 4}
""",
}


def tiny_vae(folder: Path) -> Path:
    """A diffusers AutoencoderKL of a few thousand random weights, factor 2, 4 latent channels."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        vae = AutoencoderKL(
            **blocks,
            block_out_channels=[8, 8],
            latent_channels=4,
            norm_num_groups=2,
            scaling_factor=0.5,
            sample_size=16,
        )
        vae.save_pretrained(folder)
    return folder


def recipe(folder: Path) -> Path:
    """The recipe's files below `folder`; returns the recipe."""
    vae = tiny_vae(folder / "vae")
    for name, text in STAGES.items():
        (folder / f"{name}.yaml").write_text(text)
    file = folder / "recipe.yaml"
    file.write_text(SHARED.format(vae=vae))
    return file


def arguments(folder: Path, stage: str | None = None, **options: Any) -> list[str]:
    """Command line of the tiny recipe with run_dir `folder`; options are written with `__` for the dot."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    chosen = ["--stage", stage] if stage else []
    return ["--config", str(recipe(folder.parent)), "--run_dir", str(folder), *chosen, *words(**options)]


def command(folder: Path) -> list[str]:
    """A whole run, for `tests.drills`."""
    return arguments(folder)


def train(folder: Path, stage: str | None = None, **options: Any) -> Path:
    """Run the recipe (or one stage); returns `folder`."""
    from pixart.train import main

    main(arguments(folder, stage, **options))
    return folder


def losses(stage: Path, column: str = "train/loss") -> dict[int, float]:
    """A logged quantity by step, over all starts of a stage."""
    return read_logs(stage).get(column, {})
