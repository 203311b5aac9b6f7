"""Pictures as packed bits, made once by a frozen tokenizer, and the order in which two data stages take them.

Shape suffixes: n pictures, P bytes of a picture, K tokens, D bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from common.data.cache import FeatureCache, fingerprint_tensors
from common.data.sampling import StepBatchSampler, StepDataModule, TensorTable, derive_seed
from common.images import to_unit
from instella_t2i.data import Pictures
from instella_t2i.tokenizer import Tokenizer

SHARD = 512  # pictures


def pack_bits(codes_nKD: Tensor) -> Tensor:
    """uint8 [n, P] of codes of 0 and 1, the first bit the highest."""
    return torch.from_numpy(np.packbits(codes_nKD.flatten(1).byte().cpu().numpy(), axis=1))


def unpack_bits(packed_nP: Tensor, tokens: int, bits: int) -> Tensor:
    """Codes [n, K, D], float32, on the device of the bytes."""
    powers = torch.arange(7, -1, -1, device=packed_nP.device, dtype=torch.uint8)
    flat = (packed_nP[..., None] >> powers & 1).flatten(1)[:, : tokens * bits]
    return flat.unflatten(1, (tokens, bits)).float()


def fingerprint(tokenizer: Tokenizer) -> str:
    """Of a tokenizer's weights: its codes mean something to these alone."""
    return fingerprint_tensors(tokenizer.state_dict())


def encode_pictures(tokenizer: Tokenizer, pictures: Pictures, folder: Path, progress: bool = False) -> Tensor:
    """Packed codes uint8 [n, P] of all pictures, read from `folder` where they are there.

    Raises:
        UserError: what lies there was made by another tokenizer, or from other pictures.
    """
    device = next(tokenizer.parameters()).device

    def compute(rows: list[int]) -> dict[str, Tensor]:
        parts = [tokenizer.encode(to_unit(part.to(device))) for part in pictures.images(rows).split(64)]
        return {"code": pack_bits(torch.cat(parts))}

    cache = FeatureCache.open_or_build(
        folder,
        len(pictures),
        f"tokenizer {fingerprint(tokenizer)} at {pictures.size} px",
        pictures.fingerprint,
        compute,
        SHARD,
        progress,
        reading="loaded",
    )
    return cache[:]["code"]


def code_table(codes: Sequence[Tensor]) -> TensorTable:
    """Sets of packed codes, one after the other; `caption` numbers the captions of all sets in the same order."""
    packed_nP = torch.cat(list(codes))
    return TensorTable({"code": packed_nP, "caption": torch.arange(len(packed_nP))})


class MixedSampler(StepBatchSampler):
    """The first `n` rows of a table alone up to sample `begins`; from then on the rows after them take their share,
    evenly spread. Each of the two sets is gone through in its own epochs."""

    def __init__(
        self, n: int, others: int, share: float, begins: int, batch_size: int, steps: int, seed: int, **place: Any
    ) -> None:
        super().__init__(n, batch_size, steps, seed, **place)
        self.share, self.begins = share, begins
        self.others = StepBatchSampler(others, batch_size, steps, derive_seed(seed, 1))

    def _index(self, position: int) -> int:
        later = position - self.begins
        if later < 0:
            return super()._index(position)
        before = int(later * self.share)
        if int((later + 1) * self.share) > before:
            return self.n + self.others._index(before)
        return super()._index(position - before)


class MixedData(StepDataModule):
    """`StepDataModule` over two sets in one table, or over one.

    Args:
        first: rows of the first set.
        share: of the second one, from step `begins` on.
    """

    def __init__(
        self,
        table: TensorTable,
        first: int,
        share: float,
        begins: int,
        batch_size: int,
        steps: int,
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__(table, batch_size, steps, seed, **options)
        self.first, self.share, self.begins = first, share, begins

    def sampler(self, batch_size: int, steps: int, seed: int, **place: Any) -> Sampler[list[int]]:
        others = len(self.dataset) - self.first  # type: ignore[arg-type]
        if not others:
            return super().sampler(batch_size, steps, seed, **place)
        begins = self.begins * self.batch_size
        return MixedSampler(self.first, others, self.share, begins, batch_size, steps, seed, **place)
