"""Gaussians to pictures, on any device, with gradients: projection, tiles, and front-to-back compositing in torch.

On CUDA devices `render` goes through gsplat where it is installed; the two agree to 1e-4. The compositing here keeps
no table of Gaussians by pixels. Where Gaussians are small it goes through the list of (pixel, Gaussian) pairs that
count; where they are large, through slabs of a tile's Gaussians front to back, leaving tiles that are opaque, and the
backward pass computes them again. The numbers of pairs and of tiles' elements decide, so equal scenes are drawn alike.

Shape suffixes: N Gaussians, H W or Q pixels, D channels; within a slab K Gaussians of each of T tiles, P pixels of a
tile, S of its side, E columns of a table; M pairs, R rows of the Gaussians' boxes.
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
MARGIN = 0.01  # by which an ellipse's rows are widened: pixels, and share of the squared distance
FEW_CHANNELS = 16  # are summed one by one; more go through matrix products
PAIR = 3.0  # what a pair costs, in elements of a slab (measured: 2.5 to 3; slabs take less memory)
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
            found = _pairs(projection, sigmas_N, low_N2, span_N2)
        else:
            owner_M, starts, _ = tile_pairs(means_N2, reach_N2, projection.depths_N, width, height, TILE)
    shape = (means_N2, conics_N3, opacities_N, values_ND)
    if few:
        picture_QD, alpha_Q = _CompositePairs.apply(*shape, found, width, height)
        return picture_QD.view(height, width, -1), alpha_Q.view(height, width), None
    picture_TPD, alpha_PT, weight_N = _Composite.apply(*shape, owner_M, starts, -(-width // TILE), weigh)
    if weight_N is not None:  # tiles at the border reach beyond the picture
        place_N2 = (means_N2.detach() - 0.5).floor()
        weight_N = torch.where((place_N2 < place_N2.new_tensor([width, height])).all(1), weight_N, 0)
    alpha_HW = _untile(alpha_PT.t()[..., None].contiguous(), width, height)[..., 0]
    return _untile(picture_TPD, width, height), alpha_HW, weight_N


def _boxes(means_N2: Tensor, reach_N2: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """The first pixel [N, 2] whose centre a Gaussian reaches, and how many columns and rows of them there are."""
    size_2 = torch.tensor([width, height], device=means_N2.device)
    low_N2 = (means_N2 - reach_N2 - 0.5).ceil().clamp(0, 2**20).long()
    high_N2 = torch.minimum((means_N2 + reach_N2 - 0.5).floor().clamp(-1, 2**20).long() + 1, size_2)
    return low_N2, torch.where((reach_N2 > 0).all(1, keepdim=True), high_N2 - low_N2, 0).clamp(min=0)


def _pairs(
    projection: Projection, sigmas_N: Tensor, low_N2: Tensor, span_N2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gaussians [M], the nearest first, columns and rows of the pixels that each may reach, and their rows' numbers.

    Of a row of its box a Gaussian has what its ellipse cuts out, and a little more.
    """
    nearest_N = projection.depths_N.sort(stable=True).indices
    owner_R = torch.repeat_interleave(nearest_N, span_N2[nearest_N, 1])
    rows_N = span_N2[nearest_N, 1]
    y_R = torch.arange(len(owner_R), device=owner_R.device)
    y_R += torch.repeat_interleave(low_N2[nearest_N, 1] - (rows_N.cumsum(0) - rows_N), rows_N)
    mean_x, mean_y = projection.means_N2.t()
    a, b, c = projection.conics_N3.t()
    # a dx^2 + 2 b dx dy + c dy^2 <= sigmas^2; what is left of a c - b^2 for a long Gaussian float32 does not hold
    sharp_N = (a.double() * c.double() - b.double().square()).to(a)
    dy_R = y_R + 0.5 - mean_y.index_select(0, owner_R)
    square_N = sigmas_N.square() * a * (1 + MARGIN)
    half_R = square_N.index_select(0, owner_R) - sharp_N.index_select(0, owner_R) * dy_R.square()
    half_R = half_R.clamp(min=0).sqrt() / a.index_select(0, owner_R) + MARGIN
    middle_R = mean_x.index_select(0, owner_R) - (b / a).index_select(0, owner_R) * dy_R - 0.5
    first_R, most_R = low_N2[:, 0].index_select(0, owner_R), (low_N2 + span_N2)[:, 0].index_select(0, owner_R)
    low_R = torch.maximum((middle_R - half_R).ceil().clamp(0, 2**20).long(), first_R)
    high_R = torch.minimum((middle_R + half_R).floor().clamp(-1, 2**20).long() + 1, most_R)
    columns_R = (high_R - low_R).clamp(min=0)
    of_row_M = torch.repeat_interleave(columns_R)
    x_M = torch.arange(len(of_row_M), device=of_row_M.device)
    x_M += (low_R - (columns_R.cumsum(0) - columns_R)).index_select(0, of_row_M)
    return owner_R.index_select(0, of_row_M), x_M, y_R, of_row_M


