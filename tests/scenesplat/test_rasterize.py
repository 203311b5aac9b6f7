"""Pictures and gradients of the rasteriser against the equation written out, Gaussian by Gaussian."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scenesplat import rasterize
from scenesplat.gaussians import Gaussians
from scenesplat.rasterize import LARGEST_ALPHA, LEAST_ALPHA, OPAQUE, Camera, composite, covariances, project, render


def cloud(count: int, seed: int = 0, opaque: float = 0.0) -> Gaussians:
    """Gaussians of all sizes in front of the camera at zero that looks along y."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(count, 3, generator=generator) * torch.tensor([0.8, 1.0, 0.6]) + torch.tensor([0.0, 4.0, 0.0])
    return Gaussians(
        means,
        torch.randn(count, 3, generator=generator) * 0.6 - 2,
        F.normalize(torch.randn(count, 4, generator=generator), dim=1),
        torch.randn(count, generator=generator) + opaque,
        torch.randn(count, 12, generator=generator) * 0.3,
    )


def camera(width: int = 37, height: int = 21) -> Camera:
    return Camera.looking(torch.zeros(3), torch.tensor([0.0, 4.0, 0.0]), width, height)


def written_out(scene: Gaussians, values_ND: Tensor, view: Camera) -> tuple[Tensor, Tensor]:
    """Front-to-back blending (section 3.1) as one sequence over Gaussians, for every pixel at once."""
    seen = project(scene.means_N3, covariances(scene.quaternions_N4, scene.scales_N3.exp()), view)
    rows, columns = (torch.arange(side).to(values_ND) + 0.5 for side in (view.height, view.width))
    ys, xs = torch.meshgrid(rows, columns, indexing="ij")
    light, left = torch.ones_like(ys), torch.ones_like(ys)
    picture = torch.zeros(view.height, view.width, values_ND.shape[1], dtype=values_ND.dtype)
    for i in seen.depths_N.argsort(stable=True).tolist():
        if int(seen.radii_N2[i].min()) == 0:
            continue
        dx, dy = xs - seen.means_N2[i, 0], ys - seen.means_N2[i, 1]
        a, b, c = seen.conics_N3[i]
        alpha = scene.opacities_N[i].sigmoid() * torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
        alpha = alpha.clamp(max=LARGEST_ALPHA)
        alpha = torch.where(alpha < LEAST_ALPHA, 0.0, alpha)
        after = light * (1 - alpha)
        counts = (after > OPAQUE) & (light > OPAQUE)
        picture = picture + torch.where(counts, alpha * light, 0.0)[..., None] * values_ND[i]
        left = torch.where(counts, after, left)
        light = after
    return picture, 1 - left


