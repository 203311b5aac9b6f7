"""How the trainer reads the user's own pictures, for the test that nothing held out is trained on."""

from __future__ import annotations

from pathlib import Path

from slam.config import DataConfig
from slam.data import open_pictures
from tests.common.pictures import level


def _opened(where: Path) -> tuple[set[int], set[int]]:
    config = DataConfig(name="folder", path=str(where), images=0, eval_images=1000)
    parts = (open_pictures(config, part, 16) for part in ("train", "test"))  # type: ignore[arg-type]
    shown = [{level({"image": image}) for image in part.images(list(range(len(part.captions))))} for part in parts]
    return shown[0], shown[1]


LOADERS = {"folder": _opened}
