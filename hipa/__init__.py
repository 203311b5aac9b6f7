"""HiPA (arXiv 2311.18158): `from hipa import load_pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_pipeline(
    adaptors: str | Path = "hipa/pretrained/shapes32",
    teacher: str | Path = "ldm/pretrained/shapes32-v",
    device: str = "auto",
) -> Any:
    """A frozen teacher with adaptors for one step, as a stock diffusers pipeline.

    `load_pipeline()("a red star", num_inference_steps=1, guidance_scale=1.0).images[0]` is a PIL picture.

    Args:
        adaptors: a folder with pytorch_lora_weights.safetensors and scheduler/.
        teacher: the diffusers folder that they were trained for.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: one of them is missing, damaged, or they do not fit each other.
    """
    from diffusers import DDIMScheduler

    from common.adaptors import FILE, read_adaptors
    from common.errors import UserError
    from common.options import chosen_device
    from common.paths import existing_path
    from common.pretrained import from_folder, quiet_libraries
    from common.teacher import open_pipeline

    folder = existing_path(adaptors)
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise UserError(
            f"{folder}: no scheduler/ there; expected a folder of adaptors that train.py or publish.py wrote"
        )
    pipeline = open_pipeline(existing_path(teacher), chosen_device(device))
    read_adaptors(folder, pipeline.unet)  # says by name what does not fit
    with quiet_libraries():  # they miss adaptors of the text encoder
        pipeline.load_lora_weights(str(folder), weight_name=FILE)
    pipeline.scheduler = from_folder(DDIMScheduler, folder / "scheduler")
    return pipeline
