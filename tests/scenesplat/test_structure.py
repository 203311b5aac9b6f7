"""Curves, neighbours, patches and pooling of voxels."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from scenesplat.serialization import ORDERS, encode
from scenesplat.structure import Structure, neighbours_of, padding
from tests.refusals import refused


def cube(depth: int) -> Tensor:
    side = torch.arange(1 << depth)
    return torch.cartesian_prod(side, side, side)


def some_voxels(count: int, side: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.stack(torch.unravel_index(torch.randperm(side**3)[:count], (side,) * 3), 1)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("order", ORDERS)
def test_a_curve_visits_every_voxel_once(order: str, depth: int) -> None:
    grid = cube(depth)
    codes = encode(grid, torch.zeros(len(grid)), depth, order)
    assert torch.equal(codes.sort().values, torch.arange(8**depth))


@pytest.mark.parametrize("order", ["hilbert", "hilbert-trans"])
def test_consecutive_voxels_of_the_hilbert_curve_touch(order: str) -> None:
    grid = cube(4)
    along = grid[encode(grid, torch.zeros(len(grid)), 4, order).argsort()]
    assert torch.equal((along[1:] - along[:-1]).abs().sum(1), torch.ones(len(grid) - 1, dtype=torch.long))


def test_the_z_curve_interleaves_bits_and_trans_swaps_x_and_y() -> None:
    grid = torch.tensor([[0b101, 0b011, 0b110]])
    batch = torch.tensor([2])
    assert int(encode(grid, batch, 3, "z")) == 2 << 9 | 0b101_011_110
    assert int(encode(grid, batch, 3, "z-trans")) == 2 << 9 | 0b011_101_110


def test_scenes_beyond_sixteen_levels_are_refused() -> None:
    refused(
        "voxel coordinates run from 0 to 65536", Structure.of, torch.tensor([[0, 0, 65536]]), torch.tensor([1]), "z", []
    )
    refused("order 'peano': expected one of z,", Structure.of, torch.zeros(1, 3), torch.tensor([1]), ["peano"], [])


@pytest.mark.parametrize("size", [3, 5])
def test_neighbours_are_those_that_comparing_all_voxels_finds(size: int) -> None:
    grid = torch.cat([some_voxels(60, 6), some_voxels(40, 5, seed=1) + 3])
    batch = torch.tensor([0] * 60 + [1] * 40)
    neighbours = neighbours_of(grid, batch, size)
    order, radius = neighbours.order_N, size // 2
    assert torch.equal(neighbours.place_N[order], torch.arange(100))
    for place, (move, found) in enumerate(
        zip(itertools.product(range(-radius, radius + 1), repeat=3), neighbours.pairs, strict=True)
    ):
        same = (grid[None] == (grid + torch.tensor(move))[:, None]).all(2) & (batch[None] == batch[:, None])
        rows, columns = same.nonzero(as_tuple=True)
        if place == size**3 // 2:
            assert not len(found[0])
        else:
            assert {*zip(rows.tolist(), columns.tolist())} == {*zip(*(order[side].tolist() for side in found))}


def test_pooling_joins_what_lies_in_one_larger_voxel() -> None:
    grid = some_voxels(100, 8)
    structure = Structure.of(grid, torch.tensor([70, 100]), ORDERS, [2, 4])
    fine, middle, coarse = structure.levels
    for level, finer, cluster, levels in ((middle, fine, 0, 1), (coarse, middle, 1, 2)):
        parent = structure.clusters[cluster]
        assert torch.equal(level.grid_N3[parent], finer.grid_N3 >> levels)
        assert torch.equal(level.batch_N[parent], finer.batch_N)
        assert sum(level.sizes) == len(level.grid_N3)
        for row, order in enumerate(ORDERS):
            assert torch.equal(level.codes_ON[row], encode(level.grid_N3, level.batch_N, level.depth, order))


def test_a_stride_that_the_curves_have_no_levels_for_joins_nothing() -> None:
    """As in the released code, where a stride of 4 after one of 4 leaves a scene of three levels as it was."""
    grid = cube(3)
    levels = Structure.of(grid, torch.tensor([len(grid)]), ORDERS, [4, 4, 2, 2]).levels
    assert [len(level.grid_N3) for level in levels] == [512, 8, 8, 1, 1]
    assert [level.depth for level in levels] == [3, 1, 1, 0, 0]
    alone = Structure.of(torch.zeros(2, 3), torch.tensor([1, 2]), ORDERS, [2]).levels
    assert alone[0].depth == 0 and alone[0].codes_ON.tolist() == [[0, 1]] * 4
    assert torch.equal(alone[1].batch_N, torch.tensor([0, 1]))


def test_a_long_clouds_last_patch_is_filled_with_the_end_of_the_one_before() -> None:
    pad, unpad, ends = padding([7, 3, 4], 4)
    assert pad.tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 7, 8, 9, 10, 11, 12, 13]
    assert unpad.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14]
    assert ends.tolist() == [0, 4, 8, 11, 15]


def test_patches_hold_every_voxel_once_in_its_own_place() -> None:
    level = Structure.of(some_voxels(50, 6), torch.tensor([33, 36, 50]), ORDERS, []).levels[0]
    for flash, wide in ((True, 8), (False, 3)):
        for row in range(4):
            index, mask, place = level.patches(row, 8, flash)
            assert index.shape[1] == wide
            assert torch.equal(index.flatten()[place], torch.arange(50))
            assert mask is None or bool(mask.flatten()[place].all())
            own = level.batch_N[index]
            assert bool((own == own[:, :1])[mask if mask is not None else ...].all())  # no patch spans two clouds