@pytest.mark.parametrize("pair", [0.0, 1e9])  # always through pairs, always through tiles
@pytest.mark.parametrize("opaque", [0.0, 6.0])
def test_picture_and_gradients_are_those_of_the_equation(
    opaque: float, pair: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rasterize, "PAIR", pair)
    scene = cloud(60, opaque=opaque)._each(lambda name, value: value.double())
    view = camera()
    view = Camera(view.world_44.double(), view.intrinsics_33.double(), view.width, view.height)
    values = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [scene.means_N3, scene.scales_N3, scene.quaternions_N4, scene.opacities_N, values]
    for leaf in leaves:
        leaf.requires_grad_(True)
    weights = torch.randn(view.height, view.width, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = []
    for ours in (True, False):
        if ours:
            seen = project(scene.means_N3, covariances(scene.quaternions_N4, scene.scales_N3.exp()), view)
            picture, alpha, _ = composite(seen, scene.opacities_N.sigmoid(), values, view.width, view.height)
        else:
            picture, alpha = written_out(scene, values, view)
        total = (torch.cat([picture, alpha[..., None]], 2) * weights).sum()
        results.append((picture, alpha, torch.autograd.grad(total, leaves)))
    (picture, alpha, gradients), (wanted, wanted_alpha, wanted_gradients) = results
    assert float(alpha.detach().max()) > 0.9
    torch.testing.assert_close(picture, wanted, atol=1e-10, rtol=0)
    torch.testing.assert_close(alpha, wanted_alpha, atol=1e-10, rtol=0)
    for found, right in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(found, right, atol=1e-9 * max(1.0, float(right.abs().max())), rtol=1e-8)


def test_the_size_of_tiles_slabs_and_groups_changes_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, view = cloud(400), camera(50, 30)
    with torch.no_grad():
        wanted = render(scene, view)
        monkeypatch.setattr(rasterize, "PAIR", 0.0)
        pairs = render(scene, view)
        torch.testing.assert_close(pairs.rgb_HW3, wanted.rgb_HW3, atol=1e-6, rtol=0)
        monkeypatch.setattr(rasterize, "PAIR", 1e9)
        for name, value in (("TILE", 16), ("SLAB", 3), ("ELEMENTS", 2**12)):
            with monkeypatch.context() as patch:
                patch.setattr(rasterize, name, value)
                found = render(scene, view)
            torch.testing.assert_close(found.rgb_HW3, wanted.rgb_HW3, atol=1e-6, rtol=0)
            torch.testing.assert_close(found.depth_HW, wanted.depth_HW, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [0, 3, rasterize.FEW_CHANNELS + 1])
def test_long_gaussians_are_cut_to_their_ellipses_and_blended_alike_both_ways(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needles, whose boxes are mostly empty; any number of channels."""
    monkeypatch.setattr(rasterize, "MOST_PAIRS", 2**30)
    scene = cloud(60)._each(lambda name, value: value.double())
    scene.scales_N3 += torch.tensor([2.0, -1.0, -2.0], dtype=torch.float64)
    view = camera(50, 30)
    view = Camera(view.world_44.double(), view.intrinsics_33.double(), view.width, view.height)
    values = torch.rand(60, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [scene.means_N3, scene.scales_N3, scene.opacities_N, values]
    results = []
    for pair in (0.0, 1e9):
        monkeypatch.setattr(rasterize, "PAIR", pair)
        for leaf in leaves:
            leaf.requires_grad_(True)
        seen = project(scene.means_N3, covariances(scene.quaternions_N4, scene.scales_N3.exp()), view)
        picture, alpha, _ = composite(seen, scene.opacities_N.sigmoid(), values, view.width, view.height)
        assert picture.shape == (30, 50, channels)
        total = picture.square().sum() + alpha.square().sum()
        results.append((picture, alpha, *torch.autograd.grad(total, leaves, allow_unused=True)))
    for found, wanted in zip(*results, strict=True):
        if found is not None or wanted is not None:
            torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-7)


def test_a_scene_out_of_sight_is_background_everywhere() -> None:
    scene = cloud(10).moved(torch.tensor([0.0, -20.0, 0.0]))
    picture = render(scene, camera(), background=0.25)
    assert torch.equal(picture.rgb_HW3, torch.full_like(picture.rgb_HW3, 0.25))
    assert not picture.alpha_HW.any()


def test_gaussians_beyond_the_far_plane_or_before_the_near_one_are_not_in_the_picture() -> None:
    means = torch.tensor([[0.0, 1, 0], [0, 3, 0], [0, 5, 0]])
    spread = 0.01 * torch.eye(3).expand(3, 3, 3)
    seen = project(means, spread, camera(), near=2.0, far=4.0)
    assert (seen.radii_N2 > 0).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("depth", [0.0, 1e-30, -1e-20])
def test_a_gaussian_beside_the_camera_spoils_no_gradient(depth: float) -> None:
    scene = cloud(20)
    scene.means_N3[3] = torch.tensor([0.5, depth, 0.2])
    leaves = [scene.means_N3, scene.scales_N3, scene.quaternions_N4, scene.opacities_N, scene.colours_NC]
    for leaf in leaves:
        leaf.requires_grad_(True)
    render(scene, camera()).rgb_HW3.square().mean().backward()
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.isfinite().all() and not leaf.grad[3].any() and leaf.grad[4:].any()


def test_an_opaque_sheet_hides_what_is_behind_it_and_depth_is_its_own() -> None:
    near, far = cloud(1), cloud(1)
    near.means_N3[:], far.means_N3[:] = torch.tensor([0.0, 2.0, 0.0]), torch.tensor([0.0, 5.0, 0.0])
    for scene, red in ((near, 1.0), (far, 0.0)):
        scene.scales_N3[:] = torch.tensor([3.0, -6.0, 3.0])
        scene.quaternions_N4[:] = torch.tensor([1.0, 0, 0, 0])
        scene.opacities_N[:] = 12.0
        scene.colours_NC = torch.tensor([[red, 1 - red, 0.0]]).sub(0.5) / 0.28209479177387814
    from scenesplat.gaussians import joined

    picture = render(joined([far, near]), camera())
    middle = picture.rgb_HW3[10, 18]
    torch.testing.assert_close(middle, torch.tensor([1.0, 0.0, 0.0]), atol=2e-3, rtol=0)
    assert float(picture.depth_HW[10, 18]) == pytest.approx(2.0, abs=0.01)


def test_a_camera_sees_its_target_in_the_middle_and_up_above() -> None:
    view = Camera.looking(torch.tensor([1.0, 2.0, 1.5]), torch.tensor([4.0, 3.0, 0.5]), 64, 48)
    for point, side in (([4.0, 3.0, 0.5], 0.0), ([4.0, 3.0, 0.8], -1.0)):
        x, y, z = view.intrinsics_33 @ (view.world_44[:3, :3] @ torch.tensor(point) + view.world_44[:3, 3])
        assert float(x / z) == pytest.approx(32.0, abs=1e-3)
        assert (float(y / z) - 24.0) * side > 0 or abs(float(y / z) - 24.0) < 1e-3
    torch.testing.assert_close(view.place_3, torch.tensor([1.0, 2.0, 1.5]))
