"""Token embedding split over data-parallel ranks, and the cross-entropy of the output layer tied to it (paper §4.3).

Every rank of a data-parallel group has other tokens, so no rank can keep only "its" words. Columns: rank r holds
E[:, c_r : c_{r+1}] with its optimizer state; ids go to everyone, partial vectors come back by AlltoAll. Rows: rank r
holds E[v_r : v_{r+1}]; ids go to the ranks that own them, whole vectors come back. Neither ever reduces the table.

Gradients of a slice are sums over all ranks' tokens, like those of an expert: divide by the number of ranks once.

Shapes: T tokens of this rank, A tokens of all ranks, V vocabulary, H hidden, R ranks, v and h this rank's part of V, H.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.kernels.products import product
from se_moe.communication import Group, RowPlan, all_gather_flat, all_to_all_rows, group_rank, group_size

Partition = Literal["columns", "rows"]
LOSS_ROWS = 256  # tokens whose logits exist at the same time in `tied_cross_entropy`


def part_bounds(total: int, parts: int) -> list[int]:
    """[parts + 1] limits of an even split; the first `total % parts` parts get one more."""
    small, larger = divmod(total, parts)
    return [small * r + min(r, larger) for r in range(parts + 1)]


def _sizes(bounds: Sequence[int]) -> list[int]:
    return [b - a for a, b in pairwise(bounds)]


def gather_counts(count: int, group: Group, device: torch.device) -> list[int]:
    """`count` of every rank of the group."""
    if group_size(group) == 1:
        return [count]
    found = torch.empty(group_size(group), dtype=torch.int64, device=device)
    all_gather_flat(found, torch.tensor([count], device=device), group=group)
    return found.tolist()


def gather_rows(x: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Rows of all ranks, in rank order; `counts[r]` rows come from rank r. Not differentiable."""
    if group_size(group) == 1:
        return x
    x = x.contiguous()
    if len(set(counts)) == 1:
        out = x.new_empty((sum(counts), *x.shape[1:]))
        all_gather_flat(out, x, group=group)
        return out
    # Uneven: every rank sends its rows to everyone, so that no padding travels.
    out = x.new_empty((sum(counts), *x.shape[1:]))
    copies = x.repeat(len(counts), *(1 for _ in x.shape[1:]))
    dist.all_to_all_single(out, copies, list(counts), [x.shape[0]] * len(counts), group=group)
    return out


class _GatherTokens(torch.autograd.Function):
    """Tokens of all ranks; the gradient of a rank's tokens is the sum of what all ranks say about them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Sequence[int], group: Group) -> Tensor:
        ctx.rest = counts, group
        return gather_rows(x, counts, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        counts, group = ctx.rest
        grad = grads[0].contiguous()
        own, ranks = group_rank(group), len(counts)
        received = grad.new_empty((ranks * counts[own], *grad.shape[1:]))
        dist.all_to_all_single(received, grad, [counts[own]] * ranks, list(counts), group=group)
        return received.view(ranks, counts[own], *grad.shape[1:]).sum(0), None, None


class _AllToAllColumns(torch.autograd.Function):
    """[A, h] columns of everyone's tokens -> [T, H] this rank's tokens with all columns."""

    @staticmethod
    def forward(ctx: Any, x_Ah: Tensor, counts: Sequence[int], widths: Sequence[int], group: Group) -> Tensor:
        ctx.rest = counts, widths, group
        return _to_tokens(x_Ah, counts, widths, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        counts, widths, group = ctx.rest
        return _to_columns(grads[0], counts, widths, group), None, None, None


def _to_tokens(x_Ah: Tensor, counts: Sequence[int], widths: Sequence[int], group: Group) -> Tensor:
    """Send every rank the columns of its tokens, and join the columns of this rank's tokens."""
    own, width = group_rank(group), x_Ah.shape[1]
    tokens = counts[own]
    received = x_Ah.new_empty(tokens * sum(widths))
    dist.all_to_all_single(
        received, x_Ah.reshape(-1), [tokens * w for w in widths], [n * width for n in counts], group=group
    )
    parts = torch.split(received, [tokens * w for w in widths])
    return torch.cat([part.view(tokens, w) for part, w in zip(parts, widths)], dim=1)


