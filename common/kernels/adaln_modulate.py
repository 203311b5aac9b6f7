"""Adaptive layer norm in one pass over memory, and the gated residual that follows a branch.

    adaln_modulate(x, shift, scale) = layer_norm(x) * (1 + scale) + shift      the norm has no weights of its own
    gated_residual(x, y, gate)      = x + gate * y

These are what models call. On CUDA they are the custom ops `less_compute::adaln_modulate` and
`less_compute::gated_residual`, whose forward and backward are the Triton kernels below; everywhere else they are the
plain torch expressions.

Shapes: B samples, N tokens, D width; shift, scale and gate are [B, D], one row for all tokens of a sample.

How the kernels divide the work. Forward: a program a token. Backward: a program takes several consecutive tokens of one
sample and keeps the sums over them that make the gradients of shift, scale and gate; torch adds the programs' sums up,
so there are no atomics and the result does not depend on scheduling.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels.dispatch import tl, triton, use_kernels

# Programs of a backward pass: enough to fill a large GPU several times over, few enough that their sums stay small.
BACKWARD_PROGRAMS = 2048
MOST_TOKENS = 64
_WIDEST = 1 << 14  # a token stays in registers


def adaln_modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = 1e-6) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift.

    On CUDA the arithmetic is float32 whatever the input's dtype, and the result has the dtype that autocast's linear
    layers would cast it to (without autocast: x's). It can then be differentiated once; on CPU any number of times.
    """
    if _use_kernels(x_BND, shift_BD, scale_BD):
        return torch.ops.less_compute.adaln_modulate(x_BND, shift_BD, scale_BD, eps, _result_dtype(x_BND))[0]
    normal_BND = F.layer_norm(x_BND, x_BND.shape[-1:], eps=eps)
    return torch.addcmul(shift_BD[:, None], normal_BND, 1 + scale_BD[:, None])


def gated_residual(x_BND: Tensor, y_BND: Tensor, gate_BD: Tensor) -> Tensor:
    """x + gate * y; on CUDA in float32 arithmetic, with the result in x's dtype."""
    if _use_kernels(x_BND, y_BND, gate_BD):
        return torch.ops.less_compute.gated_residual(x_BND, y_BND, gate_BD)
    return torch.addcmul(x_BND, y_BND, gate_BD[:, None])


def _use_kernels(x: Tensor, *others: Tensor) -> bool:
    return use_kernels(x, *others) and x.shape[-1] <= _WIDEST and x.numel() > 0


def _result_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def reference_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean [B, N], rstd [B, N]) in plain torch; float32 arithmetic (float64 for float64 input)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(x, dim=-1, correction=0)
    rstd = torch.rsqrt(var + eps)
    xhat = (x - mean[..., None]) * rstd[..., None]
    return xhat * (1 + scale[:, None]) + shift[:, None], mean, rstd


