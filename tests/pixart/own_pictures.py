"""How the trainer reads the user's own pictures, for the test that nothing held out is trained on."""

from __future__ import annotations

from pathlib import Path

from pixart.config import DataConfig
from pixart.data import open_pictures
from tests.common.pictures import level


def _opened(where: Path) -> tuple[set[int], set[int]]:
    config = DataConfig(name="folder", path=str(where), size=16)
    train, held_out = (open_pictures(config, part) for part in ("train", "test"))  # type: ignore[arg-type]
    assert not held_out.trained_on
    shown = [{level({"image": image}) for image in part.images(range(len(part)))} for part in (train, held_out)]
    return shown[0], shown[1]


LOADERS = {"folder": _opened}
