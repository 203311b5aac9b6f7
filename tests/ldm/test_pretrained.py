"""The committed teachers: they open with plain diffusers, keep their size limits, and follow their captions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.data.shapes import prompts
from common.data.shapes_verifier import score
from common.teacher import open_pipeline
from ldm.sample import PRETRAINED, pipeline_images

LIMITS_MB = {"shapes32-eps": 6.0, "shapes32-v": 6.0, "emoji64": 15.0}
PREDICTION = {"shapes32-eps": "epsilon", "shapes32-v": "v_prediction", "emoji64": "v_prediction"}


@pytest.mark.parametrize("name", sorted(LIMITS_MB))
def test_teacher_directory_is_small_stock_and_described(name: str) -> None:
    folder = PRETRAINED / name
    weights = list(folder.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) / 1e6 <= LIMITS_MB[name]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == PREDICTION[name]
    card = (folder / "README.md").read_text()
    assert "floor" in card and "samples.png" in card and (folder / "samples.png").is_file()
    assert not list(folder.rglob("*.py")) and not list(folder.rglob("*.bin"))


@pytest.mark.parametrize("name", ["shapes32-eps", "shapes32-v"])
def test_shapes_teacher_draws_the_colours_its_captions_name(name: str) -> None:
    specs = prompts(16, split="test", tasks=["color"])
    pipeline = open_pipeline(PRETRAINED / name)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline_images(pipeline, [spec.caption for spec in specs], steps=20, guidance=3.0, seed=0)
    assert images.shape == (16, 3, 32, 32)
    right = score(images, specs)["color"]
    wrong = score(images.roll(1, 0), specs)["color"]
    assert right >= 0.4
    assert wrong <= right - 0.3


def test_emoji_teacher_varies_with_the_seed_and_with_the_caption() -> None:
    pipeline = open_pipeline(PRETRAINED / "emoji64")
    pipeline.set_progress_bar_config(disable=True)
    first, second, other = pipeline_images(
        pipeline, ["red heart, flat style"] * 2 + ["tree, shaded style"], steps=10, guidance=3.0, seed=0
    ).float()
    assert torch.mean((first - second).abs()) > 2.0
    assert torch.mean((first - other).abs()) > 10.0


def test_pretrained_folder_holds_nothing_else() -> None:
    assert {path.name for path in Path(PRETRAINED).iterdir()} == set(LIMITS_MB)
