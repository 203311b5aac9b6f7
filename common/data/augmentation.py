"""Augmented batches of pictures with classes (`classes.py`) as a function of (seed, step).

Shape suffixes: B batch, C channels, H W sides in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common.data.classes import ImageSet, InMemory, Pictures
from common.data.sampling import step_generator
from common.errors import UserError

POLICY_DRAWS = 8
# uint8 [B, C, H, W] and [B, POLICY_DRAWS] uniform numbers to uint8 pictures: AutoAugment and the like.
Policy = Callable[[Tensor, Tensor], Tensor]


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
    """What happens to a training picture, in this order.

    Args:
        padding: random crops of the picture padded by so many pixels. flip: mirror half of the pictures.
        resized_crop: smallest area share of a random resized crop (ImageNet: 0.08); 0 switches it off.
        jitter: strengths of brightness, contrast, saturation and hue changes (ImageNet: 0.4 0.4 0.4 0.2).
        cutout: side of the square that is blanked out; 0 is off.
        policy: changes the cropped and flipped picture before it is normalised; None is off.

    Raises:
        UserError: strengths that mean nothing.
    """

    padding: int = 0
    flip: bool = False
    resized_crop: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    cutout: int = 0
    policy: Policy | None = None

    def __post_init__(self) -> None:
        if self.padding < 0 or self.cutout < 0 or not 0 <= self.resized_crop <= 1:
            raise UserError("data.padding and cutout must not be negative, data.resized_crop must be in [0, 1]")


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
        "policy": torch.rand(count, POLICY_DRAWS if augment.policy else 0, generator=generator),
    }


def _augmented(x_BCHW: Tensor, data: ImageSet, augment: Augmentation, draws: dict[str, Tensor]) -> Tensor:
    """Crop, flip, policy, jitter, normalise, cutout."""
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
    if augment.policy is not None:
        x_BCHW = augment.policy((x_BCHW * 255).round().to(torch.uint8), draws["policy"]).float() / 255
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
