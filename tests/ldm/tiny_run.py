"""A run of the LDM trainer that takes a second: what the tests of training, tasks and sampling share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.training import load_checkpoint, read_logs
from ldm.config import LdmConfig
from ldm.run import Run
from ldm.train import main
from tests.drills import kill, same_weights, words

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


def command(folder: Path) -> list[str]:
    """A whole run, for `tests.drills`."""
    return arguments(folder, stages="[first_stage,diffusion,evaluate]")


def train(folder: Path, **options: Any) -> Path:
    main(arguments(folder, **options))
    return folder


def logged(stage: Path, column: str, by: str | None = None) -> dict[int, float]:
    """A logged quantity by step (or by another column), over all starts of the run."""
    logs = read_logs(stage)
    return {int(logs[by][step]) if by else step: value for step, value in logs.get(column, {}).items()}


def losses(folder: Path) -> dict[int, float]:
    """Loss of every step of the diffusion stage."""
    return logged(folder / "diffusion", "train/loss")


def first_stage_losses(folder: Path, column: str = "total_loss") -> dict[int, float]:
    """What the first stage logged, by its own step."""
    return logged(folder / "first_stage", f"first_stage/{column}", "step_count")


def first_stage_of(folder: Path) -> Path:
    return folder / "first_stage" / "first_stage.safetensors"


def same_model(a: Path, b: Path) -> bool:
    return same_weights(a / "model.safetensors", b / "model.safetensors")


def assert_goes_on_exactly(folder: Path, whole: Path, **options: Any) -> None:
    """A run in `folder` that is killed in the middle of both stages ends with the losses and weights of the `whole`."""
    for stage, step in (("first_stage", 5), ("diffusion", 8 - 3 + 5)):
        kill("ldm.train", step, arguments(folder, **options))
        state = load_checkpoint(folder / stage / "checkpoints" / "last.ckpt")["state_dict"]
        assert int(state.get("_steps", state.get("ema.num_updates"))) == 3
    train(folder, **options)
    assert first_stage_losses(folder) == first_stage_losses(whole) and len(first_stage_losses(folder)) == 8
    assert losses(folder) == losses(whole) and sorted(losses(folder)) == list(range(8))
    assert same_weights(first_stage_of(folder), first_stage_of(whole)) and same_model(folder, whole)


def config_of(folder: Path) -> LdmConfig:
    return Run.existing(folder).config
