"""A scene as 3D Gaussians: the container, what the network sees of it, and what rotations and mirrors do to it.

Shape suffixes: N Gaussians, C colour coefficients, K bands' coefficients of one channel, F width of features.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

C0 = 0.28209479177387814  # the constant spherical harmonic
ATTRIBUTES = {"colour": 3, "opacity": 1, "quaternion": 4, "scale": 3, "normal": 3}  # the network's input, in this order
# Least opacity, least and largest scale in metres, as the released loaders clip them.
CLIPS = {"scannet": (0.0, 0.0, 1.5), "generic": (1e-3, 1e-4, 1.0)}


@dataclass
class Gaussians:
    """N Gaussians as a 3DGS .ply holds them, and what is known about each.

    Args:
        means_N3: centres in metres, z up, relative to `origin_3`.
        scales_N3: natural logarithms of the standard deviations.
        quaternions_N4: unit, w first: from the Gaussian's axes to the world's.
        opacities_N: logits.
        colours_NC: spherical harmonics: the three of degree 0, then the higher ones, channel by channel.
        labels_N: class of each, -1 for none; instances_N: object of each, -1 for none.
        features_NF: in the text space; zero where `valid_N` is False.
        normals_N3: of the surface, unit.
        origin_3: float64, what centres are relative to, so that a scene far from zero loses no digits.
    """

    means_N3: Tensor
    scales_N3: Tensor
    quaternions_N4: Tensor
    opacities_N: Tensor
    colours_NC: Tensor
    labels_N: Tensor | None = None
    instances_N: Tensor | None = None
    features_NF: Tensor | None = None
    valid_N: Tensor | None = None
    normals_N3: Tensor | None = None
    origin_3: Tensor | None = None

    def __len__(self) -> int:
        return len(self.means_N3)

    @property
    def degree(self) -> int:
        """Of the spherical harmonics, 0 to 3."""
        return int((self.colours_NC.shape[1] // 3) ** 0.5) - 1

    @property
    def harmonics_NK3(self) -> Tensor:
        """Coefficients by band and channel."""
        first_N13 = self.colours_NC[:, None, :3]
        rest_NK3 = self.colours_NC[:, 3:].unflatten(1, (3, -1)).transpose(1, 2) if self.degree else first_N13[:, :0]
        return torch.cat([first_N13, rest_NK3], 1)

    def with_harmonics(self, harmonics_NK3: Tensor) -> Gaussians:
        """The same Gaussians in other colours."""
        rest_NC = harmonics_NK3[:, 1:].transpose(1, 2).flatten(1)
        return replace(self, colours_NC=torch.cat([harmonics_NK3[:, 0], rest_NC], 1))

    def select(self, rows: Tensor) -> Gaussians:
        """Those of `rows`, numbers or a mask."""
        return self._each(lambda name, value: value if name == "origin_3" else value[rows])

    def to(self, device: torch.device | str) -> Gaussians:
        """The same on a device."""
        return self._each(lambda name, value: value.to(device))

    def _each(self, change: Any) -> Gaussians:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(name, value) for name, value in given.items() if value is not None})

    def moved(self, by_3: Tensor) -> Gaussians:
        """Shifted by metres."""
        return replace(self, means_N3=self.means_N3 + by_3)

    def scaled(self, factor: float) -> Gaussians:
        """Larger by a factor, from the origin: centres and extents alike."""
        grown = torch.tensor(factor, dtype=self.scales_N3.dtype).log()
        origin = None if self.origin_3 is None else self.origin_3 * factor
        return replace(self, means_N3=self.means_N3 * factor, scales_N3=self.scales_N3 + grown, origin_3=origin)

    def turned(self, matrix_33: Tensor) -> Gaussians:
        """Rotated about the origin: centres, axes, normals and the higher bands of colour."""
        return self._under(matrix_33, matrix_33.to(self.quaternions_N4) @ rotations(self.quaternions_N4))

    def mirrored(self, axis: int) -> Gaussians:
        """With x, y or z (0, 1, 2) turned round: the mirror F takes a Gaussian's rotation R to F R F."""
        mirror_33 = torch.eye(3).to(self.quaternions_N4)
        mirror_33[axis, axis] = -1
        return self._under(mirror_33, mirror_33 @ rotations(self.quaternions_N4) @ mirror_33)

    def _under(self, matrix_33: Tensor, turned_N33: Tensor) -> Gaussians:
        return replace(
            self.with_harmonics(turned_harmonics(self.harmonics_NK3, matrix_33)),
            means_N3=self.means_N3 @ matrix_33.to(self.means_N3).t(),
            quaternions_N4=quaternions(turned_N33),
            normals_N3=None if self.normals_N3 is None else self.normals_N3 @ matrix_33.to(self.normals_N3).t(),
            origin_3=None if self.origin_3 is None else matrix_33.to(self.origin_3) @ self.origin_3,
        )

    def covariances(self) -> Tensor:
        """[N, 3, 3], square metres."""
        axes_N33 = rotations(self.quaternions_N4) * self.scales_N3.exp()[:, None]
        return axes_N33 @ axes_N33.transpose(1, 2)

    def attributes(self) -> dict[str, Tensor]:
        """What the network may see, as the released code prepares it: `coord`, and ATTRIBUTES but unclipped.

        Colours are whole numbers 0 to 255, cut off rather than rounded; quaternions have a real part that is not
        negative; scales are metres; a normal that the scene does not have is the shortest axis.
        """
        shade_N3 = (0.5 + C0 * self.colours_NC[:, :3]).clamp(0, 1)
        found = {
            "coord": self.means_N3,
            "colour": (255 * shade_N3).trunc(),
            "opacity": torch.sigmoid(self.opacities_N)[:, None],
            "quaternion": canonical(self.quaternions_N4),
            "scale": self.scales_N3.exp(),
            "normal": self.normals_N3 if self.normals_N3 is not None else shortest_axes(self),
        }
        return found


