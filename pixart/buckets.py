"""Aspect-ratio buckets (appendix A.5): tables of image sizes, the nearest one, batches of one bucket, crops to fit.

A ratio is height / width. The authors' 40 sizes have areas close to base x base, sides that are whole sixteenths of the
base side, and ratios 0.25 to 4.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.data.sampling import StepBatchSampler, step_generator
from common.errors import UserError

MAX_RATIO = 4.0  # rarer shapes than 1:4 and 4:1 are left out of training

# Height and widths of the authors' table, in sixteenths of the base side; ratio keys are height / width to two digits.
_LANDSCAPE = {
    8: (32, 31, 30, 29),
    9: (28, 27, 26),
    10: (25, 24),
    11: (23, 22, 21),
    12: (21, 20),
    13: (19, 18),
    14: (18, 17),
    15: (17, 16),
}
_WIDE = [(height, width) for height, widths in _LANDSCAPE.items() for width in widths]
# The portrait half mirrors the landscape half but for 21:11 (1.91), which the authors' table lacks.
_TALL = [(width, height) for height, width in reversed(_WIDE) if (width, height) != (21, 11)]
_SIXTEENTHS = [*_WIDE, (16, 16), *_TALL]
# Keys of the training table that the authors' table for inference leaves out.
_TRAINING_ONLY = {0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88}


@dataclass(frozen=True)
class Bucket:
    """One image size in pixels; `ratio` is the table's key (height / width to two digits)."""

    ratio: float
    height: int
    width: int


@functools.lru_cache(maxsize=64)
def bucket_table(base: int, multiple: int | None = None, inference: bool = False) -> tuple[Bucket, ...]:
    """Buckets of about base x base pixels, ascending in ratio.

    Args:
        base: side of the square bucket; 256, 512 and 1024 give the authors' tables.
        multiple: sides must be divisible by this (codec factor x patch size). Default base/16. When base/16 is not a
            multiple of it, sides are rounded to it and sizes that fall together are merged: the scaled table of a
            small base (32 or 64 px).
        inference: leave out the seven sizes that the authors' *_TEST tables leave out.

    Raises:
        UserError: base is not divisible by 16 or by `multiple`.
    """
    if base < 16 or base % 16:
        raise UserError(f"aspect buckets need a base side divisible by 16, got {base}")
    unit = base // 16
    step = unit if multiple is None else multiple
    if step < 1 or base % step:
        raise UserError(f"aspect buckets of base side {base} cannot have sides divisible by {multiple}")
    table: dict[tuple[int, int], Bucket] = {}
    for rows, columns in _SIXTEENTHS:
        key = round(rows / columns, 2)
        if inference and key in _TRAINING_ONLY:
            continue
        height, width = rows * unit, columns * unit
        if height % step or width % step:
            height, width = (max(step, step * round(side / step)) for side in (height, width))
            key = round(height / width, 2)
            if not 1 / MAX_RATIO <= height / width <= MAX_RATIO:
                continue
        table.setdefault((height, width), Bucket(key, height, width))
    return tuple(sorted(table.values(), key=lambda bucket: bucket.ratio))


def nearest_bucket(table: Sequence[Bucket], height: float, width: float) -> int:
    """Position of the bucket whose ratio is nearest to height / width; the first one wins a tie."""
    if not (height > 0 and width > 0):
        raise UserError(f"an image size must be positive, got {height} x {width}")
    ratio = height / width
    return min(range(len(table)), key=lambda position: abs(table[position].ratio - ratio))


def assign_buckets(table: Sequence[Bucket], sizes_N2: Tensor | np.ndarray) -> np.ndarray:
    """`nearest_bucket` of many (height, width) pairs: int64 [N]."""
    sizes = np.asarray(sizes_N2, dtype=np.float64).reshape(-1, 2)
    if not (sizes > 0).all():
        raise UserError("image sizes must be positive")
    keys = np.array([bucket.ratio for bucket in table])
    ratios = sizes[:, 0] / sizes[:, 1]
    return np.concatenate(
        [np.abs(keys - ratios[i : i + 65536, None]).argmin(axis=1) for i in range(0, max(len(ratios), 1), 65536)]
    )


def usable_shapes(sizes_N2: Tensor | np.ndarray) -> np.ndarray:
    """Indices of the images that are at most MAX_RATIO times as long as wide; a warning counts the others."""
    sizes = np.asarray(sizes_N2, dtype=np.float64).reshape(-1, 2)
    if not (sizes > 0).all():
        raise UserError("image sizes must be positive")
    kept = np.flatnonzero(sizes.max(axis=1) <= MAX_RATIO * sizes.min(axis=1))
    if len(kept) < len(sizes):
        warnings.warn(
            f"{len(sizes) - len(kept)} of {len(sizes)} images are left out: longer than {MAX_RATIO:g} times their "
            "width",
            stacklevel=2,
        )
    return kept


