"""PSNR and SSIM against torchmetrics and hand-made cases."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from common.errors import UserError
from common.metrics.image import psnr, ssim


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 3, 20, 28, generator=generator)
    return a, (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)


def test_psnr_and_ssim_agree_with_torchmetrics_image_by_image(pair):
    a, b = pair
    for index in range(3):
        one, other = a[index : index + 1], b[index : index + 1]
        expected_psnr = peak_signal_noise_ratio(one, other, data_range=1.0).item()
        # torchmetrics also averages over windows that hang over the border of a mirrored image; the paper does not.
        full = structural_similarity_index_measure(one, other, data_range=1.0, return_full_image=True)[1]
        expected_ssim = full[..., 5:-5, 5:-5].mean().item()
        assert psnr(a, b)[index].item() == pytest.approx(expected_psnr, rel=1e-5)
        assert ssim(a, b)[index].item() == pytest.approx(expected_ssim, rel=1e-4)


def test_psnr_of_a_constant_error_of_one_grey_level():
    a = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    assert psnr(a, a + 1).tolist() == pytest.approx([20 * math.log10(255)] * 2)


def test_equal_images_have_infinite_psnr_and_ssim_one(pair):
    a, _ = pair
    assert psnr(a, a).isinf().all()
    torch.testing.assert_close(ssim(a, a), torch.ones(3, dtype=torch.float64))


def test_bytes_and_floats_of_one_image_score_alike(pair):
    a, b = ((x * 255).round().to(torch.uint8) for x in pair)
    torch.testing.assert_close(psnr(a, b), psnr(a.double() / 255, b.double() / 255))
    torch.testing.assert_close(ssim(a, b), ssim(a.double() / 255, b.double() / 255))


def test_both_fall_as_noise_grows(pair):
    a, _ = pair
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    for metric in (psnr, ssim):
        values = [metric(a, a + sigma * noise).mean().item() for sigma in (0.02, 0.05, 0.1, 0.3)]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17), "one shape"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16), "at least 11 x 11"),
    ],
)
def test_incomparable_images_are_refused(a, b, message):
    with pytest.raises(UserError, match=message):
        ssim(a, b)