def _to_columns(x_TH: Tensor, counts: Sequence[int], widths: Sequence[int], group: Group) -> Tensor:
    """The inverse: send every rank its columns of this rank's tokens; [A, h]."""
    own = group_rank(group)
    width, tokens = widths[own], x_TH.shape[0]
    sent = torch.cat([part.reshape(-1) for part in torch.split(x_TH, list(widths), dim=1)])
    received = x_TH.new_empty(sum(counts) * width)
    dist.all_to_all_single(received, sent, [n * width for n in counts], [tokens * w for w in widths], group=group)
    return received.view(sum(counts), width)


class PartitionedEmbedding(nn.Module):
    """An embedding table of which each rank of `group` holds a slice.

    Args:
        vocabulary, hidden: V and H, neither needs to be a multiple of the ranks.
        group: the data-parallel group; None: one rank, the whole table.
        partition: "columns" (the paper) or "rows".

    `weight` is this rank's slice: [V, h] or [v, H].
    """

    def __init__(self, vocabulary: int, hidden: int, group: Group = None, partition: Partition = "columns") -> None:
        super().__init__()
        if partition not in ("columns", "rows"):
            raise UserError(f'partition is "{partition}": choose "columns" or "rows"')
        self.vocabulary, self.hidden, self.group, self.partition = vocabulary, hidden, group, partition
        ranks, own = group_size(group), group_rank(group)
        split = hidden if partition == "columns" else vocabulary
        if split < ranks:
            raise UserError(f"{split} {partition} of the embedding cannot be split over {ranks} ranks: use fewer ranks")
        self.columns, self.rows = part_bounds(hidden, ranks), part_bounds(vocabulary, ranks)
        bounds = self.columns if partition == "columns" else self.rows
        self.first, self.last = bounds[own], bounds[own + 1]
        size = self.last - self.first
        shape = (vocabulary, size) if partition == "columns" else (size, hidden)
        self.weight = nn.Parameter(torch.randn(shape))

    def load_full(self, table_VH: Tensor) -> None:
        """Take this rank's slice of a whole table."""
        if table_VH.shape != (self.vocabulary, self.hidden):
            raise UserError(
                f"embedding table has shape {tuple(table_VH.shape)}, expected {(self.vocabulary, self.hidden)}"
            )
        with torch.no_grad():
            self.weight.copy_(self.slice_of(table_VH))

    def slice_of(self, table_VH: Tensor) -> Tensor:
        """This rank's slice of a tensor of the table's shape."""
        return table_VH[:, self.first : self.last] if self.partition == "columns" else table_VH[self.first : self.last]

    @torch.no_grad()
    def full(self) -> Tensor:
        """The whole table [V, H]; a collective call."""
        if group_size(self.group) == 1:
            return self.weight.detach().clone()
        if self.partition == "rows":
            return gather_rows(self.weight.detach(), _sizes(self.rows), self.group)
        widths = _sizes(self.columns)
        flat = gather_rows(self.weight.detach().t(), widths, self.group)
        return flat.t().contiguous()

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> vectors [..., H]; a collective call, token counts may differ between ranks."""
        ids_T = ids.reshape(-1)
        if group_size(self.group) == 1:
            return F.embedding(ids, self.weight)
        lookup = self._by_columns if self.partition == "columns" else self._by_rows
        return lookup(ids_T).view(*ids.shape, self.hidden)

    def _by_columns(self, ids_T: Tensor) -> Tensor:
        counts = gather_counts(ids_T.numel(), self.group, ids_T.device)
        ids_A = gather_rows(ids_T, counts, self.group)
        part_Ah = F.embedding(ids_A, self.weight)
        return _AllToAllColumns.apply(part_Ah, counts, _sizes(self.columns), self.group)

    def _by_rows(self, ids_T: Tensor) -> Tensor:
        bounds = torch.tensor(self.rows[1:], device=ids_T.device)
        owner_T = torch.bucketize(ids_T, bounds, right=True)
        order_T = torch.sort(owner_T, stable=True).indices
        counts = torch.bincount(owner_T, minlength=len(self.rows) - 1)
        heard = torch.empty_like(counts)
        dist.all_to_all_single(heard, counts, group=self.group)
        plan = RowPlan(counts.tolist(), heard.tolist())
        wanted = all_to_all_rows(ids_T[order_T], plan, self.group) - self.first
        vectors_TH = all_to_all_rows(F.embedding(wanted, self.weight), plan.reverse(), self.group)
        inverse_T = torch.empty_like(order_T)
        inverse_T[order_T] = torch.arange(order_T.numel(), device=order_T.device)
        return vectors_TH[inverse_T]

    def vocabulary_rows(self) -> Tensor:
        """This rank's share of the vocabulary, [v, H], differentiable: the slice itself, or columns transposed into
        rows by AlltoAll, which moves V H / R values per rank where gathering the table would move V H."""
        if self.partition == "rows" or group_size(self.group) == 1:
            return self.weight
        return _AllToAllColumns.apply(self.weight, _sizes(self.rows), _sizes(self.columns), self.group)

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """hidden @ table.T for this rank's tokens, [T, V]: for sampling, not for training (gathers the table)."""
        return hidden_TH @ self.full().T

    def cross_entropy(self, hidden_TH: Tensor, targets_T: Tensor) -> Tensor:
        """Mean cross-entropy of this rank's targets under softmax(hidden @ table.T), without the table on any rank.

        Every rank scores its share of the vocabulary for everyone's tokens; three numbers per token are combined.
        Targets below 0 are ignored (0 loss, no gradient). A collective call, like its backward pass.
        """
        if group_size(self.group) == 1:
            return tied_cross_entropy(hidden_TH, self.weight, targets_T)
        counts = gather_counts(targets_T.numel(), self.group, targets_T.device)
        hidden_AH = _GatherTokens.apply(hidden_TH, counts, self.group)
        targets_A = gather_rows(targets_T, counts, self.group)
        first = self.rows[group_rank(self.group)]
        logits_Av = hidden_AH @ self.vocabulary_rows().T
        nll_T = _PartitionedCrossEntropy.apply(logits_Av, targets_A, first, counts, self.group)
        return nll_T.sum() / (targets_T >= 0).sum().clamp(min=1)


