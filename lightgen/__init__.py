"""LightGen (arXiv 2503.08619): `from lightgen import load_painter`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightgen.painter import Painter


def load_painter(folder: str | Path, device: str = "auto") -> Painter:
    """A masked autoregressive model; `painter.draw(["a red star"], seed=0)` is uint8 [1, 3, H, W].

    Args:
        folder: a run's `model/`, or the run's.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from common.options import chosen_device
    from common.paths import existing_path
    from lightgen.painter import CONFIG, Painter

    place = existing_path(folder)
    own = place / "model"
    return Painter.load(own if (own / CONFIG).is_file() else place, chosen_device(device), "folder")
