"""Gaussians by voxel: one of each in training, all in turn in tests.

Shape suffixes: N Gaussians, V voxels, n Gaussians of a pass (one a voxel).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass
class Grid:
    """Gaussians by voxel.

    Args:
        cells_N3: voxel of each Gaussian, from 0; low_3: the lowest voxel's number, before they were moved to 0.
        order_N: Gaussians sorted by voxel; voxel_N: number of each Gaussian's voxel; count_V: Gaussians of a voxel.
    """

    cells_N3: Tensor
    low_3: Tensor
    order_N: Tensor
    voxel_N: Tensor
    count_V: Tensor

    @classmethod
    def of(cls, coord_N3: Tensor, side: float, order: Literal["fnv", "ravel"] = "fnv") -> Grid:
        """Voxels of `side` metres; a coordinate is divided in float64, as in the released code.

        Args:
            order: of the voxels: by the unsigned FNV hash of their coordinates (the released code), or along z, y, x.
        """
        cells_N3 = (coord_N3.double() / side).floor().long()
        low_3 = cells_N3.min(0).values
        cells_N3 = cells_N3 - low_3
        # with the highest bit turned round, signed numbers are in the order of unsigned ones
        key_N = fnv_hash(cells_N3) ^ torch.iinfo(torch.int64).min if order == "fnv" else ravel_hash(cells_N3)
        _, voxel_N, count_V = key_N.unique(return_inverse=True, return_counts=True)
        return cls(cells_N3, low_3, voxel_N.argsort(stable=True), voxel_N, count_V)

    @property
    def start_V(self) -> Tensor:
        return self.count_V.cumsum(0) - self.count_V

    def one_each(self, generator: torch.Generator) -> Tensor:
        """One Gaussian of every voxel, at random (training)."""
        draw_V = torch.randint(int(self.count_V.max()), self.count_V.shape, generator=generator)
        return self.order_N[self.start_V + draw_V % self.count_V]


def fnv_hash(cells_N3: Tensor) -> Tensor:
    """64-bit FNV of whole coordinates, as a signed number: multiply, then exclusive or, axis by axis."""
    hash_N = torch.full_like(cells_N3[:, 0], -3750763034362895579)  # 14695981039346656037 without sign
    for axis in cells_N3.unbind(1):
        hash_N = (hash_N * 1099511628211) ^ axis
    return hash_N


def ravel_hash(cells_N3: Tensor) -> Tensor:
    """Coordinates from their lowest on as one number, the last axis running fastest."""
    cells_N3 = cells_N3 - cells_N3.min(0).values
    spans_3 = cells_N3.max(0).values + 1
    return (cells_N3[:, 0] * spans_3[1] + cells_N3[:, 1]) * spans_3[2] + cells_N3[:, 2]


def voxels_of(places_N3: Tensor, side: float) -> tuple[Tensor, Tensor]:
    """(whole coordinates [V, 3] from 0, voxel [N] of each place) of a grid of `side` metres."""
    cells_N3 = ((places_N3.double() - places_N3.double().min(0).values) / side).floor().long()
    spans_3 = cells_N3.max(0).values + 1
    key_V, voxel_N = ravel_hash(cells_N3).unique(return_inverse=True)  # of whole numbers: faster than of rows
    columns_V = key_V // spans_3[2]
    return torch.stack([columns_V // spans_3[1], columns_V % spans_3[1], key_V % spans_3[2]], 1), voxel_N


def fragments(voxel_N: Tensor, limit: int = 0) -> Iterator[Tensor]:
    """Gaussians [n] of each pass: pass i takes the i-th of every voxel, beginning again where there are fewer.

    Args:
        limit: passes at most; 0 makes as many as the fullest voxel has Gaussians.
    """
    order_N = voxel_N.argsort(stable=True)
    count_V = torch.bincount(voxel_N)
    first_V = count_V.cumsum(0) - count_V
    passes = int(count_V.max())
    for i in range(min(passes, limit) if limit else passes):
        # Where not all can be seen, those that are lie evenly among them.
        step_V = i * count_V // limit if limit and passes > limit else torch.full_like(count_V, i)
        yield order_N[first_V + step_V % count_V]
