"""Sets of pictures with classes, and their splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.classes import ImageSet, InMemory, draw_textures, open_classes, per_class_sample
from tests.refusals import refused


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return open_classes("digits", 8)


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


def test_imagenet_sampling_takes_ten_and_two_and_a_half_percent_of_each_class() -> None:
    labels = torch.arange(20).repeat_interleave(200)
    weights, alphas = per_class_sample(labels, [0.1, 0.025], 3)
    assert labels[weights].bincount().tolist() == [20] * 20
    assert labels[alphas].bincount().tolist() == [5] * 20
    assert not set(weights.tolist()) & set(alphas.tolist())
    again, _ = per_class_sample(labels, [0.1, 0.025], 3)
    other, _ = per_class_sample(labels, [0.1, 0.025], 4)
    assert torch.equal(weights, again) and not torch.equal(weights, other)
    refused("sum to at most 1", per_class_sample, labels, [0.9, 0.2], 0)


def test_shares_that_sum_to_one_leave_no_picture_out() -> None:
    labels = torch.randint(7, (997,))
    parts = per_class_sample(labels, [0.3, 0.3, 0.4], 0)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(997))


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


def test_class_folders_with_and_without_a_test_folder(own_cache: None, tmp_path: Path) -> None:
    plain = class_folder(tmp_path / "plain", {"cat": 12, "dog": 24})
    data = open_classes("folder", 16, str(plain), validation=0.2)
    assert data.classes == ("cat", "dog") and len(data.test) == 6 and len(data.train) + len(data.validation) == 30
    assert isinstance(data.train.source, InMemory) and data.train.source.images_NCHW.shape[1:] == (3, 16, 16)
    used = [set(part.index_N.tolist()) for part in (data.train, data.validation, data.test)]
    assert len(set.union(*used)) == sum(map(len, used)) == 36, "no picture is in two parts"
    class_folder(tmp_path / "only" / "train", {"cat": 12, "dog": 24})
    assert open_classes("folder", 16, str(tmp_path / "only")).classes == ("cat", "dog"), "train is a split, no class"
    split = tmp_path / "split"
    for name, count in (("train", 10), ("val", 4)):
        class_folder(split / name, {"cat": count, "dog": count})
    data = open_classes("folder", 16, str(split))
    assert len(data.test) == 8 and len(data.train) + len(data.validation) == 20
    (split / "val" / "dog").rename(split / "val" / "fox")
    refused(r"its classes differ .*dog, fox", open_classes, "folder", 16, str(split))


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
    data = open_classes(name, 32, str(tmp_path / "set"), validation=0.25)  # type: ignore[arg-type]
    assert len(data.classes) == classes and len(data.test) == 40
    assert len(data.train) + len(data.validation) == (200 if name == "cifar10" else 40)
    row = np.fromfile(tmp_path / "set" / ("test_batch.bin" if head == 1 else "test.bin"), np.uint8)[: head + 3072]
    assert isinstance(data.test.source, InMemory)
    assert data.test.source.images_NCHW[0].flatten().tolist() == row[head:].tolist()


def test_truncated_and_pickled_cifar_are_refused(tmp_path: Path) -> None:
    cifar_files(tmp_path / "set", "cifar10", 1)
    (tmp_path / "set" / "test_batch.bin").write_bytes(b"123")
    whole = r"test_batch.bin: 3 bytes are no whole number of rows of 3073"
    refused(whole, open_classes, "cifar10", 32, str(tmp_path / "set"))
    (tmp_path / "set" / "data_batch_3.bin").unlink()
    absent = r"data_batch_3\.bin: no such file; expected the binary version"
    refused(absent, open_classes, "cifar10", 32, str(tmp_path / "set"))


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
def test_options_that_make_no_set_are_refused(options: dict[str, Any], sentence: str) -> None:
    refused(sentence, open_classes, **{"name": "emoji", "size": 32, **options})


def test_small_subset_keeps_all_classes() -> None:
    data = open_classes("digits", 8, images=200)
    assert 195 <= len(data.train) + len(data.validation) <= 205
    assert len(data.train.labels_N.unique()) == 10


def test_classes_without_pictures_and_sets_that_are_too_small_are_refused_at_once(
    own_cache: None, tmp_path: Path
) -> None:
    root = class_folder(tmp_path / "small", {"cat": 12, "dog": 3})
    few = r"2 pictures of dog are too few to hold a sixth out; give at least 4 a class"
    next((root / "dog").iterdir()).unlink()
    refused(few, open_classes, "folder", 16, str(root))
    (root / "emu").mkdir()
    refused(r"emu: the folder of a class holds no picture", open_classes, "folder", 16, str(root))
    four = class_folder(tmp_path / "four", {"cat": 4, "dog": 4})
    refused("too few pictures: none of any class is left for validation", open_classes, "folder", 16, str(four))
    assert len(open_classes("folder", 16, str(four), validation=0.3).validation) == 2


def test_numbered_classes_of_a_table_are_read(own_cache: None, tmp_path: Path) -> None:
    root = class_folder(tmp_path / "own", {"cat": 12, "dog": 12})
    files = sorted(file.relative_to(root) for file in root.rglob("*.png"))
    lines = ["path,score,kind", *(f"{file},{i},{int(file.parent.name == 'dog')}" for i, file in enumerate(files))]
    (root / "list.csv").write_text("\n".join(lines))
    data = open_classes("folder", 16, str(root / "list.csv"), label_column="kind")
    assert data.classes == ("class 0", "class 1") and data.test.labels_N.bincount().tolist() == [2, 2]
