"""EAGAN (Ying et al., ECCV 2022): `from eagan import load_generator`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eagan.model import Generator


def load_generator(folder: str | Path) -> tuple[Generator, dict[str, Any]]:
    """A trained generator, which turns z [N, Z] into pictures [N, 3, H, W] in [-1, 1], and its config.json.

    Args:
        folder: a run's `model/`, or the run's.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from common.paths import existing_path
    from eagan.retraining import load_generator as load

    place = existing_path(folder)
    return load(place / "model" if (place / "model" / "config.json").is_file() else place)
