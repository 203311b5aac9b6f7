"""A search and a training that take seconds, and processes to kill or to join: what the tests share.

Processes are forked, so that none of them has to import torch and Lightning again. A forked process hangs where it uses
its parent's pool of threads, so all of these run in one thread, whatever TEST_THREADS says.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.data.augmentation import Augmentation
from common.data.classes import ImageSet
from common.options import RunOptions
from pc_darts.config import CONFIGS, DataConfig, RetrainOptions, SearchOptions
from pc_darts.data import open_data, search_halves
from pc_darts.genotypes import Genotype
from pc_darts.retraining import RetrainResult, retrain
from pc_darts.searching import Searcher
from pc_darts.training import Machine
from tests.drills import PATIENCE, forked, words

DATA = DataConfig(name="digits", size=8, images=120, padding=1, flip=False, validation=0.2)
SEARCH = SearchOptions(channels=8, cells=3, nodes=2, epochs=3, warmup_epochs=1, batch_size=16)
RETRAIN = RetrainOptions(channels=4, layers=3, epochs=2, batch_size=32, cutout=2, drop_path=0.2, auxiliary=0.4)
RUN = RunOptions(checkpoint_every=2, log_every=1, progress=False)
AUGMENT = Augmentation(padding=1)
CELL = Genotype(
    (("sep_conv_3x3", 0), ("skip_connect", 1), ("dil_conv_3x3", 2), ("max_pool_3x3", 0)),
    (2, 3),
    (("avg_pool_3x3", 0), ("sep_conv_3x3", 1), ("skip_connect", 2), ("sep_conv_3x3", 1)),
    (2, 3),
)


TWO_RANKS: list[str] = []  # torchrun starts them


def command(folder: Path) -> list[str]:
    """A whole run of a search and a training, for `tests.drills`; other arms have budgets of measured seconds."""
    options = words(run_dir=folder, progress="false", device="cpu", threads=1, checkpoint_every=2)
    options += words(compare__darts="false", compare__random_search="false", compare__random=0, data__images=120)
    options += words(search__epochs=2, search__warmup_epochs=1, search__batch_size=16, search__channels=8)
    options += words(search__cells=3, search__nodes=2, retrain__channels=4, retrain__layers=3, retrain__epochs=2)
    return ["--config", str(CONFIGS / "smoke.yaml"), *options]


@functools.cache
def digits() -> ImageSet:
    return open_data(DATA)


def searcher(folder: Path, machine: Machine | None = None, draw: bool = False, **options: Any) -> Searcher:
    """The tiny search; options replace those of SEARCH."""
    torch.set_num_threads(1)
    chosen = SearchOptions(**{**SEARCH.__dict__, **options})
    halves = search_halves(digits().train, [0.5, 0.5], 0)
    return Searcher(chosen, digits(), halves, AUGMENT, folder, machine=machine, run=RUN, draw=draw)


def training(folder: Path, machine: Machine | None = None, seed: int = 0, **options: Any) -> RetrainResult:
    """The tiny training of CELL."""
    torch.set_num_threads(1)
    chosen = RetrainOptions(**{**RETRAIN.__dict__, **options})
    return retrain(CELL, chosen, digits(), AUGMENT, folder, seed, machine, RUN)


def on_two_processes(work: Callable[[Machine], object], store: Path) -> None:
    """Run `work` on two processes of a gloo group that meet at the file `store`."""

    def one(rank: int) -> None:
        dist.init_process_group("gloo", f"file://{store}", PATIENCE, world_size=2, rank=rank)
        work(Machine(rank=rank, world=2))
        dist.destroy_process_group()

    def both() -> None:
        other = os.fork()
        if other == 0:
            os._exit(forked(lambda: one(1)))
        one(0)
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0

    assert forked(both) == 0
