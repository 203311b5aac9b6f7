"""Space-filling curves: one whole number a voxel, close voxels mostly with close numbers (section 3.2, Point
Transformer v3).

`z` interleaves the bits of x, y and z; `hilbert` is Skilling's curve; `-trans` swaps x and y first. The Hilbert curve
is walked by a table: what it does with a level depends on the levels above only through one of a few states (a signed
permutation of the axes and a parity), so that four levels are one look-up.

Shape suffixes: N voxels, O orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from common.errors import UserError

ORDERS = ("z", "z-trans", "hilbert", "hilbert-trans")
DEEPEST = 16  # levels: three times as many bits and the number of the cloud fit 63
_STEP = 4  # levels a look-up
# Bits of a 16-bit number moved to every third place, in four halvings.
_SPREAD = ((32, 0x1F00000000FFFF), (16, 0x1F0000FF0000FF), (8, 0x100F00F00F00F00F), (4, 0x10C30C30C30C30C3))
_LAST = (2, 0x1249249249249249)
State = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # (axis, inverted) of x, y, z; parity


def depth_of(grid_N3: Tensor) -> int:
    """Levels that the largest coordinate needs; none where all voxels are at zero.

    Raises:
        UserError: more than 16, or a negative coordinate.
    """
    largest = int(grid_N3.max())
    if largest >= 1 << DEEPEST or int(grid_N3.min()) < 0:
        raise UserError(
            f"voxel coordinates run from {int(grid_N3.min())} to {largest}; expected 0 to {(1 << DEEPEST) - 1}: the "
            "scene is too large for its voxels (a larger grid, or Gaussians far outside of it)"
        )
    return largest.bit_length()


def encode(grid_N3: Tensor, batch_N: Tensor, depth: int, order: str) -> Tensor:
    """Numbers [N] along a curve; the cloud's number stands above bit 3 x depth.

    Raises:
        UserError: an order that is not in `ORDERS`.
    """
    if order not in ORDERS:
        raise UserError(f"order {order!r}: expected one of {', '.join(ORDERS)}")
    x, y, z = grid_N3.long().unbind(1)
    if order.endswith("-trans"):
        x, y = y, x
    code_N = _spread(x) << 2 | _spread(y) << 1 | _spread(z)
    if order.startswith("hilbert"):
        code_N = _hilbert(code_N, depth)
    return batch_N.long() << 3 * depth | code_N


def encode_all(grid_N3: Tensor, batch_N: Tensor, depth: int, orders: Sequence[str]) -> Tensor:
    """[O, N]."""
    return torch.stack([encode(grid_N3, batch_N, depth, order) for order in orders])


def _spread(x: Tensor) -> Tensor:
    """Bit i to bit 3 i."""
    for shift, mask in (*_SPREAD, _LAST):
        x = (x | x << shift) & mask
    return x


def _hilbert(z_N: Tensor, depth: int) -> Tensor:
    """Numbers along Skilling's curve of `depth` levels from those of the z curve."""
    digits, states, starts = _tables()
    levels = -(-depth // _STEP) * _STEP
    # Levels of nothing that come before the first one turn the axes: begin so that they are turned back.
    state_N = torch.full_like(z_N, starts[(depth - levels) % 3])
    digits, states = digits.to(z_N.device), states.to(z_N.device)
    size = 8**_STEP
    code_N = torch.zeros_like(z_N)
    for shift in range(3 * (levels - _STEP), -1, -3 * _STEP):
        place_N = state_N * size + (z_N >> shift & size - 1)
        code_N = code_N << 3 * _STEP | digits[place_N]
        state_N = states[place_N]
    return code_N


@cache
def _tables() -> tuple[Tensor, Tensor, list[int]]:
    """(digits, next states) by state x 8^4 + input, and the states after 0, 1 and 2 empty levels."""
    first: State = ((0, 0), (1, 0), (2, 0), 0)
    known, queue = {first: 0}, [first]
    one: list[list[tuple[int, int]]] = []
    while queue:
        state = queue.pop(0)
        row = []
        for bits in range(8):
            digit, after = _level(state, bits)
            if after not in known:
                known[after] = len(known)
                queue.append(after)
            row.append((digit, known[after]))
        one.append(row)
    empty = [0, one[0][0][1], one[one[0][0][1]][0][1]]
    digits, states = torch.tensor(one).unbind(2)  # [S, 8]
    deep_digits, deep_states = digits, states
    for _ in range(_STEP - 1):
        deep_digits = (deep_digits[..., None] << 3 | digits[deep_states]).flatten(1)
        deep_states = states[deep_states].flatten(1)
    return deep_digits.flatten(), deep_states.flatten(), empty


def _level(state: State, bits: int) -> tuple[int, State]:
    """One level of Skilling's transform ("Programming the Hilbert curve", 2004): its digit, and the state below."""
    *axes, parity = state
    given = (bits >> 2 & 1, bits >> 1 & 1, bits & 1)
    x = [given[axis] ^ inverted for axis, inverted in axes]
    for i in range(3):
        if x[i]:
            axes[0] = (axes[0][0], 1 - axes[0][1])
        else:
            axes[0], axes[i] = axes[i], axes[0]
    digit = 0
    for bit in x:  # Gray code: each bit over all before it, of the levels above too
        parity ^= bit
        digit = digit << 1 | parity
    return digit, (axes[0], axes[1], axes[2], parity)
