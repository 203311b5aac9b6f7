"""What the encoder does with places and never with features: orders, neighbours, patches and pooling of voxels.

A `Structure` is made once for a batch and read by every block of every stage. Nothing in it is random: the permutations
of orders that training draws only say which curve a block follows (`shuffled`), since the numbering of pooled voxels is
without effect.

Shape suffixes: N voxels of a stage, O orders, K voxels of a patch, P patches, M voxels of the next stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from scenesplat.serialization import depth_of, encode_all


@dataclass
class Neighbours:
    """Who is next to whom, counted in the order of places in space, so that memory is read nearly in sequence.

    Args:
        order_N: voxels in that order; place_N: where each voxel stands in it.
        pairs: for each place of a kernel (voxels, their neighbours there), both as numbers in that order.
    """

    order_N: Tensor
    place_N: Tensor
    pairs: list[tuple[Tensor, Tensor]]


@dataclass
class Level:
    """The voxels of one stage, cloud after cloud.

    Args:
        grid_N3: whole coordinates; batch_N: number of the cloud; sizes: of the clouds.
        codes_ON: numbers along the curves (`scenesplat.serialization`); depth: their levels.
        rows: which row of `codes_ON` stands first, second, ... (`Structure.shuffled`).
    """

    grid_N3: Tensor
    batch_N: Tensor
    sizes: list[int]
    codes_ON: Tensor
    depth: int
    rows: list[int]
    _kept: dict[object, Any] = field(default_factory=dict, repr=False)

    def order(self, row: int) -> Tensor:
        """Voxels [N] along the curve that stands in `row`."""
        return self._once(("order", self.rows[row]), lambda: self.codes_ON[self.rows[row]].argsort(stable=True))

    def neighbours(self, size: int) -> Neighbours:
        """For a kernel of `size`^3, x outermost; the middle place, everyone with itself, stays empty."""
        return self._once(("neighbours", size), lambda: neighbours_of(self.grid_N3, self.batch_N, size))

    def patches(self, row: int, size: int, flash: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Attention's patches along the curve in `row`.

        Args:
            flash: clouds smaller than a patch form one short patch; else all patches shrink to the smallest cloud.

        Returns:
            voxels [P, K]; True [P, K] where one counts, None where all do; each voxel's own place [N] in [P x K].
        """
        width = size if flash else min(size, *self.sizes)

        def made() -> tuple[Tensor, Tensor | None, Tensor]:
            device, order_N = self.grid_N3.device, self.order(row)
            pad, unpad, ends = padding(self.sizes, width)
            lengths = torch.diff(ends)
            widest = int(lengths.max())
            if int(lengths.min()) == widest:
                index_PK, mask = pad.view(-1, widest), None
                place_N = unpad
            else:  # short patches are filled up with a voxel that does not count
                column = torch.arange(widest)
                mask = column < lengths[:, None]
                index_PK = pad[(ends[:-1, None] + column).clamp(max=len(pad) - 1)]
                patch = torch.bucketize(unpad, ends[1:], right=True)
                place_N = patch * widest + unpad - ends[patch]
                mask = mask.to(device)
            place = torch.empty_like(order_N)
            place[order_N] = place_N.to(device)
            return order_N[index_PK.to(device)], mask, place

        return self._once(("patches", self.rows[row], width), made)

    def pooled(self, stride: int) -> tuple[Level, Tensor]:
        """The next stage, in the order of the first curve, and the pooled voxel [N] of each.

        Where the curves have fewer levels left than the stride takes, nothing is joined (released code).
        """
        levels = (stride - 1).bit_length()
        levels = levels if levels <= self.depth else 0
        codes = self.codes_ON >> 3 * levels
        first, cluster_N = codes[self.rows[0]].unique(return_inverse=True)
        head = torch.empty_like(first).scatter_(0, cluster_N, torch.arange(len(cluster_N), device=first.device))
        batch = self.batch_N[head]
        sizes = torch.bincount(batch, minlength=len(self.sizes)).tolist()
        grid = self.grid_N3[head] >> levels
        return Level(grid, batch, sizes, codes[:, head], self.depth - levels, self.rows), cluster_N

    def _once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


