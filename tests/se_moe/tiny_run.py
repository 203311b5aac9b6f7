"""A run of the trainer that takes seconds: what the tests of training, checkpoints and programs share."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from se_moe.config import DataConfig, ModelOptions, OptimiserConfig, StorageConfig, Switches, TrainConfig
from se_moe.data import TextData
from se_moe.launch import make_run_groups
from se_moe.trainer import Trainer

WORDS = [
    "the",
    "of",
    "state",
    "union",
    "congress",
    "people",
    "year",
    "we",
    "must",
    "make",
    "great",
    "nation",
    "law",
    "work",
    "peace",
    "war",
    "tax",
    "and",
    "to",
    "our",
]
MODEL = ModelOptions(
    hidden=16, layers=4, heads=2, dense_hidden=32, experts=8, expert_hidden=24, moe_every=2, top_k=2, aux_weight=0.01
)


def text_file(folder: Path, name: str = "text.txt", seed: int = 0) -> Path:
    """A few thousand words of made-up text."""
    file = folder / name
    if not file.is_file():
        generator = np.random.default_rng(seed)
        weights = 1.0 / np.arange(1, len(WORDS) + 1)
        chosen = generator.choice(WORDS, size=6000, p=weights / weights.sum())
        file.write_text("\n".join(" ".join(chosen[i : i + 12]) for i in range(0, len(chosen), 12)), encoding="utf-8")
    return file


def config(folder: Path, switches: dict[str, bool] | None = None, **options: Any) -> TrainConfig:
    """The tiny run; `switches` are those that differ from "all on, embedding whole"."""
    return replace(
        TrainConfig(
            run_dir=str(folder / "run"),
            steps=8,
            batch=8,
            checkpoint_every=3,
            log_every=100,
            eval_sequences=8,
            data=DataConfig(tasks=[str(text_file(folder))], vocabulary=300, sequence=8),
            model=MODEL,
            switches=Switches(**({"partition": False} | (switches or {}))),
            storage=StorageConfig(period=16, device_mb=1.0),
            optimiser=OptimiserConfig(lr=3e-3, warmup=2),
        ),
        **options,
    )


# The drills' process is the only rank itself, so that no other one has to import torch.
VARIABLES = {"RANK": "0", "WORLD_SIZE": "1"}
TWO_RANKS = ["--parallel.ranks", "2"]


def write_config(file: Path, run: TrainConfig) -> Path:
    file.write_text(json.dumps(asdict(run)), encoding="utf-8")  # JSON is YAML
    return file


def command(folder: Path) -> list[str]:
    """A whole run of one arm, for `tests.drills`."""
    run = replace(config(folder.parent), run_dir=str(folder), arms=["ours"], progress=False)
    run = replace(run, parallel=replace(run.parallel, ranks=1, device="cpu"))
    return ["--config", str(write_config(folder.parent / f"{folder.name}.yaml", run))]


def trainer(run: TrainConfig, **options: Any) -> Trainer:
    """At its first step, in this process or as one of the ranks that are running."""
    torch.set_num_threads(1)
    data = run.data
    text = TextData(data.tasks, data.shares, data.vocabulary, data.sequence)
    groups = make_run_groups(run)
    return Trainer(run, text, torch.device("cpu"), Path(run.run_dir) / "tiers", groups, **options)


def losses(run: TrainConfig, steps: int, **options: Any) -> list[list[float]]:
    """(loss, gradient norm) of every step."""
    training = trainer(run, **options)
    found = []
    for _ in range(steps):
        log = training.step()
        found.append([log.loss, log.grad_norm])
    training.close()
    return found
