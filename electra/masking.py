"""Which tokens are masked, what the generator's samples are, and what the corrupted text is: the official rules.

Shapes: B rows, S slots of a row, N packed tokens, M chosen slots of all rows (a position drawn twice has two slots),
V vocabulary. Numbered steps are those of section 2 of the official pre-training step (run_pretraining.py and
pretrain_helpers.py of google-research/electra).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from electra.model import Batch

KEEP_MASK = 0.85  # step 3: probability of [MASK]; otherwise the token stays
NOISE_EPSILON = 1e-9  # step 5: inside both logarithms
DISALLOWED = 1000.0  # step 5: taken off the logit of an id that must not be sampled


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the five special tokens; the defaults are those of the published vocabularies."""

    pad: int = 0
    unk: int = 100
    cls: int = 101
    sep: int = 102
    mask: int = 103

    @cached_property
    def never_masked(self) -> tuple[int, int, int]:
        return self.cls, self.sep, self.mask


@dataclass(frozen=True)
class Draws:
    """Random numbers given instead of drawn, one row a slot that is used (`slots_per_row`), rows in order.

    Args:
        positions_M: packed positions, int64.
        replace_M: uniform numbers of the 85 % rule.
        gumbel_MV: uniform numbers of the Gumbel noise.
        seeds_M: instead of `gumbel_MV`, one seed in [0, 2^62) a slot, from which its sample follows.
    """

    positions_M: Tensor | None = None
    replace_M: Tensor | None = None
    gumbel_MV: Tensor | None = None
    seeds_M: Tensor | None = None

    @classmethod
    def from_padded(
        cls,
        batch: Batch,
        slots: Sequence[int],
        columns_BS: Tensor,
        replace_BS: Tensor | None = None,
        gumbel_BSV: Tensor | None = None,
    ) -> Draws:
        """From the official layout: the first `slots[b]` of each row's S slots are used; columns of a padded row."""
        used_BS = torch.arange(columns_BS.shape[1])[None, :] < torch.as_tensor(slots)[:, None]
        used_BS = used_BS.to(columns_BS.device)
        places_BL = batch.pad(torch.arange(len(batch.ids_N), device=columns_BS.device), fill=-1)
        positions_M = places_BL.gather(1, columns_BS.long())[used_BS]
        return cls(
            positions_M,
            None if replace_BS is None else replace_BS[used_BS],
            None if gumbel_BSV is None else gumbel_BSV[used_BS],
        )


@dataclass(frozen=True)
class Masked:
    """The masked input and what to predict.

    Args:
        ids_N: the input with [MASK].
        positions_M: packed position of each slot.
        targets_M: the true ids there.
        weights_M: 1; 0 in a row that has no token to mask.
        writes_M: whether a sample may be written there: official code ignores column 0.
    """

    ids_N: Tensor
    positions_M: Tensor
    targets_M: Tensor
    weights_M: Tensor
    writes_M: Tensor


@dataclass(frozen=True)
class Corrupted:
    """The input with samples in place of chosen tokens.

    Args:
        ids_N: the corrupted input.
        labels_N: True where a written id differs from the original.
        written_N: True at every position a sample was written to, right or wrong.
    """

    ids_N: Tensor
    labels_N: Tensor
    written_N: Tensor


def slots_per_row(lengths: Sequence[int], probability: float, max_length: int) -> np.ndarray:
    """Step 1: max(1, min(S, round(p n))) of each row, S = int((p + 0.005) L), n counting [CLS] and [SEP].

    Args:
        max_length: L, the length that examples are built for.

    Raises:
        UserError: p is not in (0, 1].
    """
    if not 0 < probability <= 1:
        raise UserError(f"mask probability {probability} must be above 0 and at most 1")
    most = int((probability + 0.005) * max_length)
    wanted = np.rint(np.float32(probability) * np.asarray(lengths, dtype=np.float32)).astype(np.int64)
    return np.maximum(1, np.minimum(most, wanted)) * (np.asarray(lengths) > 0)