def inputs(attributes: dict[str, Tensor], names: Collection[str], loader: str = "scannet") -> Tensor:
    """The network's input [N, sum of widths]: colours in -1..1, opacities and scales clipped.

    Args:
        names: of ATTRIBUTES; colour, opacity, quaternion, scale are the 11 of the released model.
        loader: of CLIPS.
    """
    opacity, least, largest = CLIPS[loader]
    prepared = {
        **attributes,
        "colour": attributes["colour"] / 127.5 - 1,
        "opacity": attributes["opacity"].clamp(min=opacity),
        "scale": attributes["scale"].clamp(least, largest),
    }
    return torch.cat([prepared[name] for name in ATTRIBUTES if name in names], 1)


def axis_turn(axis: str, angle: float) -> Tensor:
    """The rotation [3, 3] by radians about x, y or z."""
    c, s = math.cos(angle), math.sin(angle)
    rows = {
        "x": [[1.0, 0, 0], [0, c, -s], [0, s, c]],
        "y": [[c, 0, s], [0, 1.0, 0], [-s, 0, c]],
        "z": [[c, -s, 0], [s, c, 0], [0, 0, 1.0]],
    }
    return torch.tensor(rows[axis])


def canonical(quaternions_N4: Tensor) -> Tensor:
    """The one of q and -q whose real part is not negative."""
    return torch.where(quaternions_N4[:, :1] < 0, -quaternions_N4, quaternions_N4)


def shortest_axes(gaussians: Gaussians) -> Tensor:
    """The direction [N, 3] in which each is thinnest: its normal, but for the side."""
    thinnest_N = gaussians.scales_N3.argmin(1)
    return rotations(gaussians.quaternions_N4)[torch.arange(len(gaussians)), :, thinnest_N]


def rotations(quaternions_N4: Tensor) -> Tensor:
    """Rotation matrices [N, 3, 3] of quaternions, which need not be unit."""
    w, x, y, z = F.normalize(quaternions_N4, dim=-1).unbind(-1)
    rows = (
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def quaternions(rotations_N33: Tensor) -> Tensor:
    """Unit quaternions [N, 4] of rotation matrices, w first and not negative.

    Of the four ways to begin, each takes the one whose square root is largest.
    """
    m = rotations_N33
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    squares_N4 = torch.stack([1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz], -1)
    zy, xz, yx = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    xy, xz_sum, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    ways_N44 = torch.stack(
        [
            torch.stack([squares_N4[..., 0], zy, xz, yx], -1),
            torch.stack([zy, squares_N4[..., 1], xy, xz_sum], -1),
            torch.stack([xz, xy, squares_N4[..., 2], yz], -1),
            torch.stack([yx, xz_sum, yz, squares_N4[..., 3]], -1),
        ],
        -2,
    )
    best_N = squares_N4.argmax(-1)
    found_N4 = ways_N44.gather(-2, best_N[..., None, None].expand(*best_N.shape, 1, 4)).squeeze(-2)
    return canonical(F.normalize(found_N4, dim=-1))


def harmonics(directions_N3: Tensor, degree: int) -> Tensor:
    """The real spherical harmonics [N, (degree + 1)^2] of unit directions, in the order and with the signs of 3DGS."""
    x, y, z = directions_N3.unbind(-1)
    found = [torch.full_like(x, C0)]
    if degree > 0:
        found += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if degree > 1:
        found += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (3 * z * z - 1),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (x * x - y * y),
        ]
    if degree > 2:
        found += [
            -0.5900435899266435 * y * (3 * x * x - y * y),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (5 * z * z - 1),
            0.3731763325901154 * z * (5 * z * z - 3),
            -0.4570457994644658 * x * (5 * z * z - 1),
            1.445305721320277 * z * (x * x - y * y),
            -0.5900435899266435 * x * (x * x - 3 * y * y),
        ]
    return torch.stack(found, -1)


def turned_harmonics(harmonics_NK3: Tensor, matrix_33: Tensor) -> Tensor:
    """Coefficients of the colours that a rotation or a mirror gives: seen from M d they are what they were from d.

    Each band turns into itself, by a matrix that is solved for from directions in general position.
    """
    degree = int(harmonics_NK3.shape[1] ** 0.5) - 1
    if degree == 0:
        return harmonics_NK3
    generator = torch.Generator().manual_seed(0)
    directions_D3 = F.normalize(torch.randn(64, 3, generator=generator, dtype=torch.float64), dim=1)
    matrix_33 = matrix_33.detach().to("cpu", torch.float64)
    before_DK, after_DK = harmonics(directions_D3, degree), harmonics(directions_D3 @ matrix_33.t(), degree)
    # after_DK @ new_K = before_DK @ old_K for every direction
    solved_KK = torch.linalg.lstsq(after_DK, before_DK).solution.to(harmonics_NK3)
    return torch.einsum("kj,njc->nkc", solved_KK, harmonics_NK3)


def joined(parts: list[Gaussians]) -> Gaussians:
    """Several sets as one; what one of them lacks the whole lacks. All have the same origin and degree."""
    together = {}
    for field in fields(Gaussians):
        values = [getattr(part, field.name) for part in parts]
        if field.name == "origin_3":
            together[field.name] = values[0]
        else:
            together[field.name] = None if any(value is None for value in values) else torch.cat(values)
    return Gaussians(**together)
