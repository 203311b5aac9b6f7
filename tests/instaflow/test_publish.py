"""Publishing a finished run: complete folders only, and a table whose numbers are the run's."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from common.paths import REPOSITORY
from instaflow.publish import arms_table, publish

ARM = {"fd_data": 12.345678, "fd_teacher": 1e-12, "perceptual": 0.5, "hf_error": 0.1, "accuracy": 0.75, "entropy": 0.7}


def test_table_has_a_line_an_arm_and_the_seconds() -> None:
    metrics = {
        "arms": {"teacher 25-step": ARM, "InstaFlow 1-step": {**ARM, "accuracy": 0.5}},
        "unet_forwards_per_image": {"teacher 25-step": 50, "InstaFlow 1-step": 1},
        "seconds": {"pairs": 10.4, "distil": 20.0},
    }
    lines = arms_table(metrics).splitlines()
    assert lines[2] == "| teacher 25-step | 50 | 12.35 | 0 | 0.5 | 0.1 | 0.75 | 0.7 |"
    assert lines[3] == "| InstaFlow 1-step | 1 | 12.35 | 0 | 0.5 | 0.1 | 0.5 | 0.7 |"
    assert lines[-1] == "Wall seconds: pairs 10, distil 20."


def test_measures_that_an_arm_lacks_are_left_out() -> None:
    metrics = {"arms": {"a": {"fd_data": 1.0}}, "unet_forwards_per_image": {}, "seconds": {}}
    assert arms_table(metrics).splitlines()[0] == "| arm | U-Net evaluations an image | FD to held-out data |"


def test_an_unfinished_run_is_refused_by_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.json is missing"):
        publish(tmp_path, "never-made")
    assert not (REPOSITORY / "instaflow" / "pretrained" / "never-made").exists()


def test_the_published_pipeline_draws_in_one_step_with_stock_diffusers() -> None:
    folder = REPOSITORY / "instaflow" / "pretrained" / "shapes32"
    if not folder.is_dir():
        pytest.skip("no published pipeline in this checkout")
    import numpy as np
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red square",
        num_inference_steps=1,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    pixels = np.asarray(image).astype(float)
    red = (pixels[..., 0] > 140) & (pixels[..., 1:].max(-1) < 100)
    assert 0.01 < red.mean() < 0.6, "a red object was asked for"
