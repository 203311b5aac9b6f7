"""PixArt-alpha (Chen et al., ICLR 2024): `from pixart import load_painter`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pixart.sample import Painter


def load_painter(
    weights: str | Path | None = None,
    vae: str | None = None,
    text_encoder: str | None = None,
    device: str = "auto",
) -> Painter:
    """A transformer with its codec and text encoder; `painter.captions(texts, height, width, SamplingConfig())` draws.

    Args:
        weights: our folder, a stage of a run, an official .pth or a diffusers folder; None: the published small one.
        vae, text_encoder: folders; needed where the weights do not come with their own.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: nothing to load there, or a part is missing.
    """
    from common.options import chosen_device
    from common.paths import existing_path
    from pixart.sample import default_weights, open_painter

    chosen = default_weights() if weights is None else existing_path(weights)
    return open_painter(chosen, vae, text_encoder, chosen_device(device))
