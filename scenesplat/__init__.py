"""SceneSplat (Li et al., ICCV 2025): `from scenesplat import load_model`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scenesplat.export import SceneModel


def load_model(folder: str | Path = "scenesplat/pretrained/rooms", text_encoder: str | None = None) -> SceneModel:
    """An encoder of Gaussians with the text space it answers in; `scenesplat.query.ask(model, scene, queries, no)`.

    Args:
        folder: a run's `model/`, a converted or the published one.
        text_encoder: where the text encoder lies now, if not where it was.

    Raises:
        UserError: there is none, or a part is missing or damaged.
    """
    from common.paths import existing_path
    from scenesplat.export import SceneModel

    return SceneModel.load(existing_path(folder), "folder", text_encoder)
