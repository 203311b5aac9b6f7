"""The networks: BERT encoder, masked-language-model head, replaced-token-detection head.

Shapes: B rows, L tokens of a row, N packed tokens of a batch (no padding), M selected tokens, D hidden size,
E embedding size, V vocabulary, A heads, H width of a head.

Tokens of all rows stand one after the other (`Batch`), so that no linear layer works on padding; attention is
block-diagonal. Parameters have the names of transformers' ElectraModel. Sizes: the paper's appendix, table of
pre-training hyper-parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cpu import few_sizes
from common.errors import UserError
from common.kernels.attention import Form, attention
from common.kernels.products import Linear, by_onednn, linear
from electra.config import ElectraConfig

# More runs of equal row length than this are attended in one padded call instead of one call each (CPU).
MOST_CALLS = 8


@dataclass(frozen=True)
class Batch:
    """Rows of tokens packed without padding.

    Args:
        ids_N: token ids, int64.
        types_N: segment ids, int64.
        positions_N: position within the row, int64.
        cu_lengths: [B + 1] int32, where each row starts; the last entry is N.
        lengths: the same on the host, tokens of each row.
        max_length: at least the longest row; a fixed value keeps compiled code from specialising on it.
        width: of the padded layout that `pad` makes (0: the longest row).
    """

    ids_N: Tensor
    types_N: Tensor
    positions_N: Tensor
    cu_lengths: Tensor
    lengths: tuple[int, ...]
    max_length: int
    width: int = 0
    columns_N: Tensor | None = field(default=None, repr=False)  # place in a padded row, where that is not the position
    keys_BL: Tensor | None = field(default=None, repr=False)  # real tokens of rows that keep their padding

    @classmethod
    def from_rows(cls, rows: Sequence[Tensor], types: Sequence[Tensor] | None = None, max_length: int = 0) -> Batch:
        """Library. From rows of ids (1-d); types default to 0. Rows of equal length side by side attend fastest."""
        lengths = tuple(len(row) for row in rows)
        if not rows or not min(lengths):
            raise UserError("a batch needs at least one row, and every row at least one token")
        ids_N = torch.cat(list(rows)).long()
        types_N = torch.zeros_like(ids_N) if types is None else torch.cat(list(types)).long()
        return cls.from_flat(ids_N, types_N, lengths, max_length)

    @classmethod
    def from_flat(cls, ids_N: Tensor, types_N: Tensor, lengths: Sequence[int], max_length: int = 0) -> Batch:
        """Ids and types of all rows one after the other."""
        starts = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        return cls(
            ids_N,
            types_N,
            torch.from_numpy(positions).to(ids_N.device),
            torch.from_numpy(starts.astype(np.int32)).to(ids_N.device),
            tuple(int(n) for n in lengths),
            max(max_length, *lengths),
        )

    @classmethod
    def from_padded(cls, ids_BL: Tensor, mask_BL: Tensor | None = None, types_BL: Tensor | None = None) -> Batch:
        """A padded batch; tokens with mask 0 are left out (wherever they stand), positions are the columns."""
        if mask_BL is None:
            mask_BL = torch.ones_like(ids_BL)
        real_BL = mask_BL.bool()
        counts = real_BL.sum(1).cpu()
        rows_N, columns_N = real_BL.nonzero(as_tuple=True)
        cu_lengths = F.pad(counts.cumsum(0), (1, 0)).to(ids_BL.device, torch.int32)
        types_N = torch.zeros_like(columns_N) if types_BL is None else types_BL[rows_N, columns_N].long()
        lengths = tuple(counts.tolist())
        dense = bool((columns_N == torch.arange(len(columns_N), device=ids_BL.device) - cu_lengths[rows_N]).all())
        return cls(
            ids_BL[rows_N, columns_N].long(),
            types_N,
            columns_N,
            cu_lengths,
            lengths,
            max(1, *lengths),
            ids_BL.shape[1],
            None if dense else columns_N,
        )

    @classmethod
    def with_padding(cls, ids_BL: Tensor, mask_BL: Tensor, types_BL: Tensor | None = None) -> Batch:
        """A padded batch whose padding is computed, though nothing attends to it, as in transformers.

        For heads whose softmax or loss runs over the padding too (transformers' question answering); slower.
        """
        return replace(cls.from_padded(ids_BL, types_BL=types_BL), keys_BL=mask_BL.bool())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed."""
        return replace(
            self,
            ids_N=change(self.ids_N),
            types_N=change(self.types_N),
            positions_N=change(self.positions_N),
            cu_lengths=change(self.cu_lengths),
            columns_N=None if self.columns_N is None else change(self.columns_N),
            keys_BL=None if self.keys_BL is None else change(self.keys_BL),
        )

    @cached_property
    def rows_N(self) -> Tensor:
        """Row of each token, int64."""
        counts = (self.cu_lengths[1:] - self.cu_lengths[:-1]).long()
        rows = torch.arange(len(counts), device=self.cu_lengths.device)
        return torch.repeat_interleave(rows, counts, output_size=len(self.ids_N))

    @cached_property
    def starts_B(self) -> Tensor:
        """Where each row's first token ([CLS]) stands, int64; empty rows have none."""
        return self.cu_lengths[:-1].long()

    def pad(self, values: Tensor, fill: float = 0) -> Tensor:
        """[N, ...] -> [B, width, ...], padding filled with `fill`."""
        width = self.width or max(self.lengths)
        places_N = self.rows_N * width + (self._places_in_row if self.columns_N is None else self.columns_N)
        padded = values.new_full((len(self.lengths) * width, *values.shape[1:]), fill)
        return padded.index_copy(0, places_N, values).unflatten(0, (-1, width))

    @cached_property
    def _places_in_row(self) -> Tensor:
        return torch.arange(len(self.ids_N), device=self.ids_N.device) - self.starts_B[self.rows_N]

    @cached_property
    def _attention_places_N(self) -> Tensor:
        """Index of each token in rows padded to the longest."""
        return self.rows_N * self.max_length + self._places_in_row

    @cached_property
    def _attention_mask_B11L(self) -> Tensor:
        """True at real keys; the first key of an empty row counts as real, lest its softmax be 0 / 0."""
        counts_B1 = (self.cu_lengths[1:] - self.cu_lengths[:-1]).clamp_min(1)[:, None]
        return (torch.arange(self.max_length, device=self.cu_lengths.device) < counts_B1)[:, None, None]

    @cached_property
    def _runs(self) -> list[tuple[int, int]]:
        """Runs of neighbouring rows of equal length: (rows, length)."""
        return [(len(list(run)), length) for length, run in groupby(n for n in self.lengths if n)]


class RelativeBias(nn.Module):
    """A learned number per head and signed distance, added to every layer's attention scores.

    It starts at ALiBi's -|i - j| * slope (Press et al. 2022) and can then tell left from right. Slopes run from 2^-1 to
    2^-8 as for eight heads however many there are, so that one head looks near and one, as [CLS] must, sees the row.
    """

    def __init__(self, heads: int, max_position: int) -> None:
        super().__init__()
        self.max_position = max_position
        self.slopes = [2.0 ** -(1 + 7 * a / max(1, heads - 1)) for a in range(heads)]
        self.bias = nn.Parameter(torch.empty(heads, 2 * max_position - 1))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        distance = torch.arange(-(self.max_position - 1), self.max_position, dtype=torch.float32).abs()
        self.bias.copy_(-torch.tensor(self.slopes)[:, None] * distance)

    def forward(self, positions_L: Tensor) -> Tensor:
        """[A, L, L], the bias of query i on key j."""
        return self.bias[:, positions_L[None, :] - positions_L[:, None] + self.max_position - 1]


class Embeddings(nn.Module):
    """Token + type + position, LayerNorm, dropout; each table E wide."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.position_embeddings = nn.Embedding(config.max_position, config.embedding_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab, config.embedding_size)
        self.LayerNorm = nn.LayerNorm(config.embedding_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, batch: Batch, ids_N: Tensor | None = None) -> Tensor:
        """[N, E] of the batch, its ids replaced by `ids_N` where given."""
        x_NE = self.word_embeddings(batch.ids_N if ids_N is None else ids_N)
        x_NE = x_NE + self.position_embeddings(batch.positions_N) + self.token_type_embeddings(batch.types_N)
        return self.dropout(self.LayerNorm(x_NE))


class ResidualOutput(nn.Module):
    """LayerNorm(residual + dropout(linear(x))): how attention and feed-forward end."""

    def __init__(self, width: int, config: ElectraConfig) -> None:
        super().__init__()
        self.dense = Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual_ND: Tensor) -> Tensor:
        return self.LayerNorm(residual_ND + self.dropout(self.dense(x)))


class SelfAttention(nn.Module):
    """Block-diagonal multi-head attention; the three projections run as one matrix product."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)
        self.heads, self.dropout = config.heads, config.attention_dropout

    def forward(self, x_ND: Tensor, batch: Batch, bias_ALL: Tensor | None) -> Tensor:
        weight = torch.cat([self.query.weight, self.key.weight, self.value.weight])
        bias = torch.cat([self.query.bias, self.key.bias, self.value.bias])
        qkv_N3AH = linear(x_ND, weight, bias).unflatten(1, (3, self.heads, -1))
        return attend(qkv_N3AH, batch, bias_ALL, self.dropout if self.training else 0.0).flatten(1)


def filled(x: Tensor) -> Tensor:
    """`x` with zero rows added up to one of few sizes where oneDNN multiplies, else `x` itself."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x
    spare = few_sizes(len(x)) - len(x) if by_onednn(x.dtype) else 0
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, spare)) if spare else x


def attend(qkv_N3AH: Tensor, batch: Batch, bias_ALL: Tensor | None, dropout: float) -> Tensor:
    """Attention of each row to itself: [N, A, H]. Rows behind the batch's tokens (see `filled`) give zeros.

    Half precision on CUDA runs FlashAttention on the packed tokens; elsewhere rows of equal length that stand side by
    side share a call, and batches with many different lengths are padded for this one operation.
    """
    if batch.keys_BL is not None:
        tokens = batch.keys_BL.numel()
        rows_BL3AH = qkv_N3AH[:tokens].unflatten(0, batch.keys_BL.shape)
        out_NAH = _attend_rows(rows_BL3AH, bias_ALL, batch.keys_BL[:, None, None], dropout).flatten(0, 1)
        return F.pad(out_NAH, (0, 0, 0, 0, 0, len(qkv_N3AH) - tokens))
    if qkv_N3AH.is_cuda and bias_ALL is None and qkv_N3AH.dtype in (torch.float16, torch.bfloat16):
        q, k, v = qkv_N3AH.unbind(1)
        cu, longest = batch.cu_lengths, batch.max_length
        return torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, longest, longest, dropout, False, False)[0]
    if not qkv_N3AH.is_cuda and len(batch._runs) <= MOST_CALLS:
        sizes = [rows * length for rows, length in batch._runs]
        sizes.append(len(qkv_N3AH) - sum(sizes))
        *parts, spare = qkv_N3AH.split(sizes)
        runs = zip(parts, batch._runs)
        outs = [_attend_rows(part.unflatten(0, run), bias_ALL, None, dropout).flatten(0, 1) for part, run in runs]
        if len(spare):
            outs.append(outs[0].new_zeros(len(spare), *outs[0].shape[1:]))
        return outs[0] if len(outs) == 1 else torch.cat(outs)
    if spare_rows := len(qkv_N3AH) - len(batch.ids_N):
        out_NAH = attend(qkv_N3AH[: len(batch.ids_N)], batch, bias_ALL, dropout)
        return F.pad(out_NAH, (0, 0, 0, 0, 0, spare_rows))
    rows, width = len(batch.lengths), batch.max_length
    padded = qkv_N3AH.new_zeros(rows * width, *qkv_N3AH.shape[1:])
    padded = padded.index_copy(0, batch._attention_places_N, qkv_N3AH).unflatten(0, (rows, width))
    out_BLAH = _attend_rows(padded, bias_ALL, batch._attention_mask_B11L, dropout)
    return out_BLAH.flatten(0, 1).index_select(0, batch._attention_places_N)


def _attend_rows(qkv_BL3AH: Tensor, bias_ALL: Tensor | None, keys_B11L: Tensor | None, dropout: float) -> Tensor:
    """[B, L, A, H] for rows of one length."""
    q, k, v = qkv_BL3AH.permute(2, 0, 3, 1, 4).unbind()
    mask = keys_B11L
    if bias_ALL is not None:
        length = q.shape[2]
        mask = bias_ALL[None, :, :length, :length].to(q.dtype)
        if keys_B11L is not None:
            mask = mask.masked_fill(~keys_B11L, float("-inf"))
    # A single row seldom has the length of another one: see `filled` for what that costs in bfloat16.
    form: Form | None = "fused_float32" if q.device.type == "cpu" and q.shape[0] == 1 else None
    return attention(q, k, v, mask, dropout=dropout, form=form).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention and its output; the two submodules carry transformers' names."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = ResidualOutput(config.hidden_size, config)


class Intermediate(nn.Module):
    """First half of the feed-forward network: linear and exact gelu."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.gelu(self.dense(x_ND))


class Layer(nn.Module):
    """A post-LayerNorm transformer block."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, x_ND: Tensor, batch: Batch, bias_ALL: Tensor | None, select_M: Tensor | None = None) -> Tensor:
        """All tokens, or after attention only those of `select_M`."""
        context_ND = self.attention.self(x_ND, batch, bias_ALL)
        if select_M is not None:
            context_ND, x_ND = context_ND[select_M], x_ND[select_M]
        x_ND = self.attention.output(context_ND, x_ND)
        return self.output(self.intermediate(x_ND), x_ND)


class Layers(nn.Module):
    """The stack of blocks, under transformers' name `layer`."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Layer(config) for _ in range(config.layers)])


class Encoder(nn.Module):
    """Embeddings, their projection to the hidden size, and the transformer: transformers' ElectraModel.

    Args:
        own_embeddings: False for a generator that reads the main network's (weight tying); then `forward` needs them.
    """

    def __init__(self, config: ElectraConfig, own_embeddings: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config) if own_embeddings else None
        needs_projection = config.embedding_size != config.hidden_size
        self.embeddings_project = Linear(config.embedding_size, config.hidden_size) if needs_projection else None
        self.relative_positions = RelativeBias(config.heads, config.max_position) if config.relative_positions else None
        self.encoder = Layers(config)
        initialise(self, config)

    def forward(
        self,
        batch: Batch,
        ids_N: Tensor | None = None,
        embeddings: Embeddings | None = None,
        select_M: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [N, D] of the packed tokens.

        Args:
            ids_N: read these ids instead of the batch's.
            embeddings: of another network (weight tying).
            select_M: return only these tokens, [M, D]; the last block then skips the others after its attention.
            states: a list that receives the embeddings and every block's output (all tokens but for the last block).

        Raises:
            UserError: a row is longer than the position table.
        """
        if batch.max_length > self.config.max_position:
            raise UserError(
                f"a row of {batch.max_length} tokens does not fit model.max_position {self.config.max_position}: "
                "cut the rows or use a model with more positions"
            )
        source = embeddings or self.embeddings
        assert source is not None, "an encoder without embeddings needs them from another"
        x_ND = filled(source(batch, ids_N))
        tokens, chosen = len(batch.ids_N), None if select_M is None else filled(select_M)
        if self.embeddings_project is not None:
            x_ND = self.embeddings_project(x_ND)
        bias_ALL = None
        if self.relative_positions is not None:
            bias_ALL = self.relative_positions(torch.arange(batch.max_length, device=x_ND.device))
        if states is not None:
            states.append(x_ND[:tokens])
        last = len(self.encoder.layer) - 1
        for i, layer in enumerate(self.encoder.layer):
            x_ND = layer(x_ND, batch, bias_ALL, chosen if i == last else None)
            if states is not None:
                states.append(x_ND[: tokens if i < last or select_M is None else len(select_M)])
        return x_ND[: tokens if select_M is None else len(select_M)]


class MlmHead(nn.Module):
    """Hidden state to the space of the token table: linear, gelu, LayerNorm (transformers' generator_predictions)."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.embedding_size)
        self.LayerNorm = nn.LayerNorm(config.embedding_size, config.layer_norm_eps)
        initialise(self, config)

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """[M, E]; logits are its products with the token table plus `OutputBias`."""
        return self.LayerNorm(F.gelu(self.dense(filled(hidden_MD))))[: len(hidden_MD)]


class OutputBias(nn.Module):
    """The bias of the vocabulary's logits (transformers' generator_lm_head.bias; its weight is the token table)."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))


class RtdHead(nn.Module):
    """Replaced-token detection: linear, gelu, one logit a token, positive for "replaced"."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.dense_prediction = Linear(config.hidden_size, 1)
        initialise(self, config)
        # The official last layer has no initialiser of its own, so it gets TensorFlow's default.
        nn.init.xavier_uniform_(self.dense_prediction.weight)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N], float32."""
        return self.dense_prediction(F.gelu(self.dense(filled(hidden_ND))))[: len(hidden_ND), 0].float()


@torch.no_grad()
def initialise(module: nn.Module, config: ElectraConfig) -> None:
    """Truncated-normal tables and kernels, zero biases, unit LayerNorms; relative positions at ALiBi's slopes."""
    for part in module.modules():
        if next((p.is_meta for p in part.parameters()), False):
            return  # plans need no values, and drawing them takes torch seconds even where there is no memory
        if isinstance(part, (nn.Linear, nn.Embedding)):
            std = config.init_std if config.init == "official" else 0.7 / math.sqrt(part.weight.shape[1])
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
            if isinstance(part, nn.Linear):
                nn.init.zeros_(cast(Tensor, part.bias))
        elif isinstance(part, (nn.LayerNorm, RelativeBias)):
            part.reset_parameters()
