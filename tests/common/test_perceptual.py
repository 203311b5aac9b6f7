"""LPIPS with the repository's own trunk, a random one, and the user's AlexNet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from common.metrics.perceptual import AlexNetTrunk, perceptual_distance


@pytest.mark.parametrize("trunk", ["trained", "random"])
def test_perceptual_distances_are_zero_for_equal_images_and_pull_images_together(trunk: str) -> None:
    distance = perceptual_distance(trunk)
    a, b = torch.rand(2, 3, 32, 32) * 2 - 1, (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_(True)
    value = distance(a, b)
    value.sum().backward()
    assert float(distance(a, a).abs().max()) == 0
    assert b.grad is not None
    with torch.no_grad():
        assert bool((distance(a, b - 1e-2 * b.grad / b.grad.norm()) < value).all())


def test_the_papers_alexnet_lpips_loads_from_the_users_files(tmp_path: Path) -> None:
    trunk = AlexNetTrunk()
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 192, 384, 256, 256))}
    save_file(trunk.state_dict(), tmp_path / "alexnet.safetensors")
    torch.save(heads, tmp_path / "lpips.pth")
    distance = perceptual_distance(f"{tmp_path / 'alexnet.safetensors'},{tmp_path / 'lpips.pth'}")
    taps = trunk(torch.zeros(1, 3, 224, 224))
    assert [tuple(tap.shape[1:]) for tap in taps] == [(64, 55, 55), (192, 27, 27), (384, 13, 13), *[(256, 13, 13)] * 2]
    a, b = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    assert float(distance(a, b)) > 0
    with pytest.raises(UserError, match="64x64"):
        distance(a[..., :32, :32], b[..., :32, :32])
    save_file({k: v for k, v in trunk.state_dict().items() if k != "features.8.bias"}, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"features\.8\.bias"):
        perceptual_distance(str(tmp_path / "cut.safetensors"))
    with pytest.raises(UserError, match="no such file"):
        perceptual_distance(str(tmp_path / "none.safetensors"))
