"""A search and a training that take seconds."""

from __future__ import annotations

import functools
from pathlib import Path

from common.data.classes import ImageSet
from eeea_net.config import CONFIGS, DataConfig, LargeOptions, ProxyOptions, RetrainOptions
from eeea_net.data import open_data
from eeea_net.proxy import Setting
from eeea_net.search import Evaluator, Scale
from eeea_net.space import Space
from tests.drills import words

DATA = DataConfig(name="digits", size=8, images=120, padding=1, flip=False, validation=0.2)
PROXY = ProxyOptions(channels=4, layers=3, batch_size=16, lr=0.1, cutout=0, auxiliary=0.0, steps=2)
RETRAIN = RetrainOptions(channels=4, layers=3, epochs=2, batch_size=32, lr=0.1, cutout=2, drop_path=0.2)
SETTING = Setting(DATA, PROXY, 0)
SPACE = Space()
SCALE = Scale(SPACE, LargeOptions())
TWO_RANKS = None  # a run is one process, with workers of its own


def command(folder: Path) -> list[str]:
    """A whole run of a search and a training, for `tests.drills`."""
    options = words(run_dir=folder, progress="false", device="cpu", checkpoint_every=2, data__images=120)
    options += words(compare__unfiltered="false", compare__random_search="false", compare__genotypes="[]")
    options += words(proxy__steps=2, proxy__batch_size=16, data__validation=0.2)
    return ["--config", str(CONFIGS / "smoke.yaml"), *options]


@functools.cache
def digits() -> ImageSet:
    return open_data(DATA)


def evaluator(path: Path, engine: str = "here", workers: int = 0) -> Evaluator:
    """Of tiny networks, in a file of its own."""
    return Evaluator(SETTING, SPACE, path, engine, workers)  # type: ignore[arg-type]