def _weighted(weights_M: Tensor, values_ND: Tensor, from_M: Tensor, to_M: Tensor, count: int) -> Tensor:
    """[count, D]: sums at `to` of weights times the values at `from`."""
    if values_ND.shape[1] > FEW_CHANNELS:
        products_MD = weights_M[:, None] * values_ND.index_select(0, from_M)
        return values_ND.new_zeros(count, values_ND.shape[1]).index_add_(0, to_M, products_MD)
    sums_DC = values_ND.new_zeros(values_ND.shape[1], count)
    for sum_C, value_N in zip(sums_DC, values_ND.t().contiguous()):
        sum_C.index_add_(0, to_M, weights_M * value_N.index_select(0, from_M))
    return sums_DC.t()


class _CompositePairs(torch.autograd.Function):
    """Blends the pairs of each pixel by running sums of logarithms in float64.

    Everything is a column by itself: of narrow tables torch adds and takes rows several times as slowly.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        means: Tensor,
        conics: Tensor,
        opacities: Tensor,
        values_ND: Tensor,
        pairs: tuple[Tensor, Tensor, Tensor, Tensor],
        width: int,
        height: int,
    ) -> tuple[Tensor, Tensor]:
        """Picture [Q, D] and its alpha [Q]."""
        owner_M, x_M, y_R, of_row_M = pairs
        order_M = (x_M + (y_R * width).index_select(0, of_row_M)).int()
        pixel_M, order_M = order_M.sort(stable=True)
        pixel_M, owner_M = pixel_M.long(), owner_M.index_select(0, order_M)
        x_M, y_M = x_M.index_select(0, order_M), y_R.index_select(0, of_row_M).index_select(0, order_M)
        mean_x, mean_y = means.t().contiguous()
        dx_M, dy_M = x_M + 0.5 - mean_x.index_select(0, owner_M), y_M + 0.5 - mean_y.index_select(0, owner_M)
        a, b, c = (part.index_select(0, owner_M) for part in conics.t().contiguous())
        power_M = (a * dx_M).mul_(dx_M).addcmul_(c * dy_M, dy_M).mul_(-0.5).sub_(b.mul_(dx_M).mul_(dy_M))
        full_M = power_M.exp_().mul_(opacities.index_select(0, owner_M))
        cut = bool(opacities.max() > LARGEST_ALPHA) if len(opacities) else False
        uncut_M = full_M <= LARGEST_ALPHA if cut else None
        alpha_M = F.threshold(full_M.clamp(max=LARGEST_ALPHA), below(LEAST_ALPHA, full_M.dtype), 0.0)
        logs_M = torch.log1p(-alpha_M)
        ends_Q = torch.bincount(pixel_M, minlength=width * height).cumsum(0)
        starts_Q = F.pad(ends_Q, (1, 0))[:-1]
        sums_M = _running(logs_M)
        after_M = (sums_M[1:] - sums_M[starts_Q].index_select(0, pixel_M)).to(means).exp_()
        hides = bool(after_M.amin() <= OPAQUE) if len(after_M) else False
        if hides:
            sums_M = _running(logs_M * (after_M > OPAQUE))
        left_Q = (sums_M[ends_Q] - sums_M[starts_Q]).exp_()
        light_M = F.threshold(after_M, OPAQUE, 0.0, inplace=True).div_(1 - alpha_M)
        weights_M = alpha_M * light_M
        picture_QD = _weighted(weights_M, values_ND, owner_M, pixel_M, width * height)
        kept = (conics, opacities, values_ND, owner_M, pixel_M, dx_M, dy_M, alpha_M, uncut_M, light_M, left_Q, ends_Q)
        ctx.save_for_backward(*kept)
        ctx.hides = hides
        return picture_QD, (1 - left_Q).to(means)

    @staticmethod
    def backward(ctx: Any, grad_picture_QD: Tensor, grad_alpha_Q: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        conics, opacities, values_ND, owner_M, pixel_M, dx_M, dy_M, alpha_M, uncut_M, light_M, left_Q, ends_Q = (
            ctx.saved_tensors
        )
        weights_M, count = alpha_M * light_M, len(opacities)
        grads: list[Tensor | None] = [None, None, None, None]
        if ctx.needs_input_grad[3]:
            grads[3] = _weighted(weights_M, grad_picture_QD, pixel_M, owner_M, count)
        if any(ctx.needs_input_grad[:3]):
            # d picture / d alpha_k = T_k v_k - (what lies behind) / (1 - alpha_k); alpha of the picture likewise
            value_M = torch.zeros_like(weights_M)
            for grad_Q, value_N in zip(grad_picture_QD.t().contiguous(), values_ND.t().contiguous()):
                value_M.addcmul_(grad_Q.index_select(0, pixel_M), value_N.index_select(0, owner_M))
            sums_M = _running(weights_M.mul_(value_M))
            behind_M = (sums_M[ends_Q] - left_Q * grad_alpha_Q).index_select(0, pixel_M).sub_(sums_M[1:])
            grad_M = value_M.mul_(light_M).sub_(behind_M.to(light_M).div_(1 - alpha_M)).mul_(alpha_M)
            if ctx.hides:
                grad_M *= light_M != 0
            if uncut_M is not None:
                grad_M *= uncut_M
            gx_M, gy_M = grad_M * dx_M, grad_M * dy_M

            def summed(part_M: Tensor) -> Tensor:
                return part_M.new_zeros(count).index_add_(0, owner_M, part_M)

            gx, gy, gxy, whole = summed(gx_M), summed(gy_M), summed(gx_M * dy_M), summed(grad_M)
            gxx, gyy = summed(gx_M.mul_(dx_M)), summed(gy_M.mul_(dy_M))
            a, b, c = conics.unbind(1)
            grads[0] = torch.stack([a * gx + b * gy, b * gx + c * gy], 1)
            grads[1] = torch.stack([-0.5 * gxx, -gxy, -0.5 * gyy], 1)
            grads[2] = whole / opacities.clamp(min=1e-12)
        return *grads, None, None, None


def _running(part_M: Tensor) -> Tensor:
    """Running sums [M + 1] in float64, from 0."""
    sums_M = torch.zeros(len(part_M) + 1, dtype=torch.float64, device=part_M.device)
    torch.cumsum(part_M, 0, dtype=torch.float64, out=sums_M[1:])
    return sums_M


def _untile(picture_TPD: Tensor, width: int, height: int) -> Tensor:
    """[H, W, D] of tiles."""
    across, down = -(-width // TILE), -(-height // TILE)
    rows = picture_TPD.view(down, across, TILE, TILE, -1).transpose(1, 2)
    return rows.reshape(down * TILE, across * TILE, -1)[:height, :width]


class _Slabs:
    """Walks front to back through the Gaussians of tiles, a slab at a time, over groups of tiles that fit in memory.

    Tiles come last: what is done to a slab then runs along memory, whatever is broadcast over Gaussians or pixels.
    """

    def __init__(
        self,
        means_N2: Tensor,
        conics_N3: Tensor,
        opacities_N: Tensor,
        owner_M: Tensor,
        starts: Tensor,
        across: int,
    ):
        columns = [means_N2, conics_N3, opacities_N[:, None], opacities_N.log()[:, None]]
        # One more, which stands for no Gaussian: its alpha is 0.
        self.table_EN = F.pad(torch.cat(columns, 1).t(), (0, 1))
        self.table_EN[6, -1] = -torch.inf
        self.owner_M, self.starts, self.across, self.none = owner_M, starts, across, len(means_N2)
        self.axis_S = torch.arange(TILE, device=means_N2.device) + 0.5
        self.least = below(LEAST_ALPHA, means_N2.dtype)

    def gaussians(self, tiles_T: Tensor, first: int, count: int) -> Tensor:
        """Numbers [K, T] of the `count` Gaussians of each tile from its `first` on."""
        at_KT = self.starts[tiles_T] + first + torch.arange(count, device=tiles_T.device)[:, None]
        inside_KT = at_KT < self.starts[tiles_T + 1]
        if not len(self.owner_M):
            return torch.full_like(at_KT, self.none)
        return torch.where(inside_KT, self.owner_M[at_KT.clamp(max=len(self.owner_M) - 1)], self.none)

    def slab(self, rows_KT: Tensor, tiles_T: Tensor) -> _Slab:
        """Alphas in all pixels of the tiles, and what is known of the Gaussians."""
        given_EKT = self.table_EN.index_select(1, rows_KT.flatten()).unflatten(1, rows_KT.shape)
        mean_x, mean_y, a, b, c, opacity, log_opacity = given_EKT[:, :, None]
        dx_KST = (tiles_T % self.across * TILE + self.axis_S[:, None]) - mean_x
        dy_KST = (tiles_T // self.across * TILE + self.axis_S[:, None]) - mean_y
        by_x, tilt = -0.5 * a * dx_KST**2 + log_opacity, -b * dx_KST
        alpha = torch.addcmul(by_x[:, None], tilt[:, None], dy_KST[:, :, None])
        alpha = alpha.add_((-0.5 * c * dy_KST**2)[:, :, None]).exp_().flatten(1, 2)
        uncut_KPT = None
        if bool(opacity.max() > LARGEST_ALPHA):
            uncut_KPT = alpha <= LARGEST_ALPHA
            alpha.clamp_(max=LARGEST_ALPHA)
        alpha_KPT = F.threshold(alpha, self.least, 0.0, inplace=True)
        return _Slab(alpha_KPT, uncut_KPT, dx_KST, dy_KST, given_EKT[2:5], given_EKT[5])


@dataclass
class _Slab:
    """K Gaussians of each of T tiles in the tiles' pixels; distances of pixels from centres along both axes (S)."""

    alpha_KPT: Tensor
    uncut_KPT: Tensor | None  # where alpha is that of the Gaussian; None: everywhere
    dx_KST: Tensor
    dy_KST: Tensor
    conics_3KT: Tensor
    opacities_KT: Tensor

    def light(self, first_PT: Tensor) -> Tensor:
        """What reaches each Gaussian, and what is left behind the last [K + 1, P, T]."""
        light_KPT = torch.empty(len(self.alpha_KPT) + 1, *first_PT.shape).to(first_PT)
        light_KPT[0] = first_PT
        torch.sub(1, self.alpha_KPT, out=light_KPT[1:])
        for k in range(len(self.alpha_KPT)):
            light_KPT[k + 1] *= light_KPT[k]
        return light_KPT


