"""InstaFlow (Liu et al., ICLR 2024): `from instaflow import load_pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instaflow.pipeline import InstaFlowPipeline


def load_pipeline(
    folder: str | Path = "instaflow/pretrained/shapes32", device: str = "auto", layout: str | None = None
) -> InstaFlowPipeline:
    """A flow with its text encoder and autoencoder: `load_pipeline()(["a red star"], steps=1)` is uint8 [1, 3, H, W].

    Args:
        folder: what train.py writes, or a published one.
        device: auto, cpu, cuda or cuda:N.
        layout: diffusers or official, of a folder that does not say.

    Raises:
        UserError: there is none, or it is damaged.
    """
    import torch

    from common.options import chosen_device
    from common.paths import existing_path
    from instaflow.pipeline import InstaFlowPipeline

    place = chosen_device(device)
    dtype = torch.bfloat16 if place.startswith("cuda") else torch.float32
    return InstaFlowPipeline.load(existing_path(folder), place, dtype, layout).channels_last()
