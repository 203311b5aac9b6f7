"""Augmented batches: what is done to a picture, and batches as a function of (seed, step)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.data import classes
from common.data.augmentation import (
    Augmentation,
    Batches,
    _jittered,
    _padded_crop,
    _resized_crop,
    cutout_mask,
    evaluation_batches,
)
from common.data.classes import ImageSet, InMemory, OnDisk, open_classes
from common.errors import UserError
from tests.common.test_classes import class_folder


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return open_classes("digits", 8)


def test_cutout_blanks_a_square_clipped_at_the_border() -> None:
    mask = cutout_mask(32, 32, 16, 16, 16)
    assert mask.sum() == 32 * 32 - 16 * 16 and mask[8, 8] == 0 and mask[24, 24] == 1 and mask[7, 8] == 1
    corner = cutout_mask(32, 32, 0, 31, 16)
    assert (corner == 0).sum() == 8 * 9 and corner[0, 31] == 0
    assert cutout_mask(8, 8, 3, 3, 0).min() == 1


def test_padded_crop_moves_a_picture_by_its_corner() -> None:
    x = torch.arange(2 * 1 * 4 * 4).float().view(2, 1, 4, 4)
    moved = _padded_crop(x, 1, 0.5, torch.tensor([[1, 1], [0, 2]]))
    assert torch.equal(moved[0], x[0])
    assert torch.equal(moved[1, 0, 1:, :3], x[1, 0, :3, 1:])
    assert (moved[1, 0, 0] == 0.5).all() and (moved[1, 0, :, 3] == 0.5).all()


def test_resized_crop_of_the_whole_area_is_the_picture() -> None:
    x = torch.rand(3, 16, 16)
    torch.testing.assert_close(_resized_crop(x, 16, 1.0, [0.3, 0.5, 0.2, 0.9]), x)
    small = _resized_crop(x, 8, 0.08, [0.0, 0.5, 0.0, 0.0])
    assert small.shape == (3, 8, 8) and not torch.equal(small, _resized_crop(x, 8, 0.08, [0.0, 0.5, 0.9, 0.9]))


def test_jitter_of_no_strength_changes_nothing_and_hue_keeps_greys() -> None:
    x = torch.rand(4, 3, 6, 6)
    draw = torch.rand(4, 4) * 2 - 1
    torch.testing.assert_close(_jittered(x, (0, 0, 0, 0), draw), x, atol=1e-5, rtol=0)
    grey = torch.rand(4, 1, 6, 6).expand(-1, 3, -1, -1)
    torch.testing.assert_close(_jittered(grey, (0, 0, 0.4, 0.5), draw), grey, atol=1e-4, rtol=0)
    assert not torch.allclose(_jittered(x, (0, 0, 0, 0.5), draw), x, atol=0.05)


def test_batches_are_a_function_of_seed_and_step(digits: ImageSet) -> None:
    augment = Augmentation(padding=1, flip=True, cutout=2)
    one, same = (Batches(digits, digits.train, 32, 5, augment) for _ in range(2))
    far = one.batch(70)
    one.batch(3)
    for a, b in zip(far, same.batch(70)):
        assert torch.equal(a, b)
    assert not torch.equal(far[0], Batches(digits, digits.train, 32, 6, augment).batch(70)[0])


def test_an_epoch_shows_every_picture_at_most_once(digits: ImageSet) -> None:
    batches = Batches(digits, digits.train, 100, 0, Augmentation())
    seen = torch.cat([batches.indices(step) for step in range(batches.steps_per_epoch)])
    assert len(seen) == len(seen.unique()) == 1300
    assert not torch.equal(batches.indices(0), batches.indices(batches.steps_per_epoch))


def test_two_processes_share_the_batch_of_one(digits: ImageSet) -> None:
    augment = Augmentation(padding=2, flip=True, cutout=4)
    whole_x, whole_y = Batches(digits, digits.train, 32, 1, augment).batch(9)
    for rank in range(2):
        x, y = Batches(digits, digits.train, 32, 1, augment, rank, 2).batch(9)
        assert torch.equal(x, whole_x[rank::2]) and torch.equal(y, whole_y[rank::2])
    with pytest.raises(UserError, match="cannot be divided among 3"):
        Batches(digits, digits.train, 32, 1, augment, 0, 3)


def test_evaluation_sees_all_test_pictures_in_order_and_normalised(digits: ImageSet) -> None:
    parts = list(evaluation_batches(digits, digits.test, 64))
    assert torch.equal(torch.cat([y for _, y in parts]), digits.test.labels_N)
    x = torch.cat([x for x, _ in parts])
    assert abs(float(x.mean())) < 0.05 and abs(float(x.std()) - 1) < 0.05


def test_more_batch_than_pictures_is_refused(digits: ImageSet) -> None:
    with pytest.raises(UserError, match="fewer than a batch of 5000"):
        Batches(digits, digits.train, 5000, 0, Augmentation())


def test_pictures_on_disk_give_the_batches_of_pictures_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))
    root = class_folder(tmp_path / "set", {"a": 12, "b": 12}, side=30)
    memory = open_classes("folder", 14, str(root), margin=True)
    monkeypatch.setattr(classes, "MEMORY_LIMIT", 0)
    disk = open_classes("folder", 14, str(root), margin=True)
    assert isinstance(memory.train.source, InMemory) and isinstance(disk.train.source, OnDisk)
    assert memory.train.source.images_NCHW.shape[-1] == 16  # 14 * 256 / 224
    augment = Augmentation(padding=4, flip=True, resized_crop=0.3, jitter=(0.4, 0.4, 0.4, 0.2))
    one = list(Batches(memory, memory.train, 8, 0, augment).run(1, 4))
    two = list(Batches(disk, disk.train, 8, 0, augment).run(1, 4))
    assert len(one) == len(two) == 3
    for (x, y), (u, v) in zip(one, two):
        assert torch.equal(x, u) and torch.equal(y, v) and x.shape == (8, 3, 14, 14)


@pytest.mark.parametrize("options", [{"padding": -1}, {"cutout": -1}, {"resized_crop": 1.5}])
def test_strengths_that_mean_nothing_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"must not be negative, data\.resized_crop must be in"):
        Augmentation(**options)  # type: ignore[arg-type]
