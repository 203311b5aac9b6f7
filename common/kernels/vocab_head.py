"""Projection on a vocabulary, cross-entropy, arg-max and Gumbel-max sample in one pass over the vocabulary's tiles.

    logits = hidden @ table.T + bias          never in memory as a whole: of all rows, only a few tiles at a time
    loss   = logsumexp(logits) - logits[target]
    sample = argmax(logits / temperature - log(-log(u)))      u uniform: sampled from softmax(logits / temperature)

`vocab_head` is the function that models call. On CUDA it is the custom op `less_compute::vocab_head` on the Triton
kernels below, elsewhere the same op in plain torch over chunks of rows. The uniform numbers are either given, one a
logit, and then enter as in ELECTRA's official code, or are made on the spot from one 64-bit seed a row by an integer
hash of (seed, vocabulary id), the same on every device, so that the noise of M x V logits is never stored either.

Shapes: M rows (masked tokens), E width of the table, V vocabulary, S splits of the vocabulary.

How the kernels divide the work. Forward: a program takes a block of rows and a share of the vocabulary, walks through
its tiles, and keeps per row the running maximum, the sum of exponentials, the target's logit and the best noisy logit;
torch merges the shares. Backward: a kernel writes the gradient of the logits of one chunk of rows, from tiles of logits
that are computed again, and two matrix products per chunk make the gradients of `hidden` and `table`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.kernels.dispatch import INTERPRET, tl, triton, use_kernels
from common.kernels.products import product

OFFICIAL_EPSILON = 1e-9  # inside both logarithms of the official sampling code
DISALLOWED = 1000.0  # what the official code takes off the logit of an id that must not be sampled
CHUNK = 1 << 20  # logits that are in memory at a time on CPUs: a few megabytes, which stay in the cache
GRADIENT_CHUNK = 1 << 25  # and, as gradients in half precision, on GPUs
PROGRAMS = 528  # of the forward kernel, enough for four on each multiprocessor of a large GPU
# Two rounds of a multiply-xorshift hash; the multipliers are those of MurmurHash3's finaliser and 2**32 / golden ratio.
_STRIDE, _MULTIPLY_1, _MULTIPLY_2 = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35


class VocabHead(NamedTuple):
    """What `vocab_head` returns, each of length M."""

    loss_M: Tensor  # -log softmax(logits)[target], float32
    sampled_M: Tensor | None  # ids, int64
    argmax_M: Tensor  # ids, int64


def vocab_head(
    hidden_ME: Tensor,
    table_VE: Tensor,
    bias_V: Tensor,
    targets_M: Tensor,
    seeds_M: Tensor | None = None,
    uniform_MV: Tensor | None = None,
    temperature: float = 1.0,
    disallow_target: bool = False,
) -> VocabHead:
    """Per-row cross-entropy, arg-max and, where seeds or uniform numbers are given, a sample of the softmax.

    The loss can be differentiated once with respect to hidden, table and bias; ids carry no gradient. Logits are
    accumulated, and noise added, in float32; under CUDA autocast the product's inputs are rounded to autocast's dtype.

    Args:
        targets_M: int64 ids; entries outside the vocabulary are not allowed.
        seeds_M: int64, one a row; a row's sample is a function of its seed and its logits.
        uniform_MV: uniform numbers in [0, 1) instead of seeds; noise is then -log(-log(u + 1e-9) + 1e-9).
        temperature: of the sample; loss and arg-max are those of the raw logits.
        disallow_target: never sample the target.

    Raises:
        ValueError: shapes that do not fit, both seeds and uniform numbers, or a temperature that is not positive.
    """
    if seeds_M is not None and uniform_MV is not None:
        raise ValueError("vocab_head takes seeds or uniform numbers, not both")
    if not temperature > 0:
        raise ValueError(f"vocab_head: temperature {temperature} must be positive")
    rows, (vocabulary, width) = len(hidden_ME), table_VE.shape
    if hidden_ME.shape != (rows, width) or bias_V.shape != (vocabulary,) or targets_M.shape != (rows,):
        raise ValueError(
            f"vocab_head: hidden {list(hidden_ME.shape)}, table {list(table_VE.shape)}, bias {list(bias_V.shape)} and "
            f"targets {list(targets_M.shape)} do not fit as [M, E], [V, E], [V], [M]"
        )
    dtype = hidden_ME.dtype
    if hidden_ME.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    loss_M, sampled_M, argmax_M, _ = torch.ops.less_compute.vocab_head(
        hidden_ME, table_VE, bias_V, targets_M, seeds_M, uniform_MV, temperature, disallow_target, dtype
    )
    sampling = seeds_M is not None or uniform_MV is not None
    return VocabHead(loss_M, sampled_M if sampling else None, argmax_M)


def hashed_uniform(seeds_M: Tensor, vocabulary: int) -> Tensor:
    """The uniform numbers in (0, 1) that seeds stand for, float32 [M, vocabulary]; 23 random bits each."""
    ids_V = torch.arange(vocabulary, dtype=torch.int32, device=seeds_M.device)
    low_M1 = _signed(seeds_M & 0xFFFFFFFF)[:, None]
    high_M1 = _signed((seeds_M >> 32) & 0xFFFFFFFF)[:, None]
    x = ids_V.mul_(_wrapped(_STRIDE)) + low_M1
    _xor_shift(x, 16).mul_(_wrapped(_MULTIPLY_1)).add_(high_M1)
    _xor_shift(x, 13).mul_(_wrapped(_MULTIPLY_2))
    _xor_shift(x, 16)
    return (x >> 9).bitwise_and_(0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def _wrapped(value: int) -> int:
    """An unsigned 32-bit number as the signed one with the same bits."""
    return value - (1 << 32) if value >= 1 << 31 else value


def _signed(value: Tensor) -> Tensor:
    return torch.where(value >= 1 << 31, value - (1 << 32), value).int()


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    """x ^= x >> bits, the shift bringing in zeros; in place."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def reference_forward(
    hidden: Tensor,
    table: Tensor,
    bias: Tensor,
    targets: Tensor,
    seeds: Tensor | None,
    uniform: Tensor | None,
    temperature: float,
    disallow_target: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, sampled ids, arg-max ids, logsumexp), each [M], in plain torch over chunks of rows."""
    acc = torch.promote_types(hidden.dtype, torch.float32)
    hidden, table, bias = hidden.to(acc), table.to(acc), bias.to(acc)
    rows, vocabulary = len(hidden), len(table)
    lse = hidden.new_empty(rows)
    target_logit = torch.empty_like(lse)
    sampled = targets.new_zeros(rows)
    top = torch.empty_like(sampled)
    for part in _chunks(rows, vocabulary, CHUNK):
        logits = product(hidden[part], table.t(), bias)
        lse[part] = torch.logsumexp(logits, dim=1)
        target_logit[part] = logits.gather(1, targets[part, None])[:, 0]
        top[part] = _first_largest(logits)
        if seeds is None and uniform is None:
            continue
        if seeds is not None:
            noise = hashed_uniform(seeds[part], vocabulary).log_().neg_()
        else:
            assert uniform is not None
            noise = (uniform[part].float() + OFFICIAL_EPSILON).log_().neg_().add_(OFFICIAL_EPSILON)
        noise = noise.log_()
        scores = logits.div_(temperature) if temperature != 1 else logits
        if disallow_target:
            scores.scatter_add_(1, targets[part, None], scores.new_full((part.stop - part.start, 1), -DISALLOWED))
        sampled[part] = _first_largest(scores.sub_(noise))
    return (lse - target_logit), sampled, top, lse


def reference_backward(
    dloss: Tensor, hidden: Tensor, table: Tensor, bias: Tensor, targets: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dtable, dbias) from dlogits = (softmax(logits) - onehot(target)) * dloss, chunk by chunk."""
    acc = lse.dtype
    hidden, table, bias = hidden.to(acc), table.to(acc), bias.to(acc)
    dhidden, dtable, dbias = torch.empty_like(hidden), torch.zeros_like(table), torch.zeros_like(bias)
    for part in _chunks(len(hidden), len(table), CHUNK):
        dlogits = product(hidden[part], table.t(), bias).sub_(lse[part, None]).exp_()
        dlogits.scatter_add_(1, targets[part, None], dlogits.new_full((part.stop - part.start, 1), -1.0))
        dlogits.mul_(dloss[part, None])
        dhidden[part] = product(dlogits, table)
        dtable.add_(product(hidden[part].t(), dlogits).t())
        dbias.add_(dlogits.sum(0))
    return dhidden, dtable, dbias


