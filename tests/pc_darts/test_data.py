"""Data sets, splits, augmentation and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pc_darts.config import DataConfig
from pc_darts.data import (
    Augmentation,
    Batches,
    ImageSet,
    InMemory,
    OnDisk,
    _jittered,
    _padded_crop,
    _resized_crop,
    cutout_mask,
    draw_textures,
    evaluation_batches,
    open_data,
    per_class_sample,
    search_halves,
)

DIGITS = DataConfig(name="digits", size=8, padding=1, flip=False)


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return open_data(DIGITS)


def class_folder(root: Path, classes: dict[str, int], side: int = 20) -> Path:
    """A folder of flat pictures, one colour a class."""
    rng = np.random.default_rng(0)
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = np.full((side, side + 4, 3), 40 * number, np.uint8) + rng.integers(0, 20, (1, 1, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.png")
    return root


def test_splits_are_disjoint_complete_and_keep_every_class(digits: ImageSet) -> None:
    assert len(digits.train) + len(digits.validation) + len(digits.test) == 1797
    assert not set(digits.train.index_N.tolist()) & set(digits.validation.index_N.tolist())
    for part in (digits.train, digits.validation, digits.test):
        assert sorted(part.labels_N.unique().tolist()) == list(range(10))


def test_search_halves_share_no_picture_and_use_all(digits: ImageSet) -> None:
    weights, alphas = search_halves(digits.train, [0.5, 0.5], 0)
    first, second = set(weights.index_N.tolist()), set(alphas.index_N.tolist())
    assert not first & second
    assert first | second == set(digits.train.index_N.tolist())
    assert abs(len(weights) - len(alphas)) <= 10
    with pytest.raises(UserError, match="expected two shares"):
        search_halves(digits.train, [0.5], 0)


def test_imagenet_sampling_takes_ten_and_two_and_a_half_percent_of_each_class() -> None:
    labels = torch.arange(20).repeat_interleave(200)
    weights, alphas = per_class_sample(labels, [0.1, 0.025], 3)
    assert labels[weights].bincount().tolist() == [20] * 20
    assert labels[alphas].bincount().tolist() == [5] * 20
    assert not set(weights.tolist()) & set(alphas.tolist())
    again, _ = per_class_sample(labels, [0.1, 0.025], 3)
    other, _ = per_class_sample(labels, [0.1, 0.025], 4)
    assert torch.equal(weights, again) and not torch.equal(weights, other)
    with pytest.raises(UserError, match="sum to at most 1"):
        per_class_sample(labels, [0.9, 0.2], 0)


def test_shares_that_sum_to_one_leave_no_picture_out() -> None:
    labels = torch.randint(7, (997,))
    parts = per_class_sample(labels, [0.3, 0.3, 0.4], 0)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(997))


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


def test_textures_are_balanced_repeatable_and_differ_between_seeds() -> None:
    images, labels = draw_textures(50, 16, 0)
    assert images.shape == (50, 3, 16, 16) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [5] * 10
    assert torch.equal(images, draw_textures(50, 16, 0)[0]) and not torch.equal(images, draw_textures(50, 16, 1)[0])


def test_grain_of_a_texture_shows_in_the_object_at_pixel_distance() -> None:
    images, labels = draw_textures(400, 32, 0)
    centre = images[:, :, 12:20, 12:20].double()
    change = (centre.diff(dim=3).abs().mean((1, 2, 3)) + centre.diff(dim=2).abs().mean((1, 2, 3))) / 2
    disc_or_square = labels < 4
    fine, coarse = (change[disc_or_square & (labels % 2 == grain)].mean() for grain in (0, 1))
    assert fine > 1.3 * coarse


def test_class_folders_with_and_without_a_test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))
    plain = class_folder(tmp_path / "plain", {"cat": 12, "dog": 24})
    data = open_data(DataConfig(name="folder", path=str(plain), size=16, validation=0.2))
    assert data.classes == ("cat", "dog") and len(data.test) == 6 and len(data.train) + len(data.validation) == 30
    assert isinstance(data.train.source, InMemory) and data.train.source.images_NCHW.shape[1:] == (3, 16, 16)
    split = tmp_path / "split"
    for name, count in (("train", 10), ("val", 4)):
        class_folder(split / name, {"cat": count, "dog": count})
    data = open_data(DataConfig(name="folder", path=str(split), size=16))
    assert len(data.test) == 8 and len(data.train) + len(data.validation) == 20
    (split / "val" / "dog").rename(split / "val" / "fox")
    with pytest.raises(UserError, match=r"its classes differ .*dog, fox"):
        open_data(DataConfig(name="folder", path=str(split), size=16))


def test_pictures_on_disk_give_the_batches_of_pictures_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))
    root = class_folder(tmp_path / "set", {"a": 12, "b": 12}, side=30)
    config = DataConfig(name="folder", path=str(root), size=14, resized_crop=0.3, jitter=[0.4, 0.4, 0.4, 0.2])
    memory = open_data(config)
    monkeypatch.setattr("pc_darts.data.MEMORY_LIMIT", 0)
    disk = open_data(config)
    assert isinstance(memory.train.source, InMemory) and isinstance(disk.train.source, OnDisk)
    assert memory.train.source.images_NCHW.shape[-1] == 16  # 14 * 256 / 224
    augment = Augmentation.of(config)
    one = list(Batches(memory, memory.train, 8, 0, augment).run(1, 4))
    two = list(Batches(disk, disk.train, 8, 0, augment).run(1, 4))
    assert len(one) == len(two) == 3
    for (x, y), (u, v) in zip(one, two):
        assert torch.equal(x, u) and torch.equal(y, v) and x.shape == (8, 3, 14, 14)


def cifar_files(root: Path, name: str, head: int) -> None:
    root.mkdir()
    rng = np.random.default_rng(0)
    files = {"cifar10": [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]}
    files["cifar100"] = ["train.bin", "test.bin"]
    for file in files[name]:
        rows = rng.integers(0, 256, (40, head + 3072), np.uint8)
        rows[:, :head] = np.arange(40)[:, None] % 10
        rows.tofile(root / file)


@pytest.mark.parametrize(("name", "head", "classes"), [("cifar10", 1, 10), ("cifar100", 2, 100)])
def test_binary_cifar_is_read(tmp_path: Path, name: str, head: int, classes: int) -> None:
    cifar_files(tmp_path / "set", name, head)
    data = open_data(DataConfig(name=name, path=str(tmp_path / "set")))  # type: ignore[arg-type]
    assert len(data.classes) == classes and len(data.test) == 40
    assert len(data.train) + len(data.validation) == (200 if name == "cifar10" else 40)
    row = np.fromfile(tmp_path / "set" / ("test_batch.bin" if head == 1 else "test.bin"), np.uint8)[: head + 3072]
    assert isinstance(data.test.source, InMemory)
    assert data.test.source.images_NCHW[0].flatten().tolist() == row[head:].tolist()


def test_truncated_and_pickled_cifar_are_refused(tmp_path: Path) -> None:
    cifar_files(tmp_path / "set", "cifar10", 1)
    (tmp_path / "set" / "test_batch.bin").write_bytes(b"123")
    with pytest.raises(UserError, match=r"test_batch.bin: 3 bytes are no whole number of rows of 3073"):
        open_data(DataConfig(name="cifar10", path=str(tmp_path / "set")))
    (tmp_path / "set" / "data_batch_3.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_3\.bin: no such file; expected the binary version"):
        open_data(DataConfig(name="cifar10", path=str(tmp_path / "set")))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "cifar10"}, "needs --data.path"),
        ({"name": "folder"}, "needs --data.path"),
        ({"name": "folder", "path": "nowhere"}, "data.path nowhere: no such folder"),
        ({"validation": 0.0}, "data.validation 0.0: expected a share"),
        ({"size": 4}, "data.size 4: pictures need at least 8 pixels"),
    ],
)
def test_options_that_make_no_set_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        open_data(DataConfig(**options))  # type: ignore[arg-type]


def test_small_subset_keeps_all_classes() -> None:
    data = open_data(DataConfig(name="digits", size=8, images=200))
    assert 195 <= len(data.train) + len(data.validation) <= 205
    assert len(data.train.labels_N.unique()) == 10
