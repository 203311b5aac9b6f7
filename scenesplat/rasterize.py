"""Gaussians to pictures, on any device, with gradients: projection, tiles, and front-to-back compositing in torch.

On CUDA devices `render` goes through gsplat where it is installed; the two agree to 1e-4. The compositing here keeps
no table of Gaussians by pixels. Where Gaussians are small it goes through the list of (pixel, Gaussian) pairs that
count; where they are large, through slabs of a tile's Gaussians front to back, leaving tiles that are opaque, and the
backward pass computes them again. The numbers of pairs and of tiles' elements decide, so equal scenes are drawn alike.

Shape suffixes: N Gaussians, H W pixels, D channels; within a slab K Gaussians of each of T tiles, P pixels of a tile;
M pairs.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scenesplat.gaussians import Gaussians, harmonics, rotations

BLUR = 0.3  # pixels^2 that every projected covariance is widened by
NEAR, FAR = 0.01, 1e10  # metres
REACH = 3.33  # standard deviations that a Gaussian reaches, per axis of the picture
LARGEST_ALPHA, LEAST_ALPHA, OPAQUE = 0.999, 1 / 255, 1e-4  # gsplat 1.5.3
TILE = 8  # pixels; any side gives the same picture
SLAB = 16  # Gaussians of a tile that are composited at a time
PAIR = 3.0  # what a pair costs, in elements of a slab (measured: 3 to 4)
MOST_PAIRS = 2**23  # that are held in memory, some 200 bytes each
ELEMENTS = 2**19  # Gaussians times pixels of a slab, over all its tiles: what caches hold


@dataclass
class Camera:
    """A pinhole camera; x to the right, y down, z forward.

    Args:
        world_44: from the world to the camera; intrinsics_33: in pixels.
    """

    world_44: Tensor
    intrinsics_33: Tensor
    width: int
    height: int

    @property
    def place_3(self) -> Tensor:
        """Where it is in the world."""
        return -self.world_44[:3, :3].t() @ self.world_44[:3, 3]

    @classmethod
    def looking(cls, place_3: Tensor, at_3: Tensor, width: int, height: int, view: float = 75.0) -> Camera:
        """From a place to a point, the horizon level; `view` is the horizontal angle in degrees."""
        forward_3 = F.normalize(at_3 - place_3, dim=0)
        up_3 = forward_3.new_tensor([0, 0, 1] if abs(float(forward_3[2])) < 0.999 else [0, 1, 0])
        right_3 = F.normalize(torch.linalg.cross(forward_3, up_3), dim=0)
        turn_33 = torch.stack([right_3, torch.linalg.cross(forward_3, right_3), forward_3])
        world_44 = torch.eye(4).to(place_3)
        world_44[:3, :3], world_44[:3, 3] = turn_33, -turn_33 @ place_3
        focal = 0.5 * width / torch.tensor(view).deg2rad().div(2).tan()
        rows = [[float(focal), 0, width / 2], [0, float(focal), height / 2], [0, 0, 1]]
        return cls(world_44, torch.tensor(rows).to(place_3), width, height)


@dataclass
class Projection:
    """Gaussians in a picture; those with radii 0 are not in it.

    Args:
        conics_N3: upper triangle of the inverse covariance, per pixel^2; compensations_N: what BLUR takes from opacity.
    """

    means_N2: Tensor
    depths_N: Tensor
    conics_N3: Tensor
    radii_N2: Tensor
    compensations_N: Tensor
    covariances_N3: Tensor


def covariances(quaternions_N4: Tensor, scales_N3: Tensor, inverse: bool = False) -> Tensor:
    """[N, 3, 3] of quaternions and standard deviations, or their inverses."""
    axes_N33 = rotations(quaternions_N4) * (1 / scales_N3 if inverse else scales_N3)[:, None]
    return axes_N33 @ axes_N33.transpose(1, 2)


def project(
    means_N3: Tensor, covariances_N33: Tensor, camera: Camera, blur: float = BLUR, near: float = NEAR, far: float = FAR
) -> Projection:
    """The local affine approximation of a perspective (Zwicker 2002), with gsplat's limits at the picture's border."""
    turn_33, width, height = camera.world_44[:3, :3], camera.width, camera.height
    seen_N3 = means_N3 @ turn_33.t() + camera.world_44[:3, 3]
    covariances_N33 = turn_33 @ covariances_N33 @ turn_33.t()
    (fx, _, cx), (_, fy, cy), _ = camera.intrinsics_33.unbind(0)
    x, y, depths_N = seen_N3.unbind(1)
    between_N = (depths_N > near) & (depths_N < far)
    # What is not drawn stands anywhere: at a depth of almost 0 it would have infinite sides, and NaN for gradients.
    z = torch.where(between_N, depths_N, 1.0)
    margin_x, margin_y = 0.3 * 0.5 * width / fx, 0.3 * 0.5 * height / fy
    near_x = z * torch.minimum(torch.maximum(x / z, -(cx / fx + margin_x)), (width - cx) / fx + margin_x)
    near_y = z * torch.minimum(torch.maximum(y / z, -(cy / fy + margin_y)), (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    jacobian_N23 = torch.stack(
        [torch.stack([fx / z, zero, -fx * near_x / z**2], 1), torch.stack([zero, fy / z, -fy * near_y / z**2], 1)], 1
    )
    flat_N22 = jacobian_N23 @ covariances_N33 @ jacobian_N23.transpose(1, 2)
    means_N2 = (seen_N3 @ camera.intrinsics_33[:2].t()) / z[:, None]
    xx, xy, yy = flat_N22[:, 0, 0], 0.5 * (flat_N22[:, 0, 1] + flat_N22[:, 1, 0]), flat_N22[:, 1, 1]
    sharp_N = xx * yy - flat_N22[:, 0, 1] * flat_N22[:, 1, 0]
    xx, yy = xx + blur, yy + blur
    wide_N = (xx * yy - flat_N22[:, 0, 1] * flat_N22[:, 1, 0]).clamp(min=1e-10)
    conics_N3 = torch.stack([yy / wide_N, -xy / wide_N, xx / wide_N], 1)
    with torch.no_grad():
        radii_N2 = (REACH * torch.stack([xx, yy], 1).sqrt()).ceil()
        size_2 = means_N2.new_tensor([width, height])
        inside_N = ((means_N2 + radii_N2 > 0) & (means_N2 - radii_N2 < size_2)).all(1) & between_N
        radii_N2 = torch.where(inside_N[:, None], radii_N2, 0).int()
    compensations_N = (sharp_N / wide_N).clamp(min=0).sqrt()
    return Projection(means_N2, depths_N, conics_N3, radii_N2, compensations_N, torch.stack([xx, xy, yy], 1))


def colours_from(scene: Gaussians, camera: Camera) -> Tensor:
    """[N, 3]: what each looks like from the camera, not below 0."""
    directions_N3 = F.normalize(scene.means_N3 - camera.place_3.to(scene.means_N3), dim=1)
    basis_NK = harmonics(directions_N3, scene.degree)
    return (torch.einsum("nk,nkc->nc", basis_NK, scene.harmonics_NK3) + 0.5).clamp(min=0)


def tile_pairs(
    means_N2: Tensor, reach_N2: Tensor, depths_N: Tensor, width: int, height: int, side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which Gaussians reach which tiles: those of each tile together, the nearest first, the first of equals first.

    Returns:
        numbers of Gaussians [M]; where each tile's begin, and the end [tiles + 1]; tiles of each Gaussian [N].
    """
    across, down = -(-width // side), -(-height // side)
    limit_2 = torch.tensor([across, down], device=means_N2.device)
    low_N2 = ((means_N2 - reach_N2) / side).floor().clamp(-1, 2**20).long()
    high_N2 = ((means_N2 + reach_N2) / side).ceil().clamp(-1, 2**20).long()
    low_N2, high_N2 = torch.minimum(low_N2.clamp(min=0), limit_2), torch.minimum(high_N2.clamp(min=0), limit_2)
    spans_N2 = torch.where((reach_N2 > 0).all(1, keepdim=True), high_N2 - low_N2, 0)
    count_N = spans_N2.prod(1)
    nearest_N = depths_N.sort(stable=True).indices
    counts = count_N[nearest_N]
    owner_M = torch.repeat_interleave(nearest_N, counts)
    place_M = torch.arange(len(owner_M), device=owner_M.device) - torch.repeat_interleave(
        counts.cumsum(0) - counts, counts
    )
    columns_M = spans_N2[owner_M, 0].clamp(min=1)
    tile_M = (low_N2[owner_M, 1] + place_M // columns_M) * across + low_N2[owner_M, 0] + place_M % columns_M
    order_M = tile_M.sort(stable=True).indices
    ends = torch.bincount(tile_M, minlength=across * down).cumsum(0)
    return owner_M[order_M], torch.cat([ends.new_zeros(1), ends]), count_N


def composite(
    projection: Projection, opacities_N: Tensor, values_ND: Tensor, width: int, height: int, weigh: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Blend values front to back.

    A Gaussian counts in a pixel where its alpha is at least 1/255, as long as the light that is left stays above 1e-4.

    Returns:
        picture [H, W, D]; alpha [H, W]; with `weigh`, alpha times transmittance [N] of each Gaussian in the pixel whose
        centre p has 0 <= mean - p < 1 (Occam's significance; 0 outside), no gradients.
    """
    means_N2, conics_N3 = projection.means_N2, projection.conics_N3
    with torch.no_grad():
        # Where a Gaussian's alpha falls below 1/255, for its own opacity: never further than the radius.
        sigmas_N = (2 * (opacities_N / LEAST_ALPHA).clamp(min=1).log()).sqrt()
        spread_N2 = projection.covariances_N3[:, [0, 2]].sqrt()
        reach_N2 = torch.minimum(sigmas_N[:, None] * spread_N2 + 0.01, projection.radii_N2.to(spread_N2))
        reach_N2 = torch.where((sigmas_N > 0)[:, None], reach_N2, 0)
        low_N2, span_N2 = _boxes(means_N2, reach_N2, width, height)
        pairs = int(span_N2.prod(1).sum())
        tiles_N2 = torch.where(
            (span_N2 > 0).all(1, keepdim=True), (low_N2 + span_N2 - 1) // TILE - low_N2 // TILE + 1, 0
        )
        few = not weigh and pairs <= MOST_PAIRS and PAIR * pairs < TILE * TILE * int(tiles_N2.prod(1).sum())
        if few:
            owner_M, pixel_M = _pairs(low_N2, span_N2, projection.depths_N, width)
        else:
            owner_M, starts, _ = tile_pairs(means_N2, reach_N2, projection.depths_N, width, height, TILE)
    shape = (means_N2, conics_N3, opacities_N, values_ND)
    if few:
        picture_QD, alpha_Q = _CompositePairs.apply(*shape, owner_M, pixel_M, width, height)
        return picture_QD.view(height, width, -1), alpha_Q.view(height, width), None
    picture_TPD, alpha_TP, weight_N = _Composite.apply(*shape, owner_M, starts, -(-width // TILE), weigh)
    if weight_N is not None:  # tiles at the border reach beyond the picture
        place_N2 = (means_N2.detach() - 0.5).floor()
        weight_N = torch.where((place_N2 < place_N2.new_tensor([width, height])).all(1), weight_N, 0)
    return _untile(picture_TPD, width, height), _untile(alpha_TP[..., None], width, height)[..., 0], weight_N


def _boxes(means_N2: Tensor, reach_N2: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """The first pixel [N, 2] whose centre a Gaussian reaches, and how many columns and rows of them there are."""
    size_2 = torch.tensor([width, height], device=means_N2.device)
    low_N2 = (means_N2 - reach_N2 - 0.5).ceil().clamp(0, 2**20).long()
    high_N2 = torch.minimum((means_N2 + reach_N2 - 0.5).floor().clamp(-1, 2**20).long() + 1, size_2)
    return low_N2, torch.where((reach_N2 > 0).all(1, keepdim=True), high_N2 - low_N2, 0).clamp(min=0)


def _pairs(low_N2: Tensor, span_N2: Tensor, depths_N: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Gaussians [M], the nearest first, and the pixels in the box of each."""
    nearest_N = depths_N.sort(stable=True).indices
    counts_N = span_N2[nearest_N].prod(1)
    owner_M = torch.repeat_interleave(nearest_N, counts_N)
    place_M = torch.arange(len(owner_M), device=owner_M.device)
    place_M -= torch.repeat_interleave(counts_N.cumsum(0) - counts_N, counts_N)
    columns_M = span_N2[:, 0].index_select(0, owner_M)
    row_M = place_M // columns_M
    low_M2 = low_N2.index_select(0, owner_M)
    return owner_M, (low_M2[:, 1] + row_M) * width + low_M2[:, 0] + place_M - row_M * columns_M


class _CompositePairs(torch.autograd.Function):
    """Blends the pairs of each pixel by running sums of logarithms in float64."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        means: Tensor,
        conics: Tensor,
        opacities: Tensor,
        values_ND: Tensor,
        owner_M: Tensor,
        pixel_M: Tensor,
        width: int,
        height: int,
    ) -> tuple[Tensor, Tensor]:
        across_M2 = torch.stack([pixel_M % width, pixel_M // width], 1) + 0.5 - means.index_select(0, owner_M)
        dx_M, dy_M = across_M2.unbind(1)
        a, b, c = conics.index_select(0, owner_M).unbind(1)
        full_M = opacities.index_select(0, owner_M) * torch.exp(
            -0.5 * (a * dx_M * dx_M + c * dy_M * dy_M) - b * dx_M * dy_M
        )
        counts_M = (full_M >= LEAST_ALPHA).nonzero()[:, 0]
        counts_M = counts_M[pixel_M[counts_M].int().sort(stable=True).indices]
        owner_M, pixel_M, full_M, across_M2 = (
            part.index_select(0, counts_M) for part in (owner_M, pixel_M, full_M, across_M2)
        )
        ends_Q = torch.bincount(pixel_M, minlength=width * height).cumsum(0)
        alpha_M = full_M.clamp(max=LARGEST_ALPHA).double()
        logs_M = torch.log1p(-alpha_M)
        sums_M = F.pad(logs_M.cumsum(0), (1, 0))
        before_Q = sums_M[F.pad(ends_Q, (1, 0))[:-1]]  # of the pixels before
        after_M = (sums_M[1:] - before_Q.index_select(0, pixel_M)).exp_()
        hidden_M = after_M <= OPAQUE
        light_M = (after_M / (1 - alpha_M)).masked_fill_(hidden_M, 0)
        weights_M = (alpha_M * light_M).to(values_ND)
        picture_QD = values_ND.new_zeros(width * height, values_ND.shape[1])
        picture_QD.index_add_(0, pixel_M, weights_M[:, None] * values_ND.index_select(0, owner_M))
        left_Q = after_M.new_zeros(width * height).index_add_(0, pixel_M, logs_M.masked_fill(hidden_M, 0)).exp_()
        ctx.save_for_backward(
            conics, opacities, values_ND, owner_M, pixel_M, full_M, across_M2, light_M, weights_M, left_Q, ends_Q
        )
        return picture_QD, (1 - left_Q).to(values_ND)

    @staticmethod
    def backward(ctx: Any, grad_picture_QD: Tensor, grad_alpha_Q: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        conics, opacities, values_ND, owner_M, pixel_M, full_M, across_M2, light_M, weights_M, left_Q, ends_Q = (
            ctx.saved_tensors
        )
        grad_MD = grad_picture_QD.index_select(0, pixel_M)
        grads: list[Tensor | None] = [None, None, None, None]
        if ctx.needs_input_grad[3]:
            grads[3] = torch.zeros_like(values_ND).index_add_(0, owner_M, weights_M[:, None] * grad_MD)
        if any(ctx.needs_input_grad[:3]):
            # d picture / d alpha_k = T_k v_k - (what lies behind) / (1 - alpha_k); alpha of the picture likewise
            value_M = (grad_MD * values_ND.index_select(0, owner_M)).sum(1).double()
            sums_M = F.pad((weights_M * value_M).cumsum(0), (1, 0))
            behind_M = (sums_M[ends_Q] - left_Q * grad_alpha_Q).index_select(0, pixel_M) - sums_M[1:]
            grad_M = light_M * value_M - behind_M / (1 - full_M.clamp(max=LARGEST_ALPHA).double())
            grad_M = (grad_M * full_M).masked_fill_((light_M == 0) | (full_M > LARGEST_ALPHA), 0).to(full_M)
            dx_M, dy_M = across_M2.unbind(1)
            gx_M, gy_M = grad_M * dx_M, grad_M * dy_M
            moments_M6 = torch.stack([grad_M, gx_M, gy_M, gx_M * dx_M, gx_M * dy_M, gy_M * dy_M], 1)
            moments_N6 = full_M.new_zeros(len(opacities), 6).index_add_(0, owner_M, moments_M6)
            whole, gx, gy, gxx, gxy, gyy = moments_N6.unbind(1)
            a, b, c = conics.unbind(1)
            grads[0] = torch.stack([a * gx + b * gy, b * gx + c * gy], 1)
            grads[1] = torch.stack([-0.5 * gxx, -gxy, -0.5 * gyy], 1)
            grads[2] = whole / opacities.clamp(min=1e-12)
        return *grads, None, None, None, None


def _untile(picture_TPD: Tensor, width: int, height: int) -> Tensor:
    across, down = -(-width // TILE), -(-height // TILE)
    rows = picture_TPD.view(down, across, TILE, TILE, -1).transpose(1, 2)
    return rows.reshape(down * TILE, across * TILE, -1)[:height, :width]


class _Slabs:
    """Walks front to back through the Gaussians of tiles, a slab at a time, over groups of tiles that fit in memory."""

    def __init__(
        self, means_N2: Tensor, conics_N3: Tensor, opacities_N: Tensor, owner_M: Tensor, starts: Tensor, across: int
    ):
        # One row more, which stands for no Gaussian: its alpha is 0.
        self.means_N2, self.conics_N3 = F.pad(means_N2, (0, 0, 0, 1)), F.pad(conics_N3, (0, 0, 0, 1))
        self.opacities_N, self.owner_M, self.starts, self.across = F.pad(opacities_N, (0, 1)), owner_M, starts, across
        self.none = len(means_N2)
        self.axis = torch.arange(TILE, device=means_N2.device) + 0.5

    def gaussians(self, tiles_T: Tensor, first: int, count: int) -> Tensor:
        """Numbers [K, T] of the `count` Gaussians of each tile from its `first` on."""
        at_KT = self.starts[tiles_T] + first + torch.arange(count, device=tiles_T.device)[:, None]
        inside_KT = at_KT < self.starts[tiles_T + 1]
        if not len(self.owner_M):
            return torch.full_like(at_KT, self.none)
        return torch.where(inside_KT, self.owner_M[at_KT.clamp(max=len(self.owner_M) - 1)], self.none)

    def alpha(self, rows_KT: Tensor, tiles_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Alphas [K, T, P] before and after cutting, and distances [K, T, TILE] from the centres along x and y."""
        corner_x, corner_y = (tiles_T % self.across) * TILE, (tiles_T // self.across) * TILE
        mean_KT2 = self.means_N2[rows_KT]
        dx_KTX = (corner_x - mean_KT2[..., 0])[..., None] + self.axis
        dy_KTX = (corner_y - mean_KT2[..., 1])[..., None] + self.axis
        a, b, c = (part[..., None] for part in self.conics_N3[rows_KT].unbind(-1))
        power = (-b * dx_KTX)[..., None, :] * dy_KTX[..., None]
        power += (-0.5 * a * dx_KTX**2)[..., None, :]
        power += (-0.5 * c * dy_KTX**2)[..., None]
        full_KTP = power.exp_().flatten(-2) * self.opacities_N[rows_KT][..., None]
        cut_KTP = full_KTP.clamp(max=LARGEST_ALPHA)
        return full_KTP, cut_KTP.masked_fill_(cut_KTP < LEAST_ALPHA, 0), dx_KTX, dy_KTX


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        means: Tensor,
        conics: Tensor,
        opacities: Tensor,
        values_ND: Tensor,
        owner: Tensor,
        starts: Tensor,
        across: int,
        weigh: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        tiles, pixels = len(starts) - 1, TILE * TILE
        picture_TPD = values_ND.new_zeros(tiles, pixels, values_ND.shape[1])
        light_TP = values_ND.new_ones(tiles, pixels)
        left_TP = values_ND.new_ones(tiles, pixels)  # as light, but of the last Gaussian that counted
        weight_N = values_ND.new_zeros(len(means)) if weigh else None
        slabs = _Slabs(means, conics, opacities, owner, starts, across)
        padded_ND = F.pad(values_ND, (0, 0, 0, 1))
        counts = starts.diff()
        used = torch.zeros_like(counts)  # Gaussians of a tile until it is opaque
        for group in _groups(counts, SLAB):
            first = 0
            while len(group):
                rows_KT = slabs.gaussians(group, first, SLAB)
                _, alpha_KTP, _, _ = slabs.alpha(rows_KT, group)
                light_KTP = _light(light_TP[group], 1 - alpha_KTP)
                now, ends_KTP = light_KTP[-1], light_KTP[1:]
                hidden_KTP = ends_KTP <= OPAQUE
                weights_KTP = alpha_KTP.mul_(light_KTP[:-1]).masked_fill_(hidden_KTP, 0)
                kept_TP = torch.minimum(left_TP[group], ends_KTP.masked_fill(hidden_KTP, 1).amin(0))
                light_TP[group], left_TP[group] = now, kept_TP
                picture_TPD[group] += torch.bmm(weights_KTP.permute(1, 2, 0), padded_ND[rows_KT].transpose(0, 1))
                if weight_N is not None:
                    _weigh(weight_N, weights_KTP, rows_KT, group, means, across)
                first += SLAB
                used[group] = torch.minimum(counts[group], torch.tensor(first, device=counts.device))
                group = group[(now > OPAQUE).any(1) & (counts[group] > first)]
        ctx.save_for_backward(means, conics, opacities, values_ND, owner, starts, used, left_TP)
        ctx.across = across
        if weight_N is not None:
            ctx.mark_non_differentiable(weight_N)
        return picture_TPD, 1 - left_TP, weight_N

    @staticmethod
    def backward(ctx: Any, grad_picture_TPD: Tensor, grad_alpha_TP: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        means, conics, opacities, values_ND, owner, starts, used, left_TP = ctx.saved_tensors
        slabs = _Slabs(means, conics, opacities, owner, starts, ctx.across)
        padded_ND = F.pad(values_ND, (0, 0, 0, 1))
        grads = [torch.zeros(len(part) + 1, *part.shape[1:]).to(part) for part in (means, conics, opacities, values_ND)]
        only_values = not any(ctx.needs_input_grad[:3])
        for group in _groups(used, None):
            rows_KT = slabs.gaussians(group, 0, int(used[group].max()))
            full_KTP, alpha_KTP, dx_KTX, dy_KTX = slabs.alpha(rows_KT, group)
            through_KTP = 1 - alpha_KTP
            light_KTP = _light(torch.ones_like(alpha_KTP[0]), through_KTP)
            hidden_KTP = light_KTP[1:] <= OPAQUE
            light_KTP = light_KTP[:-1].masked_fill_(hidden_KTP, 0)
            weights_KTP = alpha_KTP * light_KTP
            grad_TPD = grad_picture_TPD[group]
            grads[3].index_add_(
                0, rows_KT.t().flatten(), torch.bmm(weights_KTP.permute(1, 0, 2), grad_TPD).flatten(0, 1)
            )
            if only_values:
                continue
            # d picture / d alpha_k = T_k v_k - (what lies behind) / (1 - alpha_k)
            value_KTP = torch.bmm(padded_ND[rows_KT].transpose(0, 1), grad_TPD.transpose(1, 2)).transpose(0, 1)
            behind_KTP = weights_KTP.mul_(value_KTP)
            # alpha of the picture is 1 - T of the last: its derivative is T_last / (1 - alpha_k) where k counts
            behind_TP = -left_TP[group] * grad_alpha_TP[group]
            for k in reversed(range(len(rows_KT))):
                share_TP = behind_KTP[k].clone()
                behind_KTP[k] = behind_TP
                behind_TP += share_TP
            grad_KTP = value_KTP.mul_(light_KTP).sub_(behind_KTP.div_(through_KTP))
            # to the exponent; none where the Gaussian does not count, nor where its alpha is cut
            full_KTP.masked_fill_(hidden_KTP.logical_or_(alpha_KTP == 0).logical_or_(full_KTP > LARGEST_ALPHA), 0)
            grad_KTP *= full_KTP
            opacity_KT = slabs.opacities_N[rows_KT].clamp(min=1e-12)
            grads[2].index_add_(0, rows_KT.flatten(), (grad_KTP.sum(-1) / opacity_KT).flatten())
            square = grad_KTP.unflatten(-1, (TILE, TILE))
            by_x, by_y = square.sum(-2), square.sum(-1)
            a, b, c = slabs.conics_N3[rows_KT].unbind(-1)
            gx, gy = (by_x * dx_KTX).sum(-1), (by_y * dy_KTX).sum(-1)
            gxx, gyy = (by_x * dx_KTX**2).sum(-1), (by_y * dy_KTX**2).sum(-1)
            gxy = ((square * dx_KTX[..., None, :]).sum(-1) * dy_KTX).sum(-1)
            grads[0].index_add_(0, rows_KT.flatten(), torch.stack([a * gx + b * gy, b * gx + c * gy], -1).flatten(0, 1))
            grads[1].index_add_(0, rows_KT.flatten(), torch.stack([-0.5 * gxx, -gxy, -0.5 * gyy], -1).flatten(0, 1))
        found = [grad[:-1] if needed else None for grad, needed in zip(grads, ctx.needs_input_grad)]
        return *found, None, None, None, None


def _light(first_TP: Tensor, through_KTP: Tensor) -> Tensor:
    """What reaches each of K Gaussians, and what is left behind the last [K + 1, T, P]."""
    light_KTP = torch.empty(len(through_KTP) + 1, *first_TP.shape).to(first_TP)
    light_KTP[0] = first_TP
    for k in range(len(through_KTP)):
        torch.mul(light_KTP[k], through_KTP[k], out=light_KTP[k + 1])
    return light_KTP


def _groups(counts: Tensor, slab: int | None) -> list[Tensor]:
    """Tiles that have Gaussians, in groups of like counts whose slabs have at most ELEMENTS elements.

    Args:
        slab: Gaussians that are composited at a time; None: all of a tile's at once.
    """
    tiles = counts.nonzero().squeeze(1)
    tiles = tiles[counts[tiles].sort(descending=True, stable=True).indices]
    groups, start = [], 0
    sizes = counts[tiles].tolist()
    while start < len(tiles):
        depth = slab or max(1, sizes[start])
        size = max(1, ELEMENTS // (depth * TILE * TILE))
        groups.append(tiles[start : start + size])
        start += size
    return groups


def _weigh(
    weight_N: Tensor, weights_KTP: Tensor, rows_KT: Tensor, tiles_T: Tensor, means_N2: Tensor, across: int
) -> None:
    """Add what each Gaussian of a slab has in the pixel before its centre, where that lies in the tile."""
    place_KT2 = (F.pad(means_N2, (0, 0, 0, 1), value=-1.0)[rows_KT] - 0.5).floor().clamp(-1, 2**20).long()
    local_x = place_KT2[..., 0] - (tiles_T % across) * TILE
    local_y = place_KT2[..., 1] - (tiles_T // across) * TILE
    here_KT = (local_x >= 0) & (local_x < TILE) & (local_y >= 0) & (local_y < TILE) & (rows_KT < len(weight_N))
    pixel_KT = (local_y * TILE + local_x).clamp(0, TILE * TILE - 1)
    found_KT = weights_KTP.gather(-1, pixel_KT[..., None])[..., 0]
    weight_N.index_add_(0, rows_KT[here_KT], found_KT[here_KT])


@dataclass
class Picture:
    """A view: rgb [H, W, 3], alpha [H, W], depth [H, W] in metres (0 where nothing is), features [H, W, F]."""

    rgb_HW3: Tensor
    alpha_HW: Tensor
    depth_HW: Tensor
    features_HWF: Tensor | None
    significance_N: Tensor | None


def render(
    scene: Gaussians, camera: Camera, background: float = 0.0, features_NF: Tensor | None = None, weigh: bool = False
) -> Picture:
    """One view of a scene; with gradients to everything in it.

    Args:
        features_NF: drawn beside the colours. weigh: also Occam's significance.
    """
    if scene.means_N3.is_cuda and not weigh and importlib.util.find_spec("gsplat") is not None:
        return _render_gsplat(scene, camera, background, features_NF)
    spread_N33 = covariances(scene.quaternions_N4, scene.scales_N3.exp())
    seen = project(scene.means_N3, spread_N33, camera)
    parts = [colours_from(scene, camera), seen.depths_N[:, None]] + ([] if features_NF is None else [features_NF])
    opacities_N = scene.opacities_N.sigmoid()
    picture, alpha_HW, weight_N = composite(
        seen, opacities_N, torch.cat(parts, 1), camera.width, camera.height, weigh=weigh
    )
    rgb_HW3 = picture[..., :3] + background * (1 - alpha_HW)[..., None]
    depth_HW = picture[..., 3] / alpha_HW.clamp(min=1e-10)
    return Picture(rgb_HW3, alpha_HW, depth_HW, None if features_NF is None else picture[..., 4:], weight_N)


def _render_gsplat(scene: Gaussians, camera: Camera, background: float, features_NF: Tensor | None) -> Picture:
    """The same by gsplat's kernels."""
    from gsplat import rasterization

    colours_N3 = colours_from(scene, camera)
    values_ND = colours_N3 if features_NF is None else torch.cat([colours_N3, features_NF], 1)
    found, alpha, _ = rasterization(
        scene.means_N3,
        scene.quaternions_N4,
        scene.scales_N3.exp(),
        scene.opacities_N.sigmoid(),
        values_ND,
        camera.world_44[None],
        camera.intrinsics_33[None],
        camera.width,
        camera.height,
        near_plane=NEAR,
        eps2d=BLUR,
        render_mode="RGB+ED",
        packed=False,
    )
    picture, alpha_HW = found[0], alpha[0, ..., 0]
    rgb_HW3 = picture[..., :3] + background * (1 - alpha_HW)[..., None]
    return Picture(rgb_HW3, alpha_HW, picture[..., -1], None if features_NF is None else picture[..., 3:-1], None)
