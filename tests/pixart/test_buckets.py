"""Aspect buckets: tables, assignment, batches of one size, crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pixart.buckets import (
    Bucket,
    BucketBatchSampler,
    assign_buckets,
    bucket_batches,
    bucket_table,
    fit_to_bucket,
    nearest_bucket,
    usable_shapes,
)

BUCKET_N = np.random.default_rng(0).choice(5, size=103, p=[0.5, 0.2, 0.2, 0.08, 0.02])


@pytest.mark.parametrize(("base", "multiple"), [(32, 4), (32, 8), (64, 8), (64, 16), (256, 16), (1024, 64)])
def test_scaled_tables_have_divisible_sides_and_nearly_the_square_s_area(base: int, multiple: int) -> None:
    table = bucket_table(base, multiple)
    assert any((b.height, b.width) == (base, base) for b in table)
    assert len({(b.height, b.width) for b in table}) == len(table)
    for bucket in table:
        assert bucket.height % multiple == 0 and bucket.width % multiple == 0
        assert 0.25 <= bucket.height / bucket.width <= 4
        assert abs(bucket.ratio - bucket.height / bucket.width) < 0.006
        # A side is off by half a multiple at most.
        assert 0.7 < bucket.height * bucket.width / base**2 < 1.35
    assert [b.ratio for b in table] == sorted(b.ratio for b in table)


def test_small_base_still_has_wide_and_tall_sizes() -> None:
    sizes = {(b.height, b.width) for b in bucket_table(32, 4)}
    assert {(16, 64), (64, 16), (24, 40), (40, 24)} <= sizes


def test_inference_table_leaves_out_seven_sizes() -> None:
    assert len(bucket_table(512)) == 40
    assert len(bucket_table(512, inference=True)) == 33


def test_base_sides_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="divisible by 16"):
        bucket_table(100)
    with pytest.raises(UserError, match="divisible by 24"):
        bucket_table(64, 24)


def test_first_bucket_wins_a_tie() -> None:
    table = (Bucket(0.5, 1, 2), Bucket(1.0, 1, 1), Bucket(1.5, 3, 2))
    assert nearest_bucket(table, 3, 4) == 0
    assert assign_buckets(table, np.array([[3, 4], [5, 4], [300, 100]])).tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="positive"):
        nearest_bucket(table, 0, 4)


def test_too_long_images_are_left_out_with_a_count() -> None:
    sizes = np.array([[100, 100], [100, 401], [401, 100], [400, 100]])
    with pytest.warns(UserWarning, match="2 of 4 images"):
        assert usable_shapes(sizes).tolist() == [0, 3]


def _streamed(order: list[int], bucket_N: np.ndarray, size: int, drop: bool) -> list[list[int]]:
    """The definition: fill the buckets in order, give out each one when it is full."""
    waiting: dict[int, list[int]] = {}
    batches = []
    for sample in order:
        bucket = waiting.setdefault(int(bucket_N[sample]), [])
        bucket.append(sample)
        if len(bucket) == size:
            batches.append(list(bucket))
            bucket.clear()
    return batches + ([] if drop else [waiting[b] for b in sorted(waiting) if waiting[b]])


@pytest.mark.parametrize("drop", [True, False])
def test_batches_come_out_in_the_order_in_which_buckets_fill(drop: bool) -> None:
    order = torch.randperm(103).tolist()
    assert bucket_batches(order, BUCKET_N, 4, drop) == _streamed(order, BUCKET_N, 4, drop)


def test_rare_buckets_can_be_left_out() -> None:
    kept = {s for batch in bucket_batches(range(103), BUCKET_N, 4, False, valid_num=15) for s in batch}
    assert kept == {s for s in range(103) if np.bincount(BUCKET_N)[BUCKET_N[s]] >= 15}


def test_resumed_sampler_continues_exactly() -> None:
    whole = list(BucketBatchSampler(BUCKET_N, 4, 70, seed=5))
    resumed = list(BucketBatchSampler(BUCKET_N, 4, 70, seed=5, start=lambda: 33))
    assert whole[33:] == resumed
    assert whole != list(BucketBatchSampler(BUCKET_N, 4, 70, seed=6))
    assert all(len({int(BUCKET_N[s]) for s in batch}) == 1 for batch in whole)


def test_ranks_share_each_batch_and_an_epoch_has_no_repetition() -> None:
    samplers = [BucketBatchSampler(BUCKET_N, 4, 10, seed=1, rank=r, world=2) for r in range(2)]
    reference = BucketBatchSampler(BUCKET_N, 4, 10, seed=1)
    seen: list[int] = []
    for step in range(reference.batches_per_epoch):
        shares = [sampler.batch(step) for sampler in samplers]
        assert [len(share) for share in shares] == [2, 2]
        assert sorted(shares[0] + shares[1]) == sorted(reference.batch(step))
        seen += reference.batch(step)
    assert len(seen) == len(set(seen))


def test_buckets_smaller_than_a_batch_are_reported() -> None:
    rare = np.array([0] * 20 + [1] * 3)
    with pytest.warns(UserWarning, match="3 of 23 images are never used"):
        BucketBatchSampler(rare, 4, 10, seed=0)
    with pytest.raises(UserError, match="the fullest has 20"):
        BucketBatchSampler(rare, 32, 10, seed=0)
    with pytest.raises(UserError, match="divided among 3 processes"):
        BucketBatchSampler(rare, 4, 10, seed=0, world=3)


def test_fitting_keeps_the_aspect_and_cuts_the_centre_out() -> None:
    # A 60 x 120 picture, 3 bands of 40 columns; the square bucket sees columns 30..90: 10 red, 40 green, 10 blue.
    pixels = np.zeros((60, 120, 3), np.uint8)
    for band in range(3):
        pixels[:, 40 * band : 40 * (band + 1), band] = 255
    fitted = fit_to_bucket(Image.fromarray(pixels), Bucket(1.0, 30, 30))
    assert fitted.shape == (3, 30, 30) and fitted.dtype == torch.uint8
    assert fitted.argmax(0)[15].tolist() == [0] * 5 + [1] * 20 + [2] * 5


def test_fitting_enlarges_small_pictures() -> None:
    assert fit_to_bucket(Image.new("L", (5, 9), 255), Bucket(0.5, 16, 32)).float().mean() == 255
