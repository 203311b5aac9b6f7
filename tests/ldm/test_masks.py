"""Facts about inpainting masks; 1 is painted, the model sees -1 and +1."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.masks import outpainting_canvas, paste_known, random_mask, resize_mask, signed_mask
from tests.refusals import refused


@pytest.mark.parametrize("kind", ["mixed", "irregular", "boxes", "outpainting"])
@pytest.mark.parametrize("size", [16, 64, (32, 48)])
def test_masks_are_binary_cover_a_fair_share_and_depend_on_the_seed_only(kind: Any, size: Any) -> None:
    masks = [random_mask(size, seed, kind) for seed in range(20)]
    for seed, mask in enumerate(masks):
        assert tuple(mask.shape) == ((size, size) if isinstance(size, int) else size)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert 0.05 <= float(mask.mean()) <= 0.6
        assert torch.equal(mask, random_mask(size, seed, kind))
    assert len({mask.numpy().tobytes() for mask in masks}) > 15


def test_outpainting_masks_reach_the_border_and_boxes_are_drawn_inside() -> None:
    for seed in range(10):
        mask = random_mask(32, seed, "outpainting")
        border = torch.stack([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert border.mean(dim=1).max() == 1.0


def test_bad_requests_are_refused() -> None:
    refused("unknown", random_mask, 32, 0, "circles")  # type: ignore[arg-type]
    refused("at least 4", random_mask, 2, 0)
    refused("widen", random_mask, 32, 0, "boxes", coverage=(0.999, 1.0))


def test_painted_pixels_are_black_and_their_mask_is_plus_one() -> None:
    image = torch.rand(2, 3, 16, 16)
    hole = torch.stack([random_mask(16, seed) for seed in (0, 1)])[:, None]
    masked_image, mask = paste_known(torch.full_like(image, -1.0), image, hole), signed_mask(hole)
    painted = hole.expand_as(image) == 1
    assert (masked_image[painted] == -1).all()
    assert torch.equal(masked_image[~painted], image[~painted])
    assert (mask[hole == 1] == 1).all() and (mask[hole == 0] == -1).all()


def test_a_resized_mask_stays_binary() -> None:
    mask = signed_mask(random_mask(64, 3))[None, None]
    small = resize_mask(mask, (16, 16))
    assert small.shape == (1, 1, 16, 16)
    assert torch.equal(small, mask[..., ::4, ::4])


def test_pasting_keeps_every_known_pixel() -> None:
    image, painted = torch.rand(2, 1, 3, 16, 16)
    hole = random_mask(16, 0)[None, None]
    result = paste_known(painted, image, hole)
    inside = hole.expand_as(image) == 1
    assert torch.equal(result[~inside], image[~inside]) and torch.equal(result[inside], painted[inside])


def test_an_outpainting_canvas_holds_the_image_and_asks_for_the_rest() -> None:
    image = torch.rand(3, 4, 6)
    canvas, hole = outpainting_canvas(image, (8, 10), top=2, left=1)
    assert torch.equal(canvas[:, 2:6, 1:7], image)
    assert hole.sum() == 8 * 10 - 4 * 6 and (canvas[:, hole[0] == 1] == -1).all()
    refused("does not fit", outpainting_canvas, image, (5, 6), top=2, left=0)
