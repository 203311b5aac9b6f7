"""Binding scores on Shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from torch.utils.data import default_collate

from common.data.shapes import Shapes
from common.errors import UserError
from pixart.compbench import SCORES, binding_scores

BINDING = ("color", "texture", "spatial", "complex")


@pytest.fixture(scope="module")
def scenes() -> tuple[np.ndarray, dict[str, Any]]:
    data = Shapes("test", 180, 32, caption="dense")
    return data.images, default_collate([data[i] for i in range(len(data))])


def test_true_renders_score_nearly_one(scenes: tuple[np.ndarray, dict[str, Any]]) -> None:
    scores = binding_scores(*scenes)
    assert all(scores[name] > 0.93 for name in SCORES), scores
    assert scores["images"] == 180 and scores["pairs"] > 100


def test_renders_of_other_scenes_score_low(scenes: tuple[np.ndarray, dict[str, Any]]) -> None:
    images, columns = scenes
    scores = binding_scores(np.roll(images, 31, axis=0), columns)
    assert all(scores[name] < 0.3 for name in BINDING), scores


def test_swapped_colours_lose_colour_and_keep_the_rest(scenes: tuple[np.ndarray, dict[str, Any]]) -> None:
    images, columns = scenes
    rows = [
        i for i in range(180) if (columns["classes"][i] >= 0).sum() == 2 and columns["task"][i] in ("two", "position")
    ]
    rows = [i for i in rows if columns["colours"][i][0] != columns["colours"][i][1]]
    chosen = {name: columns[name][rows] for name in ("boxes", "classes", "colours", "textures")}
    whole = binding_scores(images[rows], chosen)
    chosen["colours"] = chosen["colours"].clone()
    chosen["colours"][:, :2] = chosen["colours"][:, [1, 0]]
    swapped = binding_scores(images[rows], chosen)
    # Two objects of one shape may answer for each other, so a few keep their colour.
    assert whole["color"] > 0.9 and swapped["color"] < 0.35
    assert swapped["shape"] == whole["shape"] and swapped["count"] == whole["count"]


def test_empty_images_score_zero_and_single_objects_have_no_relations(
    scenes: tuple[np.ndarray, dict[str, Any]],
) -> None:
    images, columns = scenes
    single = [i for i in range(180) if columns["task"][i] == "single"]
    chosen = {name: columns[name][single] for name in ("boxes", "classes", "colours", "textures")}
    scores = binding_scores(np.full_like(images[single], 240), chosen)
    assert scores["shape"] == scores["color"] == scores["count"] == scores["complex"] == 0
    assert math.isnan(scores["spatial"]) and scores["pairs"] == 0


def test_columns_must_be_there_and_as_many_as_images(scenes: tuple[np.ndarray, dict[str, Any]]) -> None:
    images, columns = scenes
    with pytest.raises(UserError, match="textures is missing"):
        binding_scores(images, {k: v for k, v in columns.items() if k != "textures"})
    with pytest.raises(UserError, match="179 images but 180 rows"):
        binding_scores(images[1:], columns)
