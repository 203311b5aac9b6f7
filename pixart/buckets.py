"""Aspect-ratio buckets (appendix A.5): tables of image sizes, the nearest one, batches of one bucket, crops to fit.

A ratio is height / width. The authors' 40 sizes have areas close to base x base, sides that are whole sixteenths of the
base side, and ratios 0.25 to 4.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Sampler

from common.data.sampling import step_generator
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


def usable_shapes(sizes_N2: Tensor | np.ndarray, limit: float = MAX_RATIO) -> np.ndarray:
    """Indices of the images that are at most `limit` times as long as wide; a warning counts the others."""
    sizes = np.asarray(sizes_N2, dtype=np.float64).reshape(-1, 2)
    if not (sizes > 0).all():
        raise UserError("image sizes must be positive")
    kept = np.flatnonzero(sizes.max(axis=1) <= limit * sizes.min(axis=1))
    if len(kept) < len(sizes):
        warnings.warn(
            f"{len(sizes) - len(kept)} of {len(sizes)} images are left out: longer than {limit:g} times their width",
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


class BucketBatchSampler(Sampler[list[int]]):
    """For each step this rank's share of a global batch whose images all have one size.

    Like `common.data.sampling.StepBatchSampler` the order is a pure function of (seed, step): epoch e is the authors'
    bucketing (`bucket_batches`) of a permutation seeded by (seed, e), rank r of W takes every W-th sample from r on.

    Args:
        bucket_N: bucket of each sample of the data set (`assign_buckets`).
        batch_size: samples of one global batch (all ranks together); must be divisible by `world`.
        steps: total number of steps of the run.
        start: called when iteration begins; returns the step to begin with (the restored `global_step`).
        leftovers: "drop" leaves out, epoch by epoch, what does not fill a batch (the authors' training); "emit" makes
            smaller batches of it, topped up to a multiple of `world` by repeating their own samples.
        samples: the sample numbers to use (default all), for instance those of `usable_shapes`.
    """

    def __init__(
        self,
        bucket_N: Sequence[int] | np.ndarray | Tensor,
        batch_size: int,
        steps: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start: Callable[[], int] = lambda: 0,
        leftovers: Literal["drop", "emit"] = "drop",
        samples: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise UserError(
                f"batch_size {batch_size} (all processes together) cannot be divided among {world} processes"
            )
        self.bucket_N = np.asarray(bucket_N, dtype=np.int64)
        self.samples = np.arange(len(self.bucket_N)) if samples is None else np.asarray(samples, dtype=np.int64)
        if not len(self.samples):
            raise UserError("the data set is empty")
        self.batch_size, self.steps, self.seed = batch_size, steps, seed
        self.rank, self.world, self.start, self.leftovers = rank, world, start, leftovers
        counts = np.bincount(self.bucket_N[self.samples])
        self.batches_per_epoch = int((counts // batch_size).sum())
        small = counts[(counts > 0) & (counts < batch_size)]
        if leftovers == "emit":
            self.batches_per_epoch = int(np.ceil(counts / batch_size).sum())
        elif self.batches_per_epoch == 0:
            raise UserError(
                f"no aspect bucket holds {batch_size} images (the fullest has {int(counts.max())}): use a smaller "
                "batch_size or fewer buckets"
            )
        elif len(small):
            warnings.warn(
                f"{int(small.sum())} of {len(self.samples)} images are never used: their {len(small)} aspect buckets "
                f"hold fewer than batch_size {batch_size} each",
                stacklevel=2,
            )
        self._epoch = -1
        self._batches: list[list[int]] = []

    def global_batch(self, step: int) -> list[int]:
        """Sample numbers of step `step` over all ranks."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            generator = step_generator(self.seed, -1 - epoch)
            order = self.samples[torch.randperm(len(self.samples), generator=generator).numpy()]
            self._batches = bucket_batches(order, self.bucket_N, self.batch_size, self.leftovers == "drop")
            self._epoch = epoch
        batch = self._batches[position]
        missing = -len(batch) % self.world
        return batch + [batch[i % len(batch)] for i in range(missing)]

    def batch(self, step: int) -> list[int]:
        """This rank's sample numbers of step `step`."""
        return self.global_batch(step)[self.rank :: self.world]

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start(), self.steps):
            yield self.batch(step)

    def __len__(self) -> int:
        return self.steps


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
