"""Pictures with classes: the sets and their splits. What happens to a training picture is in `augmentation.py`.

Shape suffixes: N pictures, B batch, C channels, H W sides in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from common.data.cache import fingerprint_strings, fingerprint_tensors
from common.data.lines import read_text
from common.data.sampling import derive_seed, step_generator
from common.errors import UserError
from common.paths import existing_path

SetName = Literal["emoji", "digits", "textures", "fashion-mnist", "cifar10", "cifar100", "folder"]
# Pictures that would take more than this are decoded when a batch needs them, not kept in memory.
MEMORY_LIMIT = 2 * 2**30
# ImageNet's resize: pictures are kept at 256/224 of the training size and cut (at random, or in the middle) from there.
MARGIN = 256 / 224


class Source(Protocol):
    """Pictures of one size, by index."""

    def __len__(self) -> int: ...
    def take(self, index_B: Tensor) -> Tensor:
        """uint8 [B, C, S, S]."""
        ...


@dataclass(frozen=True)
class InMemory:
    """All pictures as one uint8 tensor [N, C, S, S]."""

    images_NCHW: Tensor

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def take(self, index_B: Tensor) -> Tensor:
        return self.images_NCHW[index_B]


class OnDisk:
    """Pictures of a folder, decoded by several threads when a batch needs them."""

    def __init__(self, images: Dataset[dict[str, Any]], threads: int = 16) -> None:
        self.images = images
        self._pool = ThreadPoolExecutor(threads)

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def take(self, index_B: Tensor) -> Tensor:
        items = self._pool.map(self.images.__getitem__, index_B.tolist())
        return torch.stack([item["image"] for item in items])


@dataclass(frozen=True)
class Pictures:
    """A part of a data set: positions in its source, and the labels of these positions.

    index_N: int64 positions in `source`; labels_N: int64 classes of the same pictures.
    """

    source: Source
    index_N: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.index_N)

    def part(self, chosen_M: Tensor) -> Pictures:
        """The pictures at positions `chosen_M` of this part."""
        return Pictures(self.source, self.index_N[chosen_M], self.labels_N[chosen_M])


@dataclass(frozen=True)
class ImageSet:
    """A classification set: `train` for searching and training, `validation` for choosing, `test` for reporting.

    mean_C, std_C: of the training pictures, in [0, 1]. size: side at which networks see the pictures.
    background: value 0..1 around the pictures, for padded crops.
    contents: fingerprint of what was read.
    """

    name: str
    classes: tuple[str, ...]
    train: Pictures
    validation: Pictures
    test: Pictures
    mean_C: Tensor
    std_C: Tensor
    size: int
    background: float
    contents: str

    @property
    def channels(self) -> int:
        return len(self.mean_C)

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise UserError(f"{self.name}: {len(self.classes)} class; classification needs at least two")


def per_class_sample(labels_N: Tensor, shares: Sequence[float], seed: int) -> list[Tensor]:
    """Disjoint random subsets with the given share of every class (ImageNet search: 0.10 and 0.025).

    Args:
        labels_N: int64 classes.
        shares: positive, with sum at most 1.

    Returns:
        int64 positions, sorted, one tensor a share.

    Raises:
        UserError: shares that are not positive or sum to more than 1.
    """
    if not shares or min(shares) <= 0 or sum(shares) > 1 + 1e-9:
        raise UserError(f"shares {list(shares)}: expected positive numbers that sum to at most 1")
    found: list[list[Tensor]] = [[] for _ in shares]
    for label in labels_N.unique().tolist():
        members = torch.nonzero(labels_N == label).squeeze(1)
        members = members[torch.randperm(len(members), generator=step_generator(seed, label))]
        # Borders are rounded, not counts, so that shares that sum to 1 leave nobody out.
        edges = [round(sum(shares[:k]) * len(members)) for k in range(len(shares) + 1)]
        for k, part in enumerate(found):
            part.append(members[edges[k] : edges[k + 1]])
    return [torch.cat(part).sort().values for part in found]


@dataclass(frozen=True)
class _Request:
    name: SetName
    size: int
    path: str | None
    margin: bool
    image_column: str | None = None
    label_column: str | None = None


def open_classes(
    name: SetName,
    size: int,
    path: str | None = None,
    *,
    images: int | None = None,
    validation: float = 0.1,
    margin: bool = False,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSet:
    """A set with its splits.

    Args:
        name: emoji (EmojiGroups, embedded, 9 classes), digits (scikit-learn, 8 px grey), textures (procedural shape x
            texture), fashion-mnist (`make data-fashion-mnist`), cifar10 or cifar100 (binary version, `path`), or
            folder (`path`: one subfolder per class, optionally below train/ and test/, or a table with labels).
        size: side of the square pictures in pixels.
        images: at most so many training pictures, a share of every class; None takes all.
        validation: share of the training pictures held out for choosing; `seed` decides which.
        margin: keep a folder's pictures at 256/224 of `size`, for random resized crops.
        image_column, label_column: of a table; None finds them.

    Raises:
        UserError: files are missing or broken, or the options do not fit the set.
    """
    if not 0 < validation < 1:
        raise UserError(f"data.validation {validation}: expected a share between 0 and 1")
    if size < 8:
        raise UserError(f"data.size {size}: pictures need at least 8 pixels")
    readers: dict[SetName, Callable[[_Request], _Read]] = {
        "emoji": _emoji,
        "digits": _digits,
        "textures": _textures,
        "fashion-mnist": _fashion_mnist,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "folder": _folder,
    }
    read = readers[name](_Request(name, size, path, margin, image_column, label_column))
    train, test = read.train, read.test
    if images is not None and images < len(train):
        if images < 1:
            raise UserError(f"data.images {images}: expected at least one picture")
        # A share of every class, so that small subsets keep all classes.
        train = train.part(per_class_sample(train.labels_N, [images / len(train)], derive_seed(seed, 2))[0])
    if not len(train):
        raise UserError(f"data.images {images}: not one picture of any of the {len(read.classes)} classes is left")
    fitting, held_out = per_class_sample(train.labels_N, [1 - validation, validation], seed)
    lost = sorted(set(read.train.labels_N.tolist()) - set(train.labels_N[fitting].tolist()))
    if lost or not len(held_out):
        of = read.classes[lost[0]] if lost else "any class"
        raise UserError(
            f"{read.name}: too few pictures: none of {of} is left for {'training' if lost else 'validation'} "
            f"(data.validation {validation}, data.images {images}); give more, or other shares"
        )
    mean_C, std_C = _statistics(train)
    return ImageSet(
        read.name,
        read.classes,
        train.part(fitting),
        train.part(held_out),
        test,
        mean_C,
        std_C,
        size,
        read.background,
        read.contents or fingerprint_strings([_fingerprint(read.train), _fingerprint(read.test)]),
    )


@dataclass(frozen=True)
class _Read:
    """What a reader found."""

    name: str
    classes: tuple[str, ...]
    train: Pictures
    test: Pictures
    background: float
    contents: str = ""  # fingerprint of the files, where they are not read into memory as they are


def _fingerprint(pictures: Pictures) -> str:
    assert isinstance(pictures.source, InMemory)
    return fingerprint_tensors({"images": pictures.source.images_NCHW, "labels": pictures.labels_N})


def _statistics(train: Pictures) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by channel, of at most 4096 training pictures spread over the set."""
    some = torch.linspace(0, len(train) - 1, min(len(train), 4096)).long()
    x = train.source.take(train.index_N[some]).double() / 255
    return x.mean((0, 2, 3)).float(), x.std((0, 2, 3), correction=0).clamp(min=1e-3).float()


