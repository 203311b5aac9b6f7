"""How the trainer reads the user's own pictures, for the test that nothing held out is trained on."""

from __future__ import annotations

from pathlib import Path

from lightgen.config import DataConfig, EvaluationConfig, LightgenConfig, StagesConfig
from lightgen.data import open_pictures
from tests.common.pictures import level


def _opened(where: Path) -> tuple[set[int], set[int]]:
    config = LightgenConfig(
        data=DataConfig(name="folder", path=str(where), images=0),
        stages=StagesConfig([16], [1], [1e-3]),
        evaluation=EvaluationConfig(per_task=200),
    )
    parts = (open_pictures(config, part) for part in ("train", "test"))  # type: ignore[arg-type]
    shown = [{level({"image": image}) for image in part.images(list(range(len(part))))} for part in parts]
    return shown[0], shown[1]


LOADERS = {"folder": _opened}