def reference_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dshift, dscale) in closed form, the formula that the kernels follow.

    With xhat the normalised token and g = dy * (1 + scale): dshift = sum dy, dscale = sum dy * xhat over the tokens,
    dx = rstd * (g - mean_d(g) - xhat * mean_d(g * xhat)).
    """
    acc = mean.dtype
    xhat = (x.to(acc) - mean[..., None]) * rstd[..., None]
    dy = dy.to(acc)
    g = dy * (1 + scale[:, None])
    dx = rstd[..., None] * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    return dx, dy.sum(1), (dy * xhat).sum(1)


@torch.library.custom_op("less_compute::adaln_modulate", mutates_args=())
def _modulate_op(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    if _use_kernels(x, shift, scale):
        return _launch_modulate(x.contiguous(), shift, scale, eps, dtype)
    y, mean, rstd = reference_modulate(x, shift, scale, eps)
    return y.to(dtype).contiguous(), mean, rstd


@_modulate_op.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape, dtype=dtype), mean, torch.empty_like(mean)


@torch.library.custom_op("less_compute::adaln_modulate_backward", mutates_args=())
def _modulate_backward_op(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if _use_kernels(x, dy, scale):
        return _launch_modulate_backward(dy.contiguous(), x.contiguous(), scale, mean, rstd)
    dx, dshift, dscale = reference_modulate_backward(dy, x, scale, mean, rstd)
    return dx.to(x.dtype).contiguous(), dshift, dscale


@_modulate_backward_op.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row = mean.new_empty(scale.shape)
    return x.new_empty(x.shape), row, torch.empty_like(row)


def _modulate_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, shift, scale, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype
    ctx.mark_non_differentiable(mean, rstd)


def _modulate_backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None, None]:
    x, scale, mean, rstd = ctx.saved_tensors
    dx, dshift, dscale = torch.ops.less_compute.adaln_modulate_backward(dy, x, scale, mean, rstd)
    return dx, dshift.to(ctx.shift_dtype), dscale.to(scale.dtype), None, None


_modulate_op.register_autograd(_modulate_backward, setup_context=_modulate_context)


@torch.library.custom_op("less_compute::gated_residual", mutates_args=())
def _gate_op(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    if _use_kernels(x, y, gate):
        return _launch_gate(x.contiguous(), y.contiguous(), gate)
    acc = torch.promote_types(x.dtype, torch.float32)
    return (x.to(acc) + gate[:, None] * y.to(acc)).to(x.dtype).contiguous()


@_gate_op.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("less_compute::gated_residual_backward", mutates_args=())
def _gate_backward_op(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    if _use_kernels(dout, y, gate):
        return _launch_gate_backward(dout.contiguous(), y.contiguous(), gate)
    acc = torch.promote_types(y.dtype, torch.float32)
    return (gate[:, None] * dout.to(acc)).to(y.dtype).contiguous(), (dout.to(acc) * y.to(acc)).sum(1)


@_gate_backward_op.register_fake
def _(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(gate.shape, dtype=torch.promote_types(y.dtype, torch.float32))


def _gate_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gate = inputs
    ctx.save_for_backward(y, gate)


def _gate_backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, gate = ctx.saved_tensors
    dy, dgate = torch.ops.less_compute.gated_residual_backward(dout, y, gate)
    return dout, dy, dgate.to(gate.dtype)


_gate_op.register_autograd(_gate_backward, setup_context=_gate_context)


def tokens_per_program(batch: int, tokens: int) -> int:
    """Consecutive tokens of a sample that one program of a backward pass takes."""
    return max(1, min(tokens, MOST_TOKENS, -(-batch * tokens // BACKWARD_PROGRAMS)))


def _blocks(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}


def _rows(t_BD: Tensor) -> Tensor:
    """Rows that the kernels can read: their distance is free (slices of one tensor), their elements are adjacent."""
    return t_BD if t_BD.stride(-1) == 1 else t_BD.contiguous()


def _launch_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = x.shape
    shift, scale = _rows(shift), _rows(scale)
    y = torch.empty_like(x, dtype=dtype)
    mean = x.new_empty((batch, tokens), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    with torch.cuda.device_of(x):
        _modulate_kernel[(batch * tokens,)](
            x, shift, scale, y, mean, rstd, tokens, width, shift.stride(0), scale.stride(0), eps, **_blocks(width)
        )
    return y, mean, rstd


def _launch_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = x.shape
    scale = _rows(scale)
    each = tokens_per_program(batch, tokens)
    splits = triton.cdiv(tokens, each)
    dx = torch.empty_like(x)
    sums = x.new_empty((2, batch, splits, width), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _modulate_backward_kernel[(batch * splits,)](
            dy, x, scale, mean, rstd, dx, sums[0], sums[1], tokens, width, scale.stride(0), splits, each,
            **_blocks(width),
        )  # fmt: skip
    dshift, dscale = sums.sum(2).unbind()
    # Outputs of a custom op may not share storage.
    return dx, dshift.clone(), dscale.clone()


def _launch_gate(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    gate = _rows(gate)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _gate_kernel[(batch * tokens,)](x, y, gate, out, tokens, width, gate.stride(0), **_blocks(width))
    return out


def _launch_gate_backward(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, width = y.shape
    gate = _rows(gate)
    each = tokens_per_program(batch, tokens)
    splits = triton.cdiv(tokens, each)
    dy = torch.empty_like(y)
    sums = y.new_empty((batch, splits, width), dtype=torch.float32)
    with torch.cuda.device_of(y):
        _gate_backward_kernel[(batch * splits,)](
            dout, y, gate, dy, sums, tokens, width, gate.stride(0), splits, each, **_blocks(width)
        )
    return dy, sums.sum(1)


# Loads are cast to float32 at once and results to the pointer's type at the store, because Triton's interpreter
# computes wrongly on bfloat16 tiles. Offsets of a token are 64-bit, offsets within a token 32-bit.

if triton is not None:

    @triton.jit
    def _modulate_kernel(
        x_ptr, shift_ptr, scale_ptr, y_ptr, mean_ptr, rstd_ptr,
        tokens, width, shift_stride, scale_stride, eps,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program normalises and modulates one token."""
        row = tl.program_id(0).to(tl.int64)
        sample = row // tokens
        d = tl.arange(0, BLOCK)
        mask = d < width
        x = tl.load(x_ptr + row * width + d, mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + sample * shift_stride + d, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + sample * scale_stride + d, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(x) / width
        centred = tl.where(mask, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred) / width + eps)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
        y = centred * rstd * (1.0 + scale) + shift
        tl.store(y_ptr + row * width + d, y.to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _modulate_backward_kernel(
        dy_ptr, x_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dshift_ptr, dscale_ptr,
        tokens, width, scale_stride, splits, each,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program: dx of `each` tokens, and their sums of dy and dy * xhat."""
        pid = tl.program_id(0).to(tl.int64)
        sample = pid // splits
        first = (pid % splits) * each
        d = tl.arange(0, BLOCK)
        mask = d < width
        gain = 1.0 + tl.load(scale_ptr + sample * scale_stride + d, mask=mask, other=0.0).to(tl.float32)
        dshift = tl.zeros((BLOCK,), tl.float32)
        dscale = tl.zeros((BLOCK,), tl.float32)
        count = tl.minimum(each, tokens - first)
        for i in range(count):
            row = sample * tokens + first + i
            x = tl.load(x_ptr + row * width + d, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + row * width + d, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + row)
            xhat = tl.where(mask, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
            dshift += dy
            dscale += dy * xhat
            g = dy * gain
            dx = rstd * (g - tl.sum(g) / width - xhat * (tl.sum(g * xhat) / width))
            tl.store(dx_ptr + row * width + d, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dshift_ptr + pid * width + d, dshift, mask=mask)
        tl.store(dscale_ptr + pid * width + d, dscale, mask=mask)

    @triton.jit
    def _gate_kernel(x_ptr, y_ptr, gate_ptr, out_ptr, tokens, width, gate_stride, BLOCK: tl.constexpr):
        """One program adds the gated branch to one token."""
        row = tl.program_id(0).to(tl.int64)
        sample = row // tokens
        d = tl.arange(0, BLOCK)
        mask = d < width
        x = tl.load(x_ptr + row * width + d, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * width + d, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + sample * gate_stride + d, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * width + d, (x + gate * y).to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _gate_backward_kernel(
        dout_ptr, y_ptr, gate_ptr, dy_ptr, dgate_ptr,
        tokens, width, gate_stride, splits, each,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program: dy of `each` tokens, and their sum of dout * y."""
        pid = tl.program_id(0).to(tl.int64)
        sample = pid // splits
        first = (pid % splits) * each
        d = tl.arange(0, BLOCK)
        mask = d < width
        gate = tl.load(gate_ptr + sample * gate_stride + d, mask=mask, other=0.0).to(tl.float32)
        dgate = tl.zeros((BLOCK,), tl.float32)
        count = tl.minimum(each, tokens - first)
        for i in range(count):
            row = sample * tokens + first + i
            dout = tl.load(dout_ptr + row * width + d, mask=mask, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + row * width + d, mask=mask, other=0.0).to(tl.float32)
            dgate += dout * y
            tl.store(dy_ptr + row * width + d, (dout * gate).to(dy_ptr.dtype.element_ty), mask=mask)
        tl.store(dgate_ptr + pid * width + d, dgate, mask=mask)