@dataclass
class Structure:
    """All stages of a batch, fine to coarse.

    Args:
        clusters: for each stage but the last the voxel of the next one that each of its voxels belongs to.
    """

    levels: list[Level]
    clusters: list[Tensor]

    @classmethod
    def of(
        cls,
        grid_N3: Tensor,
        offset_B: Tensor,
        orders: Sequence[str],
        strides: Sequence[int],
        depth: int | None = None,
    ) -> Structure:
        """Of voxels with whole coordinates from 0, cloud after cloud.

        Args:
            offset_B: where each cloud ends.
            depth: levels of the curves; None: those that the batch needs (the released code). A fixed one makes a
                cloud's features independent of the others in its batch.

        Raises:
            UserError: the scene has too many voxels along an axis.
        """
        ends = offset_B.tolist()
        sizes = [end - start for start, end in zip([0, *ends], ends)]
        batch_N = torch.repeat_interleave(torch.tensor(sizes)).to(grid_N3.device)
        depth = depth_of(grid_N3) if depth is None else depth
        codes_ON = encode_all(grid_N3, batch_N, depth, orders)
        levels = [Level(grid_N3.long(), batch_N, sizes, codes_ON, depth, list(range(len(orders))))]
        clusters = []
        for stride in strides:
            level, cluster = levels[-1].pooled(stride)
            levels.append(level)
            clusters.append(cluster)
        return cls(levels, clusters)

    def shuffled(self, permutations: Sequence[Tensor]) -> Structure:
        """Other curves first: a permutation for the first stage, then one for each pooling."""
        rows, levels = list(range(len(self.levels[0].codes_ON))), []
        for level, permutation in zip(self.levels, permutations, strict=True):
            rows = [rows[i] for i in permutation.tolist()]
            levels.append(replace(level, rows=rows))
        return Structure(levels, self.clusters)


def neighbours_of(grid_N3: Tensor, batch_N: Tensor, size: int) -> Neighbours:
    """For every place of a kernel of `size`^3: which voxels have a neighbour there, and which one it is.

    A column of the kernel needs one search among the sorted voxels: what follows there along z are its other places.
    """
    radius = size // 2
    if not len(grid_N3):
        empty = batch_N[:0]
        return Neighbours(empty, empty, [(empty, empty)] * size**3)
    low = grid_N3.min(0).values
    spans = (grid_N3.max(0).values - low + 1 + 2 * radius).tolist()
    moved = grid_N3 - low + radius
    key_N = ((batch_N * spans[0] + moved[:, 0]) * spans[1] + moved[:, 1]) * spans[2] + moved[:, 2]
    sorted_N, order_N = key_N.sort(stable=True)
    total = len(sorted_N)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    sides = range(-radius, radius + 1)
    half = size**3 // 2
    number = 0
    for dx in sides:
        for dy in sides:
            if number > half:
                break
            first = (dx * spans[1] + dy) * spans[2] - radius
            at_N = torch.searchsorted(sorted_N, sorted_N + first)
            for step in range(size):
                wanted = sorted_N + (first + step)
                hit = sorted_N[at_N.clamp(max=total - 1)] == wanted
                hit &= at_N < total
                if number < half:
                    rows = hit.nonzero().squeeze(1)
                    found[number] = rows, at_N[rows]
                at_N = at_N + hit.long()
                number += 1
    pairs: list[tuple[Tensor, Tensor]] = []
    for place in range(size**3):
        if place == half:
            pairs.append((order_N[:0], order_N[:0]))
        else:  # the place opposite has the same pairs the other way round
            rows, columns = found[min(place, 2 * half - place)]
            pairs.append((rows, columns) if place < half else (columns, rows))
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(total, device=order_N.device)
    return Neighbours(order_N, place_N, pairs)


def padding(sizes: Sequence[int], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where clouds of these sizes are cut into patches of `width`.

    A cloud that is longer than a patch is filled up to a multiple of it, its last patch with the end of the patch
    before; one that is not is a short patch by itself.

    Returns:
        pad: the voxel at each padded place; unpad [N]: the padded place of each voxel; ends [P + 1]: where patches
        begin, and the end.
    """
    pads, unpads, ends, start, padded = [], [], [0], 0, 0
    for size in sizes:
        length = size if size <= width else -(-size // width) * width
        places = torch.arange(length)
        places[size:] -= width
        pads.append(start + places)
        unpads.append(padded + torch.arange(size))
        ends += [padded + min(end, length) for end in range(width, length + width, width)]
        start, padded = start + size, padded + length
    return torch.cat(pads), torch.cat(unpads), torch.tensor(ends)
