"""Pictures as packed bits, made once by a frozen tokenizer, and the order in which two data stages take them.

Shape suffixes: n pictures, H and W their sides, P bytes of a picture, K tokens, D bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler

from common.data.cache import FeatureCache, fingerprint_tensors
from common.data.sampling import StepBatchSampler, StepDataModule, TensorTable, derive_seed, step_generator
from common.images import to_unit
from instella_t2i.data import Pictures
from instella_t2i.tokenizer import Tokenizer

SHARD = 512  # pictures
MOVE, SCALE = 0.05, 0.1  # of a picture's side, at most


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


def framed(pixels_n3HW: Tensor, rows: Sequence[int], view: int, seed: int = 0) -> Tensor:
    """Pictures moved by up to MOVE of their side and scaled by up to SCALE; beyond their border it is continued.

    Args:
        rows: their numbers; the frame is a function of (seed, view, number). View 0 is the picture itself.
    """
    if view == 0:
        return pixels_n3HW
    draws = [torch.rand(3, generator=step_generator(derive_seed(seed, view), row)) for row in rows]
    u_n3 = 2 * torch.stack(draws).to(pixels_n3HW) - 1
    frame_n23 = u_n3.new_zeros(len(rows), 2, 3)
    frame_n23[:, 0, 0] = frame_n23[:, 1, 1] = 1 + SCALE * u_n3[:, 0]
    frame_n23[:, :, 2] = 2 * MOVE * u_n3[:, 1:]
    grid = F.affine_grid(frame_n23, list(pixels_n3HW.shape), align_corners=False)
    return F.grid_sample(pixels_n3HW, grid, padding_mode="border", align_corners=False)


def encode_pictures(
    tokenizer: Tokenizer, pictures: Pictures, folder: Path, progress: bool = False, views: int = 1
) -> Tensor:
    """Packed codes uint8 [views n, P] of all pictures, view after view, read from `folder` where they are there.

    Raises:
        UserError: what lies there was made by another tokenizer, or from other pictures.
    """
    device, count = next(tokenizer.parameters()).device, len(pictures)

    def encoded(rows: list[int], view: int) -> Tensor:
        parts = [rows[i : i + 64] for i in range(0, len(rows), 64)]
        pixels = [framed(to_unit(pictures.images(part).to(device)), part, view) for part in parts]
        return torch.cat([pack_bits(tokenizer.encode(part)) for part in pixels])

    def compute(rows: list[int]) -> dict[str, Tensor]:
        of_view = [(view, [row % count for row in rows if row // count == view]) for view in range(views)]
        return {"code": torch.cat([encoded(part, view) for view, part in of_view if part])}

    made_by = f"tokenizer {fingerprint(tokenizer)} at {pictures.size} px"
    cache = FeatureCache.open_or_build(
        folder,
        views * count,
        made_by if views == 1 else f"{made_by}, {views} views",
        pictures.fingerprint,
        compute,
        SHARD,
        progress,
        reading="loaded",
    )
    return cache[:]["code"]


def code_table(codes: Sequence[Tensor], views: int = 1) -> TensorTable:
    """Sets of packed codes, one after the other; `caption` numbers the captions of all sets in the same order.

    Args:
        views: of each picture, which share its caption.
    """
    numbers, before = [], 0
    for packed_nP in codes:
        count = len(packed_nP) // views
        numbers.append((before + torch.arange(count)).repeat(views))
        before += count
    return TensorTable({"code": torch.cat(list(codes)), "caption": torch.cat(numbers)})


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