def below(number: float, dtype: torch.dtype) -> float:
    """The largest number of a type that is less: `threshold` keeps what lies above it, so it keeps `number`."""
    return float(torch.nextafter(torch.tensor(number, dtype=dtype), torch.tensor(0.0, dtype=dtype)))


class _Channels:
    """Values of Gaussians over the slabs: few channels one by one with the tiles last, as everything else, many through
    a matrix product a tile, for which the tiles come first.

    Shapes of values: few [D, K, T], many [T, K, D]; of a picture's part: [D, P, T], [T, P, D].
    """

    def __init__(self, values_ND: Tensor) -> None:
        self.many = values_ND.shape[1] > FEW_CHANNELS
        # One more, which stands for no Gaussian.
        self.table = F.pad(values_ND if self.many else values_ND.t(), (0, 0, 0, 1) if self.many else (0, 1))

    def of(self, rows_KT: Tensor) -> Tensor:
        """The values of a slab's Gaussians."""
        if self.many:
            return self.table.index_select(0, rows_KT.t().flatten()).unflatten(0, rows_KT.t().shape)
        return self.table.index_select(1, rows_KT.flatten()).unflatten(1, rows_KT.shape)

    def nothing(self, pixels: int, tiles: int) -> Tensor:
        """A picture's part before anything is drawn."""
        if self.many:
            return self.table.new_zeros(tiles, pixels, self.table.shape[1])
        return self.table.new_zeros(len(self.table), pixels, tiles)

    def draw(self, part: Tensor, weights_KPT: Tensor, values: Tensor) -> None:
        """Add a slab to a picture's part."""
        if self.many:
            part.baddbmm_(weights_KPT.permute(2, 1, 0).contiguous(), values)
        else:
            for part_PT, value_KT in zip(part, values):
                part_PT += (weights_KPT * value_KT[:, None]).sum(0)

    def tiles(self, part: Tensor, which: Tensor) -> Tensor:
        """Some tiles of a picture's part."""
        return part[which] if self.many else part[..., which]

    def turned(self, part: Tensor) -> Tensor:
        """A picture's part [T, P, D], or from that."""
        return part if self.many else part.permute(2, 1, 0).contiguous()

    def gradients(self, weights_KPT: Tensor, grad_part: Tensor, rows_KT: Tensor) -> tuple[Tensor, Tensor]:
        """Gaussians and the gradients [.., D] of their values, from those of a picture's part."""
        if self.many:
            found_TKD = torch.bmm(weights_KPT.permute(2, 0, 1).contiguous(), grad_part)
            return rows_KT.t().flatten(), found_TKD.flatten(0, 1)
        found_DKT = weights_KPT.new_empty(len(grad_part), *rows_KT.shape)
        for found_KT, grad_PT in zip(found_DKT, grad_part):
            torch.sum(weights_KPT * grad_PT, 1, out=found_KT)
        return rows_KT.flatten(), found_DKT.flatten(1).t()

    def projected(self, values: Tensor, grad_part: Tensor) -> Tensor:
        """Values times the picture's gradients, summed over channels [K, P, T]."""
        if self.many:
            return torch.bmm(values, grad_part.transpose(1, 2)).permute(1, 2, 0).contiguous()
        sum_KPT = values.new_zeros(values.shape[1], *grad_part.shape[1:])
        for value_KT, grad_PT in zip(values, grad_part):
            sum_KPT.addcmul_(value_KT[:, None], grad_PT)
        return sum_KPT


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
        """Picture [tiles, P, D], its alpha [P, tiles], weights [N]."""
        tiles, pixels, channels = len(starts) - 1, TILE * TILE, values_ND.shape[1]
        # Alpha, as a sum, is exact where it is small; 1 less it, what is left, is kept as a product.
        picture_TPD, alpha_PT = values_ND.new_zeros(tiles, pixels, channels), values_ND.new_zeros(pixels, tiles)
        left_PT = values_ND.new_ones(pixels, tiles)
        weight_N = values_ND.new_zeros(len(means)) if weigh else None
        slabs, values = _Slabs(means, conics, opacities, owner, starts, across), _Channels(values_ND)
        counts = starts.diff()
        used = torch.zeros_like(counts)  # Gaussians of a tile until it is opaque
        for group in _groups(counts, SLAB):
            first = 0
            part, sum_PT = values.nothing(pixels, len(group)), values_ND.new_zeros(pixels, len(group))
            light_PT = values_ND.new_ones(pixels, len(group))
            last_PT = light_PT.clone()  # as light, but of the last Gaussian that counted
            while len(group):
                rows_KT = slabs.gaussians(group, first, SLAB)
                slab = slabs.slab(rows_KT, group)
                light_KPT = slab.light(light_PT)
                light_PT, ends_KPT = light_KPT[-1], light_KPT[1:]
                weights_KPT = slab.alpha_KPT.mul_(light_KPT[:-1])
                if bool(light_PT.amin() <= OPAQUE):
                    weights_KPT *= ends_KPT > OPAQUE
                    last_PT = torch.minimum(last_PT, F.threshold(ends_KPT, OPAQUE, 1.0).amin(0))
                else:
                    last_PT = light_PT
                values.draw(part, weights_KPT, values.of(rows_KT))
                sum_PT += weights_KPT.sum(0)
                if weight_N is not None:
                    _weigh(weight_N, weights_KPT, rows_KT, group, means, across)
                first += SLAB
                used[group] = counts[group].clamp(max=first)
                goes_on_T = (light_PT > OPAQUE).any(0) & (counts[group] > first)
                ended, stays = (~goes_on_T).nonzero()[:, 0], goes_on_T.nonzero()[:, 0]
                if len(ended):
                    picture_TPD[group[ended]] = values.turned(values.tiles(part, ended))
                    alpha_PT[:, group[ended]] = sum_PT[:, ended]
                    left_PT[:, group[ended]] = last_PT[:, ended]
                    group, part, sum_PT = group[stays], values.tiles(part, stays), sum_PT[:, stays]
                    light_PT, last_PT = light_PT[:, stays], last_PT[:, stays]
        ctx.save_for_backward(means, conics, opacities, values_ND, owner, starts, used, left_PT)
        ctx.across = across
        if weight_N is not None:
            ctx.mark_non_differentiable(weight_N)
        return picture_TPD, alpha_PT, weight_N

    @staticmethod
    def backward(ctx: Any, grad_picture_TPD: Tensor, grad_alpha_PT: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        means, conics, opacities, values_ND, owner, starts, used, left_PT = ctx.saved_tensors
        slabs, values = _Slabs(means, conics, opacities, owner, starts, ctx.across), _Channels(values_ND)
        only_values = not any(ctx.needs_input_grad[:3])
        grads_ND, grads_N6 = (values_ND.new_zeros(len(means) + 1, width) for width in (values_ND.shape[1], 6))
        for group in _groups(used, None):
            rows_KT = slabs.gaussians(group, 0, int(used[group].max()))
            slab = slabs.slab(rows_KT, group)
            alpha_KPT = slab.alpha_KPT
            light_KPT = slab.light(torch.ones_like(alpha_KPT[0]))
            visible_KPT = light_KPT[1:] > OPAQUE if bool(light_KPT[-1].amin() <= OPAQUE) else None
            light_KPT = light_KPT[:-1]
            if visible_KPT is not None:
                light_KPT *= visible_KPT
            weights_KPT = alpha_KPT * light_KPT
            grad_part = values.turned(grad_picture_TPD[group])
            grads_ND.index_add_(0, *values.gradients(weights_KPT, grad_part, rows_KT))
            if not only_values:
                # d picture / d alpha_k = T_k v_k - (what lies behind) / (1 - alpha_k)
                value_KPT = values.projected(values.of(rows_KT), grad_part)
                weights_KPT *= value_KPT
                behind_KPT = torch.empty_like(weights_KPT)
                # alpha of the picture is 1 - T of the last: its derivative is T_last / (1 - alpha_k) where k counts
                torch.mul(left_PT[:, group], -grad_alpha_PT[:, group], out=behind_KPT[-1])
                for k in reversed(range(len(rows_KT) - 1)):
                    torch.add(behind_KPT[k + 1], weights_KPT[k + 1], out=behind_KPT[k])
                grad_KPT = value_KPT.mul_(light_KPT).sub_(behind_KPT.div_(1 - alpha_KPT))
                # to the exponent; none where the Gaussian does not count, nor where its alpha is cut
                grad_KPT *= alpha_KPT
                for counted_KPT in (visible_KPT, slab.uncut_KPT):
                    if counted_KPT is not None:
                        grad_KPT *= counted_KPT
                grads_N6.index_add_(0, rows_KT.flatten(), _moments(grad_KPT, slab).flatten(1).t())
        grads = (grads_N6[:-1, :2], grads_N6[:-1, 2:5], grads_N6[:-1, 5], grads_ND[:-1])
        found_grads = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad)]
        return *found_grads, None, None, None, None