def _first_largest(x: Tensor) -> Tensor:
    """Index of each row's first largest value; on CPUs `argmax` takes several times as long, it is not vectorised."""
    count = x.shape[1]
    from_the_end = torch.arange(count, 0, -1, dtype=torch.int32, device=x.device)
    found = torch.where(x == x.amax(1, keepdim=True), from_the_end, 0).amax(1)
    return (count - found).clamp_(max=count - 1).long()  # a row of NaN equals nothing


def _chunks(rows: int, vocabulary: int, elements: int) -> list[slice]:
    """Cuts of the rows such that a cut has about `elements` logits."""
    size = max(1, elements // vocabulary)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def _use_kernels(hidden: Tensor, table: Tensor) -> bool:
    return use_kernels(hidden, table) and hidden.numel() > 0


@torch.library.custom_op("less_compute::vocab_head", mutates_args=())
def _op(
    hidden: Tensor,
    table: Tensor,
    bias: Tensor,
    targets: Tensor,
    seeds: Tensor | None,
    uniform: Tensor | None,
    temperature: float,
    disallow_target: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forward = _launch_forward if _use_kernels(hidden, table) else reference_forward
    inputs = hidden.to(dtype), table.to(dtype), bias, targets
    return forward(*inputs, seeds, uniform, temperature, disallow_target)


@_op.register_fake
def _(
    hidden: Tensor,
    table: Tensor,
    bias: Tensor,
    targets: Tensor,
    seeds: Tensor | None,
    uniform: Tensor | None,
    temperature: float,
    disallow_target: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty(len(hidden), dtype=torch.promote_types(dtype, torch.float32))
    return loss, torch.empty_like(targets), torch.empty_like(targets), torch.empty_like(loss)


@torch.library.custom_op("less_compute::vocab_head_backward", mutates_args=())
def _backward_op(
    dloss: Tensor, hidden: Tensor, table: Tensor, bias: Tensor, targets: Tensor, lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    backward = _launch_backward if _use_kernels(hidden, table) else reference_backward
    dhidden, dtable, dbias = backward(dloss, hidden.to(dtype), table.to(dtype), bias, targets, lse)
    return dhidden.to(hidden.dtype), dtable.to(table.dtype), dbias.to(bias.dtype)


@_backward_op.register_fake
def _(
    dloss: Tensor, hidden: Tensor, table: Tensor, bias: Tensor, targets: Tensor, lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (hidden, table, bias))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, table, bias, targets, _, _, _, _, dtype = inputs
    _, sampled, top, lse = output
    ctx.save_for_backward(hidden, table, bias, targets, lse)
    ctx.dtype = dtype
    ctx.mark_non_differentiable(sampled, top, lse)


def _backward(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = torch.ops.less_compute.vocab_head_backward(dloss, *ctx.saved_tensors, ctx.dtype)
    return (*grads, *(None for _ in range(6)))


_op.register_autograd(_backward, setup_context=_setup_context)


class Blocks(NamedTuple):
    """Tile of rows x vocabulary x width of one program; powers of two, at least 16 for tensor cores."""

    rows: int
    vocabulary: int
    width: int
    warps: int
    stages: int


def blocks(rows: int, width: int, dtype: torch.dtype) -> Blocks:
    """The tile sizes of both kernels."""
    widest = 32 if dtype is torch.float32 else 64
    block_m = 64 if rows > 32 else max(16, triton.next_power_of_2(rows))
    return Blocks(block_m, 128, max(16, min(widest, triton.next_power_of_2(width))), 8 if block_m == 64 else 4, 3)


def _constants(rows: int, width: int, dtype: torch.dtype) -> tuple[Blocks, dict[str, Any]]:
    tile = blocks(rows, width, dtype)
    return tile, {
        "WIDTH": width,
        "BLOCK_M": tile.rows,
        "BLOCK_V": tile.vocabulary,
        "BLOCK_E": tile.width,
        "UPCAST": INTERPRET,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _launch_forward(
    hidden: Tensor,
    table: Tensor,
    bias: Tensor,
    targets: Tensor,
    seeds: Tensor | None,
    uniform: Tensor | None,
    temperature: float,
    disallow_target: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (rows, width), vocabulary = hidden.shape, len(table)
    tile, constants = _constants(rows, width, hidden.dtype)
    row_blocks, tiles = triton.cdiv(rows, tile.rows), triton.cdiv(vocabulary, tile.vocabulary)
    tiles_per_split = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // row_blocks)))
    splits = triton.cdiv(tiles, tiles_per_split)
    # Per row and split: maximum, sum of exponentials, target's logit (0 if elsewhere), best noisy logit; two ids.
    stats = hidden.new_empty((4, rows, splits), dtype=torch.float32)
    ids = hidden.new_empty((2, rows, splits), dtype=torch.int32)
    with torch.cuda.device_of(hidden):
        _forward_kernel[(row_blocks, splits)](
            hidden.contiguous(), table.contiguous(), bias.contiguous(), targets.contiguous(),
            targets if seeds is None else seeds.contiguous(), stats if uniform is None else uniform.contiguous(),
            stats, ids, rows, vocabulary, rows * splits, 1.0 / temperature, tiles_per_split, splits,
            SAMPLE=1 if seeds is not None else 2 if uniform is not None else 0, DISALLOW=disallow_target, **constants,
        )  # fmt: skip
    peak, total, target_logit, best = stats.unbind()
    lse = torch.logsumexp(peak + total.log(), dim=1)
    sampled = ids[0].gather(1, best.argmax(1, keepdim=True))[:, 0].long()
    top = ids[1].gather(1, peak.argmax(1, keepdim=True))[:, 0].long()
    return lse - target_logit.sum(1), sampled, top, lse


def _launch_backward(
    dloss: Tensor, hidden: Tensor, table: Tensor, bias: Tensor, targets: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, width), vocabulary = hidden.shape, len(table)
    tile, constants = _constants(rows, width, hidden.dtype)
    hidden, table, bias = hidden.contiguous(), table.contiguous(), bias.contiguous()
    dloss, targets = dloss.float().contiguous(), targets.contiguous()
    dhidden = torch.empty_like(hidden)
    dtable = torch.zeros_like(table, dtype=torch.float32)
    dbias = torch.zeros_like(bias, dtype=torch.float32)
    cuts = _chunks(rows, vocabulary, GRADIENT_CHUNK)
    buffer = hidden.new_empty((cuts[0].stop, vocabulary))
    for part in cuts:
        dlogits = buffer[: part.stop - part.start]
        with torch.cuda.device_of(hidden):
            _gradient_kernel[(triton.cdiv(len(dlogits), tile.rows), triton.cdiv(vocabulary, tile.vocabulary))](
                hidden[part], table, bias, targets[part], lse[part], dloss[part], dlogits,
                len(dlogits), vocabulary, **constants,
            )  # fmt: skip
        torch.mm(dlogits, table, out=dhidden[part])
        _add_product(dtable, dlogits.t(), hidden[part])
        dbias += dlogits.sum(0, dtype=torch.float32)
    return dhidden, dtable, dbias


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with the sum in float32 throughout."""
    if a.dtype is torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.float(), b.float())


# Triton's interpreter computes wrongly on bfloat16 tiles: UPCAST makes them float32 there. Row offsets are 64-bit.

if triton is not None:

    @triton.jit
    def _logits(
        hidden_ptr, table_ptr, bias_ptr, row, row_mask, ids, id_mask,
        WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
        UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """A tile of logits in float32; columns outside the vocabulary hold -inf."""
        logits = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for first in range(0, WIDTH, BLOCK_E):
            e = first + tl.arange(0, BLOCK_E)
            e_mask = (e < WIDTH)[None, :]
            here = hidden_ptr + row[:, None] * WIDTH + e[None, :]
            hidden = tl.load(here, mask=row_mask[:, None] & e_mask, other=0.0)
            there = table_ptr + ids.to(tl.int64)[:, None] * WIDTH + e[None, :]
            table = tl.load(there, mask=id_mask[:, None] & e_mask, other=0.0)
            if UPCAST:
                hidden = hidden.to(tl.float32)
                table = table.to(tl.float32)
            logits = tl.dot(hidden, tl.trans(table), logits, input_precision=PRECISION)
        bias = tl.load(bias_ptr + ids, mask=id_mask, other=0.0).to(tl.float32)
        return tl.where(id_mask[None, :], logits + bias[None, :], float("-inf"))

    @triton.jit
    def _hashed_uniform(low, high, ids):
        """`hashed_uniform` for one tile: rows' seed halves and ids as uint32."""
        x = ids[None, :] * 0x9E3779B1 + low[:, None]
        x = (x ^ (x >> 16)) * 0x85EBCA6B + high[:, None]
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        x = x ^ (x >> 16)
        return ((x >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07

    @triton.jit
    def _forward_kernel(
        hidden_ptr, table_ptr, bias_ptr, target_ptr, seed_ptr, uniform_ptr, stats_ptr, ids_ptr,
        rows, vocabulary, plane, inverse_temperature, tiles_per_split, splits,
        SAMPLE: tl.constexpr, DISALLOW: tl.constexpr,
        WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
        UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """One program: statistics of a block of rows over its share of the vocabulary."""
        row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        split = tl.program_id(1)
        row_mask = row < rows
        target = tl.load(target_ptr + row, mask=row_mask, other=-1).to(tl.int32)
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        target_logit = tl.zeros((BLOCK_M,), tl.float32)
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        best_id = tl.zeros((BLOCK_M,), tl.int32)
        peak_id = tl.zeros((BLOCK_M,), tl.int32)
        if SAMPLE == 1:
            seed = tl.load(seed_ptr + row, mask=row_mask, other=0)
            low = seed.to(tl.uint32)
            high = (seed >> 32).to(tl.uint32)
        start = split * tiles_per_split
        stop = tl.minimum(start + tiles_per_split, tl.cdiv(vocabulary, BLOCK_V))
        for tile in range(start, stop):
            ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            id_mask = ids < vocabulary
            logits = _logits(
                hidden_ptr, table_ptr, bias_ptr, row, row_mask, ids, id_mask,
                WIDTH, BLOCK_M, BLOCK_V, BLOCK_E, UPCAST, PRECISION,
            )  # fmt: skip
            is_target = ids[None, :] == target[:, None]
            target_logit += tl.sum(tl.where(is_target, logits, 0.0), axis=1)
            tile_peak, tile_id = tl.max(logits, axis=1, return_indices=True)
            new_peak = tl.maximum(peak, tile_peak)
            peak_id = tl.where(tile_peak > peak, tile * BLOCK_V + tile_id, peak_id)
            total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(logits - new_peak[:, None]), axis=1)
            peak = new_peak
            if SAMPLE > 0:
                if SAMPLE == 1:
                    race = -tl.log(_hashed_uniform(low, high, ids.to(tl.uint32)))
                else:
                    here = uniform_ptr + row[:, None] * vocabulary + ids[None, :]
                    u = tl.load(here, mask=row_mask[:, None] & id_mask[None, :], other=0.5).to(tl.float32)
                    race = -tl.log(u + 1e-9) + 1e-9
                score = logits * inverse_temperature - tl.log(race)
                if DISALLOW:
                    score = tl.where(is_target, score - 1000.0, score)
                tile_best, tile_best_id = tl.max(score, axis=1, return_indices=True)
                best_id = tl.where(tile_best > best, tile * BLOCK_V + tile_best_id, best_id)
                best = tl.maximum(best, tile_best)
        out = row * splits + split
        tl.store(stats_ptr + out, peak, mask=row_mask)
        tl.store(stats_ptr + plane + out, total, mask=row_mask)
        tl.store(stats_ptr + 2 * plane + out, target_logit, mask=row_mask)
        tl.store(stats_ptr + 3 * plane + out, best, mask=row_mask)
        tl.store(ids_ptr + out, best_id, mask=row_mask)
        tl.store(ids_ptr + plane + out, peak_id, mask=row_mask)

    @triton.jit
    def _gradient_kernel(
        hidden_ptr, table_ptr, bias_ptr, target_ptr, lse_ptr, dloss_ptr, dlogits_ptr, rows, vocabulary,
        WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
        UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """One program: a tile of (softmax - onehot(target)) * dloss."""
        row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        ids = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        row_mask = row < rows
        id_mask = ids < vocabulary
        logits = _logits(
            hidden_ptr, table_ptr, bias_ptr, row, row_mask, ids, id_mask,
            WIDTH, BLOCK_M, BLOCK_V, BLOCK_E, UPCAST, PRECISION,
        )  # fmt: skip
        target = tl.load(target_ptr + row, mask=row_mask, other=-1).to(tl.int32)
        lse = tl.load(lse_ptr + row, mask=row_mask, other=0.0)
        dloss = tl.load(dloss_ptr + row, mask=row_mask, other=0.0)
        probability = tl.exp(logits - lse[:, None])
        dlogits = tl.where(ids[None, :] == target[:, None], probability - 1.0, probability) * dloss[:, None]
        here = dlogits_ptr + row[:, None] * vocabulary + ids[None, :]
        tl.store(here, dlogits.to(dlogits_ptr.dtype.element_ty), mask=row_mask[:, None] & id_mask[None, :])
