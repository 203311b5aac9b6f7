"""SLAM, the sub-path linear approximation model (Xu et al., ECCV 2024): `from slam import load_pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_pipeline(folder: str | Path, device: str = "auto") -> Any:
    """A student of 1 to 8 steps as diffusers' LatentConsistencyModelPipeline.

    `load_pipeline(folder)("a red star", num_inference_steps=4, guidance_scale=1.0).images[0]` is a PIL picture; the
    folder's card names its `original_inference_steps`.

    Args:
        folder: the pipeline's, or a run's that holds it as `slam/pipeline/`.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from common.options import chosen_device
    from common.paths import existing_path
    from common.teacher import open_pipeline

    place = existing_path(folder)
    own = place / "slam" / "pipeline"
    return open_pipeline(own if (own / "model_index.json").is_file() else place, chosen_device(device))