class _PartitionedCrossEntropy(torch.autograd.Function):
    """Cross-entropy over logits of which this rank holds the words [first, first + v) of all tokens; returns its own
    tokens' losses. The softmax overwrites the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits_Av: Tensor, targets_A: Tensor, first: int, counts: Sequence[int], group: Group
    ) -> Tensor:
        logits_Av = logits_Av.detach().float()
        peak_A = logits_Av.amax(1)
        dist.all_reduce(peak_A, dist.ReduceOp.MAX, group=group)
        local_A = targets_A - first
        here_A = (local_A >= 0) & (local_A < logits_Av.shape[1]) & (targets_A >= 0)
        index_A = local_A.clamp(0, logits_Av.shape[1] - 1)
        wanted_A = torch.where(here_A, logits_Av.gather(1, index_A[:, None])[:, 0] - peak_A, 0.0)
        exp_Av = logits_Av.sub_(peak_A[:, None]).exp_()
        sums_2A = torch.stack((exp_Av.sum(1), wanted_A))
        dist.all_reduce(sums_2A, group=group)
        exp_Av.div_(sums_2A[0][:, None])
        ctx.save_for_backward(exp_Av, index_A, here_A, targets_A >= 0)
        ctx.rest = counts, group
        own = group_rank(group)
        span = slice(sum(counts[:own]), sum(counts[: own + 1]))
        nll_T = sums_2A[0, span].log() - sums_2A[1, span]
        return torch.where(targets_A[span] >= 0, nll_T, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        softmax_Av, index_A, here_A, valid_A = ctx.saved_tensors
        counts, group = ctx.rest
        upstream_A = gather_rows(grads[0], counts, group) * valid_A
        dlogits_Av = softmax_Av * upstream_A[:, None]
        dlogits_Av.scatter_add_(1, index_A[:, None], -(upstream_A * here_A)[:, None])
        return dlogits_Av, None, None, None, None


class _TiedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over row blocks: the logits of `LOSS_ROWS` tokens exist at a time, and nothing of
    size [T, V] is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, table_VH: Tensor, targets_T: Tensor) -> Tensor:
        need_hidden, need_table = ctx.needs_input_grad[:2]
        valid_T = targets_T >= 0
        index_T1 = targets_T.clamp(min=0)[:, None]
        share_T1 = (valid_T / valid_T.sum().clamp(min=1)).float()[:, None]
        loss = hidden_TH.new_zeros((), dtype=torch.float32)
        ctx.dhidden_TH = torch.empty_like(hidden_TH) if need_hidden else None
        ctx.dtable_VH = torch.zeros_like(table_VH) if need_table else None
        for first in range(0, hidden_TH.shape[0], LOSS_ROWS):
            span = slice(first, first + LOSS_ROWS)
            hidden_BH, index_B1, share_B1 = hidden_TH[span], index_T1[span], share_T1[span]
            logits_BV = product(hidden_BH, table_VH.T).float()
            target_B1 = logits_BV.gather(1, index_B1)
            peak_B1 = logits_BV.amax(1, keepdim=True)
            exp_BV = logits_BV.sub_(peak_B1).exp_()
            sum_B1 = exp_BV.sum(1, keepdim=True)
            loss += ((sum_B1.log() + peak_B1 - target_B1) * share_B1).sum()
            if not (need_hidden or need_table):
                continue
            dlogits_BV = exp_BV.mul_(share_B1 / sum_B1)  # (softmax - one-hot) / number of valid tokens
            dlogits_BV.scatter_add_(1, index_B1, -share_B1)
            dlogits_BV = dlogits_BV.to(table_VH.dtype)
            if ctx.dhidden_TH is not None:
                ctx.dhidden_TH[span] = product(dlogits_BV, table_VH)
            if ctx.dtable_VH is not None:
                ctx.dtable_VH.add_(product(hidden_BH.T, dlogits_BV).T)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # Handed over, not kept: autograd then takes the buffers as they are. A second backward pass has nothing left.
        dhidden_TH, dtable_VH = ctx.dhidden_TH, ctx.dtable_VH
        del ctx.dhidden_TH, ctx.dtable_VH
        if grads[0].is_cuda or grads[0].item() != 1.0:
            for grad in (dhidden_TH, dtable_VH):
                if grad is not None:
                    grad.mul_(grads[0])
        return dhidden_TH, dtable_VH, None


def tied_cross_entropy(hidden_TH: Tensor, table_VH: Tensor, targets_T: Tensor) -> Tensor:
    """Mean cross-entropy of softmax(hidden @ table.T), a float32 scalar; targets below 0 are ignored.

    Can be differentiated once.
    """
    if torch.is_autocast_enabled(hidden_TH.device.type):
        dtype = torch.get_autocast_dtype(hidden_TH.device.type)
        hidden_TH, table_VH = hidden_TH.to(dtype), table_VH.to(dtype)
    return _TiedCrossEntropy.apply(hidden_TH, table_VH, targets_T)
