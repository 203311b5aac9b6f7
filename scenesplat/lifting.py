"""What pictures say, lifted onto Gaussians: fusion of the crops' features, and significance-weighted means over views.

Shape suffixes: M masks of a picture, V views, N Gaussians, F width of features, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from scenesplat.gaussians import Gaussians
from scenesplat.rasterize import Camera, composite, covariances, project

Fusion = Literal["dynamic", "global", "local", "masked"]
Lifting = Literal["occam", "pixels", "median", "nearest"]
NONE = -1  # a pixel without a mask
TINY = 1e-15  # Occam's LGS


@dataclass
class View:
    """A picture with the features of its masks: what a 2D teacher answers.

    Args:
        masks_HW: number of each pixel's mask, -1 for none; features_MF: unit vectors.
    """

    camera: Camera
    masks_HW: Tensor
    features_MF: Tensor

    def at(self, masks: Tensor) -> Tensor:
        """Features [..., F] of masks by number; for none of them what is never counted."""
        if not len(self.features_MF):
            return self.features_MF.new_zeros(*masks.shape, self.features_MF.shape[1])
        return self.features_MF[masks.clamp(min=0)]


def fusion_weights(global_F: Tensor, local_MF: Tensor, masked_MF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic weighting (section 3.2): shares [M] of the whole picture, the crop, and the crop without background.

    A crop is trusted less, the more its background changes it; the picture counts more for masks that resemble it.
    """
    likeness_M = (local_MF * masked_MF).sum(1)
    both_MF = F.normalize(likeness_M[:, None] * masked_MF + (1 - likeness_M)[:, None] * local_MF, dim=1)
    whole_M = torch.softmax(both_MF @ global_F, 0)
    return whole_M, (1 - whole_M) * (1 - likeness_M), (1 - whole_M) * likeness_M


def fuse(global_F: Tensor, local_MF: Tensor, masked_MF: Tensor, how: Fusion = "dynamic") -> Tensor:
    """Unit features [M, F] of a picture's masks; `how` other than dynamic takes one of the three alone."""
    if how == "dynamic":
        whole_M, local_M, masked_M = fusion_weights(global_F, local_MF, masked_MF)
        mixed_MF = whole_M[:, None] * global_F + local_M[:, None] * local_MF + masked_M[:, None] * masked_MF
    else:
        mixed_MF = {"global": global_F.expand_as(local_MF), "local": local_MF, "masked": masked_MF}[how]
    return F.normalize(mixed_MF, dim=1)


@dataclass
class Lifted:
    """Sums over views: features weighted [N, F], weights [N]; and which Gaussians were seen in a mask [N]."""

    sum_NF: Tensor
    weight_N: Tensor
    seen_N: Tensor

    def features(self) -> Tensor:
        """Weighted means [N, F], zero for what was never seen."""
        return torch.where(self.seen_N[:, None], self.sum_NF / (self.weight_N[:, None] + TINY), 0.0)


def significance(scene: Gaussians, camera: Camera) -> tuple[Tensor, Tensor]:
    """Occam's weight [N] of each Gaussian in a view, and its centre [N, 2] in pixels."""
    seen = project(scene.means_N3, covariances(scene.quaternions_N4, scene.scales_N3.exp()), camera)
    nothing_N0 = scene.means_N3.new_zeros(len(scene), 0)
    *_, weight_N = composite(seen, scene.opacities_N.sigmoid(), nothing_N0, camera.width, camera.height, weigh=True)
    assert weight_N is not None
    return weight_N, seen.means_N2


@torch.no_grad()
def lift(scene: Gaussians, views: Sequence[View], how: Lifting = "occam") -> Lifted:
    """Features of masks onto Gaussians.

    occam: the significance-weighted mean over views of the feature at each centre's pixel (Occam's LGS, equation 5).
    Weight and feature are taken at pixels that differ by one where the centre lies in the first half of its pixel, as
    in the released code. pixels: over all pixels that a Gaussian is blended into. median: per channel over the views
    that see it. nearest: of the nearest camera that sees it.

    Raises:
        UserError: there is no view.
    """
    if not views:
        raise UserError("nothing to lift from: expected one picture of the scene at least")
    if how == "pixels":
        return _lift_pixels(scene, views)
    width = views[0].features_MF.shape[1]
    total = Lifted(
        scene.means_N3.new_zeros(len(scene), width),
        scene.means_N3.new_zeros(len(scene)),
        torch.zeros(len(scene), dtype=torch.bool, device=scene.means_N3.device),
    )
    features, shown, distances = [], [], []
    for view in views:
        weight_N, centre_N2 = significance(scene, view.camera)
        size = centre_N2.new_tensor([view.camera.width - 1, view.camera.height - 1])
        at_N2 = torch.minimum(centre_N2.floor().clamp(min=0), size).long()
        mask_N = view.masks_HW[at_N2[:, 1], at_N2[:, 0]]
        shown_N = (weight_N > 0) & (mask_N != NONE)
        feature_NF = view.at(mask_N)
        if how == "occam":
            used_N = torch.where(shown_N, weight_N, 0.0)
            total.sum_NF += used_N[:, None] * feature_NF
            total.weight_N += used_N
        else:
            features.append(feature_NF)
            distances.append((scene.means_N3 - view.camera.place_3).norm(dim=1))
        shown.append(shown_N)
    shown_VN = torch.stack(shown)
    total.seen_N = shown_VN.any(0)
    if how == "median":
        blank_VNF = torch.where(shown_VN[..., None], torch.stack(features), torch.nan)
        total.sum_NF = blank_VNF.nanmedian(0).values.nan_to_num()
    elif how == "nearest":
        distance_VN = torch.where(shown_VN, torch.stack(distances), torch.inf)
        rows_N = torch.arange(len(scene), device=distance_VN.device)
        total.sum_NF = torch.stack(features)[distance_VN.argmin(0), rows_N]
    if how != "occam":
        total.weight_N = total.seen_N.to(total.sum_NF)
    return total


def _lift_pixels(scene: Gaussians, views: Sequence[View]) -> Lifted:
    """The transposed rendering: every pixel's feature to the Gaussians that it is blended from, by their shares."""
    width = views[0].features_MF.shape[1]
    sum_NF = scene.means_N3.new_zeros(len(scene), width + 1)
    spread_N33, opacities_N = covariances(scene.quaternions_N4, scene.scales_N3.exp()), scene.opacities_N.sigmoid()
    for view in views:
        camera = view.camera
        seen = project(scene.means_N3, spread_N33, camera)
        values_NF = torch.zeros_like(sum_NF).requires_grad_(True)
        known_HW1 = (view.masks_HW != NONE)[..., None]
        feature_HWF = view.at(view.masks_HW) * known_HW1
        with torch.enable_grad():
            picture, *_ = composite(seen, opacities_N, values_NF, camera.width, camera.height)
            (found_NF,) = torch.autograd.grad(picture, values_NF, torch.cat([feature_HWF, known_HW1], 2))
        sum_NF += found_NF
    return Lifted(sum_NF[:, :-1], sum_NF[:, -1], sum_NF[:, -1] > 0)
