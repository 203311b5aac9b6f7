"""How the trainer reads the user's own pictures, for the test that nothing held out is trained on."""

from __future__ import annotations

import itertools
from pathlib import Path

from ldm.config import DataConfig
from ldm.streaming import open_shards
from ldm.tasks import open_dataset
from tests.common.pictures import level


def _opened(where: Path) -> tuple[set[int], set[int]]:
    parts = [open_dataset(DataConfig("folder", str(where), size=8), part) for part in ("train", "test")]
    train, held_out = ({level(part[i]) for i in range(len(part))} for part in parts)  # type: ignore[arg-type]
    return train, held_out


def _streamed(where: Path) -> tuple[set[int], set[int]]:
    train, held_out = open_shards(DataConfig("shards", str(where), size=8), "text", seed=0)
    return {level(item) for item in itertools.islice(train, train.rows())}, set(map(level, held_out))


LOADERS = {"folder": _opened, "shards": _streamed}
