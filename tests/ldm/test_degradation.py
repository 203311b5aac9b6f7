"""Facts about the low-resolution inputs of super-resolution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.degradation import bicubic_low_resolution, bsr_low_resolution, low_resolution
from tests.refusals import refused


def picture(size: int = 64) -> Tensor:
    """Smooth colours with one sharp edge."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    image = torch.stack([x, y, (x + y > 1).float()])
    return (image * 255).to(torch.uint8)


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


def test_bicubic_reduction_is_pils_own_with_antialiasing() -> None:
    image = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    low = bicubic_low_resolution(image, 4)
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((12, 8), Image.Resampling.BICUBIC)
    assert torch.equal(low.permute(1, 2, 0), torch.from_numpy(np.array(expected)))
    # Antialiasing: noise averages out, while plain subsampling would keep its spread.
    assert low.float().std() < 0.6 * image.float().std()


def test_bsr_depends_on_the_seed_and_on_nothing_else() -> None:
    image = picture()
    before = image.clone()
    results = [bsr_low_resolution(image, 4, seed) for seed in range(8)]
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002 (the global state must not matter)
    for seed, low in enumerate(results):
        assert low.shape == (3, 16, 16) and low.dtype == torch.uint8
        assert torch.equal(low, bsr_low_resolution(image, 4, seed))
    assert len({low.numpy().tobytes() for low in results}) == 8
    assert torch.equal(image, before)


def test_bsr_is_a_worse_but_recognisable_version_of_the_bicubic_image() -> None:
    image = picture()
    reference = bicubic_low_resolution(image, 4)
    values = [psnr(bsr_low_resolution(image, 4, seed), reference) for seed in range(30)]
    assert 15.0 < sum(values) / len(values) < 35.0
    assert max(values) < 45.0


@pytest.mark.parametrize("scale", [1, 2, 8])
@pytest.mark.parametrize("kind", ["bicubic", "bsr"])
def test_any_dividing_scale_gives_the_reduced_size(kind: str, scale: int) -> None:
    low = low_resolution(picture(32), scale, kind, seed=1)  # type: ignore[arg-type]
    assert low.shape == (3, 32 // scale, 32 // scale)


def test_bad_requests_are_refused() -> None:
    refused("divisible", low_resolution, picture(30), 4)
    refused("uint8", low_resolution, picture().float(), 4)
    refused("unknown", low_resolution, picture(), 4, "blurry")  # type: ignore[arg-type]