def _moments(grad_KPT: Tensor, slab: _Slab) -> Tensor:
    """Gradients [6, K, T] of mean, conic and opacity from those of the exponent."""
    square = grad_KPT.unflatten(1, (TILE, TILE))
    by_x, by_y = square.sum(1), square.sum(2)  # [K, S, T]
    (a, b, c), dx, dy = slab.conics_3KT, slab.dx_KST, slab.dy_KST
    along_x, along_y = by_x * dx, by_y * dy
    gx, gy = along_x.sum(1), along_y.sum(1)
    gxx, gyy = along_x.mul_(dx).sum(1), along_y.mul_(dy).sum(1)
    gxy = (square.mul_(dy[:, :, None]).sum(1) * dx).sum(1)
    opacity = by_x.sum(1) / slab.opacities_KT.clamp(min=1e-12)
    return torch.stack([a * gx + b * gy, b * gx + c * gy, -0.5 * gxx, -gxy, -0.5 * gyy, opacity])


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
    weight_N: Tensor, weights_KPT: Tensor, rows_KT: Tensor, tiles_T: Tensor, means_N2: Tensor, across: int
) -> None:
    """Add what each Gaussian of a slab has in the pixel before its centre, where that lies in the tile."""
    place_KT2 = (F.pad(means_N2, (0, 0, 0, 1), value=-1.0)[rows_KT] - 0.5).floor().clamp(-1, 2**20).long()
    local_x = place_KT2[..., 0] - (tiles_T % across) * TILE
    local_y = place_KT2[..., 1] - (tiles_T // across) * TILE
    here_KT = (local_x >= 0) & (local_x < TILE) & (local_y >= 0) & (local_y < TILE) & (rows_KT < len(weight_N))
    pixel_KT = (local_y * TILE + local_x).clamp(0, TILE * TILE - 1)
    found_KT = weights_KPT.gather(1, pixel_KT[:, None])[:, 0]
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
