"""GroupNorm followed by SiLU in one pass over memory: y = silu((x - mean_g) / sqrt(var_g + eps) * weight_c + bias_c).

`group_norm_silu` is the function that models call. On CUDA it is the custom op `less_compute::group_norm_silu`, whose
forward and backward are the Triton kernels below; everywhere else it is the plain torch expression, which in training
on CPUs keeps its input alone.

Shapes: B batch, C channels, G groups, N elements of a group. "hw" stands for all spatial positions together.

How the kernels divide the work. A group is a matrix of C/G channels by H*W positions, cut into tiles:
- a group that fits one tile (<= WHOLE_GROUP_LIMIT elements: the inner levels of a UNet) is read once, normalised in
  registers and written once: `_forward_whole`, `_backward_whole`, one program a group;
- a larger group is spread over many programs. The first kernel writes partial sums, the second combines them and
  normalises: `_forward_sums` + `_forward_split`, `_backward_sums` + `_backward_split`.
Weight and bias gradients are per-(sample, channel) sums that torch adds up at the end, so there are no atomics and the
result does not depend on scheduling. Both NCHW and channels-last layouts are read as they are: only the strides differ.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels.dispatch import tl, triton, use_kernels

WHOLE_GROUP_LIMIT = 16384
TILE = 4096
MAX_SPLITS = 16


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """silu(group_norm(x)); x is [B, C, *spatial], weight and bias are [C]; returns x's shape, dtype and memory format.

    On CUDA the arithmetic is float32 whatever the input's dtype, also under autocast, and the result can be
    differentiated once; on CPU it can be differentiated any number of times.
    """
    if _use_kernels(x):
        return torch.ops.less_compute.group_norm_silu(x, num_groups, weight, bias, eps)[0]
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    if not gradients or x.device.type != "cpu" or torch.compiler.is_compiling() or x.dtype not in _KEPT:
        return _plain(x, num_groups, weight, bias, eps)
    return cast(Tensor, _KeepsInput.apply(x, num_groups, weight, bias, eps))


_KEPT = (torch.float32, torch.bfloat16)


def _plain(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.dtype is torch.bfloat16:
        # CPU group norm in bfloat16 is slower than the two casts around the float32 one, and less exact.
        return F.silu(F.group_norm(x.float(), num_groups, weight.float(), bias.float(), eps)).to(x.dtype)
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))


class _KeepsInput(torch.autograd.Function):
    """The plain expression on a CPU, keeping x alone: the norm costs little beside a convolution and is taken again for
    the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.options = num_groups, eps
        return _plain(x, num_groups, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        (dy,), (x, weight, bias), (num_groups, eps) = grads, ctx.saved_tensors, ctx.options
        again, needs = torch.is_grad_enabled(), (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
        given = (x, weight, bias)
        if not again:
            given = tuple(t.detach().requires_grad_(need) for t, need in zip(given, needs))
        asked = [t for t, need in zip(given, needs) if need]
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            y = _plain(given[0], num_groups, given[1], given[2], eps)
            found = iter(torch.autograd.grad(y, asked, dy.to(y.dtype), create_graph=again))
        dx, dweight, dbias = (next(found) if need else None for need in needs)
        return dx, None, dweight, dbias, None


def _use_kernels(x: Tensor) -> bool:
    return use_kernels(x) and x.numel() > 0


def reference_forward(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch: (y like x, mean [B, G], rstd [B, G]); float32 arithmetic (float64 for float64 input)."""
    x_BGN, weight_C, bias_C = _upcast(x, num_groups, weight, bias)
    var_BG, mean_BG = torch.var_mean(x_BGN, dim=-1, correction=0)
    rstd_BG = torch.rsqrt(var_BG + eps)
    xhat = ((x_BGN - mean_BG[..., None]) * rstd_BG[..., None]).reshape(x.shape)
    z = xhat * weight_C + bias_C
    return F.silu(z).to(x.dtype), mean_BG, rstd_BG


def reference_backward(
    dy: Tensor, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, mean_BG: Tensor, rstd_BG: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx like x, [dbias, dweight] as [2, C]) in closed form, the formula that the kernels follow.

    With xhat the normalised input, z = xhat * weight + bias, s = sigmoid(z) and dz = dy * s * (1 + z * (1 - s)):
    dbias = sum dz, dweight = sum dz * xhat,
    dx = rstd * (weight * dz - mean_g(weight * dz) - xhat * mean_g(weight * dz * xhat)).
    """
    x_BGN, weight_C, bias_C = _upcast(x, num_groups, weight, bias)
    xhat_BGN = (x_BGN - mean_BG[..., None]) * rstd_BG[..., None]
    xhat = xhat_BGN.reshape(x.shape)
    z = xhat * weight_C + bias_C
    s = torch.sigmoid(z)
    dz = dy.to(z.dtype) * s * (1 + z * (1 - s))
    dxhat_BGN = (dz * weight_C).reshape_as(xhat_BGN)
    dx_BGN = rstd_BG[..., None] * (
        dxhat_BGN - dxhat_BGN.mean(-1, keepdim=True) - xhat_BGN * (dxhat_BGN * xhat_BGN).mean(-1, keepdim=True)
    )
    dims = [0, *range(2, x.ndim)]
    return dx_BGN.reshape(x.shape).to(x.dtype), torch.stack((dz.sum(dims), (dz * xhat).sum(dims)))


def _upcast(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    acc = torch.promote_types(x.dtype, torch.float32)
    shape_C = (1, -1, *(1 for _ in x.shape[2:]))
    x_BGN = x.to(acc).reshape(x.shape[0], num_groups, -1)
    return x_BGN, weight.to(acc).reshape(shape_C), bias.to(acc).reshape(shape_C)


@torch.library.custom_op("less_compute::group_norm_silu", mutates_args=())
def _op(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x = _dense(x)
    if _use_kernels(x):
        return _launch_forward(x, num_groups, weight, bias, eps)
    y, mean_BG, rstd_BG = reference_forward(x, num_groups, weight, bias, eps)
    return torch.empty_like(x).copy_(y), mean_BG, rstd_BG


@_op.register_fake
def _(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty((x.shape[0], num_groups), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(_dense(x)), stats, torch.empty_like(stats)


@torch.library.custom_op("less_compute::group_norm_silu_backward", mutates_args=())
def _backward_op(
    dy: Tensor, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    x = _dense(x)
    if _use_kernels(x):
        return _launch_backward(dy, x, num_groups, weight, bias, mean, rstd)
    dx, dparams = reference_backward(dy, x, num_groups, weight, bias, mean, rstd)
    return torch.empty_like(x).copy_(dx), dparams


@_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_dense(x)), x.new_empty((2, x.shape[1]), dtype=mean.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, num_groups, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.num_groups = num_groups
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor, None, Tensor, Tensor, None]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dparams = torch.ops.less_compute.group_norm_silu_backward(dy, x, ctx.num_groups, weight, bias, mean, rstd)
    dbias, dweight = dparams.unbind()
    return dx, None, dweight.to(weight.dtype), dbias.to(bias.dtype), None


_op.register_autograd(_backward, setup_context=_setup_context)


def _memory_format(x: Tensor) -> torch.memory_format | None:
    """The layout in which the kernels can read x as it is; None when it has to be copied."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return None


def _dense(x: Tensor) -> Tensor:
    return x.contiguous() if _memory_format(x) is None else x


class Geometry(NamedTuple):
    """How a group of channels x positions is cut; block sizes are powers of two."""

    whole: bool  # one tile holds the group
    block_c: int
    block_hw: int
    c_tiles: int  # tiles along the channels of a group
    splits: int  # programs along the positions
    tiles_per_split: int  # consecutive position tiles of one program
    warps: int


def geometry(channels: int, positions: int, channels_last: bool) -> Geometry:
    """The cut of a group of `channels` x `positions` elements."""
    pow2_c, pow2_hw = triton.next_power_of_2(channels), triton.next_power_of_2(positions)
    if pow2_c * pow2_hw <= WHOLE_GROUP_LIMIT:
        return Geometry(True, pow2_c, pow2_hw, 1, 1, 1, _warps(pow2_c * pow2_hw))
    # The tile is longest along the dimension that is contiguous in memory.
    if channels_last:
        block_c = min(pow2_c, TILE)
        block_hw = min(pow2_hw, TILE // block_c)
    else:
        block_hw = min(pow2_hw, TILE)
        block_c = min(pow2_c, TILE // block_hw)
    c_tiles, hw_tiles = triton.cdiv(channels, block_c), triton.cdiv(positions, block_hw)
    # Every program of the second kernel reads all partial sums of its group: bound their number.
    most_splits = max(1, min(MAX_SPLITS, 512 // pow2_c))
    tiles_per_split = triton.cdiv(hw_tiles, most_splits)
    splits = triton.cdiv(hw_tiles, tiles_per_split)
    return Geometry(False, block_c, block_hw, c_tiles, splits, tiles_per_split, _warps(block_c * block_hw))


def _warps(tile: int) -> int:
    """Sixteen elements a thread: a 16-byte load or two of half precision, with registers to spare in the backward."""
    return max(1, min(16, tile // 512))


class _Sizes(NamedTuple):
    groups: int
    channels: int  # per group
    positions: int
    stride_c: int
    stride_hw: int


def _sizes(x: Tensor, num_groups: int) -> tuple[_Sizes, Geometry]:
    if x.shape[1] % num_groups:
        raise ValueError(f"group_norm_silu: {x.shape[1]} channels cannot be divided into {num_groups} groups")
    positions = x[0, 0].numel()
    channels_last = not x.is_contiguous()
    strides = (1, x.shape[1]) if channels_last else (positions, 1)
    sizes = _Sizes(num_groups, x.shape[1] // num_groups, positions, *strides)
    return sizes, geometry(sizes.channels, positions, channels_last)


def _launch_forward(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    sizes, geo = _sizes(x, num_groups)
    weight, bias = weight.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    groups = x.shape[0] * num_groups
    blocks = {"BLOCK_C": geo.block_c, "BLOCK_HW": geo.block_hw, "num_warps": geo.warps}
    with torch.cuda.device_of(x):
        if geo.whole:
            _forward_whole[(groups,)](x, weight, bias, y, mean, rstd, *sizes, eps, **blocks)
        else:
            parts = geo.c_tiles * geo.splits
            sums = x.new_empty((groups, 3, parts), dtype=torch.float32)
            cut = (geo.c_tiles, geo.splits, geo.tiles_per_split)
            _forward_sums[(groups * parts,)](x, sums, *sizes, *cut, **blocks)
            _forward_split[(groups * parts,)](
                x, weight, bias, sums, y, mean, rstd, *sizes, *cut, eps, PARTS=triton.next_power_of_2(parts), **blocks
            )
    return y, mean, rstd


def _launch_backward(
    dy: Tensor, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    sizes, geo = _sizes(x, num_groups)
    layout = _memory_format(x)
    assert layout is not None  # _dense saw to it
    dy, weight, bias = dy.contiguous(memory_format=layout), weight.contiguous(), bias.contiguous()
    dx = torch.empty_like(x)
    groups = x.shape[0] * num_groups
    sums = x.new_empty((2, x.shape[0], x.shape[1], geo.splits), dtype=torch.float32)  # of dz and dz * xhat
    blocks = {"BLOCK_C": geo.block_c, "BLOCK_HW": geo.block_hw, "num_warps": geo.warps}
    with torch.cuda.device_of(x):
        if geo.whole:
            _backward_whole[(groups,)](dy, x, weight, bias, mean, rstd, sums[0], sums[1], dx, *sizes, **blocks)
        else:
            grid = (groups * geo.c_tiles * geo.splits,)
            cut = (geo.c_tiles, geo.splits, geo.tiles_per_split)
            _backward_sums[grid](dy, x, weight, bias, mean, rstd, sums[0], sums[1], *sizes, *cut, **blocks)
            _backward_split[grid](
                dy, x, weight, bias, mean, rstd, sums[0], sums[1], dx, *sizes, *cut,
                GROUP_C=triton.next_power_of_2(sizes.channels), SPLITS=triton.next_power_of_2(geo.splits), **blocks,
            )  # fmt: skip
    return dx, sums.sum(dim=(1, 3))


# Loads are cast to float32 at once and results to the pointer's type at the store, because Triton's interpreter
# computes wrongly on bfloat16 tiles. Offsets of a tile are 64-bit, offsets within a tile 32-bit.

if triton is not None:

    @triton.jit
    def _sigmoid(z):
        return 1.0 / (1.0 + tl.exp(-z))

    @triton.jit
    def _silu_gradient(z):
        s = _sigmoid(z)
        return s * (1.0 + z * (1.0 - s))

    @triton.jit
    def _program(c_tiles, splits):
        """The (group of the whole batch, channel tile, split) of this program; splits run fastest."""
        pid = tl.program_id(0).to(tl.int64)
        per_group = c_tiles * splits
        rest = pid % per_group
        return pid // per_group, rest // splits, rest % splits

    @triton.jit
    def _group_base(group, groups, channels, positions, stride_c):
        """First element of a group of the whole batch."""
        return (group // groups) * groups * channels * positions + (group % groups) * channels * stride_c

    @triton.jit
    def _forward_whole(
        x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr,
        groups, channels, positions, stride_c, stride_hw, eps,
        BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
    ):  # fmt: skip
        """One program normalises one group."""
        group = tl.program_id(0).to(tl.int64)
        base = _group_base(group, groups, channels, positions, stride_c)
        c = tl.arange(0, BLOCK_C)
        hw = tl.arange(0, BLOCK_HW)
        mask = (c < channels)[:, None] & (hw < positions)[None, :]
        offsets = c[:, None] * stride_c + hw[None, :] * stride_hw
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        count = channels * positions
        mean = tl.sum(x) / count
        centred = tl.where(mask, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred) / count + eps)
        tl.store(mean_ptr + group, mean)
        tl.store(rstd_ptr + group, rstd)
        first_c = (group % groups) * channels
        weight = tl.load(weight_ptr + first_c + c, mask=c < channels, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + first_c + c, mask=c < channels, other=0.0).to(tl.float32)
        z = centred * rstd * weight[:, None] + bias[:, None]
        tl.store(y_ptr + base + offsets, (z * _sigmoid(z)).to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _forward_sums(
        x_ptr, sums_ptr,
        groups, channels, positions, stride_c, stride_hw, c_tiles, splits, tiles_per_split,
        BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
    ):  # fmt: skip
        """Count, mean and sum of squared deviations of this program's part of a group, merged tile by tile (Chan's
        formula, stable where the mean is large beside the spread)."""
        group, c_tile, split = _program(c_tiles, splits)
        c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
        c_mask = c < channels
        base = _group_base(group, groups, channels, positions, stride_c) + c_tile * BLOCK_C * stride_c
        rows = tl.arange(0, BLOCK_C)[:, None] * stride_c
        hw = tl.arange(0, BLOCK_HW)
        rows_here = tl.minimum(BLOCK_C, channels - c_tile * BLOCK_C)
        count = 0.0
        mean = 0.0
        m2 = 0.0
        first = split * tiles_per_split
        tiles = tl.minimum(tiles_per_split, tl.cdiv(positions, BLOCK_HW) - first)
        for i in range(tiles):
            tile = first + i
            here = base + tile * BLOCK_HW * stride_hw
            left = (positions - tile * BLOCK_HW).to(tl.int32)
            mask = c_mask[:, None] & (hw < left)[None, :]
            x = tl.load(x_ptr + here + rows + hw[None, :] * stride_hw, mask=mask, other=0.0).to(tl.float32)
            tile_count = (rows_here * tl.minimum(BLOCK_HW, left)).to(tl.float32)
            tile_mean = tl.sum(x) / tile_count
            centred = tl.where(mask, x - tile_mean, 0.0)
            delta = tile_mean - mean
            total = count + tile_count
            m2 += tl.sum(centred * centred) + delta * delta * (count * tile_count / total)
            mean += delta * (tile_count / total)
            count = total
        parts = c_tiles * splits
        out = sums_ptr + group * 3 * parts + c_tile * splits + split
        tl.store(out, count)
        tl.store(out + parts, mean)
        tl.store(out + 2 * parts, m2)

    @triton.jit
    def _forward_split(
        x_ptr, weight_ptr, bias_ptr, sums_ptr, y_ptr, mean_ptr, rstd_ptr,
        groups, channels, positions, stride_c, stride_hw, c_tiles, splits, tiles_per_split, eps,
        PARTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
    ):  # fmt: skip
        """Combine the partial sums of the group, then normalise this program's part of it."""
        group, c_tile, split = _program(c_tiles, splits)
        parts = c_tiles * splits
        part = tl.arange(0, PARTS)
        sums = sums_ptr + group * 3 * parts + part
        counts = tl.load(sums, mask=part < parts, other=0.0)
        means = tl.load(sums + parts, mask=part < parts, other=0.0)
        m2s = tl.load(sums + 2 * parts, mask=part < parts, other=0.0)
        count = tl.sum(counts)
        mean = tl.sum(counts * means) / count
        deviation = means - mean
        rstd = 1.0 / tl.sqrt(tl.sum(m2s + counts * deviation * deviation) / count + eps)
        if (c_tile == 0) & (split == 0):
            tl.store(mean_ptr + group, mean)
            tl.store(rstd_ptr + group, rstd)

        c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
        c_mask = c < channels
        first_c = (group % groups) * channels
        weight = tl.load(weight_ptr + first_c + c, mask=c_mask, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + first_c + c, mask=c_mask, other=0.0).to(tl.float32)
        scale = weight * rstd
        shift = bias - mean * scale
        base = _group_base(group, groups, channels, positions, stride_c) + c_tile * BLOCK_C * stride_c
        rows = tl.arange(0, BLOCK_C)[:, None] * stride_c
        hw = tl.arange(0, BLOCK_HW)
        first = split * tiles_per_split
        tiles = tl.minimum(tiles_per_split, tl.cdiv(positions, BLOCK_HW) - first)
        for i in range(tiles):
            tile = first + i
            offsets = rows + hw[None, :] * stride_hw
            here = base + tile * BLOCK_HW * stride_hw
            left = (positions - tile * BLOCK_HW).to(tl.int32)
            mask = c_mask[:, None] & (hw < left)[None, :]
            x = tl.load(x_ptr + here + offsets, mask=mask, other=0.0).to(tl.float32)
            z = x * scale[:, None] + shift[:, None]
            tl.store(y_ptr + here + offsets, (z * _sigmoid(z)).to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward_whole(
        dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dz_ptr, dzx_ptr, dx_ptr,
        groups, channels, positions, stride_c, stride_hw,
        BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
    ):  # fmt: skip
        """One program: dx of one group and the sums over positions that make dweight and dbias of its channels."""
        group = tl.program_id(0).to(tl.int64)
        base = _group_base(group, groups, channels, positions, stride_c)
        c = tl.arange(0, BLOCK_C)
        hw = tl.arange(0, BLOCK_HW)
        c_mask = c < channels
        mask = c_mask[:, None] & (hw < positions)[None, :]
        offsets = c[:, None] * stride_c + hw[None, :] * stride_hw
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + group)
        rstd = tl.load(rstd_ptr + group)
        first_c = (group % groups) * channels
        weight = tl.load(weight_ptr + first_c + c, mask=c_mask, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + first_c + c, mask=c_mask, other=0.0).to(tl.float32)
        xhat = (x - mean) * rstd
        dz = dy * _silu_gradient(xhat * weight[:, None] + bias[:, None])  # 0 outside the mask because dy is
        dz_sum = tl.sum(dz, axis=1)
        dzx_sum = tl.sum(dz * xhat, axis=1)
        row = group * channels + c  # [B, C] flattened
        tl.store(dz_ptr + row, dz_sum, mask=c_mask)
        tl.store(dzx_ptr + row, dzx_sum, mask=c_mask)
        count = channels * positions
        mean_dxhat = tl.sum(weight * dz_sum) / count
        mean_dxhat_xhat = tl.sum(weight * dzx_sum) / count
        dx = rstd * (dz * weight[:, None] - mean_dxhat - xhat * mean_dxhat_xhat)
        tl.store(dx_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward_sums(
        dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dz_ptr, dzx_ptr,
        groups, channels, positions, stride_c, stride_hw, c_tiles, splits, tiles_per_split,
        BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
    ):  # fmt: skip
        """Sums of dz and dz * xhat over this program's positions, for each of its channels."""
        group, c_tile, split = _program(c_tiles, splits)
        mean = tl.load(mean_ptr + group)
        rstd = tl.load(rstd_ptr + group)
        c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
        c_mask = c < channels
        first_c = (group % groups) * channels
        weight = tl.load(weight_ptr + first_c + c, mask=c_mask, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + first_c + c, mask=c_mask, other=0.0).to(tl.float32)
        base = _group_base(group, groups, channels, positions, stride_c) + c_tile * BLOCK_C * stride_c
        rows = tl.arange(0, BLOCK_C)[:, None] * stride_c
        hw = tl.arange(0, BLOCK_HW)
        dz_sum = tl.zeros((BLOCK_C,), tl.float32)
        dzx_sum = tl.zeros((BLOCK_C,), tl.float32)
        first = split * tiles_per_split
        tiles = tl.minimum(tiles_per_split, tl.cdiv(positions, BLOCK_HW) - first)
        for i in range(tiles):
            tile = first + i
            offsets = rows + hw[None, :] * stride_hw
            here = base + tile * BLOCK_HW * stride_hw
            left = (positions - tile * BLOCK_HW).to(tl.int32)
            mask = c_mask[:, None] & (hw < left)[None, :]
            x = tl.load(x_ptr + here + offsets, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + here + offsets, mask=mask, other=0.0).to(tl.float32)
            xhat = (x - mean) * rstd
            dz = dy * _silu_gradient(xhat * weight[:, None] + bias[:, None])
            dz_sum += tl.sum(dz, axis=1)
            dzx_sum += tl.sum(dz * xhat, axis=1)
        out = (group * channels + c) * splits + split  # [B, C, splits] flattened
        tl.store(dz_ptr + out, dz_sum, mask=c_mask)
        tl.store(dzx_ptr + out, dzx_sum, mask=c_mask)

    @triton.jit
    def _backward_split(
        dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dz_ptr, dzx_ptr, dx_ptr,
        groups, channels, positions, stride_c, stride_hw, c_tiles, splits, tiles_per_split,
        GROUP_C: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
    ):  # fmt: skip
        """Combine the partial sums of the group, then dx of this program's part of it."""
        group, c_tile, split = _program(c_tiles, splits)
        first_c = (group % groups) * channels
        all_c = tl.arange(0, GROUP_C)
        all_s = tl.arange(0, SPLITS)
        part_mask = (all_c < channels)[:, None] & (all_s < splits)[None, :]
        parts = (group * channels + all_c[:, None]) * splits + all_s[None, :]
        all_weight = tl.load(weight_ptr + first_c + all_c, mask=all_c < channels, other=0.0).to(tl.float32)[:, None]
        count = 1.0 * channels * positions
        mean_dxhat = tl.sum(all_weight * tl.load(dz_ptr + parts, mask=part_mask, other=0.0)) / count
        mean_dxhat_xhat = tl.sum(all_weight * tl.load(dzx_ptr + parts, mask=part_mask, other=0.0)) / count

        mean = tl.load(mean_ptr + group)
        rstd = tl.load(rstd_ptr + group)
        c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
        c_mask = c < channels
        weight = tl.load(weight_ptr + first_c + c, mask=c_mask, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + first_c + c, mask=c_mask, other=0.0).to(tl.float32)
        base = _group_base(group, groups, channels, positions, stride_c) + c_tile * BLOCK_C * stride_c
        rows = tl.arange(0, BLOCK_C)[:, None] * stride_c
        hw = tl.arange(0, BLOCK_HW)
        first = split * tiles_per_split
        tiles = tl.minimum(tiles_per_split, tl.cdiv(positions, BLOCK_HW) - first)
        for i in range(tiles):
            tile = first + i
            offsets = rows + hw[None, :] * stride_hw
            here = base + tile * BLOCK_HW * stride_hw
            left = (positions - tile * BLOCK_HW).to(tl.int32)
            mask = c_mask[:, None] & (hw < left)[None, :]
            x = tl.load(x_ptr + here + offsets, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + here + offsets, mask=mask, other=0.0).to(tl.float32)
            xhat = (x - mean) * rstd
            dz = dy * _silu_gradient(xhat * weight[:, None] + bias[:, None])
            dx = rstd * (dz * weight[:, None] - mean_dxhat - xhat * mean_dxhat_xhat)
            tl.store(dx_ptr + here + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