def _pictures(images_NCHW: Tensor, labels_N: Tensor) -> Pictures:
    return Pictures(InMemory(images_NCHW.contiguous()), torch.arange(len(labels_N)), labels_N.long())


def _resized(images_NCHW: Tensor, size: int) -> Tensor:
    """uint8 pictures at another side, bilinear (smoothed when they shrink)."""
    if images_NCHW.shape[-1] == size:
        return images_NCHW
    x = F.interpolate(images_NCHW.float(), (size, size), mode="bilinear", antialias=True)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def _emoji(request: _Request) -> _Read:
    from common.data.emoji import EmojiGroups

    parts = []
    for split in ("train", "test"):
        read = EmojiGroups(split, size=request.size)  # type: ignore[arg-type]
        parts.append(_pictures(torch.from_numpy(read.images).permute(0, 3, 1, 2), torch.from_numpy(read.labels)))
    return _Read("EmojiGroups", EmojiGroups.class_names, parts[0], parts[1], 1.0)


def _digits(request: _Request) -> _Read:
    """1,797 handwritten digits of scikit-learn, 8 x 8, 17 grey levels; every sixth picture is for testing."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(np.rint(found.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(found.target)
    images = _resized(images, request.size)
    held_out = torch.arange(len(labels)) % 6 == 5
    parts = [_pictures(images[mask], labels[mask]) for mask in (~held_out, held_out)]
    return _Read("digits", tuple(str(digit) for digit in range(10)), parts[0], parts[1], 0.0)


TEXTURE_SHAPES = ("disc", "square", "triangle", "ring", "cross")
TEXTURE_GRAINS = ("fine", "coarse")
TEXTURE_TRAIN, TEXTURE_TEST = 5000, 1000


def _textures(request: _Request) -> _Read:
    classes = tuple(f"{grain} {shape}" for shape in TEXTURE_SHAPES for grain in TEXTURE_GRAINS)
    train = draw_textures(TEXTURE_TRAIN, request.size, seed=0)
    test = draw_textures(TEXTURE_TEST, request.size, seed=1)
    return _Read("textures", classes, _pictures(*train), _pictures(*test), 0.0)


def draw_textures(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Procedural pictures: five shapes filled with stripes of a fine or a coarse period, on a striped background.

    Telling the shapes apart takes a wide view, telling the periods apart a narrow one, so that kernel size matters.
    Place, size, direction, phase, colours and noise are random.

    Returns:
        uint8 [count, 3, size, size] and int64 labels [count], 2 x shape + grain, in equal numbers.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % (len(TEXTURE_SHAPES) * len(TEXTURE_GRAINS)))
    shape, grain = labels // 2, labels % 2

    def uniform(low: float, high: float, *more: int) -> np.ndarray:
        return rng.uniform(low, high, (count, *more)).astype(np.float32)

    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    y, x = axis[None, :, None], axis[None, None, :]
    cy, cx, radius = uniform(0.38, 0.62, 1, 1), uniform(0.38, 0.62, 1, 1), uniform(0.24, 0.38, 1, 1)
    v, u = (y - cy) / radius, (x - cx) / radius
    distance = np.sqrt(u * u + v * v)
    arm = 0.33
    masks = np.stack(
        [
            distance < 1,
            np.maximum(abs(u), abs(v)) < 0.85,
            (v < 0.75) & (2.0 * abs(u) < v + 1.0),
            (distance < 1) & (distance > 0.55),
            (np.minimum(abs(u), abs(v)) < arm) & (np.maximum(abs(u), abs(v)) < 1),
        ]
    )[shape, np.arange(count)]
    period = np.where(grain == 0, uniform(2.2, 3.0), uniform(5.5, 7.5)).astype(np.float32)[:, None, None] / size

    def stripes(angle: np.ndarray, phase: np.ndarray) -> np.ndarray:
        wave = (x * np.cos(angle) + y * np.sin(angle)) / period + phase
        return 0.5 + 0.5 * np.sin(2 * np.pi * wave)

    inside = stripes(uniform(0, np.pi, 1, 1), uniform(0, 1, 1, 1))[..., None]
    # The background's stripes have a period of their own, so that the whole picture's spectrum says little.
    outer = np.where(rng.random(count) < 0.5, uniform(2.2, 3.0), uniform(5.5, 7.5)).astype(np.float32)
    period = outer[:, None, None] / size
    outside = stripes(uniform(0, np.pi, 1, 1), uniform(0, 1, 1, 1))[..., None]
    a, b, c, d = (uniform(0.05, 0.95, 1, 1, 3) for _ in range(4))
    picture = np.where(masks[..., None], a + (b - a) * inside, c + (d - c) * 0.5 * outside)
    picture = picture + rng.normal(0, 0.06, picture.shape)
    images = np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64))


def _fashion_mnist(request: _Request) -> _Read:
    from common.data.fashion_mnist import CLASSES, FashionMNIST

    parts = []
    for split in ("train", "test"):
        read = FashionMNIST(split, pad_to=32)  # type: ignore[arg-type]
        parts.append(_pictures(_resized(read.images, request.size), read.labels))
    return _Read("Fashion-MNIST", CLASSES, parts[0], parts[1], 0.0)


def _cifar(request: _Request) -> _Read:
    """The binary version of CIFAR: one byte of label (CIFAR-100: coarse, then fine) and 3072 of picture a row."""
    if request.path is None:
        raise UserError(f"data.name {request.name} needs --data.path, the folder of its binary version (.bin files)")
    root = existing_path(request.path)
    if request.name == "cifar10":
        files = {"train": [f"data_batch_{k}.bin" for k in range(1, 6)], "test": ["test_batch.bin"]}
        head, count, names = 1, 10, "batches.meta.txt"
    else:
        files = {"train": ["train.bin"], "test": ["test.bin"]}
        head, count, names = 2, 100, "fine_label_names.txt"
    parts = []
    for split in ("train", "test"):
        rows = np.concatenate([_cifar_rows(root / name, head + 3072, count, head) for name in files[split]])
        images = torch.from_numpy(rows[:, head:].reshape(-1, 3, 32, 32).copy())
        labels = torch.from_numpy(rows[:, head - 1].astype(np.int64))
        parts.append(_pictures(_resized(images, request.size), labels))
    listed = read_text(root / names).split() if (root / names).is_file() else []
    classes = tuple(listed) if len(listed) == count else tuple(f"class {k}" for k in range(count))
    return _Read(request.name, classes, parts[0], parts[1], 0.0)


def _cifar_rows(path: Path, width: int, classes: int, head: int) -> np.ndarray:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected the binary version of CIFAR (the Python version holds pickles, which are "
            "not read)"
        )
    rows = np.fromfile(path, np.uint8)
    if len(rows) == 0 or len(rows) % width:
        raise UserError(f"{path}: {len(rows)} bytes are no whole number of rows of {width}; fetch it again")
    rows = rows.reshape(-1, width)
    if int(rows[:, head - 1].max()) >= classes:
        raise UserError(f"{path}: label {int(rows[:, head - 1].max())} found, expected 0 to {classes - 1}")
    return rows


def _folder(request: _Request) -> _Read:
    """The user's class folders, with train/ and test/ (or val/) above them or without: then a sixth is held out."""
    from common.data.folders import Framing, Images, open_source
    from common.data.rows import LEFT_OUT, hold_out

    if request.path is None:
        raise UserError("data.name folder needs --data.path, a folder with one subfolder of pictures per class")
    root = existing_path(request.path)
    if not root.exists():
        raise UserError(f"data.path {request.path}: no such folder; expected one subfolder of pictures per class")
    side = round(request.size * MARGIN) if request.margin else request.size
    found = open_source(root.absolute(), request.image_column, LEFT_OUT, request.label_column, need=("label",))
    if empty := getattr(found, "empty", []):
        raise UserError(f"{empty[0]}: the folder of a class holds no picture; fill it or remove it")
    opened = Images(found, Framing(side))
    # A picture with several captions has several rows: it counts once, or one part would show it to another.
    once = {found.key(row): row for row in reversed(range(len(found))) if not opened.corrupt[row]}
    labels = {row: found.label(row)[1] for row in sorted(once.values())}
    classes = tuple(found.classes) or tuple(f"class {k}" for k in range(max(labels.values(), default=-1) + 1))
    if not classes:
        raise UserError(f"{root}: its pictures have no classes; expected one subfolder of pictures per class")
    bare = [row for row, label in labels.items() if label < 0]
    if bare:
        raise UserError(f"{found.where(bare[0])}: it has no class ({len(bare)} such pictures), others have one")
    source: Source = OnDisk(opened)
    if len(opened) * side * side * 3 <= MEMORY_LIMIT:
        source = InMemory(torch.cat([source.take(part) for part in torch.arange(len(opened)).split(256)]))

    def pictures(rows: Sequence[int]) -> Pictures:
        good = [row for row in rows if row in labels]
        return Pictures(source, torch.tensor(good), torch.tensor([labels[row] for row in good]))

    if {"test", "validation"} & set(found.splits):
        parts = [pictures(rows) for rows in hold_out(found)]
        odd = set(parts[0].labels_N.tolist()) ^ set(parts[1].labels_N.tolist())
        if odd:
            names = ", ".join(classes[label] for label in sorted(odd)[:3])
            raise UserError(f"{root}: its classes differ between training and test ({names})")
    else:
        everything = pictures(range(len(opened)))
        parts = [everything.part(some) for some in per_class_sample(everything.labels_N, [5 / 6, 1 / 6], seed=0)]
        lacking = everything.labels_N.unique()[~torch.isin(everything.labels_N.unique(), parts[1].labels_N)]
        if len(lacking):
            count = int((everything.labels_N == lacking[0]).sum())
            raise UserError(
                f"{root}: {count} pictures of {classes[int(lacking[0])]} are too few to hold a sixth out; give at "
                "least 4 a class, or train/ and test/ folders"
            )
    return _Read(root.name, classes, parts[0], parts[1], 0.0, opened.source.fingerprint)
