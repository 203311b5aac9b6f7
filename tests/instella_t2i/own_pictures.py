"""How the trainer reads the user's own pictures, for the test that nothing held out is trained on."""

from __future__ import annotations

from pathlib import Path

from instella_t2i.config import DataConfig
from instella_t2i.data import open_pictures
from tests.common.pictures import level


def _opened(where: Path) -> tuple[set[int], set[int]]:
    config = DataConfig(name="folder", path=str(where), size=16, images=0, eval_images=1000)
    parts = (open_pictures(config, part) for part in ("train", "test"))  # type: ignore[arg-type]
    shown = [{level({"image": image}) for image in part.all()} for part in parts]
    return shown[0], shown[1]


LOADERS = {"folder": _opened}
