"""Scaled dot-product attention in four equal forms: softmax(q k^T * scale + mask) v.

    fused           torch's own function in the dtype of the inputs
    fused_float32   the same in float32
    written_out     two matrix products with the softmax between them
    parts           written out a part of the queries at a time; a backward pass computes each part again

Which is fastest on a CPU depends on the CPU: without AMX the backward pass of torch's fused bfloat16 kernel is many
times slower than in float32, with AMX the fused kernel is the fastest of all. So the form is measured once for each
class of shapes (sizes rounded up to powers of two), on one core, in some tens of milliseconds, in some hundreds where a
pass takes as long, and the run's folder keeps it (`common.choices`). Forms round differently, hence a run goes on with
the forms that it began with. Not measured:

- on GPUs, where torch's function is the fastest;
- float32, where the fused kernel is as fast as any but for a few tokens;
- small shapes, where the forms are within noise: a default, so that such results are equal on all machines;
- compiled code, which takes the default;
- what `fix_form` or the environment's REPRO_ATTENTION names: a form, or `unmeasured` for the default at every shape.

Memory excludes forms at large shapes, see `_candidates`.

Shape suffixes: B batch, A heads, N queries, L keys, K width of a head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from functools import partial
from itertools import repeat
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.kernels.forms import UNMEASURED, Forms, measured_apart

Form = Literal["fused", "fused_float32", "written_out", "parts"]
FORMS: tuple[Form, ...] = get_args(Form)
ENVIRONMENT = "REPRO_ATTENTION"

MARGIN = 0.15  # a form must win by so much over the default, so that equal machines choose alike
# Scores a head and sample, 512 x 512, that may be written out for a backward pass, which keeps their weights: more of
# them would take most of a block's memory, which is what the fused kernel is there to avoid.
_KEPT_SCORES = 1 << 18
_SMALL_SCORES = 1 << 18  # scores of all heads and samples up to which nothing is measured
_PART_SCORES = 1 << 21  # of a part: 4 MiB in bfloat16
_MEASURED_SCORES, _MEASURED_QUERIES = 1 << 21, 1024  # beyond both, fewer samples, heads and queries are measured
_LAGS = (math.inf, 2.0, 1.5, 1.5)  # a form has another turn unless it was this many times slower than the fastest
_HALF = (torch.bfloat16, torch.float16)

_forms = Forms("attention form", ENVIRONMENT, FORMS)
use_choices, fix_form, fixed_form = _forms.use_choices, _forms.fix, _forms.hold


def attention(
    q_BANK: Tensor,
    k_BALK: Tensor,
    v_BALK: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    form: Form | None = None,
) -> Tensor:
    """softmax(q k^T * scale + mask) v, [B, A, N, K] in the dtype of q, or autocast's.

    Args:
        k_BALK, v_BALK: of any floating dtype; stored keys and values may come from outside of autocast.
        mask: broadcasts to [B, A, N, L]; True where a key counts, or numbers that are added to the scores (-inf: does
            not count). Every query needs a key that counts.
        scale: K^-0.5 unless given.
        dropout: probability that a weight is set to zero.
        form: this one, where the caller knows better than a measurement of a single shape could.
    """
    device = q_BANK.device.type
    dtype = q_BANK.dtype
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device)
    q, k, v = q_BANK.to(dtype), k_BALK.to(dtype), v_BALK.to(dtype)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    form = form or _form(q, k, v, mask, dropout)
    if not autocast:
        return _compute(form, q, k, v, mask, scale, dropout, _PART_SCORES)
    with torch.autocast(device, enabled=False):  # it would undo float32
        return _compute(form, q, k, v, mask, scale, dropout, _PART_SCORES)


def _compute(
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    part_scores: int,
) -> Tensor:
    wide = torch.float32 if form == "fused_float32" and q.dtype in _HALF else q.dtype
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(wide)
    if form == "written_out":
        return _written_out(q, k, v, mask, scale, dropout)
    if form == "parts":
        return _in_parts(q, k, v, mask, scale, dropout, part_scores)
    out_BANK = F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), mask, dropout, scale=scale)
    return out_BANK.to(q.dtype)


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    scores_BANL = (q * scale) @ k.transpose(2, 3)
    if mask is not None and mask.dtype is torch.bool:
        scores_BANL = scores_BANL.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        scores_BANL = scores_BANL.add_(mask)
    weights_BANL = scores_BANL.softmax(3, dtype=torch.float32 if _widens(k) else None).to(v.dtype)
    return F.dropout(weights_BANL, dropout) @ v if dropout else weights_BANL @ v


def _widens(k_BALK: Tensor) -> bool:
    """Whether written-out weights are first stored in float32: rows that do not fill whole vectors are slow in half
    precision, and the softmax computes in float32 either way."""
    return k_BALK.dtype in _HALF and k_BALK.shape[2] % 32 != 0


def _in_parts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float, part_scores: int
) -> Tensor:
    batch, heads, queries, _ = q.shape
    samples = max(1, part_scores // max(1, heads * queries * k.shape[2]))
    rows = queries if samples > 1 else max(1, min(queries, part_scores // max(1, heads * k.shape[2])))
    k, v = k.contiguous(), v.contiguous()  # lest every part's product makes a copy of its own
    attend: Any = _written_out
    if _needs_gradients(q, k, v, mask):
        attend = partial(checkpoint, _written_out, use_reentrant=False, preserve_rng_state=dropout > 0)
    if mask is not None:
        mask = mask.expand(batch, mask.shape[1] if mask.dim() == 4 else heads, queries, -1)

    def split(x: Tensor | None, size: int, dim: int) -> Iterable[Tensor | None]:
        return repeat(None) if x is None else x.split(size, dim)

    outs_bANK = []
    for q_bANK, k_bALK, v_bALK, mask_b in zip(*(split(x, samples, 0) for x in (q, k, v, mask))):
        parts = zip(split(q_bANK, rows, 2), split(mask_b, rows, 2))
        outs_bANK.append(
            torch.cat([attend(q_bAnK, k_bALK, v_bALK, mask_n, scale, dropout) for q_bAnK, mask_n in parts], dim=2)
        )
    return torch.cat(outs_bANK)


def _needs_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _form(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Form:
    """The form of this class of shapes: fixed, measured before, measured now, or the default."""
    if _forms.fixed in FORMS:
        return cast(Form, _forms.fixed)
    if q.device.type != "cpu":
        return "fused"
    gradients = _needs_gradients(q, k, v, mask)
    candidates = _candidates(q, k, gradients, bare=dropout == 0 and not _needs_gradients(mask))
    default = candidates[0]
    rows, queries, keys = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    if len(candidates) == 1 or _forms.fixed == UNMEASURED or rows * queries * keys <= _SMALL_SCORES:
        return default
    if torch.compiler.is_compiling():
        return default
    sizes = [1 << (int(size) - 1).bit_length() for size in (rows, queries, keys, q.shape[3])]
    key = (
        f"attention {str(q.dtype).removeprefix('torch.')}{' with gradients' * gradients} {'x'.join(map(str, sizes))}"
        f"{' ragged' * _widens(k)}{'' if mask is None else ' masked'}{' dropout' * (dropout > 0)}"
        f" of {', '.join(candidates)}"
    )
    if key not in _forms.taken:
        measure = partial(_measure, candidates, q, k, v, mask, dropout, gradients)
        _forms.taken[key] = _forms.choices.choose(key, measure, default=default, margin=MARGIN, together=False)
    return cast(Form, _forms.taken[key])


def _candidates(q: Tensor, k: Tensor, gradients: bool, bare: bool) -> list[Form]:
    """The forms that memory allows, the default first.

    Without gradients no form writes out more than `_PART_SCORES` scores at a time. With gradients the weights are kept
    for the backward pass, where the fused kernel keeps q, k, v and its result: see `_KEPT_SCORES`.

    Args:
        bare: neither dropout nor a mask with gradients, with which the fused kernel keeps all weights too.
    """
    if q.dtype is not torch.bfloat16:
        return ["fused_float32" if q.dtype is torch.float16 else "fused"]  # products of q and k leave float16's range
    scores = q.shape[2] * k.shape[2]
    one_part = q.shape[0] * q.shape[1] * scores <= _PART_SCORES
    if not gradients:
        return ["written_out" if one_part else "parts", "fused_float32", "fused"]
    forms: list[Form] = ["fused_float32", "fused"] if one_part else ["fused_float32", "fused", "parts"]
    return ["written_out", *forms] if scores <= _KEPT_SCORES or not bare else forms


def _measure(
    candidates: list[Form], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, gradients: bool
) -> dict[str, float]:
    """Seconds of each form on tensors like these, the least of a few."""
    return measured_apart(_timed, candidates, q, k, v, mask, dropout, gradients)


def _timed(
    candidates: list[Form],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    gradients: bool,
) -> dict[str, float]:
    # Fewer samples, heads and queries take proportionally less time in all forms; the keys are what matters.
    keys = k.shape[2]
    rows = max(_MEASURED_SCORES // keys, _MEASURED_QUERIES)
    queries = min(q.shape[2], rows)
    heads = min(q.shape[1], max(1, rows // queries))
    batch = min(q.shape[0], max(1, rows // (queries * heads)))
    part_scores = max(1, _PART_SCORES * heads // q.shape[1])  # so that a part has as many queries as in use

    def like(x: Tensor, rows: int) -> Tensor:  # laid out as projections of tokens are
        made = torch.randn(batch, rows, heads, x.shape[3], dtype=x.dtype, device="cpu").transpose(1, 2)
        return made.requires_grad_(gradients)

    q, k, v = like(q, queries), like(k, keys), like(v, keys)
    if mask is not None:
        learned = _needs_gradients(mask)
        shape = [min(size, most) for size, most in zip(mask.shape, (batch, heads, queries, keys)[-mask.dim() :])]
        mask = torch.ones(shape, dtype=mask.dtype, device="cpu").requires_grad_(learned)
    leaves = [x for x in (q, k, v, mask) if x is not None and x.requires_grad]

    def run(form: Form) -> float:
        since = time.thread_time()
        with torch.set_grad_enabled(gradients):
            out = _compute(form, q, k, v, mask, q.shape[3] ** -0.5, dropout, part_scores)
            if gradients:
                torch.autograd.grad(out, leaves, out.detach())
        return time.thread_time() - since

    seconds = {str(form): run(form) for form in candidates}  # kernels may be compiled meanwhile
    for lag in _LAGS:
        least = min(seconds.values())
        for form in candidates:
            if seconds[form] < lag * least:
                seconds[form] = min(seconds[form], run(form))
    return seconds
