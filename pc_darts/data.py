"""Pictures with classes: the sets, their splits for a search, augmentation, and batches as a function of (seed, step).

Shape suffixes: N pictures, B batch, C channels, H W sides in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from common.data.sampling import derive_seed, step_generator
from common.errors import UserError
from pc_darts.config import DataConfig, existing_path

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


def search_halves(train: Pictures, shares: Sequence[float], seed: int) -> tuple[Pictures, Pictures]:
    """(pictures for the weights, pictures for alphas and betas): disjoint, each with the same share of every class."""
    if len(shares) != 2:
        raise UserError(f"data.halves {list(shares)}: expected two shares, for weights and for alphas")
    weights, alphas = per_class_sample(train.labels_N, shares, seed)
    return train.part(weights), train.part(alphas)


def cutout_mask(height: int, width: int, centre_y: int, centre_x: int, size: int) -> Tensor:
    """Cutout (DeVries & Taylor 2017): float32 [H, W], 0 in the square around a centre, clipped to the picture, else 1.

    The square is rows centre_y - size // 2 to centre_y + size // 2 (exclusive), columns alike; it is applied after
    normalisation, so that a blanked pixel has the mean colour.
    """
    mask_HW = torch.ones(height, width)
    half = size // 2
    mask_HW[max(0, centre_y - half) : centre_y + half, max(0, centre_x - half) : centre_x + half] = 0
    return mask_HW


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training picture, in this order; see DataConfig and RetrainOptions for the options."""

    padding: int = 0
    flip: bool = False
    resized_crop: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    cutout: int = 0

    @classmethod
    def of(cls, config: DataConfig, cutout: int = 0) -> Augmentation:
        """Of the options; raises UserError for strengths that mean nothing."""
        if len(config.jitter) not in (0, 4):
            raise UserError(f"data.jitter {config.jitter}: expected [] or four strengths (ImageNet: 0.4 0.4 0.4 0.2)")
        if config.padding < 0 or cutout < 0 or not 0 <= config.resized_crop <= 1:
            raise UserError("data.padding and cutout must not be negative, data.resized_crop must be in [0, 1]")
        b, c, s, h = config.jitter or (0.0, 0.0, 0.0, 0.0)
        return cls(config.padding, config.flip, config.resized_crop, (b, c, s, h), cutout)


