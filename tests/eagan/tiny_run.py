"""A search and a training of seconds, and the pieces that the tests share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from common.options import RunOptions
from eagan.config import DataConfig, EvaluationConfig, NetworkConfig, SearchOptions, StageOptions, TrainOptions
from eagan.data import Real, open_pictures
from eagan.genotypes import PUBLISHED, Genes
from eagan.judge import judge_file, open_judge
from eagan.measuring import Reference
from eagan.model import Discriminator, Generator
from eagan.searching import Judging, Search, Searched
from eagan.training import AnyDiscriminator
from tests.drills import words

CONFIG = """
checkpoint_every: 2
log_every: 1
progress: false
device: cpu
threads: 1
data: {name: digits, images: 60}
network: {gf_dim: 4, df_dim: 4, latent_dim: 6, bottom_width: 2}
search: {population: 3}
stage_g: {warmup_steps: 2, round_steps: 2, rounds: 2, batch_real: 4, batch_fake: 4}
stage_d: {warmup_steps: 1, round_steps: 2, rounds: 2, batch_real: 4, batch_fake: 4}
train:
  {steps: 4, d_steps: 2, batch_real: 4, batch_fake: 4, augment: [colour, translation, cutout], sample_every: 2}
evaluation: {images: 20, final_images: 24, judge_steps: 3, sheet: 2, splits: 2}
"""

NETWORK = NetworkConfig(4, 4, 6, 2)
STAGE = StageOptions(warmup_steps=3, round_steps=4, rounds=2, batch_real=4, batch_fake=4)
OPTIONS = SearchOptions(population=4)
EVALUATION = EvaluationConfig(images=20, splits=2, sheet=2, judge_steps=3)
TRAIN = TrainOptions(steps=6, d_steps=2, batch_real=4, batch_fake=4, sample_every=0, ema_decay=0.9)
RUN = RunOptions(checkpoint_every=2, log_every=1, progress=False)
CPU = torch.device("cpu")


TWO_RANKS = None  # it trains in one process


def arguments(folder: Path, **options: Any) -> list[str]:
    """Command line of the tiny run in `folder`; options are written with `__` for the dot."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.parent / "tiny.yaml"
    config.write_text(CONFIG)
    return ["--config", str(config), "--run_dir", str(folder), *words(**options)]


def command(folder: Path) -> list[str]:
    """A whole run, for `tests.drills`."""
    return arguments(folder)


def train(folder: Path, **options: Any) -> dict[str, Any]:
    """One start of the trainer; returns the metrics."""
    from eagan.train import main

    return main(arguments(folder, **options))


@functools.cache
def digits() -> Real:
    return open_pictures(DataConfig(name="digits", images=60), NETWORK.side)


def judging(folder: Path) -> Judging:
    """A barely trained classifier and features of real digits."""
    real = digits()
    assert real.classed is not None
    name = f"classes:{judge_file(real.classed, EVALUATION.judge_steps)}"
    Reference.of(folder / "reference.safetensors", real, open_judge(name), 24)
    return Judging(name, folder / "reference.safetensors")


def search(
    folder: Path,
    searched: Searched = "generator",
    stage: StageOptions = STAGE,
    options: SearchOptions = OPTIONS,
    evaluation: EvaluationConfig = EVALUATION,
    seed: int = 0,
    generator: Genes = PUBLISHED["best_G"],
) -> Search:
    """A stage of the search on digits."""
    torch.manual_seed(seed)
    networks: tuple[Generator, AnyDiscriminator] = (
        Generator(NETWORK, generator if searched == "discriminator" else None),
        Discriminator(NETWORK, PUBLISHED["base_D"] if searched == "generator" else None),
    )
    place = judging(folder.parent)
    return Search(searched, stage, options, NETWORK, evaluation, place, digits(), folder, *networks, seed, RUN, CPU)
