"""Fashion-MNIST: idx files are checked, padded and split; nothing here needs the real package but the last test."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from common.data.fashion_mnist import CLASSES, FashionMNIST, read_idx
from common.errors import UserError


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 12), ("t10k", 5)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        labels = (np.arange(n) % 10).astype(np.uint8)
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


def test_items_carry_image_class_name_and_label(folder: Path) -> None:
    data = FashionMNIST("test", folder)
    assert len(data) == 5 and data.images.shape == (5, 1, 28, 28) and data.images.dtype == torch.uint8
    assert data[3]["label"] == 3 and data[3]["caption"] == CLASSES[3] == "a dress"
    raw = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    np.testing.assert_array_equal(data[3]["image"].numpy().ravel(), raw[3 * 784 : 4 * 784])
    assert len(FashionMNIST("train", folder, first=7)) == 7


def test_padding_puts_the_picture_in_the_middle_of_black(folder: Path) -> None:
    plain, padded = FashionMNIST("train", folder), FashionMNIST("train", folder, pad_to=32)
    assert padded.images.shape == (12, 1, 32, 32)
    assert torch.equal(padded.images[..., 2:30, 2:30], plain.images)
    assert padded.images.sum() == plain.images.sum()
    assert plain.fingerprint != padded.fingerprint
    with pytest.raises(UserError, match="pad_to=20"):
        FashionMNIST("train", folder, pad_to=20)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0", "too few for an idx header"),
        (struct.pack(">4I", 2049, 2, 28, 28) + bytes(2 * 784), "magic number 2049, expected 2051"),
        (struct.pack(">4I", 2051, 2, 28, 28) + bytes(2 * 784 - 1), "asks for 1584"),
        (struct.pack(">4I", 2051, 2, 28, 28) + bytes(2 * 784 + 1), "asks for 1584"),
    ],
)
def test_bad_idx_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_idx(path, 3)


def test_truncated_gzip_and_wrong_labels_are_refused(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a whole gzip file"):
        FashionMNIST("train", folder)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.full(5, 10, np.uint8))))
    with pytest.raises(UserError, match="label 10 found"):
        FashionMNIST("test", folder)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(4, np.uint8))))
    with pytest.raises(UserError, match="5 images but 4 labels"):
        FashionMNIST("test", folder)


def test_missing_data_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make data-fashion-mnist"):
        FashionMNIST("train", tmp_path)


def test_real_package_has_the_published_counts() -> None:
    try:
        train, test = FashionMNIST("train"), FashionMNIST("test")
    except UserError as error:
        pytest.skip(f"Fashion-MNIST is not here: {error}")
    assert torch.bincount(train.labels).tolist() == [6000] * 10
    assert torch.bincount(test.labels).tolist() == [1000] * 10
    assert abs(train.images.float().mean().item() / 255 - 0.2860) < 1e-3  # the published mean grey level