@dataclass
class Batches:
    """Batches of a part as a function of (seed, step): epoch e is its own random order, leftovers are dropped.

    What is drawn for a step is drawn for the global batch; rank r of `world` gets every world-th picture from r on, so
    that N processes together see what one would see.

    Args:
        batch_size: of all processes together.
        augment: random changes of the pictures; see `evaluation_batches` for none.
    """

    data: ImageSet
    pictures: Pictures
    batch_size: int
    seed: int
    augment: Augmentation
    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.batch_size % self.world:
            raise UserError(f"batch size {self.batch_size} cannot be divided among {self.world} processes")
        if len(self.pictures) < self.batch_size:
            raise UserError(
                f"{self.data.name}: {len(self.pictures)} pictures are fewer than a batch of {self.batch_size}; "
                "give more pictures or a smaller batch"
            )
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.pictures) // self.batch_size

    def indices(self, step: int) -> Tensor:
        """Positions (int64 [batch_size]) of the global batch of a step, counted from the start of the run."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(len(self.pictures), generator=step_generator(self.seed, -1 - epoch))
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(x_BCHW float32 normalised, labels_B int64) of this rank, on the device."""
        index_B = self.indices(step)
        draws = _draw(len(index_B), self.data, self.augment, step_generator(self.seed, step))
        mine = slice(self.rank, None, self.world)
        chosen = index_B[mine]
        x_BCHW = self.pictures.source.take(self.pictures.index_N[chosen])
        x_BCHW = _augmented(x_BCHW, self.data, self.augment, {name: value[mine] for name, value in draws.items()})
        labels_B = self.pictures.labels_N[chosen]
        return x_BCHW.to(self.device, non_blocking=True), labels_B.to(self.device, non_blocking=True)

    def run(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of steps start to stop - 1; pictures on disk are decoded while the step before is computed."""
        if isinstance(self.pictures.source, InMemory):
            yield from (self.batch(step) for step in range(start, stop))
            return
        with ThreadPoolExecutor(1) as ahead:
            waiting = ahead.submit(self.batch, start) if start < stop else None
            for step in range(start, stop):
                assert waiting is not None
                ready = waiting.result()
                waiting = ahead.submit(self.batch, step + 1) if step + 1 < stop else None
                yield ready


def evaluation_batches(
    data: ImageSet, pictures: Pictures, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """All pictures once, in order, cut in the middle, normalised; the last batch may be smaller."""
    for start in range(0, len(pictures), batch_size):
        chosen = slice(start, start + batch_size)
        x_BCHW = normalise(_middle(pictures.source.take(pictures.index_N[chosen]), data.size).float() / 255, data)
        yield x_BCHW.to(device), pictures.labels_N[chosen].to(device)


def normalise(x_BCHW: Tensor, data: ImageSet) -> Tensor:
    """(x - mean) / std by channel, for x in [0, 1]."""
    return (x_BCHW - data.mean_C[:, None, None]) / data.std_C[:, None, None]


def _draw(count: int, data: ImageSet, augment: Augmentation, generator: torch.Generator) -> dict[str, Tensor]:
    """Every random number of a global batch, by name, first dimension B."""
    size = data.size
    return {
        "crop": torch.randint(0, 2 * augment.padding + 1, (count, 2), generator=generator),
        "flip": torch.rand(count, generator=generator) < 0.5,
        "centre": torch.randint(0, size, (count, 2), generator=generator),
        "box": torch.rand(count, 4, generator=generator),
        "jitter": torch.rand(count, 4, generator=generator) * 2 - 1,
    }


def _augmented(x_BCHW: Tensor, data: ImageSet, augment: Augmentation, draws: dict[str, Tensor]) -> Tensor:
    """Crop, flip, jitter, normalise, cutout."""
    x_BCHW = x_BCHW.float() / 255
    size = data.size
    if augment.resized_crop:
        boxes = zip(x_BCHW, draws["box"].tolist())
        x_BCHW = torch.stack([_resized_crop(x_CHW, size, augment.resized_crop, box) for x_CHW, box in boxes])
    else:
        x_BCHW = _middle(x_BCHW, size)
        if augment.padding:
            x_BCHW = _padded_crop(x_BCHW, augment.padding, data.background, draws["crop"])
    if augment.flip:
        x_BCHW = torch.where(draws["flip"][:, None, None, None], x_BCHW.flip(3), x_BCHW)
    if any(augment.jitter):
        x_BCHW = _jittered(x_BCHW, augment.jitter, draws["jitter"])
    x_BCHW = normalise(x_BCHW, data)
    if augment.cutout:
        masks = [cutout_mask(size, size, y, x, augment.cutout) for y, x in draws["centre"].tolist()]
        x_BCHW = x_BCHW * torch.stack(masks)[:, None]
    return x_BCHW.contiguous()


def _middle(x_BCHW: Tensor, size: int) -> Tensor:
    """The middle size x size pixels."""
    top, left = (x_BCHW.shape[2] - size) // 2, (x_BCHW.shape[3] - size) // 2
    return x_BCHW[:, :, top : top + size, left : left + size]


def _padded_crop(x_BCHW: Tensor, padding: int, background: float, corner_B2: Tensor) -> Tensor:
    """Pictures padded on all sides, then cut back to their size at a corner of their own."""
    height, width = x_BCHW.shape[2:]
    padded = F.pad(x_BCHW, (padding,) * 4, value=background)
    row_BH = corner_B2[:, :1] + torch.arange(height)
    column_BW = corner_B2[:, 1:] + torch.arange(width)
    sample_B = torch.arange(len(x_BCHW))[:, None, None]
    # Advanced indices around a slice put their dimensions first: [B, H, W, C].
    return padded[sample_B, :, row_BH[:, :, None], column_BW[:, None, :]].permute(0, 3, 1, 2)


def _resized_crop(x_CHW: Tensor, size: int, smallest: float, box: Sequence[float]) -> Tensor:
    """A random part of the area share [smallest, 1] and ratio [3/4, 4/3], resized; `box` are four uniform numbers."""
    height, width = x_CHW.shape[1:]
    area = (smallest + (1 - smallest) * box[0]) * height * width
    ratio = math.exp((2 * box[1] - 1) * math.log(4 / 3))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    top, left = int(box[2] * (height - h + 1)), int(box[3] * (width - w + 1))
    part = x_CHW[None, :, top : top + h, left : left + w]
    return F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]


def _jittered(x_BCHW: Tensor, strengths: Sequence[float], draw_B4: Tensor) -> Tensor:
    """Brightness, contrast and saturation scaled by 1 + strength x draw, then hue turned by strength x draw."""
    factor_B4 = 1 + draw_B4 * torch.tensor(strengths)
    f = factor_B4[:, :, None, None, None]
    x_BCHW = (x_BCHW * f[:, 0]).clamp(0, 1)
    grey_B1HW = _grey(x_BCHW)
    x_BCHW = torch.lerp(grey_B1HW.mean((2, 3), keepdim=True).expand_as(x_BCHW), x_BCHW, f[:, 1]).clamp(0, 1)
    if x_BCHW.shape[1] != 3:
        return x_BCHW
    x_BCHW = torch.lerp(_grey(x_BCHW).expand_as(x_BCHW), x_BCHW, f[:, 2]).clamp(0, 1)
    # Hue as a rotation of the colour plane about the grey axis (YIQ), by strength x draw of a full turn.
    angle_B = draw_B4[:, 3] * strengths[3] * 2 * math.pi
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    turn_B33 = torch.zeros(len(angle_B), 3, 3)
    turn_B33[:, 0, 0] = 1
    turn_B33[:, 1, 1] = turn_B33[:, 2, 2] = angle_B.cos()
    turn_B33[:, 1, 2], turn_B33[:, 2, 1] = -angle_B.sin(), angle_B.sin()
    change_B33 = torch.linalg.inv(to_yiq) @ turn_B33 @ to_yiq
    return torch.einsum("bij,bjhw->bihw", change_B33, x_BCHW).clamp(0, 1)


def _grey(x_BCHW: Tensor) -> Tensor:
    if x_BCHW.shape[1] == 1:
        return x_BCHW
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    return (x_BCHW * weights).sum(1, keepdim=True)


def open_data(config: DataConfig, seed: int = 0) -> ImageSet:
    """The configured set with its splits; `seed` decides which pictures are held out for validation.

    Raises:
        UserError: files are missing or broken, or the options do not fit the set.
    """
    if not 0 < config.validation < 1:
        raise UserError(f"data.validation {config.validation}: expected a share between 0 and 1")
    if config.size < 8:
        raise UserError(f"data.size {config.size}: pictures need at least 8 pixels")
    readers: dict[str, Callable[[DataConfig], _Read]] = {
        "emoji": _emoji,
        "digits": _digits,
        "textures": _textures,
        "fashion-mnist": _fashion_mnist,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "folder": _folder,
    }
    read = readers[config.name](config)
    train, test = read.train, read.test
    if config.images is not None and config.images < len(train):
        if config.images < 1:
            raise UserError(f"data.images {config.images}: expected at least one picture")
        # A share of every class, so that small subsets keep all classes.
        train = train.part(per_class_sample(train.labels_N, [config.images / len(train)], derive_seed(seed, 2))[0])
    fitting, validation = per_class_sample(train.labels_N, [1 - config.validation, config.validation], seed)
    mean_C, std_C = _statistics(train)
    return ImageSet(
        read.name,
        read.classes,
        train.part(fitting),
        train.part(validation),
        test,
        mean_C,
        std_C,
        config.size,
        read.background,
    )


@dataclass(frozen=True)
class _Read:
    """What a reader found."""

    name: str
    classes: tuple[str, ...]
    train: Pictures
    test: Pictures
    background: float


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


def _emoji(config: DataConfig) -> _Read:
    from common.data.emoji import EmojiGroups

    parts = []
    for split in ("train", "test"):
        read = EmojiGroups(split, size=config.size)  # type: ignore[arg-type]
        parts.append(_pictures(torch.from_numpy(read.images).permute(0, 3, 1, 2), torch.from_numpy(read.labels)))
    return _Read("EmojiGroups", EmojiGroups.class_names, parts[0], parts[1], 1.0)


def _digits(config: DataConfig) -> _Read:
    """1,797 handwritten digits of scikit-learn, 8 x 8, 17 grey levels; every sixth picture is for testing."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(np.rint(found.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(found.target)
    images = _resized(images, config.size)
    held_out = torch.arange(len(labels)) % 6 == 5
    parts = [_pictures(images[mask], labels[mask]) for mask in (~held_out, held_out)]
    return _Read("digits", tuple(str(digit) for digit in range(10)), parts[0], parts[1], 0.0)


TEXTURE_SHAPES = ("disc", "square", "triangle", "ring", "cross")
TEXTURE_GRAINS = ("fine", "coarse")
TEXTURE_TRAIN, TEXTURE_TEST = 5000, 1000


def _textures(config: DataConfig) -> _Read:
    classes = tuple(f"{grain} {shape}" for shape in TEXTURE_SHAPES for grain in TEXTURE_GRAINS)
    train = draw_textures(TEXTURE_TRAIN, config.size, seed=0)
    test = draw_textures(TEXTURE_TEST, config.size, seed=1)
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


def _fashion_mnist(config: DataConfig) -> _Read:
    from common.data.fashion_mnist import CLASSES, FashionMNIST

    parts = []
    for split in ("train", "test"):
        read = FashionMNIST(split, pad_to=32)  # type: ignore[arg-type]
        parts.append(_pictures(_resized(read.images, config.size), read.labels))
    return _Read("Fashion-MNIST", CLASSES, parts[0], parts[1], 0.0)


def _cifar(config: DataConfig) -> _Read:
    """The binary version of CIFAR: one byte of label (CIFAR-100: coarse, then fine) and 3072 of picture a row."""
    if config.path is None:
        raise UserError(f"data.name {config.name} needs --data.path, the folder of its binary version (.bin files)")
    root = existing_path(config.path)
    if config.name == "cifar10":
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
        parts.append(_pictures(_resized(images, config.size), labels))
    listed = (root / names).read_text().split() if (root / names).is_file() else []
    classes = tuple(listed) if len(listed) == count else tuple(f"class {k}" for k in range(count))
    return _Read(config.name, classes, parts[0], parts[1], 0.0)


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


def _folder(config: DataConfig) -> _Read:
    """The user's class folders, with train/ and test/ (or val/) above them or without: then a sixth is held out."""
    from common.data.folders import open_images
    from common.data.rows import LEFT_OUT, hold_out

    if config.path is None:
        raise UserError("data.name folder needs --data.path, a folder with one subfolder of pictures per class")
    root = existing_path(config.path)
    if not root.is_dir():
        raise UserError(f"data.path {config.path}: no such folder; expected one subfolder of pictures per class")
    side = round(config.size * MARGIN) if config.resized_crop else config.size
    opened = open_images(root.absolute(), side, split=None, caption_column=LEFT_OUT)
    if not opened.classes:
        raise UserError(f"{root}: its pictures have no classes; expected one subfolder of pictures per class")
    labels_N = torch.tensor([opened.source.label(k)[1] for k in range(len(opened))])
    source: Source = OnDisk(opened)
    if len(opened) * side * side * 3 <= MEMORY_LIMIT:
        source = InMemory(torch.cat([source.take(part) for part in torch.arange(len(opened)).split(256)]))

    def pictures(rows: Sequence[int]) -> Pictures:
        good_N = torch.tensor([row for row in rows if not opened.corrupt[row]], dtype=torch.long)
        return Pictures(source, good_N, labels_N[good_N])

    classes = tuple(opened.classes)
    if {"test", "validation"} & set(opened.source.splits):
        parts = [pictures(rows) for rows in hold_out(opened.source)]
        seen, met = ({classes[label] for label in part.labels_N.tolist()} for part in parts)
        if seen != met:
            odd = ", ".join(sorted(seen ^ met)[:3])
            raise UserError(f"{root}: its classes differ between training and test ({odd})")
    else:
        everything = pictures(range(len(opened)))
        parts = [everything.part(some) for some in per_class_sample(everything.labels_N, [5 / 6, 1 / 6], seed=0)]
    return _Read(root.name, classes, parts[0], parts[1], 0.0)