def bucket_batches(
    order: Sequence[int] | np.ndarray,
    bucket_N: Sequence[int] | np.ndarray,
    batch_size: int,
    drop_last: bool = True,
    valid_num: int = 0,
) -> list[list[int]]:
    """Batches of one bucket each, as the authors' sampler makes them from samples in the given order.

    A batch comes out when its bucket is full; leftovers come at the end in the order of the table, unless dropped.

    Args:
        order: sample numbers, each at most once.
        bucket_N: bucket of each sample number.
        valid_num: buckets with fewer samples (counted over all of `bucket_N`) are left out.
    """
    bucket = np.asarray(bucket_N, dtype=np.int64)
    samples = np.asarray(order, dtype=np.int64)
    if valid_num > 0 and len(bucket):
        samples = samples[np.bincount(bucket)[bucket[samples]] >= valid_num]
    if not len(samples):
        return []
    # Stable sort by bucket: within a bucket the order of arrival stays.
    by_bucket = np.argsort(bucket[samples], kind="stable")
    groups = np.split(by_bucket, np.flatnonzero(np.diff(bucket[samples][by_bucket])) + 1)
    full: list[np.ndarray] = []
    rest: list[list[int]] = []
    for positions in groups:
        count = len(positions) // batch_size
        full.extend(positions[: count * batch_size].reshape(count, batch_size))
        if len(positions) % batch_size and not drop_last:
            rest.append(samples[positions[count * batch_size :]].tolist())
    full.sort(key=lambda positions: int(positions[-1]))  # a batch is complete when its last sample arrives
    return [*(samples[positions].tolist() for positions in full), *rest]


class BucketBatchSampler(StepBatchSampler):
    """For each step this rank's share of a global batch whose images all have one size.

    As in `StepBatchSampler` the order is a pure function of (seed, step): epoch e is the authors' bucketing
    (`bucket_batches`) of a permutation seeded by (seed, e), rank r of W takes every W-th sample from r on. What does
    not fill a batch is left out, epoch by epoch (the authors' training).

    Args:
        bucket_N: bucket of each sample of the data set (`assign_buckets`).
        batch_size, steps, seed, options: of `StepBatchSampler`.
    """

    def __init__(
        self, bucket_N: Sequence[int] | np.ndarray | Tensor, batch_size: int, steps: int, seed: int, **options: Any
    ) -> None:
        super().__init__(len(bucket_N), batch_size, steps, seed, **options)
        self.bucket_N = np.asarray(bucket_N, dtype=np.int64)
        counts = np.bincount(self.bucket_N)
        self.batches_per_epoch = int((counts // batch_size).sum())
        if self.batches_per_epoch == 0:
            raise UserError(
                f"no aspect bucket holds {batch_size} images (the fullest has {int(counts.max())}): use a smaller "
                "batch_size or fewer buckets"
            )
        small = counts[(counts > 0) & (counts < batch_size)]
        if len(small):
            warnings.warn(
                f"{int(small.sum())} of {self.n} images are never used: their {len(small)} aspect buckets "
                f"hold fewer than batch_size {batch_size} each",
                stacklevel=2,
            )
        self._batches: list[list[int]] = []

    def batch(self, step: int) -> list[int]:
        """This rank's sample numbers of step `step`."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            order = torch.randperm(self.n, generator=step_generator(self.seed, -1 - epoch)).numpy()
            self._batches = bucket_batches(order, self.bucket_N, self.batch_size)
            self._epoch = epoch
        return self._batches[position][self.rank :: self.world]


def fit_to_bucket(picture: Image.Image, bucket: Bucket) -> Tensor:
    """uint8 [3, height, width]: the picture scaled with its aspect kept until it covers the bucket, its centre cut out.

    Appendix A.5's crop. (The authors' script that extracts features offline squeezes instead, which this follows not.)
    """
    width, height = picture.size
    scale = min(width / bucket.width, height / bucket.height)
    crop_width, crop_height = bucket.width * scale, bucket.height * scale
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    # Cutting out while scaling never makes the whole scaled picture.
    box = (left, top, min(left + crop_width, width), min(top + crop_height, height))
    fitted = picture.convert("RGB").resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(fitted).transpose(2, 0, 1).copy())
