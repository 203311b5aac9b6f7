"""Measures of few-step samples on scenes whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from common.data.shapes import Shapes
from common.metrics.distribution import fid
from common.metrics.judge import ShapesJudge
from common.metrics.measures import (
    Yardstick,
    fixed_noise,
    high_frequency_energy,
    high_frequency_error,
    shapes_prompts,
    variety,
)


def blurred(images: torch.Tensor) -> torch.Tensor:
    x = torch.nn.functional.avg_pool2d(images.float(), 3, stride=1, padding=1, count_include_pad=False)
    return x.round().to(torch.uint8)


def test_fixed_noise_does_not_depend_on_how_much_is_drawn() -> None:
    assert torch.equal(fixed_noise(3, (2, 4, 4)), fixed_noise(8, (2, 4, 4))[:3])
    assert not torch.equal(fixed_noise(1, (2, 4, 4), seed=1), fixed_noise(1, (2, 4, 4), seed=2))


def test_held_out_scenes_satisfy_their_own_specifications(cache: None) -> None:
    prompts = shapes_prompts(60, (4, 8, 8))
    assert prompts.reference is not None
    found = Yardstick(prompts, ShapesJudge(), prompts.reference).measure(prompts.reference)
    assert found["accuracy"] > 0.9 and found["fd_data"] < 1e-6 and found["hf_error"] == 0.0
    shuffled = Yardstick(prompts, ShapesJudge(), prompts.reference).measure(prompts.reference.roll(1, 0))
    assert shuffled["accuracy"] < 0.3 and shuffled["fd_data"] < 1e-6


def test_high_frequency_error_sees_blur_and_noise_but_not_colour() -> None:
    images = torch.from_numpy(np.ascontiguousarray(Shapes("test", 32, 32, seed=3).images))
    assert high_frequency_energy(blurred(images)) < 0.6 * high_frequency_energy(images)
    noisy = (images.float() + 20 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    assert high_frequency_error(noisy.to(torch.uint8), images) > 0.2
    assert high_frequency_error(images.flip(1), images) < 1e-9


def test_high_frequency_energy_of_a_wave_is_its_power_above_the_radius_only() -> None:
    x = torch.arange(32).float() / 32
    for cycles, counted in ((4, False), (5, True), (12, True)):
        wave = (127.5 + 100 * torch.sin(2 * torch.pi * cycles * x)).round()
        images = wave.expand(1, 3, 32, 32).to(torch.uint8)
        power = 32 * 32 * float(((wave - wave.mean()) / 255).square().mean())
        assert high_frequency_energy(images) == pytest.approx(power if counted else 0.0, abs=0.01 * power)


def test_judge_separates_wrong_counts_and_textures_better_than_resampled_scenes(cache: None) -> None:
    judge = ShapesJudge()

    def features(**options: Any) -> torch.Tensor:
        images = Shapes("test", 192, 32, **options).images
        return judge(torch.from_numpy(np.ascontiguousarray(images)))

    same, again = features(seed=1), features(seed=2)
    floor = fid(same, again)
    assert fid(same, features(seed=2, textures=("solid",))) > 1.2 * floor
    assert fid(same, features(seed=2, colours=("red", "blue"))) > 1.5 * floor
    assert fid(same, features(seed=2, tasks=("single",))) > 2 * floor


def test_variety_falls_when_every_image_is_the_same() -> None:
    images = torch.from_numpy(np.ascontiguousarray(Shapes("test", 48, 32, seed=3).images))
    assert variety(images) > 0.8 and variety(images[:1].expand(48, -1, -1, -1).contiguous()) < 0.01