def choose(
    batch: Batch,
    special: SpecialIds,
    probability: float,
    max_length: int,
    generator: torch.Generator | None = None,
    draws: Draws | None = None,
) -> Masked:
    """Steps 1 to 3: positions drawn with replacement among ordinary tokens, [MASK] at 85 % of them.

    Args:
        max_length: L of `slots_per_row`.
        generator: on the batch's device.
        draws: numbers to use instead of the generator's.
    """
    draws = draws or Draws()
    ids_N, device = batch.ids_N, batch.ids_N.device
    slots = slots_per_row(batch.lengths, probability, max_length)
    count = int(slots.sum())
    if draws.positions_M is not None:
        positions_M, weights_M = draws.positions_M, torch.ones(count, device=device)
        if len(positions_M) != count:
            raise UserError(f"{len(positions_M)} positions are given, but the batch has {count} slots")
    else:
        rows_M = torch.from_numpy(np.repeat(np.arange(len(slots)), slots)).to(device, non_blocking=True)
        positions_M, weights_M = _draw_positions(batch, special, rows_M, generator)
    replace_M = draws.replace_M
    if replace_M is None:
        replace_M = torch.rand(count, generator=generator, device=device)
    writes_M = (batch.positions_N[positions_M] > 0) & (weights_M > 0)
    masks_M = (replace_M < KEEP_MASK) & writes_M
    # A slot that writes nothing writes the first token's own id where it stands, whatever the order of writes.
    hits_N = torch.zeros_like(ids_N).index_add_(0, positions_M, masks_M.long())
    masked_N = torch.where(hits_N > 0, special.mask, ids_N)
    return Masked(masked_N, positions_M, ids_N[positions_M], weights_M, writes_M)


def _draw_positions(
    batch: Batch, special: SpecialIds, rows_M: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Uniform over each row's candidates, without waiting for the device; a row without any gives weight 0."""
    candidate_N = torch.ones_like(batch.ids_N, dtype=torch.bool)
    for token in special.never_masked:
        candidate_N &= batch.ids_N != token
    rank_N = candidate_N.long().cumsum(0)  # of each candidate in the batch, from 1
    before_B = torch.cat([rank_N.new_zeros(1), rank_N])[batch.cu_lengths.long()]
    counts_M = (before_B[1:] - before_B[:-1])[rows_M]
    uniform_M = torch.rand(len(rows_M), generator=generator, device=rows_M.device, dtype=torch.float64)
    pick_M = torch.minimum((uniform_M * counts_M).long(), (counts_M - 1).clamp_min(0))
    positions_M = torch.searchsorted(rank_N, before_B[:-1][rows_M] + pick_M + 1)
    has_any_M = counts_M > 0
    return torch.where(has_any_M, positions_M, batch.starts_B[rows_M]), has_any_M.float()


def gumbel_sample(
    logits_MV: Tensor, uniform_MV: Tensor, temperature: float = 1.0, disallow_M: Tensor | None = None
) -> Tensor:
    """Library. Step 5: ids [M], argmax(logits / T + g) with g = -log(-log(u + 1e-9) + 1e-9), in float32.

    Args:
        disallow_M: ids that must not be sampled (the official `disallow_correct`: the true ones).
    """
    scores_MV = logits_MV.float() / temperature
    if disallow_M is not None:
        penalty = scores_MV.new_full((len(scores_MV), 1), -DISALLOWED)
        scores_MV = scores_MV.scatter_add(1, disallow_M[:, None], penalty)
    noise_MV = -torch.log(-torch.log(uniform_MV.float() + NOISE_EPSILON) + NOISE_EPSILON)
    return (scores_MV + noise_MV).argmax(1)


def corrupt(batch: Batch, masked: Masked, samples_M: Tensor) -> Corrupted:
    """Steps 6 and 7: samples into the unmasked input; a position drawn twice gets the floored mean of its ids."""
    ids_N = batch.ids_N
    writes_M = masked.writes_M.long()
    count_N = torch.zeros_like(ids_N).index_add_(0, masked.positions_M, writes_M)
    total_N = torch.zeros_like(ids_N).index_add_(0, masked.positions_M, samples_M * writes_M)
    written_N = count_N > 0
    corrupted_N = torch.where(written_N, total_N // count_N.clamp_min(1), ids_N)
    return Corrupted(corrupted_N, corrupted_N != ids_N, written_N)
