"""Mixture-of-experts data movement and expert GEMMs: permute rows, combine rows, multiply groups of rows.

    permute_rows   x_TD -> rows_ND           copies every token to its kept routes, sorted by expert
    grouped_linear rows_ND -> rows_NF        each expert's rows times that expert's weight, one launch for all experts
    combine_rows   rows_ND -> y_TD           weighted sum of each token's routes

Shapes: T tokens, K choices of a token, N kept routes (rows), D and F features, G groups (experts of this device).
`route_N` names the route t * K + k of every row; `row_TK` is the row of every route, -1 where it was dropped. The two
describe one permutation, so forward and backward of both movements are gathers: no atomics, no one-hot matrix, no
padding to a capacity, and results that do not depend on scheduling.

On CUDA the functions are the custom ops `less_compute::moe_*`, whose forward and backward are the Triton kernels below;
elsewhere they are plain torch with the same closed-form gradients.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.kernels.dispatch import INTERPRET, tl, triton, use_kernels
from common.kernels.products import product

COPY_TILE = 1024  # features of a row that a program of the movements handles at a time
TILE_ROWS, TILE_COLUMNS, TILE_INNER = 128, 128, 64  # of a half-precision matrix product
FLOAT_TILES = 64, 64, 32  # of a float32 one, whose operands take twice the shared memory


def permute_rows(x_TD: Tensor, route_N: Tensor, row_TK: Tensor) -> Tensor:
    """rows[n] = x[route[n] // K]; the gradient of a token is the sum over its kept choices, added in their order.

    Args:
        x_TD: float.
        route_N, row_TK: int64, the two directions of one permutation (module docstring).
    """
    if use_kernels(x_TD):
        return torch.ops.less_compute.moe_permute(x_TD, route_N, row_TK)
    return _Permute.apply(x_TD, route_N, row_TK)


def combine_rows(rows_ND: Tensor, weight_TK: Tensor, route_N: Tensor, row_TK: Tensor) -> Tensor:
    """y[t] = sum_k weight[t, k] * rows[row[t, k]], choices added in order; dropped choices add nothing.

    Args:
        rows_ND: float; the result has its dtype.
        weight_TK: float32 combine weights; differentiable, like the rows.
        route_N, row_TK: as in `permute_rows`.
    """
    if use_kernels(rows_ND):
        return torch.ops.less_compute.moe_combine(rows_ND, weight_TK, route_N, row_TK)
    return _Combine.apply(rows_ND, weight_TK, route_N, row_TK)


def grouped_linear(rows_ND: Tensor, weight_GFD: Tensor, bias_GF: Tensor | None, starts_G1: Tensor) -> Tensor:
    """Rows starts[g] <= n < starts[g + 1] become rows @ weight[g].T + bias[g]; [N, F] in the rows' dtype.

    Args:
        rows_ND: float, sorted by group.
        weight_GFD: one weight per group, in the rows' dtype (under autocast both are cast to the autocast dtype).
        bias_GF: or None.
        starts_G1: int64 [G + 1], from 0 to N.
    """
    if torch.is_autocast_enabled(rows_ND.device.type):
        dtype = torch.get_autocast_dtype(rows_ND.device.type)
        rows_ND, weight_GFD = rows_ND.to(dtype), weight_GFD.to(dtype)
    return torch.ops.less_compute.moe_grouped_linear(rows_ND, weight_GFD, bias_GF, starts_G1)


def reference_gather_sum(rows_ND: Tensor, weight_TK: Tensor | None, row_TK: Tensor) -> Tensor:
    """sum_k weight[t, k] * rows[row[t, k]] in plain torch, choices in order; weight None means 1."""
    tokens, choices = row_TK.shape
    acc = torch.promote_types(rows_ND.dtype, torch.float32)
    if rows_ND.shape[0] == 0:
        return rows_ND.new_zeros((tokens, rows_ND.shape[1]))
    out_TD: Tensor | None = None
    for k in range(choices):
        row_T = row_TK[:, k]
        part_TD = rows_ND.index_select(0, row_T.clamp(min=0)).to(acc)
        factor_T = (row_T >= 0).to(acc) if weight_TK is None else weight_TK[:, k].to(acc) * (row_T >= 0)
        part_TD *= factor_T[:, None]
        out_TD = part_TD if out_TD is None else out_TD.add_(part_TD)
    assert out_TD is not None
    return out_TD.to(rows_ND.dtype)


def reference_combine_backward(
    dy_TD: Tensor, rows_ND: Tensor, weight_TK: Tensor, route_N: Tensor
) -> tuple[Tensor, Tensor]:
    """(drows [N, D], dweight [T, K]): drows[n] = weight of the route * dy of its token, dweight = <dy[t], rows[n]>."""
    acc = torch.promote_types(rows_ND.dtype, torch.float32)
    dy_ND = dy_TD.index_select(0, route_N // weight_TK.shape[1]).to(acc)
    dweight_TK = torch.zeros(weight_TK.shape, dtype=acc, device=rows_ND.device)
    dweight_TK.view(-1)[route_N] = torch.linalg.vecdot(dy_ND, rows_ND.to(acc))
    weight_N = weight_TK.reshape(-1).index_select(0, route_N).to(acc)
    return dy_ND.mul_(weight_N[:, None]).to(rows_ND.dtype), dweight_TK.to(weight_TK.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, route_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, route_N // row_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return reference_gather_sum(grads[0], None, row_TK), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weight_TK: Tensor, route_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_ND, weight_TK, route_N)
        return reference_gather_sum(rows_ND, weight_TK, row_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *reference_combine_backward(grads[0], *ctx.saved_tensors), None, None


def reference_grouped_linear(rows_ND: Tensor, weight_GFD: Tensor, bias_GF: Tensor | None, starts_G1: Tensor) -> Tensor:
    """One matrix product per group, in plain torch."""
    out_NF = rows_ND.new_empty((rows_ND.shape[0], weight_GFD.shape[1]))
    starts = starts_G1.tolist()
    for g, (first, last) in enumerate(pairwise(starts)):
        bias_F = None if bias_GF is None else bias_GF[g].to(rows_ND.dtype)
        out_NF[first:last] = product(rows_ND[first:last], weight_GFD[g].T, bias_F)
    return out_NF


def reference_grouped_weight_gradient(dout_NF: Tensor, rows_ND: Tensor, starts_G1: Tensor) -> tuple[Tensor, Tensor]:
    """(dweight [G, F, D] in the rows' dtype, dbias [G, F] in float32 at least); zeros for groups without rows."""
    groups = starts_G1.numel() - 1
    acc = torch.promote_types(rows_ND.dtype, torch.float32)
    dweight_GFD = rows_ND.new_empty((groups, dout_NF.shape[1], rows_ND.shape[1]))
    dbias_GF = torch.empty((groups, dout_NF.shape[1]), dtype=acc, device=rows_ND.device)
    starts = starts_G1.tolist()
    for g, (first, last) in enumerate(pairwise(starts)):
        dweight_GFD[g] = product(dout_NF[first:last].T, rows_ND[first:last])
        torch.sum(dout_NF[first:last].to(acc), dim=0, out=dbias_GF[g])
    return dweight_GFD, dbias_GF


@torch.library.custom_op("less_compute::moe_permute", mutates_args=())
def _permute_op(x_TD: Tensor, route_N: Tensor, row_TK: Tensor) -> Tensor:
    if use_kernels(x_TD):
        return _launch_permute(x_TD.contiguous(), route_N, row_TK.shape[1])
    return x_TD.index_select(0, route_N // row_TK.shape[1])


@_permute_op.register_fake
def _(x_TD: Tensor, route_N: Tensor, row_TK: Tensor) -> Tensor:
    return x_TD.new_empty((route_N.shape[0], x_TD.shape[1]))


@torch.library.custom_op("less_compute::moe_permute_backward", mutates_args=())
def _permute_backward_op(drows_ND: Tensor, row_TK: Tensor) -> Tensor:
    if use_kernels(drows_ND):
        return _launch_gather_sum(drows_ND.contiguous(), None, row_TK)
    return reference_gather_sum(drows_ND, None, row_TK)


@_permute_backward_op.register_fake
def _(drows_ND: Tensor, row_TK: Tensor) -> Tensor:
    return drows_ND.new_empty((row_TK.shape[0], drows_ND.shape[1]))


def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _permute_backward(ctx: Any, drows_ND: Tensor) -> tuple[Tensor, None, None]:
    (row_TK,) = ctx.saved_tensors
    return torch.ops.less_compute.moe_permute_backward(drows_ND, row_TK), None, None


_permute_op.register_autograd(_permute_backward, setup_context=_permute_setup)


@torch.library.custom_op("less_compute::moe_combine", mutates_args=())
def _combine_op(rows_ND: Tensor, weight_TK: Tensor, route_N: Tensor, row_TK: Tensor) -> Tensor:
    if use_kernels(rows_ND):
        return _launch_gather_sum(rows_ND.contiguous(), weight_TK.contiguous(), row_TK)
    return reference_gather_sum(rows_ND, weight_TK, row_TK)


@_combine_op.register_fake
def _(rows_ND: Tensor, weight_TK: Tensor, route_N: Tensor, row_TK: Tensor) -> Tensor:
    return rows_ND.new_empty((row_TK.shape[0], rows_ND.shape[1]))


@torch.library.custom_op("less_compute::moe_combine_backward", mutates_args=())
def _combine_backward_op(dy_TD: Tensor, rows_ND: Tensor, weight_TK: Tensor, route_N: Tensor) -> tuple[Tensor, Tensor]:
    if use_kernels(rows_ND):
        return _launch_combine_backward(dy_TD.contiguous(), rows_ND.contiguous(), weight_TK.contiguous(), route_N)
    return reference_combine_backward(dy_TD, rows_ND, weight_TK, route_N)


@_combine_backward_op.register_fake
def _(dy_TD: Tensor, rows_ND: Tensor, weight_TK: Tensor, route_N: Tensor) -> tuple[Tensor, Tensor]:
    return rows_ND.new_empty(rows_ND.shape), weight_TK.new_empty(weight_TK.shape)


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _combine_backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
    drows_ND, dweight_TK = torch.ops.less_compute.moe_combine_backward(dy_TD, *ctx.saved_tensors)
    return drows_ND, dweight_TK, None, None


_combine_op.register_autograd(_combine_backward, setup_context=_combine_setup)


@torch.library.custom_op("less_compute::moe_grouped_linear", mutates_args=())
def _linear_op(rows_ND: Tensor, weight_GFD: Tensor, bias_GF: Tensor | None, starts_G1: Tensor) -> Tensor:
    if use_kernels(rows_ND):
        return _launch_grouped_linear(rows_ND.contiguous(), weight_GFD, bias_GF, starts_G1)
    return reference_grouped_linear(rows_ND, weight_GFD, bias_GF, starts_G1)


@_linear_op.register_fake
def _(rows_ND: Tensor, weight_GFD: Tensor, bias_GF: Tensor | None, starts_G1: Tensor) -> Tensor:
    return rows_ND.new_empty((rows_ND.shape[0], weight_GFD.shape[1]))


@torch.library.custom_op("less_compute::moe_grouped_linear_backward", mutates_args=())
def _linear_backward_op(
    dout_NF: Tensor, rows_ND: Tensor, weight_GFD: Tensor, starts_G1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if use_kernels(rows_ND):
        drows_ND = _launch_grouped_linear(dout_NF.contiguous(), weight_GFD.transpose(1, 2), None, starts_G1)
        dweight_GFD, dbias_GF = _launch_weight_gradient(dout_NF.contiguous(), rows_ND.contiguous(), starts_G1)
        return drows_ND, dweight_GFD, dbias_GF
    drows_ND = reference_grouped_linear(dout_NF, weight_GFD.transpose(1, 2), None, starts_G1)
    return drows_ND, *reference_grouped_weight_gradient(dout_NF, rows_ND, starts_G1)


@_linear_backward_op.register_fake
def _(dout_NF: Tensor, rows_ND: Tensor, weight_GFD: Tensor, starts_G1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    acc = torch.promote_types(rows_ND.dtype, torch.float32)
    return (
        rows_ND.new_empty(rows_ND.shape),
        rows_ND.new_empty(weight_GFD.shape),
        rows_ND.new_empty(weight_GFD.shape[:2], dtype=acc),
    )


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_ND, weight_GFD, bias_GF, starts_G1 = inputs
    ctx.save_for_backward(rows_ND, weight_GFD, starts_G1)
    ctx.bias_dtype = None if bias_GF is None else bias_GF.dtype


def _linear_backward(ctx: Any, dout_NF: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
    drows_ND, dweight_GFD, dbias_GF = torch.ops.less_compute.moe_grouped_linear_backward(dout_NF, *ctx.saved_tensors)
    dbias = None if ctx.bias_dtype is None else dbias_GF.to(ctx.bias_dtype)
    return drows_ND, dweight_GFD.to(ctx.saved_tensors[1].dtype), dbias, None


_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


class _Tiles(NamedTuple):
    """Rows, columns and inner length of the blocks of a matrix product, and how a program runs it."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def tiles(dtype: torch.dtype) -> _Tiles:
    """The cut of a grouped product of that dtype."""
    if dtype == torch.float32:
        return _Tiles(*FLOAT_TILES, 4, 3)
    return _Tiles(TILE_ROWS, TILE_COLUMNS, TILE_INNER, 8, 3)


def _product_options(cut: _Tiles) -> dict[str, Any]:
    """How a program runs a product; those in float32 follow torch's own switch."""
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return {"PRECISION": precision, "UPCAST": INTERPRET, "num_warps": cut.warps, "num_stages": cut.stages}


def _launch_permute(x_TD: Tensor, route_N: Tensor, choices: int) -> Tensor:
    rows, width = route_N.shape[0], x_TD.shape[1]
    out_ND = x_TD.new_empty((rows, width))
    if rows:
        block = min(COPY_TILE, triton.next_power_of_2(width))
        with torch.cuda.device_of(x_TD):
            _permute_kernel[(rows, triton.cdiv(width, block))](x_TD, route_N, out_ND, width, choices, BLOCK=block)
    return out_ND


def _launch_gather_sum(rows_ND: Tensor, weight_TK: Tensor | None, row_TK: Tensor) -> Tensor:
    (tokens, choices), width = row_TK.shape, rows_ND.shape[1]
    out_TD = rows_ND.new_empty((tokens, width))
    if tokens:
        block = min(COPY_TILE, triton.next_power_of_2(width))
        with torch.cuda.device_of(rows_ND):
            _gather_sum_kernel[(tokens, triton.cdiv(width, block))](
                rows_ND, rows_ND if weight_TK is None else weight_TK, row_TK.contiguous(), out_TD, width,
                CHOICES=choices, WEIGHTED=weight_TK is not None, BLOCK=block,
            )  # fmt: skip
    return out_TD


def _launch_combine_backward(
    dy_TD: Tensor, rows_ND: Tensor, weight_TK: Tensor, route_N: Tensor
) -> tuple[Tensor, Tensor]:
    rows, width = rows_ND.shape
    drows_ND, dweight_TK = torch.empty_like(rows_ND), torch.zeros_like(weight_TK)
    if rows:
        block = min(COPY_TILE, triton.next_power_of_2(width))
        with torch.cuda.device_of(rows_ND):
            _combine_backward_kernel[(rows,)](
                dy_TD, rows_ND, weight_TK, route_N, drows_ND, dweight_TK, width, weight_TK.shape[1], BLOCK=block
            )
    return drows_ND, dweight_TK


def _launch_grouped_linear(rows_ND: Tensor, weight_GFD: Tensor, bias_GF: Tensor | None, starts_G1: Tensor) -> Tensor:
    (rows, inner), (groups, columns, _) = rows_ND.shape, weight_GFD.shape
    out_NF = rows_ND.new_empty((rows, columns))
    if rows == 0:
        return out_NF
    cut = tiles(rows_ND.dtype)
    # Every group ends in at most one partial tile: so many programs are enough, without asking the device for sizes.
    row_tiles, column_tiles = triton.cdiv(rows, cut.rows) + groups, triton.cdiv(columns, cut.columns)
    with torch.cuda.device_of(rows_ND):
        _grouped_linear_kernel[(row_tiles * column_tiles,)](
            rows_ND, weight_GFD, rows_ND if bias_GF is None else bias_GF.contiguous(), starts_G1, out_NF,
            groups, columns, inner, *weight_GFD.stride(), column_tiles,
            HAS_BIAS=bias_GF is not None, GROUPS=triton.next_power_of_2(groups),
            TILE_N=cut.rows, TILE_F=cut.columns, TILE_D=cut.inner, **_product_options(cut),
        )  # fmt: skip
    return out_NF


def _launch_weight_gradient(dout_NF: Tensor, rows_ND: Tensor, starts_G1: Tensor) -> tuple[Tensor, Tensor]:
    groups, columns, inner = starts_G1.numel() - 1, dout_NF.shape[1], rows_ND.shape[1]
    dweight_GFD = rows_ND.new_empty((groups, columns, inner))
    dbias_GF = rows_ND.new_empty((groups, columns), dtype=torch.float32)
    cut = tiles(rows_ND.dtype)
    column_tiles, inner_tiles = triton.cdiv(columns, cut.rows), triton.cdiv(inner, cut.columns)
    with torch.cuda.device_of(rows_ND):
        _weight_gradient_kernel[(column_tiles * inner_tiles, groups)](
            dout_NF, rows_ND, starts_G1, dweight_GFD, dbias_GF, columns, inner, inner_tiles,
            TILE_F=cut.rows, TILE_D=cut.columns, TILE_N=cut.inner, **_product_options(cut),
        )  # fmt: skip
    return dweight_GFD, dbias_GF


# Outside products, loads are cast to float32 at once and results to the pointer's type at the store, because Triton's
# interpreter computes wrongly on bfloat16 tiles; there products cast too (UPCAST). Row offsets are 64-bit.

if triton is not None:

    @triton.jit
    def _permute_kernel(x_ptr, route_ptr, out_ptr, width, choices, BLOCK: tl.constexpr):
        """One program copies a block of one row."""
        row = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        token = tl.load(route_ptr + row) // choices
        x = tl.load(x_ptr + token * width + d, mask=d < width, other=0.0)
        tl.store(out_ptr + row * width + d, x, mask=d < width)

    @triton.jit
    def _gather_sum_kernel(
        rows_ptr, weight_ptr, row_ptr, out_ptr, width,
        CHOICES: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program adds a block of one token's rows, choices in order."""
        token = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(CHOICES):
            row = tl.load(row_ptr + token * CHOICES + k)
            x = tl.load(rows_ptr + row * width + d, mask=(d < width) & (row >= 0), other=0.0).to(tl.float32)
            if WEIGHTED:
                x *= tl.load(weight_ptr + token * CHOICES + k).to(tl.float32)
            total += x
        tl.store(out_ptr + token * width + d, total.to(out_ptr.dtype.element_ty), mask=d < width)

    @triton.jit
    def _combine_backward_kernel(
        dy_ptr, rows_ptr, weight_ptr, route_ptr, drows_ptr, dweight_ptr, width, choices, BLOCK: tl.constexpr
    ):
        """One program a row: its gradient, and that of its weight."""
        row = tl.program_id(0).to(tl.int64)
        route = tl.load(route_ptr + row)
        token = route // choices
        weight = tl.load(weight_ptr + route).to(tl.float32)
        dot = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, width, BLOCK):
            d = first + tl.arange(0, BLOCK)
            mask = d < width
            dy = tl.load(dy_ptr + token * width + d, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(rows_ptr + row * width + d, mask=mask, other=0.0).to(tl.float32)
            dot += dy * x
            tl.store(drows_ptr + row * width + d, (weight * dy).to(drows_ptr.dtype.element_ty), mask=mask)
        tl.store(dweight_ptr + route, tl.sum(dot).to(dweight_ptr.dtype.element_ty))

    @triton.jit
    def _grouped_linear_kernel(
        rows_ptr, weight_ptr, bias_ptr, starts_ptr, out_ptr,
        groups, columns, inner, stride_wg, stride_wf, stride_wd, column_tiles,
        HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr,
        TILE_N: tl.constexpr, TILE_F: tl.constexpr, TILE_D: tl.constexpr,
        PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """One program multiplies one tile of one group's rows with one tile of that group's weight."""
        pid = tl.program_id(0)
        row_tile, column_tile = pid // column_tiles, pid % column_tiles
        g = tl.arange(0, GROUPS)
        start_G = tl.load(starts_ptr + g, mask=g < groups, other=0)
        end_G = tl.load(starts_ptr + g + 1, mask=g < groups, other=0)
        tiles_G = (end_G - start_G + TILE_N - 1) // TILE_N
        last_G = tl.cumsum(tiles_G, 0)
        group = tl.sum(tl.where((last_G <= row_tile) & (g < groups), 1, 0))
        if group < groups:
            mine_G = g == group
            tile = row_tile - tl.sum(tl.where(mine_G, last_G - tiles_G, 0))
            first = tl.sum(tl.where(mine_G, start_G, 0)) + tile * TILE_N
            end = tl.sum(tl.where(mine_G, end_G, 0))
            n = (first + tl.arange(0, TILE_N)).to(tl.int64)
            f = column_tile * TILE_F + tl.arange(0, TILE_F)
            d = tl.arange(0, TILE_D)
            a_ptrs = rows_ptr + n[:, None] * inner + d[None, :]
            b_ptrs = weight_ptr + group.to(tl.int64) * stride_wg + d[:, None] * stride_wd + f[None, :] * stride_wf
            total = tl.zeros((TILE_N, TILE_F), tl.float32)
            for done in range(0, inner, TILE_D):
                left = d < inner - done
                a = tl.load(a_ptrs, mask=(n < end)[:, None] & left[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=left[:, None] & (f < columns)[None, :], other=0.0)
                if UPCAST:
                    a, b = a.to(tl.float32), b.to(tl.float32)
                total = tl.dot(a, b, total, input_precision=PRECISION)
                a_ptrs += TILE_D
                b_ptrs += TILE_D * stride_wd
            if HAS_BIAS:
                bias = tl.load(bias_ptr + group.to(tl.int64) * columns + f, mask=f < columns, other=0.0)
                total += bias.to(tl.float32)[None, :]
            mask = (n < end)[:, None] & (f < columns)[None, :]
            out_ptrs = out_ptr + n[:, None] * columns + f[None, :]
            tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _weight_gradient_kernel(
        dout_ptr, rows_ptr, starts_ptr, dweight_ptr, dbias_ptr, columns, inner, inner_tiles,
        TILE_F: tl.constexpr, TILE_D: tl.constexpr, TILE_N: tl.constexpr,
        PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """One program adds up one tile of one group's weight gradient over that group's rows."""
        pid = tl.program_id(0)
        group = tl.program_id(1).to(tl.int64)
        column_tile, inner_tile = pid // inner_tiles, pid % inner_tiles
        first = tl.load(starts_ptr + group)
        end = tl.load(starts_ptr + group + 1)
        f = column_tile * TILE_F + tl.arange(0, TILE_F)
        d = inner_tile * TILE_D + tl.arange(0, TILE_D)
        n = first + tl.arange(0, TILE_N)
        a_ptrs = dout_ptr + n[None, :] * columns + f[:, None]
        b_ptrs = rows_ptr + n[:, None] * inner + d[None, :]
        total = tl.zeros((TILE_F, TILE_D), tl.float32)
        bias = tl.zeros((TILE_F,), tl.float32)
        for done in range(0, end - first, TILE_N):
            left = n < end - done
            a = tl.load(a_ptrs, mask=left[None, :] & (f < columns)[:, None], other=0.0)
            b = tl.load(b_ptrs, mask=left[:, None] & (d < inner)[None, :], other=0.0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            if inner_tile == 0:
                bias += tl.sum(a.to(tl.float32), axis=1)
            a_ptrs += TILE_N * columns
            b_ptrs += TILE_N * inner
        mask = (f < columns)[:, None] & (d < inner)[None, :]
        out_ptrs = dweight_ptr + (group * columns + f[:, None]) * inner + d[None, :]
        tl.store(out_ptrs, total.to(dweight_ptr.dtype.element_ty), mask=mask)
        if inner_tile == 0:
            tl.store(dbias_ptr + group * columns + f, bias, mask=f < columns)
