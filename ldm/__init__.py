"""Latent diffusion models (Rombach et al., CVPR 2022): `from ldm import load_pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_pipeline(folder: str | Path = "ldm/pretrained/emoji64", device: str = "auto") -> Any:
    """The diffusers pipeline of a published folder, of a finished text run, or of anybody's text-to-image folder.

    `load_pipeline()("red apple, flat style", num_inference_steps=50, guidance_scale=3.0).images[0]` is a PIL picture.

    Args:
        folder: the pipeline's, or a run's that holds it as `pipeline/`.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from common.options import chosen_device
    from common.paths import existing_path
    from common.teacher import open_pipeline

    place = existing_path(folder)
    own = place / "pipeline"
    return open_pipeline(own if (own / "model_index.json").is_file() else place, chosen_device(device))
